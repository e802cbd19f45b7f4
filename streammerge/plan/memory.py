"""Fit a plan into a memory ceiling: every buffer's size is decided before the first one exists.

Peak = interpreter and libraries + slabs (blocks on their way from read to write) + scratch
(products in the compute dtype, per worker) + factors (the adapter tensors of the targets in
flight). Nothing else grows with the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from streammerge.config.tuning import MIB, ComputeTuning
from streammerge.dtypes import Dtype
from streammerge.errors import MemoryBudgetError
from streammerge.plan.ops import ApplyTerms, TunerTerm, rank_of, unique_factors
from streammerge.plan.tiles import MIN_TILE_ROWS, factor_bytes, shared_factor_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streammerge.plan.ops import Encoding, TensorPlan

__all__ = ["BASELINE_BYTES", "MemoryPlan", "RunShape", "plan_memory"]

# interpreter, numpy and torch's CPU build after a first product: 236 MB of RSS (torch 2.13.0,
# x86-64), and what opening the inputs leaves behind
BASELINE_BYTES = 245 * 10**6
# allocator slack, thread stacks, Python's own records of the run: 20 to 40 MB seen
MARGIN_BYTES = 48 * MIB
# of the plan itself in memory, per tensor of the output or of an adapter: 1.7 KB measured over
# 90,000 tensors of a base, 2.4 KB over 18,000 targets with two factors each
TENSOR_RECORD_BYTES = 2500
MIN_SLAB_BYTES = 64 << 10
MIN_SLAB_COUNT = 3
# blocks that wait between two stages, so that none of them stops when another is late
SPARE_SLABS = 6
# factors of targets in flight: at least two of the largest targets, else as much as this
FACTOR_BYTES = 32 * MIB
# a product, a sum in the compute dtype, and a conversion on the way in and on the way out
SCRATCH_BUFFERS = 4
# what the arithmetic of other tuners allocates besides, at most
TUNER_BUFFERS = 6
# and what an encoder does: values in float32, their steps, and the codes in words
ENCODER_BUFFERS = 8


@dataclass(frozen=True, slots=True)
class RunShape:
    """How many threads a run wants, and the size of its blocks."""

    workers: int = 1
    """Threads that merge."""
    readers: int = 2
    writers: int = 2
    block_bytes: int = 8 * MIB
    compute: ComputeTuning = field(default_factory=ComputeTuning)

    @property
    def slab_count(self) -> int:
        """Blocks in flight: one with each thread, and some on their way."""
        return self.workers + self.readers + self.writers + SPARE_SLABS


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes of the buffers of a run."""

    slab_bytes: int
    slab_count: int
    workers: int
    scratch_bytes: int
    """One product; each worker may hold a few buffers of this size."""
    factor_bytes: int
    """Factors in memory at a time, as stored and in the compute dtype."""
    shared_factor_bytes: int
    """Stored factors that are kept because the next targets take other parts of them."""
    predicted_peak_bytes: int
    least_bytes: int
    """The smallest `max_memory` that would do."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    slab_bytes: int
    slab_count: int
    workers: int
    scratch_bytes: int
    scratch_buffers: int
    factor_bytes: int
    shared_factor_bytes: int

    def total(self) -> int:
        # one slab more for the pages of a mapping while they are copied out of it
        slabs = self.slab_bytes * (self.slab_count + 1)
        scratch = self.workers * self.scratch_buffers * self.scratch_bytes
        return slabs + scratch + self.factor_bytes + self.shared_factor_bytes


def plan_memory(
    tensors: Iterable[TensorPlan],
    *,
    max_memory: int,
    shape: RunShape | None = None,
    baseline: int = BASELINE_BYTES,
    baseline_holds_plan: bool = False,
) -> MemoryPlan:
    """Choose the buffer sizes for a ceiling.

    Args:
        tensors: Every output tensor.
        max_memory: Ceiling on the resident memory of the whole process, in bytes.
        shape: What the run would like to have; less of it is taken where memory is short.
        baseline: What the process holds before the run.
        baseline_holds_plan: Whether the plan's own records are part of the baseline.

    Raises:
        MemoryBudgetError: The ceiling is too low; the message says the least that works.
    """
    shape = shape or RunShape()
    count, least, wanted = _needs(tensors, shape)
    fixed = baseline + MARGIN_BYTES + (0 if baseline_holds_plan else count * TENSOR_RECORD_BYTES)
    least_bytes = fixed + least.total()
    if max_memory < least_bytes:
        # rounded up, so that the number in the message works
        shown = -(-least_bytes // 10**6)
        raise MemoryBudgetError(
            "max_memory is too small for this merge",
            expected=f"at least {shown}MB",
            got=f"{max_memory / 10**6:.0f}MB",
            hint=f"set max_memory: {shown}MB or more",
        )
    chosen = _shrink(wanted, least, room=max_memory - fixed)
    return MemoryPlan(
        slab_bytes=chosen.slab_bytes,
        slab_count=chosen.slab_count,
        workers=chosen.workers,
        scratch_bytes=chosen.scratch_bytes,
        factor_bytes=chosen.factor_bytes,
        shared_factor_bytes=chosen.shared_factor_bytes,
        predicted_peak_bytes=fixed + chosen.total(),
        least_bytes=least_bytes,
    )


def _shrink(sizes: _Sizes, least: _Sizes, *, room: int) -> _Sizes:
    """Give up what costs the least speed first, until it fits."""
    while sizes.total() > room:
        if sizes.slab_bytes > least.slab_bytes and sizes.slab_bytes > MIB:
            sizes = replace(sizes, slab_bytes=max(sizes.slab_bytes // 2, least.slab_bytes))
        elif sizes.factor_bytes > least.factor_bytes:
            sizes = replace(sizes, factor_bytes=max(sizes.factor_bytes // 2, least.factor_bytes))
        elif sizes.scratch_bytes > least.scratch_bytes:
            sizes = replace(sizes, scratch_bytes=max(sizes.scratch_bytes // 2, least.scratch_bytes))
        elif sizes.shared_factor_bytes > least.shared_factor_bytes:
            # what is not kept is read again for each target
            kept = sizes.shared_factor_bytes // 2
            sizes = replace(sizes, shared_factor_bytes=kept if kept > MIB else 0)
        elif sizes.slab_count > sizes.workers + MIN_SLAB_COUNT:
            sizes = replace(sizes, slab_count=sizes.slab_count - 1)
        elif sizes.workers > 1:
            sizes = replace(sizes, workers=sizes.workers - 1)
        elif sizes.slab_bytes > least.slab_bytes:
            sizes = replace(sizes, slab_bytes=max(sizes.slab_bytes // 2, least.slab_bytes))
        else:
            sizes = replace(sizes, slab_count=sizes.slab_count - 1)
    return sizes


def _step_of(encoding: Encoding) -> int:
    """Return the fewest rows that are encoded at a time."""
    return -(-MIN_TILE_ROWS // encoding.row_step) * encoding.row_step


def _needs(tensors: Iterable[TensorPlan], shape: RunShape) -> tuple[int, _Sizes, _Sizes]:
    """Return the number of records, the least sizes that work, and those wanted."""
    slab, scratch, wanted_scratch, largest, shared, count = MIN_SLAB_BYTES, 0, 0, 0, 0, 0
    buffers, extra = SCRATCH_BUFFERS, 0
    for whole in tensors:
        count += 1 + len(whole.terms) + len(unique_factors(whole.terms))
        for tensor in whole.parts():
            if not isinstance(tensor.op, ApplyTerms):
                continue
            # a short tail joins the tile before it, so a tile may be a few rows longer than its
            # size
            step = MIN_TILE_ROWS if tensor.encoding is None else _step_of(tensor.encoding)
            rows = min(step + MIN_TILE_ROWS, tensor.rows)
            widest = max(tensor.source.dtype.item_bytes, tensor.dtype.item_bytes)
            slab = max(slab, rows * tensor.columns * widest)
            compute = 8 if tensor.op.work_dtype is Dtype.F64 else 4
            scratch = max(scratch, rows * tensor.columns * compute)
            wanted_scratch = max(wanted_scratch, shape.compute.scratch_for(rank_of(tensor)))
            largest = max(largest, factor_bytes(tensor))
            shared = max(shared, shared_factor_bytes(tensor))
            if any(isinstance(term, TunerTerm) for term in tensor.terms):
                buffers = SCRATCH_BUFFERS + TUNER_BUFFERS
            if tensor.encoding is not None:
                extra = max(extra, ENCODER_BUFFERS)
    buffers += extra
    slab += -slab % 4096
    # of two targets at a time, so that one is loaded while the other is merged
    least = _Sizes(slab, MIN_SLAB_COUNT, 1, scratch, buffers, 2 * largest, 0)
    wanted = _Sizes(
        max(shape.block_bytes, slab),
        shape.slab_count,
        shape.workers,
        max(scratch, wanted_scratch),
        buffers,
        max(2 * largest, FACTOR_BYTES if largest else 0),
        # of two parameters at a time: those of a layer's experts take turns
        2 * shared,
    )
    return count, least, wanted
