"""How a run uses the machine: measured by `streammerge tune`, with defaults that are good without.

These values change the speed and the memory of a run, never its output.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["KIB", "MIB", "ComputeTuning", "DigestKind", "DiskTuning", "FileMode", "GpuTuning",
           "IoChoice", "KernelShape"]  # fmt: skip

KIB, MIB = 1 << 10, 1 << 20

FileMode = Literal["direct", "buffered", "mmap"]
DigestKind = Literal["xxh3-128", "sha256", "none"]


@dataclass(frozen=True, slots=True)
class DiskTuning:
    """How files on one disk are read and written."""

    read_mode: FileMode = "direct"
    write_mode: Literal["direct", "buffered"] = "direct"
    block_bytes: int = 8 * MIB
    """Bytes of one read or write."""
    readers: int = 2
    """Reads at the same time."""
    writers: int = 2
    """Writes at the same time."""


@dataclass(frozen=True, slots=True)
class ComputeTuning:
    """How tiles are merged."""

    # one thread alone is fastest with 1 MiB (1.3 ns per BF16 element at rank 16, 1.9 at 64), which
    # stays in its cache; but calls that short make two threads wait for the interpreter's lock: 1.9
    # and 2.5 with 1 MiB, 1.6 and 2.1 with 4 (4096 columns, a Xeon with AVX-512, 2026-11)
    scratch_bytes: tuple[tuple[int, int], ...] = ((64, 4 * MIB), (1 << 30, 4 * MIB))
    """Pairs of a highest rank and the bytes of one product up to it, in ascending order."""

    def scratch_for(self, rank: int) -> int:
        """Return the bytes of one product for a target of that rank."""
        return next(nbytes for highest, nbytes in self.scratch_bytes if rank <= highest)


@dataclass(frozen=True, slots=True)
class KernelShape:
    """Shape of a kernel's tile, and how many warps work on it."""

    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class GpuTuning:
    """How fast one kind of GPU is, and how its kernels are launched."""

    link_gbps: float
    """Bytes that go there while as many come back."""
    cpu_gbps: float
    """Bytes of weights that the CPU merges."""
    kernels: dict[str, KernelShape] = field(default_factory=dict)
    """By operation, width of the factors and highest rank, such as `merge half 16`; an operation
    that is not here has its own table.
    """


@dataclass(frozen=True, slots=True)
class IoChoice:
    """How one run reads and writes."""

    read_mode: FileMode = "buffered"
    write_mode: Literal["direct", "buffered"] = "buffered"
    readers: int = 1
    writers: int = 1
    digest: DigestKind = "xxh3-128"
