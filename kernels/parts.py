"""The GPUs that kernels are compiled for without being present, in figures of their makers.

NVIDIA: data sheets of A100 80 GB SXM, H100 SXM and B200 for processors, boost clock and bandwidth (B200's clock is not
published: an estimate); lanes per clock from the table of arithmetic throughput in the CUDA C++ Programming Guide
(B200's taken as H100's), shared memory and resident warps from its table of compute capabilities.  AMD: data sheet of
MI300X and the CDNA 3 instruction set manual; a clock of vector memory instructions is an estimate.
"""

from __future__ import annotations

import dataclasses

from gq_triton.kernels.machine_code import AMD, NVIDIA, InstructionSet

__all__ = ["LATENCY", "PARTS", "Part"]

LATENCY = 1e-6  # seconds from a request to its data while the memory is busy; an assumption, for every part


@dataclasses.dataclass(frozen=True)
class Part:
    """A GPU; a "processor" is NVIDIA's streaming multiprocessor or AMD's compute unit."""

    device: str
    target: tuple[str, int | str, int]  # arguments of triton's GPUTarget; the last is the lanes of a warp
    instructions: InstructionSet
    processors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second
    lanes: dict[str, int]  # lane-slots of a processor per clock, by unit
    registers: int  # of 32 bits, of a processor
    granule: int  # a warp gets registers in multiples of this
    warps: int  # resident on a processor at most
    blocks: int  # resident on a processor at most
    shared: int  # bytes of shared memory of a processor
    shared_limit: int  # bytes that a block may have of it
    shared_reserved: int  # bytes that the system takes of it for every block


# "issue" is one instruction per clock of each of the four schedulers; the others are units that a part of the
# instructions goes to: special functions and conversions; compare, select, logic and shifts ("integer"); floating-point
# and integer multiply-add; addresses or 128 bytes of loads and stores ("memory", without bank conflicts).
_NVIDIA_LANES = {"issue": 128, "special": 16, "integer": 64, "multiply": 128, "memory": 32}
_AMD_LANES = {"issue": 64, "memory": 16, "shared": 32}


def _nvidia(device: str, capability: int, processors: int, clock: float, bandwidth: float, shared: int) -> Part:
    target = ("cuda", capability, 32)
    sizes = {"registers": 1 << 16, "granule": 256, "warps": 64, "blocks": 32}
    memory = {"shared": shared << 10, "shared_limit": (shared - 1) << 10, "shared_reserved": 1 << 10}
    return Part(device, target, NVIDIA, processors, clock, bandwidth, _NVIDIA_LANES, **sizes, **memory)


def _amd(device: str, architecture: str, processors: int, clock: float, bandwidth: float) -> Part:
    target = ("hip", architecture, 64)
    sizes = {"registers": 1 << 17, "granule": 512, "warps": 32, "blocks": 32}
    memory = {"shared": 64 << 10, "shared_limit": 64 << 10, "shared_reserved": 0}
    return Part(device, target, AMD, processors, clock, bandwidth, _AMD_LANES, **sizes, **memory)


PARTS = {
    "sm_80": _nvidia("A100", 80, 108, 1.41e9, 2.04e12, 164),
    "sm_90": _nvidia("H100", 90, 132, 1.755e9, 3.35e12, 228),
    "sm_100": _nvidia("B200", 100, 148, 1.85e9, 8.0e12, 228),
    "gfx942": _amd("MI300X", "gfx942", 304, 2.1e9, 5.3e12),
}
