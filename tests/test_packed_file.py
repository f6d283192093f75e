import contextlib
import json
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized import convert, packed_weights
from safetensors.torch import load_file, save_file
from torch import nn

import gq_triton as gq
from gq_triton.layers import PackedWeight, packed_weight

INDEX = torch.arange(8).view(4, 2)
CONFIG = {
    "attention.out_proj": None,
    "encoder.weight_hh_l0": gq.GQConfig(bits=1, codebook="fp8"),
    "encoder": gq.GQConfig(bits=3, codebook="int8", activations="int8"),
    "joint": gq.GQConfig(bits=7, granularity="tensor"),
    "*": gq.GQConfig(bits=5),
}


class Model(nn.Module):
    """Every kind of layer, tied weights, a module that is used twice, and buffers of several types."""

    def __init__(self, width=6, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(12, width)
        self.encoder = nn.GRU(width, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(width, 2)
        self.joint = nn.Linear(width, width)
        self.again = self.joint
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 12)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, index):
        x = self.encoder(self.embedding(index))[0]
        x = self.norm(self.conv(x.permute(1, 2, 0))).permute(2, 0, 1)
        x = self.attention(x, x, x)[0]
        return self.head(self.again(self.joint(x)))


@pytest.fixture(scope="module")
def packed():
    torch.manual_seed(3)
    model = Model().eval()
    model.norm.running_mean.normal_()
    return gq.quantize_(gq.quantize_(model, CONFIG), step="convert")


@pytest.fixture(scope="module")
def saved(packed, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    gq.save_packed(packed, path, {"tokens": "…"})
    return path


def contents(path):
    """Tensors and metadata of a safetensors file."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return load_file(path), json.loads(raw[8 : 8 + size])["__metadata__"]


def rewritten(saved, path, change):
    """Writes a file in which ``change(tensors, header)`` has changed something; header is our entry of the metadata."""
    tensors, metadata = contents(saved)
    header = json.loads(metadata["gq_triton"])
    change(tensors, header)
    save_file(tensors, path, {**metadata, "gq_triton": json.dumps(header)})
    return path


def refused(path, message, model=None):
    model = Model() if model is None else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(gq.PackedFileError, match=message) as error:
        gq.load_packed(model, path)
    assert isinstance(error.value, ValueError)
    assert str(path) in str(error.value)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- what goes in comes out


def test_round_trip(packed, saved):
    loaded = gq.load_packed(Model().eval(), saved)
    assert torch.equal(loaded(INDEX), packed(INDEX))
    for (name, mine), (_, other) in zip(loaded.state_dict().items(), packed.state_dict().items(), strict=True):
        assert mine.dtype == other.dtype, name
        assert torch.equal(mine.float(), other.float()), name
    expected = packed_weights(packed)
    assert all(torch.equal(weight, expected[name]) for name, weight in packed_weights(loaded).items())
    assert gq.report(loaded) == gq.report(packed)
    mine = {name: m.config for name, m in loaded.named_modules() if name.endswith("_packed")}
    assert mine == {name: m.config for name, m in packed.named_modules() if name.endswith("_packed")}


def test_sharing_is_kept(saved):
    loaded = gq.load_packed(Model(), saved)
    assert loaded.head.weight_packed is loaded.embedding.weight_packed
    assert loaded.again is loaded.joint


def test_files_are_the_same_from_a_gpu(packed, saved, tmp_path, monkeypatch):
    """Where CPU tensors count as a GPU's."""
    monkeypatch.setattr(packed_weight, "layout_for", lambda device: "tiles")
    loaded = gq.load_packed(Model().eval(), saved)
    assert all(module.layout == "tiles" for module in loaded.modules() if isinstance(module, PackedWeight))
    assert loaded.head.weight_packed is loaded.embedding.weight_packed
    torch.testing.assert_close(loaded(INDEX), packed(INDEX))
    again = tmp_path / "again.safetensors"
    gq.save_packed(loaded, again, {"tokens": "…"})
    (first, known), (second, found) = contents(saved), contents(again)  # the file keeps metadata in no certain order
    assert known == found and first.keys() == second.keys()
    assert all(torch.equal(first[name].float(), second[name].float()) for name in first)


def test_saving_what_was_loaded_writes_the_same_tensors(saved, tmp_path):
    again = tmp_path / "again.safetensors"
    gq.save_packed(gq.load_packed(Model(), saved), again)
    first, second = contents(saved)[0], contents(again)[0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].float(), second[name].float()) for name in first)


def test_metadata(saved):
    assert gq.read_metadata(saved) == {"tokens": "…"}


@pytest.mark.parametrize("bits", range(1, 9))
def test_files_hold_exactly_as_many_bytes_as_reported(bits, tmp_path):
    model = gq.quantize_(gq.quantize_(nn.Linear(13, 11), gq.GQConfig(bits=bits)), step="convert")
    path = tmp_path / "linear.safetensors"
    gq.save_packed(model, path)
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert path.stat().st_size - 8 - header == gq.report(model).packed_bytes
    planes = {3: 2, 5: 2, 6: 2, 7: 3, 8: 2}.get(bits, 1)
    assert 0 <= contents(path)[0]["weight_packed.codes"].numel() - 13 * 11 * bits / 8 < planes


def test_a_lone_layer_and_a_low_precision_model(tmp_path):
    path = tmp_path / "linear.safetensors"
    model = gq.quantize_(gq.quantize_(nn.Linear(4, 3).bfloat16(), gq.GQConfig()), step="convert")
    gq.save_packed(model, path)
    x = torch.randn(2, 4)
    assert torch.equal(gq.load_packed(nn.Linear(4, 3).bfloat16(), path)(x.bfloat16()), model(x.bfloat16()))
    assert gq.load_packed(nn.Linear(4, 3), path)(x).dtype == torch.float32


def test_a_transformer_encoder_loads_with_its_fast_path_off(tmp_path):
    def make():
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        return nn.TransformerEncoder(layer, 2).eval()

    for pattern in ("*", "*.out_proj", "*.linear2"):
        model = convert(gq.quantize_(make(), {pattern: gq.GQConfig(bits=2)}))
        gq.save_packed(model, tmp_path / "encoder.safetensors")
        loaded = gq.load_packed(make(), tmp_path / "encoder.safetensors")
        x = torch.randn(2, 5, 8)
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))


# --- writing


def test_writes_are_atomic(packed, saved, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(saved.read_bytes())

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        gq.save_packed(packed, path)
    assert path.read_bytes() == saved.read_bytes()
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("metadata", [{"gq_triton": "x"}, {"a": 1}, {1: "a"}])
def test_bad_metadata(packed, metadata, tmp_path):
    with pytest.raises(ValueError, match="^metadata must map texts"):
        gq.save_packed(packed, tmp_path / "x", metadata)
    assert not os.listdir(tmp_path)


def test_models_that_are_not_packed(tmp_path):
    with pytest.raises(ValueError, match="no packed layer"):
        gq.save_packed(Model(), tmp_path / "x")
    with pytest.raises(ValueError, match="prepared layers that are not packed"):
        gq.save_packed(gq.quantize_(Model(), gq.GQConfig()), tmp_path / "x")


def test_state_that_is_not_a_tensor(packed, tmp_path):
    class Extra(nn.Module):
        def get_extra_state(self):
            return {"anything": 1}

    model = nn.Sequential(packed, Extra())
    with pytest.raises(ValueError, match=r"not a tensor and cannot be saved: 1\._extra_state"):
        gq.save_packed(model, tmp_path / "x")


# --- the wrong model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Model(width=8), "has shape"),
        (lambda: nn.Linear(6, 6), "packed weights that the model has not"),
        (lambda: nn.Sequential(Model()), "packed weights that the model has not"),
    ],
)
def test_wrong_models(model, message, saved):
    refused(saved, message, model())


def test_models_with_more_or_less(saved):
    more, less, subclass = Model(), Model(), Model()
    more.extra = nn.Linear(2, 2)
    refused(saved, r"lacks tensors that the model has: extra\.bias, extra\.weight", more)
    del less.norm
    refused(saved, "tensors that the model has not: norm", less)
    nn.utils.parametrizations.orthogonal(subclass.conv)
    refused(saved, "packed weights that the model has not: conv.weight", subclass)


def test_models_that_share_where_the_file_does_not(tmp_path):
    path = tmp_path / "untied.safetensors"
    gq.save_packed(convert(gq.quantize_(Model(tied=False), {"joint": gq.GQConfig()})), path)
    refused(path, r"head\.weight and embedding\.weight are one tensor in the model and two in it")
    gq.save_packed(convert(gq.quantize_(Model(tied=False), gq.GQConfig())), path)
    loaded = gq.load_packed(Model(tied=True), path)  # packed weights replace the shared one: nothing to mix up
    assert loaded.head.weight_packed is not loaded.embedding.weight_packed


def test_models_that_are_not_float_or_not_real(saved, packed):
    for model in (packed, gq.quantize_(Model(), gq.GQConfig())):
        with pytest.raises(ValueError, match="must be a float model"):
            gq.load_packed(model, saved)
    with pytest.raises(ValueError, match="meta device"):
        gq.load_packed(Model().to("meta"), saved)


# --- damaged and hostile files


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError):
            gq.load_packed(Model(), path)
        with pytest.raises(FileNotFoundError):
            gq.read_metadata(path)


@given(st.floats(0, 1))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncated_files(saved, tmp_path, share):
    raw = saved.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(raw[: int(share * (len(raw) - 1))])
    refused(path, "cannot be loaded")


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_header_byte_never_does_more_than_raise(saved, tmp_path, data):
    raw = bytearray(saved.read_bytes())
    (size,) = struct.unpack("<Q", raw[:8])
    raw[data.draw(st.integers(0, 7 + size))] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(raw)
    with contextlib.suppress(gq.PackedFileError):
        gq.load_packed(Model(), path)


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04", b"\xff" * 8, b"\xff" * 100, b"\x00" * 64])
def test_other_files(raw, tmp_path):
    path = tmp_path / "other"
    path.write_bytes(raw)
    refused(path, "cannot be loaded")
    with pytest.raises(gq.PackedFileError):
        gq.read_metadata(path)


def test_safetensors_of_others(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    refused(path, "not a packed model")
    for text in ("", "{", "[]", "3", '{"version": 2}', "[" * 100_000):
        save_file({"weight": torch.zeros(2)}, path, {"gq_triton": text})
        refused(path, "not valid JSON|version")


def set_to(*keys, value):
    def change(_, header):
        entry = header
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = value

    return change


HEADERS = {
    "newer": (set_to("version", value=2), "version 2; this program reads version 1"),
    "weights": (set_to("weights", value=[1]), "'weights' must map"),
    "weight": (set_to("weights", "joint.weight", value=3), "'weights' must map"),
    "aliases": (set_to("aliases", value={"a": 1}), "'aliases' must map"),
    "alias to nothing": (set_to("aliases", value={"a": "b"}), "'aliases' must map"),
    "alias of itself": (set_to("aliases", "mask", value="mask"), "'aliases' must map"),
    "bits": (
        set_to("weights", "joint.weight", "config", "bits", value=9),
        r"settings of joint\.weight are invalid: bits",
    ),
    "huge mu": (set_to("weights", "joint.weight", "config", "mu", value=10**400), "mu must be"),
    "huge bits": (set_to("weights", "joint.weight", "config", "bits", value=10**9), "bits must be"),
    "config": (set_to("weights", "joint.weight", "config", value=None), "must be a mapping"),
    "unknown setting": (set_to("weights", "joint.weight", "config", "rank", value=1), "unknown names"),
    "unhashable setting": (set_to("weights", "joint.weight", "config", "forward", value=[]), "invalid"),
    "other bits": (
        set_to("weights", "joint.weight", "config", "bits", value=6),
        r"joint\.weight_packed\.codes has shape",
    ),
    "other codebook": (set_to("weights", "joint.weight", "config", "codebook", value="int8"), "has dtype F32"),
    "unknown weight": (
        set_to("weights", "deep.weight", value={"config": {}}),
        "packed weights that the model has not: deep",
    ),
    "a weight too few": (lambda _, header: header["weights"].pop("joint.weight"), "lacks tensors"),
    "a piece too few": (
        lambda _, header: header["weights"].pop("attention.q_proj_weight"),
        "cannot take the packed form",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(case, saved, tmp_path):
    change, message = HEADERS[case]
    refused(rewritten(saved, tmp_path / "x.safetensors", change), message)


def replaced(name, value):
    return lambda tensors, _: tensors.update({name: value(tensors[name])})


TENSORS = {
    "codes too short": (replaced("joint.weight_packed.codes", lambda t: t[:-1].clone()), "has shape"),
    "codes of another type": (replaced("joint.weight_packed.codes", lambda t: t.to(torch.int8)), "has dtype I8"),
    "codes in two dimensions": (replaced("joint.weight_packed.codes", lambda t: t[None].clone()), "has shape"),
    "scale of NaN": (
        replaced("conv.weight_packed.scale", lambda t: t * torch.nan),
        "scales that are negative or not finite",
    ),
    "negative scale": (replaced("conv.weight_packed.scale", lambda t: -t), "scales that are negative or not finite"),
    "infinite codebook": (replaced("conv.weight_packed.codebook", lambda t: t / 0), "outside of"),
    "large int8 codebook": (
        replaced("encoder.weight_ih_l0_packed.codebook", lambda t: torch.full_like(t, -128)),
        "outside of",
    ),
    "large fp8 codebook": (
        replaced("encoder.weight_hh_l0_packed.codebook", lambda t: torch.full_like(t.float(), 448).to(t.dtype)),
        "outside of",
    ),
    "complex parameter": (replaced("head.bias", lambda t: t.to(torch.complex64)), "has dtype"),
    "integer parameter": (replaced("head.bias", lambda t: t.to(torch.int64)), "has dtype I64"),
    "float mask": (replaced("mask", lambda t: t.float()), "has dtype F32"),
    "missing": (lambda tensors, _: tensors.pop("head.bias"), r"lacks tensors that the model has: head\.bias"),
    "surplus": (lambda tensors, _: tensors.update(extra=torch.zeros(1)), "tensors that the model has not: extra"),
    "float weight": (lambda tensors, _: tensors.update({"joint.weight": torch.zeros(6, 6)}), "has not: joint.weight"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case, saved, tmp_path):
    change, message = TENSORS[case]
    refused(rewritten(saved, tmp_path / "x.safetensors", change), message)


def test_sharing_that_cannot_be(saved, tmp_path):
    def scales_only(tensors, header):
        header["aliases"].pop("head.weight_packed.codes")
        tensors["head.weight_packed.codes"] = tensors["embedding.weight_packed.codes"].clone()

    def with_another_kind(tensors, header):
        for buffer in ("codes", "codebook", "scale"):
            del tensors[f"attention.k_proj_weight_packed.{buffer}"]
            header["aliases"][f"attention.k_proj_weight_packed.{buffer}"] = f"attention.q_proj_weight_packed.{buffer}"
        header["weights"]["attention.k_proj_weight"]["config"]["straight_through"] = 0.5

    for change in (scales_only, with_another_kind):
        refused(rewritten(saved, tmp_path / "x.safetensors", change), "is shared with something that is not the same")


@pytest.mark.parametrize("value", ["loud", float("inf"), 10**400])
def test_an_alien_sqnr_is_ignored(saved, tmp_path, value):
    path = rewritten(saved, tmp_path / "x.safetensors", set_to("weights", "joint.weight", "sqnr_db", value=value))
    assert gq.load_packed(Model(), path).joint.weight_packed.sqnr_db is None


def test_headers_are_strict_json(tmp_path):
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)  # an infinite SQNR
    gq.save_packed(gq.quantize_(gq.quantize_(layer, gq.GQConfig()), step="convert"), tmp_path / "x.safetensors")
    assert "Infinity" not in contents(tmp_path / "x.safetensors")[1]["gq_triton"]
