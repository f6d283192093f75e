"""Codes in tiles where kernels read tiles. Without a GPU, CPU tensors are made to count as a GPU's."""

import copy
import io
import pickle

import pytest
import torch
from quantized import convert, packed_weights, prepare, same
from torch import nn

import gq_triton as gq
from gq_triton.kernels.tiles import tiled_bytes
from gq_triton.layers import PackedWeight, packed_weight

LAYERS = {
    "Linear": (lambda: nn.Linear(13, 27), lambda: (torch.randn(3, 13),)),
    "Embedding": (lambda: nn.Embedding(21, 5), lambda: (torch.randint(21, (2, 3)),)),
    "Conv1d": (lambda: nn.Conv1d(6, 18, 3, groups=3), lambda: (torch.randn(2, 6, 8),)),
    "Conv2d": (lambda: nn.Conv2d(3, 5, (3, 2)), lambda: (torch.randn(2, 3, 6, 5),)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(12, 3), lambda: (torch.randn(4, 2, 12),) * 3),
    "LSTM": (lambda: nn.LSTM(5, 6, 2, proj_size=4), lambda: (torch.randn(4, 2, 5),)),
    "GRU": (lambda: nn.GRU(5, 6, bidirectional=True), lambda: (torch.randn(4, 2, 5),)),
}
GROUPS = {"LSTM": 4, "GRU": 3}


def output(model, inputs):
    result = model(*inputs)
    return result[0] if isinstance(result, tuple) else result


def pieces(model):
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


def make_packed(bits=5, kind="Linear", **options):
    return convert(prepare(LAYERS[kind][0]().eval(), bits=bits, **options)[0])


@pytest.fixture
def gpu(monkeypatch):
    """Switches whether CPU tensors count as a GPU's; a model notices when it is moved."""

    def switch(on):
        monkeypatch.setattr(packed_weight, "wants_tiles", lambda device: on and device.type == "cpu")

    return switch


def move(model, gpu, on):
    gpu(on)
    return model.to("cpu")


def test_only_gpus_want_tiles():
    assert [packed_weight.wants_tiles(torch.device(name)) for name in ("cpu", "meta", "cuda")] == [False, False, True]


@pytest.mark.parametrize("bits", [1, 5, 8])
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_change_their_layout_with_their_device(kind, bits, gpu):
    packed, inputs = make_packed(bits, kind), LAYERS[kind][1]()
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    weights, expected = packed_weights(packed), output(packed, inputs)
    move(packed, gpu, True)
    for name, piece in packed.named_modules():
        if isinstance(piece, PackedWeight):
            assert piece.tiled
            assert piece.groups == (1 if "_hr_" in name else GROUPS.get(kind, 1))
            rows, columns = piece.shape[0], piece.shape[1:].numel()
            assert piece.codes.shape == (tiled_bytes(rows, columns, bits, piece.groups),)
    assert all(torch.equal(weight, weights[name]) for name, weight in packed_weights(packed).items())
    same(output(packed, inputs), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed.state_dict().items())
    move(packed, gpu, False)
    assert not any(piece.tiled for piece in pieces(packed))
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed.state_dict().items())
    assert torch.equal(output(packed, inputs), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("kind", LAYERS)
def test_to_a_gpu_and_back(kind):
    packed = make_packed(5, kind)
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    weights = packed_weights(packed)
    packed.cuda()
    assert all(piece.tiled for piece in pieces(packed))
    assert all(torch.equal(weight.cpu(), weights[name]) for name, weight in packed_weights(packed).items())
    packed.cpu()
    assert not any(piece.tiled for piece in pieces(packed))
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed.state_dict().items())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_model_that_is_on_a_gpu_is_packed_there(kind, gpu):
    prepared = prepare(LAYERS[kind][0]().eval(), bits=3, codebook="fp8")[0]
    expected = convert(prepared)
    gpu(True)
    packed = convert(prepared)
    assert all(piece.tiled for piece in pieces(packed))
    for mine, other in zip(pieces(packed), pieces(expected), strict=True):
        assert torch.equal(mine.decode(), other.decode())
        assert mine.sqnr_db == other.sqnr_db


def test_a_state_dict_shares_what_the_cpu_holds():
    packed = make_packed()
    state = packed.state_dict()
    for name, buffer in packed.weight_packed.named_buffers():
        assert state[f"weight_packed.{name}"].data_ptr() == buffer.data_ptr()


@pytest.mark.parametrize("assign", [False, True])
def test_loading_fills_tiles(gpu, assign):
    source, target = make_packed(), make_packed()
    state = source.state_dict()
    move(target, gpu, True)
    place = target.weight_packed.codes.data_ptr()
    target.load_state_dict(state, assign=assign)
    assert target.weight_packed.tiled
    assert torch.equal(target.weight_packed.decode(), source.weight_packed.decode())
    assert assign or target.weight_packed.codes.data_ptr() == place  # as captured graphs need
    target.load_state_dict({"bias": torch.ones(27)}, strict=False)
    assert torch.equal(target.weight_packed.decode(), source.weight_packed.decode())


def test_assigning_to_a_model_without_memory(gpu):
    source = make_packed()
    state = source.state_dict()
    target = make_packed().to("meta")
    gpu(True)
    target.load_state_dict(state, assign=True)
    assert target.weight_packed.tiled
    assert torch.equal(target.weight_packed.decode(), source.weight_packed.decode())
    assert target.to("cpu").half().weight_packed.dtype == torch.float16


@pytest.mark.parametrize("codes", [torch.zeros(3, dtype=torch.uint8), torch.zeros(220)])
def test_loading_codes_of_another_size(gpu, codes):
    packed = move(make_packed(), gpu, True)
    weight = packed.weight_packed.decode()
    state = {**packed.state_dict(), "weight_packed.codes": codes}
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_packed.codes: packed must be uint8 of shape"):
        packed.load_state_dict(state)
    assert torch.equal(packed.weight_packed.decode(), weight)


def test_copies_keep_the_layout(gpu):
    packed = move(make_packed(kind="LSTM"), gpu, True)
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), torch.load(buffer, weights_only=False)]
    for twin in copies:
        assert all(piece.tiled for piece in pieces(twin))
        assert all(torch.equal(weight, packed_weights(packed)[name]) for name, weight in packed_weights(twin).items())


def test_casts_leave_tiles_alone(gpu):
    packed = move(make_packed(), gpu, True)
    codes = packed.weight_packed.codes.clone()
    packed.half()
    assert torch.equal(packed.weight_packed.codes, codes)
    assert packed.weight_packed.decode().dtype == torch.float16


def test_through_the_meta_device(gpu):
    packed = make_packed(kind="GRU")
    state, shapes = packed.state_dict(), [piece.codes.shape for piece in pieces(packed)]
    move(packed, gpu, True).to("meta")
    assert [piece.codes.shape for piece in pieces(packed)] == shapes
    assert not any(piece.tiled for piece in pieces(packed))
    packed.to_empty(device="cpu").load_state_dict(state)
    assert all(piece.tiled for piece in pieces(packed))
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed.state_dict().items())


def test_tied_weights_stay_one(gpu):
    model = nn.ModuleDict({"embedding": nn.Embedding(20, 6), "head": nn.Linear(6, 20)})
    model["head"].weight = model["embedding"].weight
    packed = convert(prepare(model, bits=4)[0])
    index = torch.arange(20)
    expected = packed["head"](packed["embedding"](index))
    move(packed, gpu, True)
    assert packed["head"].weight_packed is packed["embedding"].weight_packed
    assert packed["head"].weight_packed.tiled
    same(packed["head"](packed["embedding"](index)), expected)


def test_a_weight_that_two_layers_group_differently_is_packed_for_each(gpu):
    model = nn.ModuleDict({"lstm": nn.LSTM(5, 7), "linear": nn.Linear(5, 28)})
    model["linear"].weight = model["lstm"].weight_ih_l0
    packed = move(convert(prepare(model, bits=4)[0]), gpu, True)
    first, second = packed["lstm"].weight_ih_l0_packed, packed["linear"].weight_packed
    assert (first.groups, second.groups) == (4, 1)
    assert torch.equal(first.decode(), second.decode())


def test_a_report_tells_tiles_from_what_a_file_holds(gpu):
    packed = make_packed(bits=4)
    before = gq.report(packed)
    after = gq.report(move(packed, gpu, True))
    assert after.packed_bytes == before.packed_bytes == before.bytes
    assert after.bytes - before.bytes == tiled_bytes(27, 13, 4) - (27 * 13 + 1) // 2
