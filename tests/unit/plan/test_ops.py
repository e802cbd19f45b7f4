"""One output tensor as a record: its rows, and the parts of it that are merged by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from streammerge.adapters.terms import Factor, Region
from streammerge.checkpoint.header import StoredTensor
from streammerge.dtypes import Dtype
from streammerge.plan.ops import ApplyTerms, CopyBytes, LoraTerm, TensorPlan, rank_of

EXPERTS, ROWS, COLUMNS = 4, 6, 5
EVERY_ROW, EVERY_COLUMN = range(ROWS), range(COLUMNS)


def stored(*shape: int, dtype: Dtype = Dtype.BF16, offset: int = 0) -> StoredTensor:
    return StoredTensor("w", dtype, shape, Path("x"), offset)


def term(expert: int, rows: range = EVERY_ROW, columns: range = EVERY_COLUMN) -> LoraTerm:
    """A term on one expert's rows and columns, with factors of its own."""
    a, b = (
        StoredTensor(f"{letter}{expert}", Dtype.F32, (2, 2), Path("adapter"), 0) for letter in "ab"
    )
    start = expert * ROWS
    region = Region(range(start + rows.start, start + rows.stop), columns)
    return LoraTerm(
        Factor(a), Factor(b), 1.0, is_transposed=False, rounds_delta=True, region=region
    )


def fused(
    *terms: LoraTerm, source: Dtype = Dtype.BF16, work: Dtype = Dtype.BF16, out: Dtype = Dtype.BF16
) -> TensorPlan:
    whole = stored(EXPERTS, ROWS, COLUMNS, dtype=source, offset=1000)
    return TensorPlan("w", out, whole, ApplyTerms(work, terms), "merged")


def regions(part: TensorPlan) -> list[Region | None]:
    return [one.region for one in part.terms if isinstance(one, LoraTerm)]


def test_experts_are_merged_by_themselves() -> None:
    one = fused(term(1), term(3))
    parts = list(one.parts())
    assert [part.name for part in parts] == [f"w[{number}]" for number in range(EXPERTS)]
    nbytes = ROWS * COLUMNS * 2
    assert [part.source.offset for part in parts] == [1000 + n * nbytes for n in range(EXPERTS)]
    for number, part in enumerate(parts):
        assert part.shape == (ROWS, COLUMNS)
        assert (part.rows, part.columns) == (ROWS, COLUMNS)
        assert part.source.path == one.source.path
        if number in {1, 3}:
            assert part.change == "merged"
            # all of its own expert is no region of it
            assert regions(part) == [None]
            assert [f.name for f in part.terms[0].factors] == [f"a{number}", f"b{number}"]
            assert rank_of(part) == 2
        else:
            assert (part.op, part.change) == (CopyBytes(), "copied")
    assert sum(part.nbytes for part in parts) == one.nbytes


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (range(3), EVERY_COLUMN),
        (range(3, 6), EVERY_COLUMN),
        (EVERY_ROW, range(0, 5, 2)),
        (EVERY_ROW, range(1, 4)),
        (range(1, 2), range(1)),
    ],
)
def test_a_region_inside_an_expert_is_counted_from_its_first_row(
    rows: range, columns: range
) -> None:
    for expert in range(EXPERTS):
        part = list(fused(term(expert, rows, columns)).parts())[expert]
        assert regions(part) == [Region(rows, columns)]


def test_terms_of_an_expert_keep_their_order() -> None:
    halves = (range(3), range(3, 6))
    one = fused(term(2, halves[0]), term(0), term(2, halves[1]), term(2))
    parts = list(one.parts())
    expected = [Region(halves[0], EVERY_COLUMN), Region(halves[1], EVERY_COLUMN), None]
    assert regions(parts[2]) == expected
    assert regions(parts[0]) == [None]


@pytest.mark.parametrize(
    ("source", "work", "out"),
    [
        (Dtype.BF16, Dtype.BF16, Dtype.F32),
        (Dtype.F32, Dtype.BF16, Dtype.BF16),
        (Dtype.F32, Dtype.BF16, Dtype.F32),
    ],
)
def test_experts_without_a_term_are_cast_where_the_others_are(
    source: Dtype, work: Dtype, out: Dtype
) -> None:
    for part in fused(term(0), source=source, work=work, out=out).parts():
        assert isinstance(part.op, ApplyTerms)
        assert (part.source.dtype, part.op.work_dtype, part.dtype) == (source, work, out)


def test_what_has_no_parts_is_one() -> None:
    matrix = stored(8, COLUMNS)
    whole = stored(EXPERTS, ROWS, COLUMNS)
    plain = LoraTerm(
        Factor(stored(2, 2)), Factor(stored(2, 2)), 1.0, is_transposed=False, rounds_delta=False
    )
    for one in (
        TensorPlan("w", Dtype.BF16, whole, CopyBytes(), "copied"),
        TensorPlan("w", Dtype.F32, whole, ApplyTerms(Dtype.BF16, ()), "cast"),
        # a convolution
        TensorPlan("w", Dtype.BF16, whole, ApplyTerms(Dtype.BF16, (plain,)), "merged"),
        # a part of a matrix
        TensorPlan("w", Dtype.BF16, matrix, ApplyTerms(Dtype.BF16, (term(0),)), "merged"),
        # nothing at all
        TensorPlan("w", Dtype.BF16, stored(4, 0, 3), ApplyTerms(Dtype.BF16, (term(0),)), "merged"),
    ):
        assert list(one.parts()) == [one]
