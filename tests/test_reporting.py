import copy
import json
import math

import pytest
import torch
from quantized import convert
from torch import nn

import gq_triton as gq


def model():
    made = nn.ModuleDict(
        {"embedding": nn.Embedding(10, 8), "lstm": nn.LSTM(8, 4), "head": nn.Linear(8, 10), "norm": nn.BatchNorm1d(4)}
    )
    made["head"].weight = made["embedding"].weight
    return made


CONFIG = {"lstm.weight_ih_l0": gq.GQConfig(bits=3, codebook="int8"), "norm": None, "*": gq.GQConfig(bits=5)}
FLOATS = 10 + 2 * 16  # biases


def quantized():
    with pytest.warns(UserWarning, match="norm"):
        return gq.quantize_(model(), CONFIG)


def test_float_models():
    report = gq.report(model())
    tensors = {id(t): t for t in (*model().parameters(), *model().buffers())}.values()
    count = 80 + 128 + 64 + FLOATS + 4 * 4 + 1
    assert report.parameters == count == sum(t.numel() for t in tensors)
    assert report.bytes == 4 * count + 4  # num_batches_tracked is int64
    assert report.float32_bytes == 4 * count
    assert {row.name for row in report.rows} == {"embedding", "lstm", "head", "norm"}
    assert all(row.sqnr_db is None for row in report.rows)


def test_sparse_buffers():
    layer = nn.Linear(2, 2, bias=False)
    layer.register_buffer("mask", torch.eye(100, dtype=torch.bool).to_sparse())
    report = gq.report(layer)
    assert report.bytes == 4 * 4 + 100 * (2 * 8 + 1)  # indices, values
    assert report.parameters == 4 + 10_000


def test_packed_models_are_counted_as_they_lie_in_memory():
    packed = convert(quantized())
    report = gq.report(packed)
    unique = {id(t): t for t in (*packed.parameters(), *packed.buffers())}.values()
    assert report.bytes == sum(t.nbytes for t in unique)
    assert report.bytes >= report.packed_bytes == sum(t.nbytes for t in packed.state_dict().values()) - 218  # tied
    rows = {row.name: row for row in report.rows}
    embedding = rows["embedding.weight"]
    assert (embedding.bits, embedding.parameters) == (5, 80)
    assert embedding.packed_bytes == 80 * 5 // 8 + 4 * 32 + 4 * 10  # codes, codebook, scales
    assert rows["lstm.weight_ih_l0"].packed_bytes == 128 * 3 // 8 + 8 + 4 * 16
    assert "head.weight" not in rows  # counted with the embedding that it is tied to
    assert report.parameters == gq.report(model()).parameters
    assert report.ratio == report.float32_bytes / report.packed_bytes


def test_prepared_models_foretell_the_packed_size():
    prepared = quantized()
    report, packed = gq.report(prepared), gq.report(convert(prepared))
    unique = {id(t): t for t in (*prepared.parameters(), *prepared.buffers())}.values()
    assert report.bytes == sum(t.nbytes for t in unique)
    assert (report.packed_bytes, report.ratio) == (packed.packed_bytes, packed.ratio)
    assert report.parameters == packed.parameters
    quality = {row.name: row.sqnr_db for row in report.rows if row.sqnr_db is not None}
    assert quality == pytest.approx({row.name: row.sqnr_db for row in packed.rows if row.sqnr_db is not None})


def test_sqnr_of_gaussian_weights():
    layer = nn.Linear(500, 20)
    nn.init.normal_(layer.weight)
    (row, _) = gq.report(gq.quantize_(layer, gq.GQConfig(bits=1))).rows
    assert row.sqnr_db == pytest.approx(-10 * math.log10(1 - 2 / math.pi), abs=0.1)
    assert layer.weight_quantizer.training


def test_sqnr_of_exactly_represented_weights_is_infinite():
    layer = nn.Linear(1, 3)
    layer.weight.data.fill_(0.5)
    assert gq.report(gq.quantize_(layer, gq.GQConfig(bits=1))).rows[0].sqnr_db == math.inf


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_sqnr_does_not_depend_on_the_weights_magnitude(size):
    layer = nn.Linear(50, 20)
    plain = gq.report(gq.quantize_(copy.deepcopy(layer), gq.GQConfig(bits=2))).rows[0].sqnr_db
    layer.weight.data.mul_(size)
    row = gq.report(gq.quantize_(layer, gq.GQConfig(bits=2))).rows[0]
    assert row.sqnr_db == pytest.approx(plain, abs=0.01)


def test_sqnr_of_nan_is_nan_and_not_infinite():
    layer = gq.quantize_(nn.Linear(5, 2), gq.GQConfig())
    layer.weight.data[0, 0] = math.nan
    assert math.isnan(gq.report(layer).rows[0].sqnr_db)


@pytest.mark.parametrize("options", [{}, {"kdim": 3}, {"bias": False}])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_prepared_attention_foretells_the_size_of_its_packed_pieces(options, granularity):
    prepared = gq.quantize_(nn.MultiheadAttention(5, 1, **options), gq.GQConfig(bits=3, granularity=granularity))
    assert gq.report(prepared).packed_bytes == gq.report(convert(prepared)).packed_bytes


def test_a_report_is_strict_json():
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    values = gq.report(gq.quantize_(layer, gq.GQConfig())).to_dict()
    assert json.loads(json.dumps(values, allow_nan=False))["rows"][0]["sqnr_db"] is None


def test_dict_and_table():
    report = gq.report(quantized())
    values = json.loads(json.dumps(report.to_dict()))
    assert values["bytes"] == report.bytes
    assert sum(row["packed_bytes"] for row in values["rows"]) == values["packed_bytes"]
    lines = str(report).splitlines()
    assert len(lines) == len(report.rows) + 3
    assert lines[0].split() == ["weight", "bits", "parameters", "bytes", "dense", "packed", "SQNR", "dB"]
    assert len({len(line) for line in lines[1:-2]}) <= 2
    assert f"{report.ratio:.2f} times smaller" in lines[-1]


@pytest.mark.parametrize("empty", [nn.ReLU(), nn.Sequential()])
def test_models_without_tensors(empty):
    report = gq.report(empty)
    assert (report.bytes, report.ratio, report.rows) == (0, 1.0, ())
    assert "total" in str(report)


def test_low_precision_models():
    report = gq.report(nn.Linear(4, 3).to(torch.bfloat16))
    assert (report.rows[0].bits, report.bytes, report.float32_bytes) == (16, 30, 60)
