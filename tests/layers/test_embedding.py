import pytest
import torch
from quantized import convert, prepare
from torch import nn

import gq_triton as gq


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (3,), (2, 4), (0,), (2, 0, 3)])
def test_any_indices(shape, dtype):
    prepared, twin = prepare(nn.Embedding(10, 5), bits=5)
    index = torch.randint(10, shape, dtype=dtype)
    assert torch.equal(prepared(index), twin(index))
    assert torch.equal(convert(prepared)(index), twin(index))


@pytest.mark.parametrize("by_freq", [False, True])
def test_padding_row_stays_zero_and_gets_no_gradient(by_freq):
    prepared, twin = prepare(nn.Embedding(10, 5, padding_idx=3, scale_grad_by_freq=by_freq), bits=1)
    index = torch.tensor([[3, 1, 1], [2, 3, 9]])
    for model in (prepared, convert(prepared)):
        assert torch.equal(model(index), twin(index))
        assert torch.equal(model(index)[0, 0], torch.zeros(5))
    prepared(index).sum().backward()
    assert torch.equal(prepared.weight.grad[3], torch.zeros(5))
    assert prepared.weight.grad[1].abs().sum() > 0


def test_padding_row_takes_the_smallest_value_with_one_scale_per_tensor():
    prepared, _ = prepare(nn.Embedding(10, 5, padding_idx=3), bits=2, granularity="tensor")
    row = prepared.eval()(torch.tensor([3]))
    assert torch.equal(row.abs(), prepared(torch.arange(10)).abs().min().expand(1, 5))
    assert torch.equal(convert(prepared)(torch.tensor([3])), row)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}])
def test_options_that_bypass_the_quantizer_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^weight cannot be quantized: .*{name}"):
        gq.quantize_(nn.Embedding(4, 3, **options), gq.GQConfig())
