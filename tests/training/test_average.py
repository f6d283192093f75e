import torch
from torch import nn

from gq_triton.training.average import ParameterAverage


def test_the_average_begins_with_the_first_update_and_decays():
    model = nn.Linear(3, 2, dtype=torch.float64)
    average = ParameterAverage(model, decay=0.75)
    assert not average.values
    expected = None
    for _ in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update()
        weight = model.weight.detach()
        expected = weight.clone() if expected is None else 0.75 * expected + 0.25 * weight
        torch.testing.assert_close(average.values["weight"], expected, rtol=1e-12, atol=1e-12)
    assert not any(value.requires_grad for value in average.values.values())


def test_values_that_were_loaded_go_on_whatever_their_order():
    model = nn.Linear(3, 2)
    average = ParameterAverage(model, decay=0.5)
    average.values = {"bias": torch.zeros(2), "weight": torch.zeros(2, 3)}
    average.update()
    torch.testing.assert_close(average.values["bias"], model.bias.detach() / 2)
    torch.testing.assert_close(average.values["weight"], model.weight.detach() / 2)
