"""Factors and weights as torch tensors: parts, spread blocks, gains, and weights in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from streammerge.adapters.terms import BiasTerm, Factor, LoraTerm, TunerTerm
from streammerge.backends.torch_factors import (
    LoraFactors,
    WholeWeight,
    load_term_factors,
)
from streammerge.checkpoint.header import StoredTensor
from streammerge.codecs.tensors import torch_dtype
from streammerge.dtypes import Dtype
from streammerge.plan.ops import ApplyTerms, TensorPlan

if TYPE_CHECKING:
    from streammerge.adapters.terms import Weight

FLOATS = [Dtype.BF16, Dtype.F16, Dtype.F32, Dtype.F64]
COMPUTE = [torch.float32, torch.float64]
PIECES = [1, 64, 100, 400, 1 << 20]


def to_bytes(tensor: torch.Tensor) -> bytearray:
    return bytearray(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def stored(name: str, tensor: torch.Tensor, dtype: Dtype = Dtype.F32) -> StoredTensor:
    return StoredTensor(name, dtype, tuple(tensor.shape), Path("x"), 0)


def values(*shape: int, dtype: Dtype = Dtype.F32) -> torch.Tensor:
    random = torch.Generator().manual_seed(sum(shape) + 1)
    return torch.randn(shape, generator=random).to(torch_dtype(dtype))


def load(
    tensor: torch.Tensor, compute: torch.dtype = torch.float32, **options: Any
) -> tuple[torch.Tensor, Factor]:
    """Return a factor as A of a term has it, and the factor."""
    dtype = next(dtype for dtype in FLOATS if torch_dtype(dtype) is tensor.dtype)
    a = Factor(stored("a", tensor, dtype), **options)
    # any B will do
    b = torch.zeros(1, 1)
    term = LoraTerm(a, Factor(stored("b", b)), 1.0, is_transposed=False, rounds_delta=False)
    raw = {a.tensor: to_bytes(tensor), term.b.tensor: to_bytes(b)}
    before = bytes(raw[a.tensor])
    factors = load_term_factors(term, raw, compute)
    # other terms may take other parts of it
    assert raw[a.tensor] == before
    assert isinstance(factors, LoraFactors)
    assert factors.a.shape == a.shape
    assert factors.a.dtype is compute
    assert factors.a.is_contiguous()
    return factors.a, a


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("compute", COMPUTE, ids=str)
def test_a_whole_factor_is_the_tensor_in_the_compute_dtype(
    dtype: Dtype, compute: torch.dtype
) -> None:
    tensor = values(4, 6, dtype=dtype)
    got, factor = load(tensor, compute)
    assert factor.is_whole
    assert torch.equal(got, tensor.to(compute))


@pytest.mark.parametrize("shape", [(5,), (4, 6), (4, 3, 2), (4, 3, 1, 2)])
def test_a_factor_is_a_matrix_of_its_first_dimension(shape: tuple[int, ...]) -> None:
    tensor = values(*shape)
    got, _ = load(tensor)
    assert torch.equal(got, tensor.reshape(shape[0], -1))


RANGES = st.builds(range, st.integers(0, 6), st.integers(7, 12), st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(st.none(), RANGES),
    st.one_of(st.none(), RANGES),
    st.sampled_from(FLOATS),
    st.sampled_from(COMPUTE),
)
def test_rows_and_columns_are_those_of_the_ranges(
    rows: range | None, columns: range | None, dtype: Dtype, compute: torch.dtype
) -> None:
    tensor = values(12, 12, dtype=dtype)
    got, _ = load(tensor, compute, rows=rows, columns=columns)
    expected = tensor[list(rows if rows is not None else range(12))]
    expected = expected[:, list(columns if columns is not None else range(12))]
    assert torch.equal(got, expected.to(compute))


@pytest.mark.parametrize("blocks", [2, 3, 6])
@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F32], ids=str)
def test_blocks_are_spread_along_the_diagonal(blocks: int, dtype: Dtype) -> None:
    tensor = values(6, 4, dtype=dtype)
    got, _ = load(tensor, diagonal_blocks=blocks)
    assert got.shape == (6, 4 * blocks)
    height = 6 // blocks
    for row in range(6):
        start = row // height * 4
        assert torch.equal(got[row, start : start + 4], tensor[row].float())
        got[row, start : start + 4] = 0
    # and nothing anywhere else
    assert not got.any()


@pytest.mark.parametrize("repeats", [2, 5])
@pytest.mark.parametrize("gain", [1.0, 0.25])
def test_columns_are_repeated_side_by_side(repeats: int, gain: float) -> None:
    tensor = values(3, 4)
    got, _ = load(tensor, column_repeats=repeats, gain=gain)
    for column in range(4 * repeats):
        assert torch.equal(got[:, column], tensor[:, column // repeats] * gain)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("compute", COMPUTE, ids=str)
def test_a_gain_multiplies_in_the_compute_dtype(dtype: Dtype, compute: torch.dtype) -> None:
    tensor = values(3, 4, dtype=dtype)
    got, _ = load(tensor, compute, gain=1 / 3)
    assert torch.equal(got, tensor.to(compute) * (1 / 3))


def test_parts_are_cut_before_they_are_spread() -> None:
    tensor = values(8, 6)
    options = {"rows": range(2, 8, 3), "columns": range(1, 6, 2)}
    got, _ = load(tensor, diagonal_blocks=2, column_repeats=2, gain=2.0, **options)
    part = tensor[[2, 5]][:, [1, 3, 5]]
    expected = torch.zeros(2, 6)
    expected[0, :3], expected[1, 3:] = part[0], part[1]
    assert torch.equal(got, expected.repeat_interleave(2, dim=1) * 2)


def test_a_gain_vector_stands_between_b_and_a() -> None:
    a, b, gain = values(3, 5), values(4, 3), values(3)
    term = LoraTerm(
        Factor(stored("a", a)),
        Factor(stored("b", b)),
        1.0,
        is_transposed=False,
        rounds_delta=False,
        gain=stored("d", gain),
    )
    raw = {factor: to_bytes(t) for factor, t in zip(term.factors, (a, b, gain), strict=True)}
    factors = load_term_factors(term, raw, torch.float64)
    expected = b.double() @ torch.diag(gain.double()) @ a.double()
    assert torch.allclose(factors.b @ factors.a, expected, rtol=1e-14)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 1), (1, 4, 1, 1)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_magnitude_is_a_vector(shape: tuple[int, ...], dtype: Dtype) -> None:
    a, b, magnitude = values(2, 5), values(4, 2), values(*shape, dtype=dtype)
    term = LoraTerm(
        Factor(stored("a", a)),
        Factor(stored("b", b)),
        1.0,
        is_transposed=False,
        rounds_delta=False,
        magnitude=stored("m", magnitude, dtype),
    )
    raw = {factor: to_bytes(t) for factor, t in zip(term.factors, (a, b, magnitude), strict=True)}
    factors = load_term_factors(term, raw, torch.float32)
    assert torch.equal(factors.magnitude, magnitude.float().view(-1))
    assert factors.column_scale is None


@dataclass(frozen=True, slots=True)
class Several(TunerTerm):
    """A term with tensors of its own."""

    tensors: tuple[StoredTensor, ...]

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        return self.tensors

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        return rows


@pytest.mark.parametrize("compute", COMPUTE, ids=str)
def test_tensors_of_other_terms_keep_their_order_and_shapes(compute: torch.dtype) -> None:
    tensors = {
        Dtype.BF16: values(2, 3, 4, dtype=Dtype.BF16),
        Dtype.F64: values(3, dtype=Dtype.F64),
        Dtype.I64: torch.tensor([[5, 1 << 40]]),
        Dtype.U8: torch.tensor(7, dtype=torch.uint8),
        Dtype.BOOL: torch.tensor([True, False]),
        Dtype.F32: torch.empty(0, 4),
    }
    parts = tuple(stored(dtype.value, t, dtype) for dtype, t in tensors.items())
    raw = {part: to_bytes(t) for part, t in zip(parts, tensors.values(), strict=True)}
    found = load_term_factors(Several(parts), raw, compute)
    for got, tensor in zip(found, tensors.values(), strict=True):
        # whole numbers are positions, and stay what they are
        dtype = compute if tensor.is_floating_point() else tensor.dtype
        assert (got.dtype, got.shape) == (dtype, tensor.shape)
        assert torch.equal(got, tensor.to(dtype))
    vector = values(4, dtype=Dtype.F16)
    bias = BiasTerm(stored("v", vector, Dtype.F16), 1.0)
    (got,) = load_term_factors(bias, {bias.vector: to_bytes(vector)}, compute)
    assert torch.equal(got, vector.to(compute))


# whole weights


class Source:
    """A weight on disk, and what was read of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.data = to_bytes(tensor)
        self.reads: list[tuple[int, int]] = []

    def __call__(self, offset: int, buffer: memoryview) -> None:
        self.reads.append((offset, len(buffer)))
        buffer[:] = self.data[offset : offset + len(buffer)]


def whole_weight(
    source: Source,
    shape: tuple[int, ...],
    *,
    stored_dtype: Dtype = Dtype.F32,
    work: Dtype = Dtype.F32,
    is_rounded: bool = True,
    piece_bytes: int = 1 << 20,
    before: Any = None,
) -> WholeWeight:
    compute = torch.float64 if work is Dtype.F64 else torch.float32
    tensor = StoredTensor("w", stored_dtype, shape, Path("x"), 1000)
    target = TensorPlan("w", work, tensor, ApplyTerms(work, ()), "merged")
    return WholeWeight(
        target,
        source,
        compute_dtype=compute,
        is_rounded=is_rounded,
        piece_bytes=piece_bytes,
        apply_before=before or (lambda rows, _: rows.to(compute)),
    )


def test_a_weight_has_the_protocol_that_terms_know() -> None:
    weight: Weight = whole_weight(Source(values(3, 4)), (3, 4), work=Dtype.F64)
    assert weight.shape == (3, 4)
    assert (weight.dtype, weight.compute_dtype) == (torch.float64, torch.float64)


@pytest.mark.parametrize("work", FLOATS, ids=str)
@pytest.mark.parametrize("is_rounded", [False, True])
def test_values_are_in_the_dtype_in_which_terms_have_them(work: Dtype, is_rounded: bool) -> None:
    source = Source(values(5, 3, dtype=work))
    weight = whole_weight(source, (5, 3), stored_dtype=work, work=work, is_rounded=is_rounded)
    expected = torch_dtype(work) if is_rounded else weight.compute_dtype
    assert weight.dtype is expected
    assert weight.whole().dtype is expected
    assert all(rows.dtype is expected for _, rows in weight.tiles())


@pytest.mark.parametrize("piece_bytes", PIECES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 11, 37])
@pytest.mark.parametrize("columns", [1, 3, 50])
@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F64], ids=str)
def test_pieces_are_the_weight_in_order_and_never_too_short(
    piece_bytes: int, rows: int, columns: int, dtype: Dtype
) -> None:
    tensor = values(rows, columns, dtype=dtype)
    source = Source(tensor)
    weight = whole_weight(
        source, (rows, columns), stored_dtype=dtype, work=dtype, piece_bytes=piece_bytes
    )
    end = 0
    for begin, part in weight.tiles():
        assert begin == end
        assert torch.equal(part, tensor[begin : begin + len(part)])
        end += len(part)
        # a product of fewer rows rounds otherwise
        assert len(part) >= min(4, rows)
    assert end == rows
    # each byte once, in order
    position = 0
    for offset, nbytes in source.reads:
        assert offset == position
        position += nbytes
    assert position == len(source.data)
    assert torch.equal(weight.whole(), tensor)


def test_pieces_are_small() -> None:
    # so that a look at a large weight needs no more memory than its merge
    weight = whole_weight(Source(values(1000, 64)), (1000, 64), piece_bytes=64 * 4 * 20)
    lengths = [len(part) for _, part in weight.tiles()]
    assert max(lengths) <= 20 + 3
    assert len(lengths) >= 40


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((), (1, 1)),
        ((5,), (5, 1)),
        ((5, 3), (5, 3)),
        ((5, 3, 2), (5, 6)),
        ((5, 3, 2, 2), (5, 12)),
        ((0, 3), (0, 3)),
        ((3, 0), (3, 0)),
    ],
)
def test_all_of_it_is_a_matrix_of_the_first_dimension(
    shape: tuple[int, ...], matrix: tuple[int, int]
) -> None:
    tensor = values(*shape)
    weight = whole_weight(Source(tensor), shape, piece_bytes=64)
    whole = weight.whole()
    assert whole.shape == matrix
    assert torch.equal(whole, tensor.view(matrix))
    # a new one each time, which may be written to
    whole.zero_()
    assert torch.equal(weight.whole(), tensor.view(matrix))
    assert weight.shape == shape


@pytest.mark.parametrize("source_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("work", FLOATS, ids=str)
@pytest.mark.parametrize("is_rounded", [False, True])
@pytest.mark.parametrize("piece_bytes", [64, 1 << 20])
def test_terms_before_are_applied_to_the_rows_that_they_are_for(
    source_dtype: Dtype, work: Dtype, is_rounded: bool, piece_bytes: int
) -> None:
    tensor = values(11, 6, dtype=source_dtype)
    compute = torch.float64 if work is Dtype.F64 else torch.float32
    delta = values(11, 6).to(compute) / 3

    def before(rows: torch.Tensor, begin: int) -> torch.Tensor:
        assert rows.dtype is torch_dtype(work)
        wide = rows.to(compute) + delta[begin : begin + len(rows)]
        # they may use the rows' own memory
        rows.zero_()
        return wide

    weight = whole_weight(
        Source(tensor),
        (11, 6),
        stored_dtype=source_dtype,
        work=work,
        is_rounded=is_rounded,
        piece_bytes=piece_bytes,
        before=before,
    )
    expected = tensor.to(torch_dtype(work)).to(compute) + delta
    expected = expected.to(torch_dtype(work)) if is_rounded else expected
    for _ in range(2):
        assert torch.equal(weight.whole(), expected)
    for begin, rows in weight.tiles():
        assert torch.equal(rows, expected[begin : begin + len(rows)])


def test_every_dtype_that_is_merged_has_its_torch_dtype() -> None:
    for dtype in Dtype:
        if dtype.is_mergeable:
            assert torch_dtype(dtype).itemsize == dtype.item_bytes
            assert torch_dtype(dtype).is_floating_point
