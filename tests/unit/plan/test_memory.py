"""Buffers fit the ceiling."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from streammerge.adapters.terms import Factor, Region
from streammerge.checkpoint.header import StoredTensor
from streammerge.config.tuning import KIB, MIB, ComputeTuning
from streammerge.dtypes import Dtype
from streammerge.errors import MemoryBudgetError
from streammerge.plan.layout import lay_out
from streammerge.plan.memory import (
    BASELINE_BYTES,
    FACTOR_BYTES,
    MARGIN_BYTES,
    MIN_SLAB_BYTES,
    MIN_SLAB_COUNT,
    SCRATCH_BUFFERS,
    SPARE_SLABS,
    TENSOR_RECORD_BYTES,
    TUNER_BUFFERS,
    RunShape,
    plan_memory,
)
from streammerge.plan.ops import (
    ApplyTerms,
    BiasTerm,
    CopyBytes,
    LoraTerm,
    TensorPlan,
    TunerTerm,
)
from streammerge.plan.tiles import Block, cut_shard, factor_bytes, shared_factor_bytes

if TYPE_CHECKING:
    from streammerge.plan.ops import Term

HUGE = 10**13
# the defaults are what was measured last
SHAPE = RunShape(compute=ComputeTuning(((1 << 30, KIB << 9),)))


def stored(name: str, dtype: Dtype, *shape: int) -> StoredTensor:
    return StoredTensor(name, dtype, shape, Path("x"), 0)


def copied(*shape: int, dtype: Dtype = Dtype.BF16) -> TensorPlan:
    return TensorPlan("copy", dtype, stored("copy", dtype, *shape), CopyBytes(), "copied")


def lora(a: Factor, b: Factor, **options: Any) -> LoraTerm:
    return LoraTerm(a, b, 1.0, **{"is_transposed": False, "rounds_delta": False, **options})


def merged(
    rows: int, columns: int, rank: int, *, work: Dtype = Dtype.BF16, out: Dtype | None = None
) -> TensorPlan:
    term = lora(
        Factor(stored("a", Dtype.F32, rank, columns)), Factor(stored("b", Dtype.F16, rows, rank))
    )
    return target(term, rows, columns, work=work, out=out)


def target(*terms: Term | int, work: Dtype = Dtype.BF16, out: Dtype | None = None) -> TensorPlan:
    """A target of terms, with the shape after them."""
    shape = [part for part in terms if isinstance(part, int)]
    op = ApplyTerms(work, tuple(part for part in terms if not isinstance(part, int)))
    return TensorPlan("w", out or work, stored("w", work, *shape), op, "merged")


def experts(count: int, rows: int, columns: int, rank: int) -> TensorPlan:
    """A fused tensor of which every expert has its part of the factors."""
    a = stored("a", Dtype.BF16, count * rank, columns)
    b = stored("b", Dtype.BF16, rows, count * rank)
    terms = [
        lora(
            Factor(a, rows=range(n * rank, (n + 1) * rank)),
            Factor(b, columns=range(n, count * rank, count)),
            region=Region(range(n * rows, (n + 1) * rows), range(columns)),
        )
        for n in range(count)
    ]
    return target(*terms, count, rows, columns)


@dataclass(frozen=True, slots=True)
class Working(TunerTerm):
    """A term that needs room."""

    tensor: StoredTensor
    nbytes: int = 0

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        return (self.tensor,)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        return self.nbytes * prod(shape)

    def apply(self, rows: Any, begin: int, state: Any) -> Any:
        return rows


def working(rows: int, columns: int, nbytes: int) -> TensorPlan:
    return target(Working(stored("t", Dtype.F32, columns), nbytes), rows, columns)


TARGETS = st.builds(
    merged,
    st.integers(1, 300_000),
    st.integers(1, 20_000),
    st.integers(1, 512),
    work=st.sampled_from([Dtype.BF16, Dtype.F16, Dtype.F32, Dtype.F64]),
    out=st.sampled_from([None, Dtype.BF16, Dtype.F32]),
)
SHAPES = st.builds(
    RunShape,
    workers=st.integers(1, 40),
    readers=st.integers(1, 16),
    writers=st.integers(1, 16),
    block_bytes=st.sampled_from([64 * KIB, MIB, 3 * MIB, 8 * MIB, 64 * MIB]),
    compute=st.sampled_from([ComputeTuning(), ComputeTuning(((1 << 30, 64 * KIB),))]),
)
OTHERS = st.one_of(
    st.builds(
        experts, st.integers(1, 9), st.integers(1, 900), st.integers(1, 900), st.integers(1, 64)
    ),
    st.builds(working, st.integers(1, 9000), st.integers(1, 9000), st.integers(0, 8)),
)
PLANS = st.lists(st.one_of(TARGETS, OTHERS, st.builds(copied, st.integers(0, 10**9))), max_size=5)


def test_copies_alone_need_the_smallest_buffers() -> None:
    shape = RunShape(readers=3, writers=4, block_bytes=5 * MIB)
    plan = plan_memory([copied(10**6)] * 3, max_memory=HUGE, shape=shape)
    count = 1 + 3 + 4 + SPARE_SLABS
    assert (plan.slab_bytes, plan.slab_count, plan.workers) == (5 * MIB, count, 1)
    assert plan.scratch_bytes == plan.factor_bytes == plan.shared_factor_bytes == 0
    fixed = BASELINE_BYTES + MARGIN_BYTES + 3 * TENSOR_RECORD_BYTES
    assert plan.predicted_peak_bytes == fixed + 5 * MIB * (count + 1)
    assert plan.least_bytes == fixed + MIN_SLAB_BYTES * (MIN_SLAB_COUNT + 1)


def test_a_target_is_counted_to_the_byte() -> None:
    shape = replace(SHAPE, workers=3)
    plan = plan_memory([merged(100, 50_000, 8)], max_memory=HUGE, baseline=1000, shape=shape)
    # as stored, and of what is stored in another dtype in the compute dtype
    factors = 8 * 50_000 * 4 + 8 * 100 * (2 + 4)
    slab = 8 * 50_000 * 2 + -(8 * 50_000 * 2) % 4096
    assert plan.factor_bytes == max(2 * factors, FACTOR_BYTES)
    assert plan.scratch_bytes == max(KIB << 9, 8 * 50_000 * 4)
    assert plan.workers == 3
    assert plan.shared_factor_bytes == 0
    # the tensor, its term, and two factors
    fixed = 1000 + MARGIN_BYTES + 4 * TENSOR_RECORD_BYTES
    assert plan.predicted_peak_bytes == (
        fixed
        + shape.block_bytes * (shape.slab_count + 1)
        + 3 * SCRATCH_BUFFERS * plan.scratch_bytes
        + plan.factor_bytes
    )
    assert plan.least_bytes == (
        fixed + slab * (MIN_SLAB_COUNT + 1) + SCRATCH_BUFFERS * 8 * 50_000 * 4 + 2 * factors
    )


def test_fp64_targets_compute_in_eight_bytes() -> None:
    wide = plan_memory([merged(100, 50_000, 8, work=Dtype.F64)], max_memory=HUGE, shape=SHAPE)
    assert wide.scratch_bytes == 8 * 50_000 * 8
    narrow = plan_memory([merged(100, 50_000, 8, work=Dtype.F32)], max_memory=HUGE, shape=SHAPE)
    assert narrow.scratch_bytes == 8 * 50_000 * 4


def test_scratch_is_what_the_tuning_says_for_the_highest_rank() -> None:
    compute = ComputeTuning(((8, 3 * MIB), (64, 5 * MIB), (1 << 30, 7 * MIB)))
    for rank, expected in ((1, 3), (8, 3), (9, 5), (64, 5), (65, 7), (1000, 7)):
        plan = plan_memory(
            [merged(100, 10, 1), merged(100, 10, rank)],
            max_memory=HUGE,
            shape=RunShape(compute=compute),
        )
        assert plan.scratch_bytes == expected * MIB


def test_a_scalar_and_a_bias_are_targets_too() -> None:
    scalar = TensorPlan("s", Dtype.BF16, stored("s", Dtype.F32), ApplyTerms(Dtype.F32, ()), "cast")
    bias = TensorPlan(
        "b",
        Dtype.BF16,
        stored("b", Dtype.BF16, 64),
        ApplyTerms(Dtype.BF16, (BiasTerm(stored("v", Dtype.F32, 64), 1.0),)),
        "merged",
    )
    plan = plan_memory([scalar, bias], max_memory=HUGE, shape=SHAPE)
    assert plan.scratch_bytes == KIB << 9
    assert plan.factor_bytes == FACTOR_BYTES
    least = plan_memory([scalar, bias], max_memory=plan.least_bytes)
    assert least.factor_bytes == 2 * 64 * 4
    assert least.scratch_bytes == 8 * 4


def test_records_grow_with_the_number_of_tensors() -> None:
    few, many = (plan_memory([copied(1)] * n, max_memory=HUGE) for n in (10, 1010))
    assert many.least_bytes - few.least_bytes == 1000 * TENSOR_RECORD_BYTES


@given(PLANS, SHAPES, st.floats(0, 1))
def test_prediction_never_exceeds_a_possible_ceiling(
    tensors: list[TensorPlan], shape: RunShape, share: float
) -> None:
    most = plan_memory(tensors, max_memory=HUGE, shape=shape)
    budget = most.least_bytes + int(share * (most.predicted_peak_bytes - most.least_bytes))
    plan = plan_memory(tensors, max_memory=budget, shape=shape)
    assert plan.predicted_peak_bytes <= budget
    assert plan.least_bytes == most.least_bytes
    assert plan.slab_count >= MIN_SLAB_COUNT
    assert 1 <= plan.workers <= shape.workers
    assert plan.predicted_peak_bytes == (
        BASELINE_BYTES
        + MARGIN_BYTES
        + TENSOR_RECORD_BYTES * sum(map(records, tensors))
        + plan.slab_bytes * (plan.slab_count + 1)
        + plan.workers * buffers(tensors) * plan.scratch_bytes
        + plan.factor_bytes
        + plan.shared_factor_bytes
    )


def records(tensor: TensorPlan) -> int:
    return 1 + len(tensor.terms) + len({f for term in tensor.terms for f in term.factors})


def buffers(tensors: list[TensorPlan]) -> int:
    """Of the size of a product, per worker: more where a tuner brings its own arithmetic."""
    has_tuner = any(isinstance(term, TunerTerm) for t in tensors for term in t.terms)
    return SCRATCH_BUFFERS + (TUNER_BUFFERS if has_tuner else 0)


@given(PLANS, SHAPES, st.integers(0, 2 * 10**9), st.integers(0, 2 * 10**9))
def test_more_memory_never_gives_smaller_buffers(
    tensors: list[TensorPlan], shape: RunShape, one: int, other: int
) -> None:
    least = plan_memory(tensors, max_memory=HUGE, shape=shape).least_bytes
    low, high = (
        plan_memory(tensors, max_memory=least + n, shape=shape) for n in sorted((one, other))
    )
    assert low.predicted_peak_bytes <= high.predicted_peak_bytes
    assert low.slab_bytes <= high.slab_bytes
    assert low.slab_count <= high.slab_count
    assert low.scratch_bytes <= high.scratch_bytes
    assert low.factor_bytes <= high.factor_bytes
    assert low.shared_factor_bytes <= high.shared_factor_bytes
    assert low.workers <= high.workers


@given(PLANS, SHAPES)
def test_least_bytes_is_the_edge(tensors: list[TensorPlan], shape: RunShape) -> None:
    least = plan_memory(tensors, max_memory=HUGE, shape=shape).least_bytes
    plan = plan_memory(tensors, max_memory=least, shape=shape)
    assert plan.predicted_peak_bytes == least
    assert (plan.workers, plan.slab_count) == (1, MIN_SLAB_COUNT)
    with pytest.raises(MemoryBudgetError):
        plan_memory(tensors, max_memory=least - 1, shape=shape)


def test_what_a_run_would_like_does_not_raise_the_least() -> None:
    tensors = [merged(5000, 1000, 8), copied(10**6)]
    small, large = (
        plan_memory(tensors, max_memory=HUGE, shape=shape)
        for shape in (RunShape(), RunShape(64, 16, 16, 64 * MIB))
    )
    assert small.least_bytes == large.least_bytes
    assert small.predicted_peak_bytes < large.predicted_peak_bytes


def test_a_plan_that_the_baseline_holds_is_not_counted_twice() -> None:
    tensors = [copied(1)] * 1000
    with_plan = plan_memory(tensors, max_memory=HUGE, baseline_holds_plan=True)
    without = plan_memory(tensors, max_memory=HUGE)
    assert without.least_bytes - with_plan.least_bytes == 1000 * TENSOR_RECORD_BYTES


@given(PLANS, st.integers(1, 10**8))
def test_the_error_names_a_ceiling_that_works(tensors: list[TensorPlan], budget: int) -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        plan_memory(tensors, max_memory=budget)
    number = re.fullmatch(r"at least (\d+)MB", str(caught.value.expected))
    assert number is not None
    named = int(number[1]) * 10**6
    assert plan_memory(tensors, max_memory=named).predicted_peak_bytes <= named
    assert caught.value.hint == f"set max_memory: {number[1]}MB or more"
    with pytest.raises(MemoryBudgetError):
        plan_memory(tensors, max_memory=named - 10**6)


@given(PLANS)
def test_every_block_fits_the_least_slab(tensors: list[TensorPlan]) -> None:
    least = plan_memory(tensors, max_memory=HUGE).least_bytes
    plan = plan_memory(tensors, max_memory=least)
    targets = [t for t in tensors if isinstance(t.op, ApplyTerms) and t.nbytes < 10**9]
    for shard in lay_out(targets, max_shard_bytes=1, layout="torch_bin"):
        blocks = cut_shard(
            shard, slab_bytes=plan.slab_bytes, max_factor_bytes=plan.factor_bytes // 2
        )
        for block in islice(blocks, 20):
            assert_fits(block, plan.slab_bytes)
            # no target needs more than its half
            assert all(2 * factor_bytes(t.target) <= plan.factor_bytes for t in block.tiles)


def assert_fits(block: Block, slab_bytes: int) -> None:
    assert block.nbytes <= slab_bytes
    assert all(segment.at + segment.nbytes <= slab_bytes for segment in block.segments)


# factors


@pytest.mark.parametrize(
    ("factor", "work", "nbytes"),
    [
        # used as it is stored
        ({"dtype": Dtype.F32}, Dtype.BF16, 40 * 4),
        ({"dtype": Dtype.F64}, Dtype.F64, 40 * 8),
        # stored, and converted
        ({"dtype": Dtype.BF16}, Dtype.BF16, 40 * (2 + 4)),
        ({"dtype": Dtype.F32}, Dtype.F64, 40 * (4 + 8)),
        ({"dtype": Dtype.F64}, Dtype.F32, 40 * (8 + 4)),
        # no more than the part that is used
        ({"dtype": Dtype.F32, "rows": range(1)}, Dtype.BF16, 10 * (4 + 4)),
        ({"dtype": Dtype.BF16, "columns": range(0, 10, 2)}, Dtype.F64, 20 * (2 + 8)),
        # what is spread is there beside what comes of it
        ({"dtype": Dtype.F32, "column_repeats": 3}, Dtype.BF16, 40 * 4 + 2 * 120 * 4),
        ({"dtype": Dtype.F32, "diagonal_blocks": 2}, Dtype.BF16, 40 * 4 + 2 * 80 * 4),
        ({"dtype": Dtype.F32, "gain": 0.5}, Dtype.BF16, 40 * 4 + 2 * 40 * 4),
    ],
)
def test_a_factor_is_counted_as_it_is_used(
    factor: dict[str, Any], work: Dtype, nbytes: int
) -> None:
    options = dict(factor)
    a = Factor(stored("a", options.pop("dtype"), 4, 10), **options)
    exact = Dtype.F64 if work is Dtype.F64 else Dtype.F32
    b = Factor(stored("b", exact, 6, a.shape[0]))
    tensor = target(lora(a, b), 6, a.shape[1], work=work)
    assert factor_bytes(tensor) == nbytes + b.tensor.nbytes
    assert shared_factor_bytes(tensor) == 0


def test_a_factor_of_several_terms_is_read_once() -> None:
    a, b = Factor(stored("a", Dtype.BF16, 2, 10)), Factor(stored("b", Dtype.F32, 6, 2))
    one = target(lora(a, b), 6, 10)
    two = target(lora(a, b), lora(a, b), 6, 10)
    # but each term converts it
    assert factor_bytes(two) - factor_bytes(one) == 2 * 10 * 4


def test_what_a_term_needs_besides_is_counted() -> None:
    magnitude = stored("m", Dtype.F32, 10)
    a, b = Factor(stored("a", Dtype.F32, 2, 6)), Factor(stored("b", Dtype.F32, 10, 2))
    dora = lora(a, b, is_transposed=True, magnitude=magnitude)
    tensor = target(dora, 6, 10)
    assert factor_bytes(tensor) == 4 * (12 + 20 + 10) + dora.work_bytes((6, 10))
    assert dora.work_bytes((6, 10)) > 0
    assert factor_bytes(working(6, 10, 3)) == 10 * 4 + 3 * 60
    least = plan_memory([working(6, 10, 3)], max_memory=HUGE).least_bytes
    most = plan_memory([working(6, 10, 300)], max_memory=HUGE).least_bytes
    assert most - least == 2 * 297 * 60


def test_integer_factors_are_never_converted_beyond_their_size() -> None:
    term = Working(stored("indices", Dtype.I64, 10))
    assert factor_bytes(target(term, 6, 10)) <= 10 * (8 + 4)
    assert factor_bytes(target(term, 6, 10, work=Dtype.F64)) == 10 * 8


def test_stored_factors_that_targets_share_are_kept_for_two() -> None:
    tensor = experts(4, 30, 20, 2)
    for part in tensor.parts():
        # the columns of B lie far apart; of A and B no more is read and converted than one expert's
        assert shared_factor_bytes(part) == 2 * 30 * 8
        assert factor_bytes(part) == (2 + 4) * (2 * 20 + 30 * 2)
    plan = plan_memory([tensor, merged(30, 20, 2)], max_memory=HUGE)
    assert plan.shared_factor_bytes == 2 * 2 * 30 * 8
    least = plan_memory([tensor, merged(30, 20, 2)], max_memory=plan.least_bytes)
    assert least.shared_factor_bytes == 0


def test_one_expert_of_factors_for_all_shares_them() -> None:
    a = stored("a", Dtype.F32, 8, 20)
    b = stored("b", Dtype.F32, 30, 8)
    one = target(lora(Factor(a, rows=range(2)), Factor(b, columns=range(0, 8, 4))), 30, 20)
    assert shared_factor_bytes(one) == b.nbytes
    assert factor_bytes(one) == (4 + 4) * (2 * 20 + 30 * 2)


def test_tuners_have_more_room_to_work_in() -> None:
    plain = plan_memory([merged(100, 1000, 8)], max_memory=HUGE, shape=SHAPE)
    tuner = plan_memory([working(100, 1000, 0)], max_memory=HUGE, shape=SHAPE)
    assert plain.scratch_bytes == tuner.scratch_bytes
    shape = replace(SHAPE, workers=5)
    more = plan_memory([working(100, 1000, 0)], max_memory=HUGE, shape=shape)
    slabs = (shape.slab_count - SHAPE.slab_count) * SHAPE.block_bytes
    room = 4 * (SCRATCH_BUFFERS + TUNER_BUFFERS) * tuner.scratch_bytes
    assert more.predicted_peak_bytes - tuner.predicted_peak_bytes == slabs + room


def test_tiles_of_fused_experts_are_small_and_those_of_convolutions_whole() -> None:
    fused = experts(8, 4000, 3000, 2)
    least = plan_memory([fused], max_memory=HUGE).least_bytes
    small = plan_memory([fused], max_memory=least)
    # eight rows of one expert, not of all of them
    assert small.scratch_bytes == 8 * 3000 * 4
    assert small.slab_bytes == MIN_SLAB_BYTES
    a, b = Factor(stored("a", Dtype.F32, 2, 90)), Factor(stored("b", Dtype.F32, 40, 2))
    convolution = target(lora(a, b), 40, 10, 3, 3)
    least = plan_memory([convolution], max_memory=HUGE).least_bytes
    assert plan_memory([convolution], max_memory=least).scratch_bytes == 8 * 90 * 4


def test_a_huge_embedding_fits_a_small_ceiling() -> None:
    embedding = merged(256_000, 16_384, 8, work=Dtype.F32)
    plan = plan_memory([embedding], max_memory=400 * 10**6)
    assert embedding.nbytes > 16 * 10**9
    assert plan.predicted_peak_bytes <= 400 * 10**6
    (shard,) = lay_out([embedding], max_shard_bytes=None, layout="safetensors")
    for block in cut_shard(
        shard, slab_bytes=plan.slab_bytes, max_factor_bytes=plan.factor_bytes // 2
    ):
        assert_fits(block, plan.slab_bytes)
