"""Fit a plan into a memory ceiling: the size of every buffer, decided before the first one exists.

Peak = interpreter and libraries + slabs (tiles on their way from read to write) + scratch (one
product in the compute dtype) + factors (the adapter tensors of the targets in flight). Nothing else
grows with the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from streammerge.dtypes import Dtype
from streammerge.errors import MemoryBudgetError
from streammerge.plan.ops import ApplyTerms
from streammerge.plan.tiles import MIN_TILE_ROWS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streammerge.plan.ops import TensorPlan

__all__ = ["BASELINE_BYTES", "FACTOR_SLOTS", "MemoryPlan", "plan_memory"]

MIB = 1 << 20
# interpreter, numpy and torch's CPU build after a first product: 236 MB of RSS (torch 2.13.0,
# x86-64), and what opening the inputs leaves behind
# x86-64)
BASELINE_BYTES = 245 * 10**6
# allocator slack, thread stacks, Python's own records of the run: 20 to 40 MB seen
MARGIN_BYTES = 48 * MIB
# of the plan itself in memory, per tensor of the output or of an adapter: 1.7 KB measured over
# 90,000 tensors of a base, 2.4 KB over 18,000 targets with two factors each
TENSOR_RECORD_BYTES = 2500
SLAB_BYTES = 16 * MIB
SLAB_COUNT = 6
MIN_SLAB_BYTES = 64 << 10
MIN_SLAB_COUNT = 3
# a product this large stays in the cache: 7.4 GB/s of BF16 weights read and written, against 6.5 at
# 2 MiB and 5.3 at 256 KiB (rank 16, 2048 columns, two threads of a Xeon, 2026-11)
SCRATCH_BYTES = MIB // 2
# targets whose factors are in memory: one in work, one being read
FACTOR_SLOTS = 2
# a product, a sum in the compute dtype, and a conversion on the way in and on the way out
SCRATCH_BUFFERS = 4


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes of the buffers of a run."""

    slab_bytes: int
    slab_count: int
    scratch_bytes: int
    """One product; a backend may hold `SCRATCH_BUFFERS` of this size."""
    factor_bytes: int
    """Adapter tensors of one target, as stored and in the compute dtype."""
    predicted_peak_bytes: int
    least_bytes: int
    """The smallest `max_memory` that would do."""


@dataclass(frozen=True, slots=True)
class _Needs:
    slab_bytes: int
    scratch_bytes: int
    factor_bytes: int
    record_bytes: int

    def total(self, *, slab_bytes: int, slab_count: int, baseline: int) -> int:
        # one slab more for the pages of a mapping while they are copied out of it
        buffers = slab_bytes * (slab_count + 1) + SCRATCH_BUFFERS * self.scratch_bytes
        factors = FACTOR_SLOTS * self.factor_bytes
        return baseline + MARGIN_BYTES + self.record_bytes + buffers + factors


def plan_memory(
    tensors: Iterable[TensorPlan],
    *,
    max_memory: int,
    baseline: int = BASELINE_BYTES,
    baseline_holds_plan: bool = False,
) -> MemoryPlan:
    """Choose the buffer sizes for a ceiling.

    Args:
        tensors: Every output tensor.
        max_memory: Ceiling on the resident memory of the whole process, in bytes.
        baseline: What the process holds before the run.
        baseline_holds_plan: Whether the plan's own records are part of the baseline.

    Raises:
        MemoryBudgetError: The ceiling is too low; the message says the least that works.
    """
    needs = _needs(tensors, baseline_holds_plan=baseline_holds_plan)
    least = needs.total(slab_bytes=needs.slab_bytes, slab_count=MIN_SLAB_COUNT, baseline=baseline)
    if max_memory < least:
        # rounded up, so that the number in the message works
        shown = -(-least // 10**6)
        raise MemoryBudgetError(
            "max_memory is too small for this merge",
            expected=f"at least {shown}MB",
            got=f"{max_memory / 10**6:.0f}MB",
            hint=f"set max_memory: {shown}MB or more",
        )
    slab_bytes, slab_count = max(SLAB_BYTES, needs.slab_bytes), SLAB_COUNT
    while needs.total(slab_bytes=slab_bytes, slab_count=slab_count, baseline=baseline) > max_memory:
        if slab_bytes > needs.slab_bytes:
            slab_bytes = max(slab_bytes // 2, needs.slab_bytes)
        else:
            slab_count -= 1
    return MemoryPlan(
        slab_bytes=slab_bytes,
        slab_count=slab_count,
        scratch_bytes=needs.scratch_bytes,
        factor_bytes=needs.factor_bytes,
        predicted_peak_bytes=needs.total(
            slab_bytes=slab_bytes, slab_count=slab_count, baseline=baseline
        ),
        least_bytes=least,
    )


def _needs(tensors: Iterable[TensorPlan], *, baseline_holds_plan: bool) -> _Needs:
    slab, scratch, factors, count = MIN_SLAB_BYTES, 0, 0, 0
    for tensor in tensors:
        count += 1 + sum(len(term.factors) for term in tensor.terms)
        if not isinstance(tensor.op, ApplyTerms):
            continue
        # a short tail joins the tile before it, so a tile may be a few rows longer than its size
        rows = min(2 * MIN_TILE_ROWS, tensor.shape[0] if tensor.shape else 1)
        columns = prod(tensor.shape[1:])
        widest = max(tensor.source.dtype.item_bytes, tensor.dtype.item_bytes)
        slab = max(slab, rows * columns * widest)
        compute = 8 if tensor.op.work_dtype is Dtype.F64 else 4
        scratch = max(scratch, SCRATCH_BYTES, rows * columns * compute)
        factors = max(factors, _factor_bytes(tensor, compute))
    slab += -slab % 4096
    records = 0 if baseline_holds_plan else count * TENSOR_RECORD_BYTES
    return _Needs(slab, scratch, factors, records)


def _factor_bytes(tensor: TensorPlan, compute: int) -> int:
    """Bytes of a target's factors, as stored and in the compute dtype."""
    factors = [factor for term in tensor.terms for factor in term.factors]
    return sum(factor.nbytes + prod(factor.shape) * compute for factor in factors)
