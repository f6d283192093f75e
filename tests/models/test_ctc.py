"""CTC models: an encoder of any kind and an output layer."""

import pytest
import torch

from gq_triton.models import CTC, RNNT, ConformerConfig, RNNTConfig, model_of, preset

SMALL = dict(features=6, encoder_layers=2, predictor_layers=0, dropout=0.0)


@pytest.mark.parametrize(
    "config",
    [
        RNNTConfig(9, encoder_hidden=10, **SMALL),
        RNNTConfig(9, encoder_hidden=10, small_encoder_layers=2, small_encoder_hidden=5, **SMALL),
        ConformerConfig(9, encoder_size=16, heads=2, channels=4, **SMALL),
    ],
    ids=["rnn", "bifocal", "conformer"],
)
def test_every_encoder_serves(config):
    model = model_of(config).eval()
    assert isinstance(model, CTC)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"encoder", "output"}
    features, lengths = torch.randn(2, 40, 6), torch.tensor([40, 17])
    logits, frames = model(features, lengths)
    assert logits.shape == (2, 40 // config.subsampling, 9)
    assert frames.tolist() == [40 // config.subsampling, 17 // config.subsampling]
    torch.testing.assert_close(logits, model.output(model.encoder(features, lengths)[0]))


def test_what_a_predictor_decides():
    assert isinstance(model_of(preset("tiny", 9)), RNNT)
    assert isinstance(model_of(preset("conformer-tiny", 9, predictor_layers=0)), CTC)
    with pytest.raises(ValueError, match="predictor_layers is 1; a CTC model has none"):
        CTC(preset("tiny", 9))
    with pytest.raises(ValueError, match="predictor_layers is 0; a transducer has a predictor"):
        RNNT(preset("tiny", 9, predictor_layers=0))


@pytest.mark.parametrize("predictor_layers", [0, 1], ids=["CTC", "transducer"])
@pytest.mark.parametrize("name", ["tiny", "conformer-tiny"])
def test_a_switch_is_for_bifocal_encoders(name, predictor_layers):
    model = model_of(preset(name, 9, predictor_layers=predictor_layers))
    labels = [torch.ones(1, 2, dtype=torch.int64)] * predictor_layers
    with pytest.raises(ValueError, match="switch is for a BifocalEncoder; this model's is of type"):
        model(torch.zeros(1, 40, 80), torch.tensor([40]), *labels, switch=torch.tensor([8]))
