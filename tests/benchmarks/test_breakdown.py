import breakdown
import pytest
import torch
from breakdown import kind_of_name, labelled


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::linear", "GEMM"),
        ("aten::addmm", "GEMM"),
        ("MmBackward0", "GEMM"),
        ("aten::matmul", "GEMM"),
        ("aten::lstm", "recurrent"),
        ("aten::_cudnn_rnn_backward", "recurrent"),
        ("aten::convolution_backward", "convolution"),
        ("ConvolutionBackward0", "convolution"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("aten::_scaled_dot_product_efficient_attention_backward", "attention"),
        ("_RNNTLoss", "loss"),
        ("gq_triton::joint_rnnt_loss_backward", "loss"),
        ("aten::_ctc_loss", "loss"),
        ("Optimizer.step#AdamW.step", "optimizer"),
        ("quantizer", "quantizer"),
        ("aten::mul", "other"),
        ("aten::sum", "other"),
        ("aten::native_layer_norm", "other"),
    ],
)
def test_kinds_of_operators(name, kind):
    assert kind_of_name(name) == kind


class Quantizer:
    """Something with operators of many kinds."""

    @staticmethod
    def run(weight):
        return (weight.exp() @ weight).tanh()


def kinds_by_name(step):
    """{operator: its kinds}, forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        step()
    found = {}
    for event, kind in breakdown.kinds_of(run.events()):
        found.setdefault(event.name.removeprefix(breakdown.BACKWARD + ": "), set()).add(kind)
    return found


def test_backward_belongs_to_the_label_around_the_forward_pass():
    weight = torch.randn(8, 8, requires_grad=True)
    with labelled("quantizer", (Quantizer, "run")):
        kinds = kinds_by_name(lambda: (Quantizer.run(weight) * 2).sum().backward())
    assert kinds["aten::exp"] == kinds["aten::tanh"] == {"quantizer"}
    assert kinds["ExpBackward0"] == kinds["TanhBackward0"] == {"quantizer"}
    assert kinds["aten::matmul"] == kinds["aten::mm"] == kinds["MmBackward0"] == {"quantizer"}
    assert kinds["aten::sum"] == kinds["SumBackward0"] == {"other"}


def test_operators_belong_to_the_outermost_one_that_has_a_kind():
    lstm, x = torch.nn.LSTM(4, 4), torch.randn(5, 2, 4)
    kinds = kinds_by_name(lambda: (lstm(x)[0] @ torch.ones(4, 4)).sum().backward())
    assert kinds["aten::lstm"] == {"recurrent"}
    assert kinds["aten::matmul"] == {"GEMM"}
    assert set().union(*(kinds[name] for name in kinds if "lstm" in name.lower() or "rnn" in name)) == {"recurrent"}


def test_milliseconds_add_up_to_those_of_all_operators(monkeypatch):
    linear, x, runs = torch.nn.Linear(50, 50), torch.randn(50, 50), []

    class Kept(torch.profiler.profile):
        def __exit__(self, *error):
            super().__exit__(*error)
            runs.append(self)

    monkeypatch.setattr(breakdown, "profile", Kept)
    kinds = breakdown.breakdown(lambda: linear(x).relu().sum().backward(), torch.device("cpu"), steps=2)
    total = sum(event.self_cpu_time_total for event in runs[0].events()) / 2 / 1e3
    assert sum(kinds.values()) == pytest.approx(total)
    assert {kind for kind, milliseconds in kinds.items() if milliseconds} == {"GEMM", "other"}


def test_labels_are_taken_off_again():
    before = Quantizer.run
    with labelled("quantizer", (Quantizer, "run")):
        assert Quantizer.run is not before
    assert Quantizer.run is before
