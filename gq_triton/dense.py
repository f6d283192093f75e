"""Dense copies of packed weights: memory for speed, where the user allows it."""

from torch import nn

from gq_triton.layers import PackedLayer, PackedWeight


def allow_dense(model: nn.Module, allow: bool = True) -> nn.Module:
    """Lets packed layers hold a decoded copy of each weight beside the codes, and compute with it where that is faster.

    For linear layers that is with many tokens, where arithmetic and not memory is the limit: few tokens still read the
    codes, and so do all with 8-bit activations; on a CPU without the native library none do. Pointwise convolutions are
    such layers, all others always take the copy. The outputs are the same up to rounding. Linear, attention and
    convolution layers take a copy; embeddings and recurrent layers have no use for one.

    A copy has the layer's dtype and device and follows both, as it does new values by ``load_state_dict``. It is in no
    state dict or packed file. :func:`gq_triton.report` shows what it takes.

    Args:
        model: a model with packed layers, or a part of one: what lies outside of it is left as it is.
        allow: False drops the copies.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: if ``model`` has no packed layer, or if the scale or codebook of one requires a gradient, which a
            copy would not give. The model is then unchanged.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    if not layers:
        raise ValueError("model has no packed layer: prepare and convert it with quantize_ first")
    weights = [weight for layer in layers if layer.uses_dense for weight in layer.packed_weights().values()]
    if allow and any(_learns(weight) for weight in weights):
        raise ValueError("model has packed weights whose scale or codebook requires a gradient, which a copy has not")
    for weight in dict.fromkeys(weights):
        weight.keep_dense(allow)
    return model


def _learns(weight: PackedWeight) -> bool:
    return weight.scale.requires_grad or weight.codebook.requires_grad
