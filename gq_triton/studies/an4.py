"""The studies on AN4: their rows, in the order in which they are worth running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gq_triton import GQConfig
from gq_triton.baselines import KMeansConfig, LSQConfig, S8BQATConfig, TorchaoConfig, UniformConfig
from gq_triton.training.recipes import recipe_of

from .design import Study, Variant

__all__ = ["STUDIES"]

WIDTHS = (8, 5, 4, 3, 2, 1)

#: Methods of quantization-aware training and of post-training quantization, by their names in tables.
TRAINED = {"GQ": GQConfig, "LSQ": LSQConfig, "straight-through": UniformConfig, "S8BQAT": S8BQATConfig}
UNTRAINED = {"GQ": GQConfig, "uniform": UniformConfig, "k-means": KMeansConfig}


def bits_of(bits: int) -> str:
    return "1 bit" if bits == 1 else f"{bits} bits"


def widths(methods: dict, *, trained: bool) -> list[Variant]:
    """Every method at every width, all weights alike."""
    how = "" if trained else " post-training"
    return [
        Variant(f"{name}{how}, {bits_of(bits)}", {"*": config(bits=bits)}, trained, group=f"{name}{how}")
        for bits in WIDTHS
        for name, config in methods.items()
    ]


def variants(linear: Sequence[str], one_bit: Sequence[str]) -> list[Variant]:
    """What both models' weights are held as, in the order in which it is worth running.

    Args:
        linear: patterns of the linear layers, which are what torchao trains.
        one_bit: patterns of the layers that have 1 bit where all others have 4.
    """
    rivals = {name: config for name, config in TRAINED.items() if name != "GQ"}
    mixed = {**dict.fromkeys(one_bit, GQConfig(bits=1)), "*": GQConfig(bits=4)}
    torchao = [
        Variant(
            f"torchao, linear layers, {bits} bits", dict.fromkeys(linear, TorchaoConfig(bits=bits)), group="torchao"
        )
        for bits in (8, 4)
    ]
    return [
        *widths({"GQ": GQConfig}, trained=True),
        Variant("GQ, 4 bits, some layers 1 bit", mixed, group="GQ, mixed"),
        *widths(UNTRAINED, trained=False),
        *widths(rivals, trained=True),
        *torchao,
    ]


#: What is changed in GQConfig, and in training, one thing at a time.
CHANGES: dict[str, tuple[dict, dict[str, str]]] = {
    "as by default": ({}, {}),
    "soft forward": ({"forward": "soft"}, {}),
    "straight-through 0": ({"straight_through": 0.0}, {}),
    "straight-through 0.3": ({"straight_through": 0.3}, {}),
    "straight-through 1": ({"straight_through": 1.0}, {}),
    "hardness 2 to 64": ({}, {"hardness": "2,64"}),
    "hardness 1 to 4": ({}, {"hardness": "1,4"}),
    "hardness 4, constant": ({}, {"hardness": "4,4"}),
    "mu 0, uniform": ({"mu": 0.0}, {}),
    "mu 15": ({"mu": 15.0}, {}),
    "mu 255": ({"mu": 255.0}, {}),
    "mu learned": ({"learn_mu": True}, {}),
    "one scale per tensor": ({"granularity": "tensor"}, {}),
    "centroids fixed": ({"learn_centroids": False}, {}),
    "int8 codebook": ({"codebook": "int8"}, {}),
    "fp8 codebook": ({"codebook": "fp8"}, {}),
    "quantized every 4th step": ({"requantize_every": 4}, {}),
    "centroids trained every 4th step": ({"centroid_interval": 4}, {}),
    "learning rate halved": ({}, {"learning_rate": "1.5e-4"}),
    "learning rate tripled": ({}, {"learning_rate": "9e-4"}),
    "learning rate of quantizers tripled": ({}, {"quantizer_learning_rate": "9e-4"}),
}


#: At one bit, two centroids at the ends of a scale: these change nothing.
NOTHING_AT_ONE_BIT = {"centroids fixed", "int8 codebook", "fp8 codebook", "centroids trained every 4th step"}


def ablations(*bits: int) -> list[Variant]:
    """Every change at every width where it is one."""
    return [
        Variant(f"{bits_of(width)}, {name}", {"*": GQConfig(bits=width, **changes)}, settings=settings, group=name)
        for name, (changes, settings) in CHANGES.items()
        for width in bits
        if width > 1 or name not in NOTHING_AT_ONE_BIT
    ]


STUDIES = {
    "an4-rnnt": Study(
        "What does quantizing every weight of an LSTM transducer cost in word errors?",
        "rnnt",
        recipe_of("an4"),
        variants(
            linear=("joint.*",),
            one_bit=("encoder.layers.[12].weight_hh*", "predictor.lstm.weight_hh*"),
        ),
    ),
    "an4-conformer": Study(
        "What does quantizing every weight of a Conformer (CTC) cost in word errors?",
        "conformer",
        replace(recipe_of("an4", "conformer"), sizes={"predictor_layers": 0}, beam_width=1),
        variants(
            linear=("*.before.*", "*.after.*", "*.attention.*", "*.convolution.*put", "encoder.input", "output"),
            one_bit=("encoder.blocks.1.before.*", "encoder.blocks.1.after.*"),
        ),
    ),
    "an4-ablation": Study(
        "Which settings of the General Quantizer matter, and at which widths?",
        "rnnt",
        recipe_of("an4"),
        ablations(4, 2, 1),
        measured=(0,),
    ),
}
