"""Terms as records: what they read, their shapes, their weights, what they need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from streammerge.adapters.terms import BiasTerm, Factor, LoraTerm, Region, TunerTerm
from streammerge.adapters.tuners.trainable_tokens import RowsTerm
from streammerge.checkpoint.header import StoredTensor
from streammerge.dtypes import Dtype
from streammerge.errors import PlanError

if TYPE_CHECKING:
    import torch


def stored(name: str, *shape: int) -> StoredTensor:
    return StoredTensor(name, Dtype.F32, shape, Path("x"), 0)


A, B = stored("a", 2, 6), stored("b", 4, 2)
MAGNITUDE, GAIN = stored("m", 4), stored("d", 2)


def lora(**options: Any) -> LoraTerm:
    defaults = {"scaling": 0.5, "is_transposed": False, "rounds_delta": False}
    return LoraTerm(Factor(A), Factor(B), **{**defaults, **options})


@dataclass(frozen=True, slots=True)
class Plain(TunerTerm):
    """The least that a tuner's term is."""

    tensor: StoredTensor = A

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        return (self.tensor,)

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        return rows


@pytest.mark.parametrize(
    ("factor", "shape"),
    [
        (Factor(A), (2, 6)),
        (Factor(stored("flat", 5)), (5, 1)),
        (Factor(stored("conv", 3, 2, 5, 7)), (3, 70)),
        (Factor(A, rows=range(1, 2)), (1, 6)),
        (Factor(A, columns=range(0, 6, 4)), (2, 2)),
        (Factor(stored("a", 12, 10), rows=range(2, 8), columns=range(1, 10, 3)), (6, 3)),
        (Factor(A, diagonal_blocks=2), (2, 12)),
        (Factor(A, column_repeats=3), (2, 18)),
        (Factor(A, columns=range(2), diagonal_blocks=2, column_repeats=3), (2, 12)),
        (Factor(A, rows=range(0)), (0, 6)),
        (Factor(A, gain=0.25), (2, 6)),
    ],
)
def test_the_shape_of_a_factor_is_that_of_its_matrix(
    factor: Factor, shape: tuple[int, int]
) -> None:
    assert factor.shape == shape


@pytest.mark.parametrize(
    ("options", "is_part", "is_whole"),
    [
        ({}, False, True),
        ({"rows": range(1)}, True, False),
        ({"columns": range(1)}, True, False),
        # all of the rows are not known to be all without a look at the tensor
        ({"rows": range(2)}, True, False),
        ({"diagonal_blocks": 2}, False, False),
        ({"column_repeats": 2}, False, False),
        ({"gain": 2.0}, False, False),
    ],
)
def test_a_part_of_a_factor_is_told_from_the_whole(
    options: dict[str, Any], is_part: bool, is_whole: bool
) -> None:
    factor = Factor(A, **options)
    assert (factor.is_part, factor.is_whole) == (is_part, is_whole)


def test_a_lora_reads_its_factors_and_vectors() -> None:
    assert lora().factors == (A, B)
    assert lora(magnitude=MAGNITUDE).factors == (A, B, MAGNITUDE)
    assert lora(gain=GAIN).factors == (A, B, GAIN)
    assert lora(magnitude=MAGNITUDE, gain=GAIN).factors == (A, B, MAGNITUDE, GAIN)
    assert BiasTerm(MAGNITUDE, 1.0).factors == (MAGNITUDE,)


def test_the_rank_is_that_of_the_part() -> None:
    assert lora().rank == 2
    part = replace(lora(), a=Factor(A, rows=range(1)), b=Factor(B, columns=range(1)))
    assert part.rank == 1


@pytest.mark.parametrize("weight", [1.0, 0.75, -2.0, 0.0])
def test_a_weight_scales_what_is_added(weight: float) -> None:
    region = Region(range(4), range(6))
    for term in (lora(), lora(region=region), BiasTerm(MAGNITUDE, 0.5)):
        scaled = term.scaled(weight)
        assert term.is_additive
        assert scaled == replace(term, scaling=0.5 * weight)


def test_what_is_no_sum_takes_no_weight() -> None:
    rows = RowsTerm(A, (1, 3))
    for term in (lora(magnitude=MAGNITUDE), Plain(), rows):
        assert not term.is_additive
        assert term.scaled(1.0) == term
        with pytest.raises(PlanError, match="adapter_weights cannot be used with") as caught:
            term.scaled(0.5)
        assert "its result is not a sum" in caught.value.what


def test_only_a_transposed_dora_looks_at_the_whole_weight() -> None:
    for options, needs_scan in (
        ({}, False),
        ({"is_transposed": True}, False),
        ({"magnitude": MAGNITUDE}, False),
        ({"magnitude": MAGNITUDE, "is_transposed": True}, True),
    ):
        term = lora(**options)
        assert term.needs_scan is needs_scan
        # sums, norms and their quotients, in eight bytes
        assert term.work_bytes((6, 4)) == (3 * 8 * 4 if needs_scan else 0)
    assert BiasTerm(MAGNITUDE, 1.0).work_bytes((4,)) == 0


def test_a_tuner_s_term_needs_nothing_and_prepares_its_factors_by_default() -> None:
    term = Plain()
    assert term.work_bytes((6, 4)) == 0
    factors: list[torch.Tensor] = []
    weight: Any = None
    assert term.prepare(factors, weight) is factors


def test_terms_are_records() -> None:
    assert lora() == lora()
    assert hash(lora(region=Region(range(2), range(3)))) == hash(
        lora(region=Region(range(2), range(3)))
    )
    assert lora() != lora(rounds_delta=True)
    assert Plain() == Plain(A)
    assert Plain() != Plain(B)
