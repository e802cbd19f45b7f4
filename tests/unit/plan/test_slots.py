"""A tensor of the output while adapters are applied to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from streammerge.adapters.adapter import Replacement
from streammerge.adapters.terms import Factor, Region
from streammerge.adapters.tuners.trainable_tokens import RowsTerm
from streammerge.checkpoint.header import StoredTensor
from streammerge.dtypes import Dtype
from streammerge.errors import PlanError
from streammerge.plan.ops import ApplyTerms, BiasTerm, Change, CopyBytes, LoraTerm, TensorPlan
from streammerge.plan.slots import Slot

BASE, ADAPTER = Path("base/one.safetensors"), Path("adapter/adapter_model.safetensors")
FLOATS = [Dtype.BF16, Dtype.F16, Dtype.F32, Dtype.F64]
CODES = [Dtype.I8, Dtype.U8, Dtype.I64, Dtype.BOOL, Dtype.F8_E4M3, Dtype.F4]


def stored(*shape: int, dtype: Dtype = Dtype.BF16, path: Path = BASE) -> StoredTensor:
    return StoredTensor("w", dtype, shape, path, 0)


def slot(*shape: int, dtype: Dtype = Dtype.BF16, change: Change = "copied") -> Slot:
    return Slot(stored(*shape, dtype=dtype), dtype, change)


def whole(*shape: int, dtype: Dtype = Dtype.BF16) -> Replacement:
    return Replacement("w", stored(*shape, dtype=dtype, path=ADAPTER), is_base_copy=False)


TERM = BiasTerm(stored(4, dtype=Dtype.F32, path=ADAPTER), 2.0)
ROWS = RowsTerm(stored(1, 4, dtype=Dtype.F32, path=ADAPTER), (0,))


def part(region: Region | None) -> LoraTerm:
    a, b = Factor(stored(2, 4)), Factor(stored(4, 2))
    return LoraTerm(a, b, 1.0, is_transposed=False, rounds_delta=False, region=region)


ONE, OTHER = (Region(range(4 * n, 4 * n + 4), range(4)) for n in range(2))


def test_what_nothing_happens_to_is_copied() -> None:
    one = slot(4, 4)
    expected = TensorPlan("name", Dtype.BF16, one.source, CopyBytes(), "copied")
    assert one.finish("name", output_dtype=None) == expected
    assert one.finish("name", output_dtype=Dtype.BF16) == expected


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_term_makes_a_target(dtype: Dtype) -> None:
    one = slot(4, dtype=dtype)
    one.add(TERM)
    one.add(ROWS)
    assert one.finish("name", output_dtype=None) == TensorPlan(
        "name", dtype, one.source, ApplyTerms(dtype, (TERM, ROWS)), "merged"
    )


@pytest.mark.parametrize("change", ["copied", "added", "replaced"])
def test_what_was_added_stays_so(change: Change) -> None:
    one = slot(4, change=change)
    one.add(TERM)
    assert one.change == ("added" if change == "added" else "merged")


@pytest.mark.parametrize("dtype", CODES)
def test_codes_take_no_term(dtype: Dtype) -> None:
    one = slot(4, dtype=dtype)
    with pytest.raises(PlanError, match="a delta cannot be added to its codes") as caught:
        one.add(TERM)
    assert caught.value.where == f"'w' of {BASE.parent}"
    assert caught.value.got == dtype.value
    assert (one.terms, one.change) == ([], "copied")


def test_a_copy_goes_on_separately() -> None:
    one = slot(4)
    one.add(TERM)
    other = one.copy()
    other.add(ROWS)
    assert (one.terms, other.terms) == ([TERM], [TERM, ROWS])
    assert (other.source, other.work_dtype) == (one.source, one.work_dtype)


@pytest.mark.parametrize(
    ("terms", "is_refused"),
    [
        ([part(ONE), part(OTHER), part(ONE)], False),
        ([part(None), ROWS], False),
        ([part(ONE), part(None)], True),
        ([part(None), part(ONE)], True),
        ([ROWS, part(ONE)], True),
        ([part(ONE), part(OTHER), ROWS], True),
    ],
)
def test_parts_of_experts_and_the_whole_of_them_have_other_rows(
    terms: list[LoraTerm], is_refused: bool
) -> None:
    one = slot(2, 4, 4)
    for term in terms[:-1]:
        one.add(term)
    if is_refused:
        with pytest.raises(PlanError, match="by parts and as a whole"):
            one.add(terms[-1])
    else:
        one.add(terms[-1])
        assert one.terms == terms
    # of a matrix the rows are the same
    matrix = slot(8, 4)
    for term in terms:
        matrix.add(term)


def test_a_replacement_begins_anew() -> None:
    one = slot(4, 4, dtype=Dtype.F16)
    one.add(part(None))
    new = one.replaced_by(whole(4, 4, dtype=Dtype.F32), name="name", rows_may_differ=False)
    assert new == Slot(stored(4, 4, dtype=Dtype.F32, path=ADAPTER), Dtype.F16, "replaced", [])
    planned = new.finish("name", output_dtype=None)
    # in the dtype that the base has
    assert planned == TensorPlan(
        "name", Dtype.F16, new.source, ApplyTerms(Dtype.F16, ()), "replaced"
    )


def test_a_replacement_of_the_same_dtype_is_copied() -> None:
    new = slot(4).replaced_by(whole(4), name="name", rows_may_differ=False)
    planned = new.finish("name", output_dtype=None)
    assert (planned.op, planned.change) == (CopyBytes(), "replaced")


def test_a_replacement_of_what_was_added_is_added() -> None:
    new = slot(4, change="added").replaced_by(whole(4), name="name", rows_may_differ=False)
    assert new.change == "added"


@pytest.mark.parametrize(
    ("base", "new", "rows_may_differ", "fits"),
    [
        ((4, 3), (4, 3), False, True),
        ((4, 3), (6, 3), False, False),
        ((4, 3), (6, 3), True, True),
        ((4, 3), (2, 3), True, True),
        ((4, 3), (4, 5), True, False),
        ((4, 3), (3, 4), True, False),
        ((4,), (6,), True, True),
        ((4, 3), (12,), True, False),
        ((), (), False, True),
    ],
)
def test_the_shape_of_a_replacement(
    base: tuple[int, ...], new: tuple[int, ...], rows_may_differ: bool, fits: bool
) -> None:
    one = slot(*base)
    if fits:
        replaced = one.replaced_by(whole(*new), name="name", rows_may_differ=rows_may_differ)
        assert replaced.source.shape == new
        return
    with pytest.raises(PlanError, match="shape mismatch: another base") as caught:
        one.replaced_by(whole(*new), name="name", rows_may_differ=rows_may_differ)
    assert caught.value.expected == f"{base} as 'name'"
    assert caught.value.got == str(new)


@pytest.mark.parametrize(
    ("base", "new", "fits"),
    [
        (Dtype.BF16, Dtype.F32, True),
        (Dtype.I64, Dtype.I64, True),
        (Dtype.F8_E4M3, Dtype.F8_E4M3, True),
        (Dtype.BF16, Dtype.I64, False),
        (Dtype.I64, Dtype.BF16, False),
        (Dtype.F8_E4M3, Dtype.F32, False),
        (Dtype.I64, Dtype.I32, False),
        (Dtype.BF16, Dtype.F8_E4M3, False),
    ],
)
def test_the_dtype_of_a_replacement(base: Dtype, new: Dtype, fits: bool) -> None:
    one = slot(4, dtype=base)
    if fits:
        replaced = one.replaced_by(whole(4, dtype=new), name="name", rows_may_differ=False)
        assert replaced.work_dtype is base
        return
    with pytest.raises(PlanError, match="cannot be converted to the base's dtype") as caught:
        one.replaced_by(whole(4, dtype=new), name="name", rows_may_differ=False)
    assert (caught.value.expected, caught.value.got) == (base.value, new.value)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("output", FLOATS)
def test_values_are_cast_to_the_output_after_the_terms(dtype: Dtype, output: Dtype) -> None:
    one = slot(4, dtype=dtype)
    cast = one.finish("name", output_dtype=output)
    assert cast.dtype is output
    is_same = dtype is output
    assert cast.op == (CopyBytes() if is_same else ApplyTerms(dtype, ()))
    assert cast.change == ("copied" if is_same else "cast")
    one.add(TERM)
    merged = one.finish("name", output_dtype=output)
    assert merged.op == ApplyTerms(dtype, (TERM,))
    assert (merged.dtype, merged.change) == (output, "merged")


@pytest.mark.parametrize("dtype", CODES)
def test_codes_are_never_cast(dtype: Dtype) -> None:
    planned = slot(4, dtype=dtype).finish("name", output_dtype=Dtype.F32)
    assert (planned.dtype, planned.op, planned.change) == (dtype, CopyBytes(), "copied")
