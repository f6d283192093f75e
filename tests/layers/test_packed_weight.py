"""Codes in the layout that kernels read. CPU tensors are made to count as those of a device that reads another one."""

import copy
import io
import pickle

import pytest
import torch
from quantized import convert, packed_weights, prepare, same
from torch import nn

import gq_triton as gq
from gq_triton.kernels import native
from gq_triton.kernels.layouts import layout_bytes, layout_for
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


class Switch:
    """Sets the layout of CPU tensors, bit planes at first or another one; a model notices when it is moved."""

    def __init__(self, layout, monkeypatch):
        self.layout, self.on = layout, False
        monkeypatch.setattr(packed_weight, "layout_for", self.layout_for)

    def layout_for(self, device):
        return self.layout if self.on and device.type == "cpu" else "planes"

    def move(self, model, on):
        self.on = on
        return model.to("cpu")


@pytest.fixture(params=["tiles", "panels"])
def switch(request, monkeypatch):
    if request.param == "panels" and not native.available():
        pytest.skip(f"no native library: {native.reason()}")
    return Switch(request.param, monkeypatch)


def all_in(model, layout):
    return all(piece.layout == layout for piece in pieces(model))


@pytest.mark.parametrize(
    ("bits", "codebook"), [(1, "float"), (5, "fp8"), (5, "int8"), (8, "float"), (8, "int8"), (8, "fp8")]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_change_their_layout_with_their_device(kind, bits, codebook, switch):
    packed, inputs = make_packed(bits, kind, codebook=codebook), LAYERS[kind][1]()
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    weights, expected = packed_weights(packed), output(packed, inputs)
    switch.move(packed, True)
    for name, piece in packed.named_modules():
        if isinstance(piece, PackedWeight):
            assert piece.layout == switch.layout
            assert piece.groups == (1 if "_hr_" in name else GROUPS.get(kind, 1))
            rows, columns = piece.shape[0], piece.shape[1:].numel()
            assert piece.codes.shape == (layout_bytes(switch.layout, bits, rows, columns, piece.groups),)
    assert all(torch.equal(weight, weights[name]) for name, weight in packed_weights(packed).items())
    same(output(packed, inputs), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed.state_dict().items())
    switch.move(packed, False)
    assert all_in(packed, "planes")
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed.state_dict().items())
    assert torch.equal(output(packed, inputs), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("kind", LAYERS)
def test_to_a_gpu_and_back(kind):
    packed = make_packed(5, kind)
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    weights = packed_weights(packed)
    packed.cuda()
    assert all_in(packed, "tiles")
    assert all(torch.equal(weight.cpu(), weights[name]) for name, weight in packed_weights(packed).items())
    packed.cpu()
    assert all_in(packed, layout_for(torch.device("cpu")))
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed.state_dict().items())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("bits", "codebook"), [(3, "fp8"), (8, "int8")])
def test_a_model_is_packed_in_the_layout_of_its_device(bits, codebook, kind, switch):
    prepared = prepare(LAYERS[kind][0]().eval(), bits=bits, codebook=codebook)[0]
    expected = convert(prepared)
    switch.on = True
    packed = convert(prepared)
    assert all_in(packed, switch.layout)
    for mine, other in zip(pieces(packed), pieces(expected), strict=True):
        assert torch.equal(mine.decode(), other.decode())
        assert mine.sqnr_db == other.sqnr_db


@pytest.mark.usefixtures("switch")
def test_a_state_dict_shares_bit_planes():
    packed = make_packed()
    state = packed.state_dict()
    for name, buffer in packed.weight_packed.named_buffers():
        assert state[f"weight_packed.{name}"].data_ptr() == buffer.data_ptr()


@pytest.mark.parametrize(("bits", "codebook"), [(5, "float"), (8, "int8")])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_fills_the_layout_of_the_device(switch, assign, bits, codebook):
    source, target = (make_packed(bits, codebook=codebook) for _ in range(2))
    state = source.state_dict()
    switch.move(target, True)
    place = target.weight_packed.codes.data_ptr()
    target.load_state_dict(state, assign=assign)
    assert target.weight_packed.layout == switch.layout
    assert torch.equal(target.weight_packed.decode(), source.weight_packed.decode())
    assert assign or target.weight_packed.codes.data_ptr() == place  # as captured graphs need
    target.load_state_dict({"bias": torch.ones(27)}, strict=False)
    assert torch.equal(target.weight_packed.decode(), source.weight_packed.decode())


@pytest.mark.parametrize(("bits", "codebook"), [(5, "float"), (8, "int8")])
def test_assigning_to_a_model_without_memory(switch, bits, codebook):
    source = make_packed(bits, codebook=codebook)
    state = source.state_dict()
    target = make_packed(bits, codebook=codebook).to("meta")
    switch.on = True
    target.load_state_dict(state, assign=True)
    assert target.weight_packed.layout == switch.layout
    assert torch.equal(target.weight_packed.decode(), source.weight_packed.decode())
    assert target.to("cpu").half().weight_packed.dtype == torch.float16


@pytest.mark.parametrize("codes", [torch.zeros(3, dtype=torch.uint8), torch.zeros(220)])
def test_loading_codes_of_another_size(switch, codes):
    packed = switch.move(make_packed(), True)
    weight = packed.weight_packed.decode()
    state = {**packed.state_dict(), "weight_packed.codes": codes}
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_packed.codes: .* must .*(220|uint8)"):
        packed.load_state_dict(state)
    assert torch.equal(packed.weight_packed.decode(), weight)


@pytest.mark.parametrize(("bits", "codebook"), [(5, "float"), (8, "int8")])
def test_copies_keep_the_layout(switch, bits, codebook):
    packed = switch.move(make_packed(bits, "LSTM", codebook=codebook), True)
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), torch.load(buffer, weights_only=False)]
    for twin in copies:
        assert all_in(twin, switch.layout)
        assert all(torch.equal(weight, packed_weights(packed)[name]) for name, weight in packed_weights(twin).items())


def test_a_pickle_is_read_where_kernels_read_another_layout(switch):
    packed = switch.move(make_packed(8, codebook="int8"), True)
    pickled = pickle.dumps(packed)
    switch.on = False
    twin = pickle.loads(pickled)
    assert twin.weight_packed.layout == "planes"
    assert torch.equal(twin.weight_packed.decode(), packed.weight_packed.decode())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("order", [("codes", "codebook"), ("codebook", "codes")])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_codes_and_codebook_may_be_loaded_one_after_the_other(switch, order, assign, device):
    if device == "meta" and not assign:
        pytest.skip("nothing is copied to the meta device")
    source = make_packed(8, codebook="int8")
    state = source.state_dict()
    switch.on = True
    target = make_packed(8, codebook="int8").to(device)
    rest = {name: tensor for name, tensor in state.items() if name.split(".")[-1] not in order}
    for part in (rest, *({f"weight_packed.{name}": state[f"weight_packed.{name}"]} for name in order)):
        target.load_state_dict(part, strict=False, assign=assign)
    assert torch.equal(target.weight_packed.decode(), source.weight_packed.decode())
    assert torch.equal(target.weight_packed.bit_planes(), state["weight_packed.codes"])
    assert target.to("cpu").weight_packed.layout == switch.layout
    assert torch.equal(target.weight_packed.decode(), source.weight_packed.decode())


def test_of_equal_entries_a_code_names_the_first():
    quantizer = prepare(nn.Linear(40, 30), bits=8, mu=255.0, codebook="int8")[0]
    packed = convert(quantizer).weight_packed
    first = {}
    for code, entry in enumerate(packed.codebook.tolist()):
        first.setdefault(entry, code)
    assert len(first) < 256
    assert set(gq.functional.unpack(packed.bit_planes(), 8, (1200,)).tolist()) <= set(first.values())


def test_casts_leave_codes_alone(switch):
    packed = switch.move(make_packed(), True)
    codes = packed.weight_packed.codes.clone()
    packed.half()
    assert torch.equal(packed.weight_packed.codes, codes)
    assert packed.weight_packed.decode().dtype == torch.float16


@pytest.mark.parametrize(("bits", "codebook"), [(5, "float"), (8, "int8")])
def test_through_the_meta_device(switch, bits, codebook):
    packed = make_packed(bits, "GRU", codebook=codebook)
    state, shapes = packed.state_dict(), [piece.codes.shape for piece in pieces(packed)]
    switch.move(packed, True).to("meta")
    assert [piece.codes.shape for piece in pieces(packed)] == shapes
    assert all_in(packed, "planes")
    packed.to_empty(device="cpu").load_state_dict(state)
    assert all_in(packed, switch.layout)
    assert all(torch.equal(tensor, state[name]) for name, tensor in packed.state_dict().items())


def test_tied_weights_stay_one(switch):
    model = nn.ModuleDict({"embedding": nn.Embedding(20, 6), "head": nn.Linear(6, 20)})
    model["head"].weight = model["embedding"].weight
    packed = convert(prepare(model, bits=4)[0])
    index = torch.arange(20)
    expected = packed["head"](packed["embedding"](index))
    switch.move(packed, True)
    assert packed["head"].weight_packed is packed["embedding"].weight_packed
    assert packed["head"].weight_packed.layout == switch.layout
    same(packed["head"](packed["embedding"](index)), expected)


def test_a_weight_that_two_layers_group_differently_is_packed_for_each(switch):
    model = nn.ModuleDict({"lstm": nn.LSTM(5, 7), "linear": nn.Linear(5, 28)})
    model["linear"].weight = model["lstm"].weight_ih_l0
    packed = switch.move(convert(prepare(model, bits=4)[0]), True)
    first, second = packed["lstm"].weight_ih_l0_packed, packed["linear"].weight_packed
    assert (first.groups, second.groups) == (4, 1)
    assert torch.equal(first.decode(), second.decode())


def test_a_report_tells_memory_from_what_a_file_holds(switch):
    packed = make_packed(bits=4)
    before = gq.report(packed)
    after = gq.report(switch.move(packed, True))
    assert after.packed_bytes == before.packed_bytes == before.bytes
    assert after.bytes - before.bytes == layout_bytes(switch.layout, 4, 27, 13) - (27 * 13 + 1) // 2
