"""C3A: a delta of circulant blocks is added.

    W + C / K,  C[i * b + p, j * b + q] = k[i, j, (q - p) mod b]        k (N / b, K / b, b)

PEFT computes C by Fourier transforms: column (j, q) of row i is the real part of
`fft(ifft(e_q) * fft(k[i, j]))`, with unit vectors e_q. It differs from k in its last digits, so the
same is done here, one group of b rows at a time. Then C is rounded to W's dtype, divided by K, and
added.

A tile needs the transforms of its whole groups, whose rows are therefore kept: all of them if they
take less than 256 MiB, else the latest.

Paper: Chen et al. 2024, "Parameter-Efficient Fine-Tuning via Circular Convolution". Source:
peft.tuners.c3a (layer.py, utils.py). Shapes: N out_features, K in_features, b block size.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import ScaledTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import linear_size
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "C3a", "C3aTerm"]

KEPT_BYTES = 256 << 20
# unit vectors that are transformed at a time. torch multiplies complex numbers in another way if
# there are few products, which decides the last digits: these are few
FEW_VECTORS = 128
# ... and these are many
MANY_VECTORS = 512
FEW_PRODUCTS = 400
_EQUATION = "...nb,mnb->...mb"


@dataclass(slots=True)
class _Groups:
    """The rows of C, by groups of b."""

    kernels: torch.Tensor
    """(N / b, K / b, b): transformed."""
    dtype: torch.dtype
    """That C is kept in."""
    is_one_of_many: bool
    """Whether there is a single group, and many products to make it."""
    _kept: dict[int, torch.Tensor] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def rows(self, number: int) -> torch.Tensor:
        """Return the rows of a group (b, K)."""
        with self._lock:
            rows = self._kept.pop(number, None)
            if rows is None:
                limit = _kept_groups(self.kernels.shape)
                while len(self._kept) >= limit:
                    # the one that was asked for the longest time ago
                    self._kept.pop(next(iter(self._kept)))
                rows = self._made(number)
            self._kept[number] = rows
            return rows

    def _made(self, number: int) -> torch.Tensor:
        import torch  # noqa: PLC0415 (planning needs no torch)

        kernels = self.kernels[number]
        columns, block = kernels.shape
        rows = torch.empty(block, columns * block, dtype=self.dtype)
        step = _vectors_at_a_time(block, is_one_of_many=self.is_one_of_many)
        # PEFT sums over all blocks of a row, with zeros for all but one; two are as good as many
        summed = min(2, columns)
        kernel = kernels.new_zeros(1, summed, block)
        for first in range(0, block, step):
            units = torch.zeros(step, summed, block)
            count = min(step, block - first)
            units[:, 0].diagonal(first)[:count] = 1.0
            units = torch.fft.ifft(units)
            for column in range(columns):
                kernel[0, 0] = kernels[column]
                parts = torch.fft.fft(torch.einsum(_EQUATION, units, kernel)[:count, 0]).real
                at = column * block + first
                rows[:, at : at + count] = parts.T
        return rows


@dataclass(frozen=True, slots=True)
class C3aTerm(ScaledTerm):
    """Add a matrix of circulant blocks."""

    kernel: StoredTensor
    """(N / b, K / b, b)"""
    scaling: float = 1.0
    """The adapter's weight."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The kernel."""
        return (self.kernel,)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the transformed kernel, the groups that are kept, and one in work take."""
        del shape
        groups, columns, block = self.kernel.shape
        kernel = 3 * 8 * prod(self.kernel.shape)
        kept = _kept_groups(self.kernel.shape) * 4 * columns * block * block
        in_work = 8 * 8 * block * _vectors_at_a_time(block, is_one_of_many=groups == 1)
        return kernel + kept + in_work

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Transform the kernel."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        kernel = torch.fft.fft(factors[0].to(torch.float32))
        groups, columns, block = kernel.shape
        is_one_of_many = groups == 1 < columns and columns * columns * block >= FEW_PRODUCTS
        # a wider weight's C is float32 before it is converted
        is_narrow = weight.dtype.itemsize < torch.float32.itemsize
        dtype = weight.dtype if is_narrow else torch.float32
        return _Groups(kernel, dtype, is_one_of_many)

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Add the delta's rows."""
        block = self.kernel.shape[2]
        end = begin + len(rows)
        for number in range(begin // block, -(-end // block)):
            start = number * block
            first, last = max(begin, start), min(end, start + block)
            delta = state.rows(number)[first - start : last - start].to(rows.dtype)
            delta = delta / rows.shape[1]
            if self.scaling != 1.0:
                delta.mul_(self.scaling)
            rows[first - begin : last - begin].add_(delta)
        return rows


class C3a(Tuner):
    """`peft_type: C3A`."""

    peft_type = "C3A"
    title = "C3A"
    formula = "W + circulant blocks / in_features"
    factors = frozenset({"c3a_kernel"})
    options = frozenset({"block_size", "block_size_pattern"})
    is_additive = True

    def check(self, module: AdapterModule, settings: Any) -> None:
        """Check that the kernel has three dimensions, which say the size of the blocks.

        Raises:
            AdapterError: It has others.
        """
        del settings
        (kernel,) = module.need("c3a_kernel")
        if len(kernel.shape) != 3 or 0 in kernel.shape:
            raise AdapterError(
                "adapter tensor has no shape of circulant blocks",
                where=f"key '{kernel.name}' of {kernel.path}",
                expected="(out_features / b, in_features / b, b)",
                got=kernel.shape,
            )

    def plan(self, layer: Layer, settings: Any, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the sum.

        Raises:
            PlanError: It is of another size.
        """
        del settings, shared
        (kernel,) = layer.module.need("c3a_kernel")
        groups, columns, block = kernel.shape
        if (groups * block, columns * block) != linear_size(layer):
            raise layer.mismatch(f"{groups} times {columns} blocks of {block}")
        return [PlannedTerm("weight", C3aTerm(kernel))]

    def describe(self, module: AdapterModule, settings: Any) -> dict[str, Any]:
        """Give the size of the blocks and the delta's shape."""
        del settings
        (kernel,) = module.need("c3a_kernel")
        groups, columns, block = kernel.shape
        return {
            "block_size": block,
            "shape": [groups * block, columns * block],
            "dtype": kernel.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (C3a(),)


def _kept_groups(shape: tuple[int, ...]) -> int:
    """Return how many groups of rows are kept; two at least, as tiles in work lie in both."""
    groups, columns, block = shape
    return min(groups, max(2, KEPT_BYTES // (4 * columns * block * block)))


def _vectors_at_a_time(block: int, *, is_one_of_many: bool) -> int:
    return MANY_VECTORS if is_one_of_many else min(block, FEW_VECTORS)
