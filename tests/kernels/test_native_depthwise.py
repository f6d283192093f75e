"""Depthwise convolution of the native library."""

import pytest
import torch
from panels import CODEBOOKS, Panels

from gq_triton.kernels import native
from gq_triton.kernels import packed_conv as pc

pytestmark = pytest.mark.skipif(not native.available(), reason="no native library")


class Problem:
    def __init__(
        self,
        rows=37,
        taps=5,
        length=50,
        batch=2,
        stride=1,
        padding=2,
        dilation=1,
        bits=4,
        codebook=torch.int8,
        bias=True,
    ):
        self.weight = Panels(rows, taps, bits, codebook)
        self.x = torch.randn(batch, length, rows)
        self.bias = torch.randn(rows) if bias else None
        self.options = stride, padding, dilation
        self.length = pc.output_length(length, taps, stride, padding, dilation)

    def run(self, threads=1):
        """The output, for which there is room in the middle of a larger array."""
        batch, _, rows = self.x.shape
        room = torch.full((batch * self.length * rows + 64,), torch.nan)
        out = room[32:-32].view(batch, self.length, rows)
        native.depthwise_conv1d(self.x, self.weight.weight, self.bias, out, *self.options, threads)
        assert room[:32].isnan().all() and room[-32:].isnan().all()
        return out

    def reference(self):
        weight, taps = self.weight, self.weight.matrix.shape[1]
        arguments = weight.planes, weight.codebook, weight.scale, self.bias, weight.bits, taps
        return pc.reference(self.x.mT, *arguments, *self.options).mT

    def check(self, **options):
        torch.testing.assert_close(self.run(**options).double(), self.reference(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_matches_the_reference(bits, codebook, isa):
    Problem(bits=bits, codebook=codebook).check()


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 48])
@pytest.mark.parametrize("taps, padding", [(1, 0), (31, 15), (33, 40)])
def test_channels_and_taps(rows, taps, padding):
    Problem(rows, taps, padding=padding).check()


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 4])
def test_stride_and_dilation(stride, dilation, isa):
    Problem(length=64, stride=stride, dilation=dilation, padding=3).check()


def test_long_sequences_take_several_windows(isa):
    Problem(length=1500, taps=31, padding=15).check()
    Problem(length=1500, taps=31, padding=15, stride=2).check()


def test_kernels_wider_than_a_window():
    Problem(length=1300, taps=600, padding=10, batch=1).check()
    Problem(length=1300, taps=3, dilation=500, padding=100, stride=7).check()


def test_a_stride_wider_than_a_window():
    Problem(length=1300, taps=3, stride=600, padding=0).check()


def test_without_bias_and_with_one_scale():
    problem = Problem(bias=False)
    problem.check()


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_change_nothing(threads):
    problem = Problem(rows=70, taps=31, length=300, batch=3)  # large enough for some
    assert torch.equal(problem.run(threads), problem.run())


def test_one_output_and_none():
    Problem(length=5, padding=0).check()
    assert Problem(batch=0).run().shape == (0, 50, 37)


def test_taps_of_no_channels_take_no_memory():
    taps, nothing, empty = (1 << 31) - 1, torch.empty(0, dtype=torch.uint8), torch.empty(1, 1, 0)
    weight = native.Weight(nothing, torch.zeros(16), torch.empty(0), 4, 0, taps)
    native.depthwise_conv1d(empty, weight, None, empty, padding=taps // 2)


def test_not_a_number_stays_in_its_windows():
    problem = Problem(taps=3, padding=1)
    problem.x[1, 20, 5] = torch.nan
    wrong = problem.run().isnan()
    assert wrong[1, 19:22, 5].all() and wrong.sum() == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stride": 0}, "stride must be from 1"),
        ({"padding": -1}, "padding must be from 0"),
        ({"dilation": 0}, "dilation must be from 1"),
        ({"dilation": 50}, "length with its padding must be at least the 201 that the kernel spans, got 54"),
        ({"threads": 0}, "threads must be from 1"),
        ({"x": torch.zeros(2, 50, 36)}, "x must have 3700 elements, got 3600"),
        ({"out": torch.zeros(2, 49, 37)}, "y must have 3700 elements, got 3626"),
        ({"bias": torch.zeros(36)}, "bias must have 37 elements, got 36"),
    ],
)
def test_arguments_that_are_refused(changes, message):
    problem = Problem()
    arguments = {"x": problem.x, "weight": problem.weight.weight, "bias": None, "out": torch.zeros(2, 50, 37)}
    with pytest.raises(ValueError, match=message):
        native.depthwise_conv1d(**(arguments | {"padding": 2} | changes))
