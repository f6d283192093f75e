import copy
import warnings

import pytest
import torch
from quantized import convert, hard_weights, packed_weights, prepare, same
from torch import nn
from torch.nn.utils import prune

import gq_triton as gq
from gq_triton.layers import PackedLinear, QATLinear, QATMultiheadAttention


class Model(nn.Module):
    """An embedding, a recurrent layer and a linear one, as in a small recognizer."""

    def __init__(self, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.encoder = nn.LSTM(6, 6, 2)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 12)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, index):
        return self.head(self.norm(self.encoder(self.embedding(index))[0]))


INDEX = torch.arange(8).view(4, 2)


# --- in place


def test_the_model_itself_is_returned_and_its_layers_stay_the_same_objects():
    model = Model().train()
    head, weight, bias = model.head, model.head.weight, model.head.bias
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    assert gq.quantize_(model, gq.GQConfig()) is model
    assert model.head is head
    assert type(head) is QATLinear
    assert head.weight is weight
    assert head.weight_quantizer.training
    model(INDEX)
    assert gq.quantize_(model, step="convert") is model
    assert model.head is head
    assert type(head) is PackedLinear
    assert head.bias is bias
    model(INDEX)
    assert len(calls) == 2


def test_a_lone_layer_may_be_the_model():
    layer = nn.Linear(5, 3)
    prepared, twin = prepare(layer, bits=2)
    assert prepared is layer
    x = torch.randn(2, 5)
    same(layer(x), twin(x))
    gq.quantize_(layer, step="convert")
    same(layer(x), twin(x))


def test_modes_and_frozen_weights_are_kept():
    model = Model()
    model.encoder.requires_grad_(False)
    model.head.eval()
    gq.quantize_(model, gq.GQConfig())
    assert not any(p.requires_grad for q in model.encoder.quantizers().values() for p in q.parameters())
    assert all(p.requires_grad for p in model.head.parameters())
    assert not model.head.weight_quantizer.training
    assert model.embedding.weight_quantizer.training


def test_names_of_float_parameters_stay():
    model = Model()
    names = set(model.state_dict())
    gq.quantize_(model, gq.GQConfig())
    assert names < set(model.state_dict())
    added = {name for name in set(model.state_dict()) - names if "_quantizer." not in name}
    assert not added


def test_deepcopied_models_are_independent():
    model = gq.quantize_(Model(), gq.GQConfig())
    twin = copy.deepcopy(model)
    same(twin(INDEX), model(INDEX))
    gq.quantize_(twin, step="convert")
    assert type(model.head) is QATLinear
    same(copy.deepcopy(twin)(INDEX), twin(INDEX))


# --- patterns


def widths(model):
    return {name: quantizer.config.bits for name, quantizer in quantizers(model).items()}


def quantizers(model):
    found = {n: m for n, m in model.named_modules() if isinstance(m, gq.WeightQuantizer)}
    return {name.removesuffix("_quantizer"): module for name, module in found.items()}


def test_the_first_matching_pattern_wins():
    one, two, six = (gq.GQConfig(bits=bits) for bits in (1, 2, 6))
    patterns = {"encoder.weight_hh_l1": one, "encoder": two, "head": None, "*.weight": six}
    model = gq.quantize_(Model(), patterns)
    assert widths(model) == {
        "embedding.weight": 6,
        "encoder.weight_ih_l0": 2,
        "encoder.weight_hh_l0": 2,
        "encoder.weight_ih_l1": 2,
        "encoder.weight_hh_l1": 1,
    }


def test_what_no_pattern_matches_stays_float():
    model = gq.quantize_(Model(), {"head": gq.GQConfig()})
    assert widths(model) == {"head.weight": 4}
    assert type(model.encoder) is nn.LSTM


def test_patterns_that_match_nothing_are_named():
    with pytest.warns(UserWarning, match=r"match no layer that can be quantized: 'decoder\.\*', 'norm'") as caught:
        gq.quantize_(Model(), {"decoder.*": gq.GQConfig(), "norm": None, "*": gq.GQConfig()})
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_weight_of_zeros_is_warned_of():
    layer = torch.nn.Linear(4, 3)
    torch.nn.init.zeros_(layer.weight)
    with pytest.warns(UserWarning, match="^weight is all zeros"):
        gq.quantize_(layer, gq.GQConfig())
    assert not layer(torch.ones(1, 4)).sub(layer.bias).any()


def test_matching_patterns_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gq.quantize_(Model(), {"head": None, "head.weight": gq.GQConfig(), "*": gq.GQConfig()})


def test_parts_may_be_prepared_and_converted_one_after_the_other():
    model = Model().eval()
    gq.quantize_(model, {"head": gq.GQConfig(bits=3)})
    gq.quantize_(model, {"encoder": gq.GQConfig(bits=5)})
    gq.quantize_(model, step="convert")
    gq.quantize_(model, {"embedding": gq.GQConfig(bits=7)})
    expected = model(INDEX)
    gq.quantize_(model, step="convert")
    same(model(INDEX), expected)
    assert {name: p.config.bits for name, p in model.named_modules() if name.endswith("_packed")} == {
        "embedding.weight_packed": 7,
        **{f"encoder.weight_{kind}_l{layer}_packed": 5 for kind in ("ih", "hh") for layer in (0, 1)},
        "head.weight_packed": 3,
    }


# --- sharing


def test_tied_weights_share_one_quantizer_and_one_packed_weight():
    model, twin = prepare(Model(tied=True), bits=3)
    assert model.head.weight is model.embedding.weight
    assert model.head.weight_quantizer is model.embedding.weight_quantizer
    same(model(INDEX), twin(INDEX))
    model(INDEX).square().sum().backward()
    assert model.head.weight_quantizer.log_scale.grad.abs().sum() > 0
    packed = convert(model)
    assert packed.head.weight_packed is packed.embedding.weight_packed
    same(packed(INDEX), twin(INDEX))
    packed.to(torch.float64).to(torch.float32)
    assert packed.head.weight_packed.codes is packed.embedding.weight_packed.codes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"head": gq.GQConfig()}, r"head\.weight is shared with embedding\.weight"),
        ({"head": None, "*": gq.GQConfig()}, r"embedding\.weight is shared with head\.weight"),
        ({"head": gq.GQConfig(bits=2), "*": gq.GQConfig()}, "are one weight but match different configs"),
    ],
)
def test_tied_weights_must_be_quantized_alike(config, message):
    model = Model(tied=True)
    with pytest.raises(ValueError, match=message):
        gq.quantize_(model, config)
    assert not quantizers(model)
    assert type(model.encoder) is nn.LSTM


def test_a_weight_that_another_kind_of_module_holds_is_refused():
    model = Model()
    model.norm.register_parameter("reused", model.head.weight)
    with pytest.raises(ValueError, match=r"head\.weight is shared with norm\.reused"):
        gq.quantize_(model, gq.GQConfig())


def test_weights_that_are_tied_under_different_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 6, num_layers=2)
            self.lstm.weight_hh_l1 = self.lstm.weight_hh_l0
            self.attention = nn.MultiheadAttention(6, 2)
            self.joint = nn.Linear(6, 18)
            self.joint.weight = self.attention.in_proj_weight

        def forward(self, x):
            x = self.lstm(x)[0]
            return self.joint(self.attention(x, x, x)[0])

    prepared, twin = prepare(Tied(), bits=3)
    packed = convert(prepared)
    x = torch.randn(4, 2, 6)
    same(packed(x), twin(x))
    assert packed.lstm.weight_hh_l1_packed is packed.lstm.weight_hh_l0_packed
    assert not quantizers(packed)


def test_an_output_projection_that_two_attention_modules_share():
    for name in ("a.out_proj", "a", "b"):
        model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.MultiheadAttention(4, 2)})
        model["b"].out_proj = model["a"].out_proj
        gq.quantize_(model, {f"{name}*": gq.GQConfig(bits=1)})
        x = torch.randn(3, 2, 4)
        for attention in model.values():
            attention(x, x, x)
            assert type(attention) is QATMultiheadAttention
        assert model["a"].out_proj.weight_quantizer.trained


def test_a_module_that_is_used_twice_is_quantized_once():
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    prepared, twin = prepare(model, {"2": gq.GQConfig(bits=2)})  # either name will do
    x = torch.randn(3, 6)
    same(prepared(x), twin(x))
    packed = convert(prepared)
    assert packed[0] is packed[2]
    same(packed(x), twin(x))


# --- refusals


def refused(model, message, config=None):
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        gq.quantize_(model, config or gq.GQConfig())
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_layers_that_are_quantized_already():
    refused(gq.quantize_(Model(), gq.GQConfig()), "prepared already")
    refused(convert(gq.quantize_(Model(), gq.GQConfig())), "packed already")


def test_parametrized_layers():
    model = Model()
    nn.utils.parametrizations.orthogonal(model.head)
    refused(model, r"head\.weight cannot be quantized: its layer is parametrized")
    gq.quantize_(model, {"head": None, "*": gq.GQConfig()})


def test_pruned_layers():
    model = Model()
    prune.l1_unstructured(model.head, "weight", 0.5)
    refused(model, "it is not a parameter but computed")


def test_an_error_names_every_weight_and_the_pattern_for_it():
    model = Model()
    nn.utils.parametrizations.orthogonal(model.head)
    model.embedding.max_norm = 1.0
    message = r"embedding\.weight cannot .*max_norm.*; head\.weight cannot .*parametrized.*"
    refused(model, message + r"put \{'embedding\.weight': None, 'head\.weight': None\} before")
    gq.quantize_(model, {"embedding.weight": None, "head.weight": None, "*": gq.GQConfig()})


def test_lazy_layers():
    refused(nn.Sequential(nn.LazyLinear(3)), "its layer is a LazyLinear")


def test_attention_of_a_foreign_subclass_with_a_quantized_out_proj():
    class Attention(nn.MultiheadAttention):
        pass

    refused(nn.Sequential(Attention(4, 2)), "Attention reads its out_proj", {"*.out_proj": gq.GQConfig()})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad):
    model = Model()
    model.head.weight.data[1, 2] = bad
    refused(model, r"head\.weight cannot be quantized: weight must be finite")
    model.head.weight.data.zero_()
    gq.quantize_(model, gq.GQConfig())
    model.head.weight.data[1, 2] = bad
    with pytest.raises(ValueError, match=r"head\.weight cannot be packed: weight must be finite"):
        gq.quantize_(model, step="convert")
    assert type(model.embedding).__name__ == "QATEmbedding"


def test_meta_and_integer_weights():
    refused(nn.Linear(3, 3, device="meta"), "on the meta device")
    model = nn.Linear(3, 3)
    model.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    refused(model, "its dtype is torch.complex64")


@pytest.mark.parametrize("config", [None, 4, {}, {"*": 4}, {1: gq.GQConfig()}, [("*", gq.GQConfig())]])
def test_bad_configs(config):
    with pytest.raises(ValueError, match="^config must"):
        gq.quantize_(Model(), config)


def test_bad_arguments():
    with pytest.raises(ValueError, match="^model must be a torch.nn.Module; got dict"):
        gq.quantize_({}, gq.GQConfig())
    with pytest.raises(ValueError, match="^step must be 'prepare' or 'convert'; got 'qat'"):
        gq.quantize_(Model(), gq.GQConfig(), step="qat")
    with pytest.raises(ValueError, match="^config must not be given"):
        gq.quantize_(gq.quantize_(Model(), gq.GQConfig()), gq.GQConfig(), step="convert")


@pytest.mark.parametrize("model", [Model(), nn.ReLU(), convert(gq.quantize_(Model(), gq.GQConfig()))])
def test_nothing_to_convert(model):
    with pytest.raises(ValueError, match="no prepared layer to convert"):
        gq.quantize_(model, step="convert")


# --- weights that are read without a call


class Encoder(Model):
    def forward(self, index):
        return self.encoder(self.embedding(index))[0]


def test_training_past_a_quantizer_is_warned_of():
    model = gq.quantize_(Encoder(), gq.GQConfig())
    annealer = gq.Annealer(model, 10)
    (model(INDEX) @ model.head.weight.T).sum().backward()
    with pytest.warns(UserWarning, match=r"^head\.weight: trained without its layer being called"):
        annealer.step()
    with pytest.warns(UserWarning, match=r"^head\.weight: trained without"):
        gq.quantize_(model, step="convert")


def test_layers_that_are_skipped_are_warned_of_at_the_end_only():
    model = gq.quantize_(Encoder(), gq.GQConfig())
    annealer = gq.Annealer(model, 10)
    model(INDEX).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        annealer.step()
    with pytest.warns(UserWarning, match=r"^head\.weight: trained without"):
        gq.quantize_(model, step="convert")


def test_no_warning_where_all_layers_ran_or_none_did():
    for run in (True, False):
        model = gq.quantize_(Model(), gq.GQConfig())
        annealer = gq.Annealer(model, 10)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if run:
                model(INDEX).sum().backward()
            annealer.step()
            gq.quantize_(model, step="convert")


# --- checkpoints


def test_float_checkpoints_load_before_or_after_prepare_alike():
    trained = Model()
    before, after = Model(), Model()
    before.load_state_dict(trained.state_dict())
    gq.quantize_(before, gq.GQConfig())
    gq.quantize_(after, gq.GQConfig())
    for quantizer in quantizers(after).values():
        quantizer.centroid_logits.data.normal_()
    result = after.load_state_dict(trained.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for (name, mine), (_, other) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.parametrize("assign", [False, True])
def test_tied_float_checkpoints(assign):
    trained, model = Model(tied=True), gq.quantize_(Model(tied=True), gq.GQConfig())
    float_state = copy.deepcopy(trained.state_dict())
    model.load_state_dict(float_state, strict=True, assign=assign)
    assert set(float_state) == set(trained.state_dict())  # the caller's own is left alone
    gq.quantize_(trained, gq.GQConfig())
    same(model(INDEX), trained(INDEX))


def test_prepared_checkpoints_keep_what_was_learned():
    first, second = (gq.quantize_(Model(), gq.GQConfig()) for _ in range(2))
    for parameter in first.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    gq.Annealer(first, 10, end=50.0).load_state_dict({"steps": 5, "total_steps": 10, "start": 2.0, "end": 50.0})
    second.load_state_dict(first.state_dict())
    for (name, mine), (_, other) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(mine, other), name
    assert torch.equal(first(INDEX), second(INDEX))


def test_checkpoints_without_a_weight_do_not_refit():
    model = gq.quantize_(Model(), gq.GQConfig())
    model.head.weight_quantizer.log_scale.data.add_(1.0)
    scale = model.head.weight_quantizer.scale()
    missing = model.load_state_dict({"head.bias": torch.zeros(12)}, strict=False).missing_keys
    assert "head.weight_quantizer.log_scale" in missing
    assert torch.equal(model.head.weight_quantizer.scale(), scale)


def test_float_checkpoints_that_are_not_finite_are_refused_by_name():
    model = gq.quantize_(Model(), gq.GQConfig())
    checkpoint = Model().state_dict()
    checkpoint["head.weight"][0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=r"head\.weight cannot be quantized: weight must be finite"):
        model.load_state_dict(checkpoint)


def test_checkpoints_that_lack_part_of_a_quantizer_are_refused():
    model = gq.quantize_(Model(), gq.GQConfig())
    state = model.state_dict()
    del state["head.weight_quantizer.log_scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.weight_quantizer\.log_scale"):
        model.load_state_dict(state)


# --- the whole way


def mean_square(x):
    return float(x.detach().square().mean())


@pytest.mark.parametrize("bits, lr", [(1, 1e-2), (2, 1e-2), (4, 3e-3)])  # steps to suit the centroids' spacing
def test_training_recovers_what_quantization_lost(bits, lr):
    task = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 4))
    x = torch.randn(256, 8)
    target = task(x).detach()
    model = gq.quantize_(copy.deepcopy(task), gq.GQConfig(bits=bits))
    after_training_quantization = mean_square(convert(model)(x) - target)
    optimizer = torch.optim.AdamW(gq.param_groups(model, lr=lr, weight_decay=0.0))
    annealer = gq.Annealer(model, 150)
    for _ in range(150):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        annealer.step()
    error = mean_square(gq.quantize_(model, step="convert")(x) - target)
    assert error < 0.5 * after_training_quantization


def test_hard_weights_take_no_more_values_than_the_codebook_has():
    model = gq.quantize_(Model(), gq.GQConfig(bits=2, granularity="tensor"))
    for weights in (hard_weights(model), packed_weights(convert(model))):
        assert all(len(weight.unique()) <= 4 for weight in weights.values())
