"""The CPU backend against fp64, and its independence of tiles and scratch."""

from __future__ import annotations

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from streammerge.adapters.terms import Factor, Region, TunerTerm
from streammerge.backends.base import TargetFactors, Tile
from streammerge.backends.select import check_device, select_backend
from streammerge.backends.torch_cpu import TorchCpuBackend, torch_dtype
from streammerge.checkpoint.header import StoredTensor
from streammerge.config.tuning import ComputeTuning
from streammerge.dtypes import Dtype
from streammerge.errors import UnsupportedError
from streammerge.plan.ops import ApplyTerms, BiasTerm, LoraTerm, TensorPlan, Term

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streammerge.adapters.terms import Weight
    from streammerge.plan.ops import Numerics

WORK = [Dtype.BF16, Dtype.F16, Dtype.F32, Dtype.F64]
SHAPES = [(1, 1), (1, 7), (3, 5), (4, 64), (5, 33), (17, 129), (64, 31)]
POISON = 0xA5
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass
class Case:
    """A target with its values: terms keep their tensors in the order of their factors."""

    weight: torch.Tensor
    terms: list[tuple[Term, list[torch.Tensor]]]
    work: Dtype
    out: Dtype
    source: Dtype
    shape: tuple[int, ...] | None = None
    """Of the target, if the weight is a view of it as a matrix."""

    @property
    def target(self) -> TensorPlan:
        shape = self.shape or tuple(self.weight.shape)
        stored = StoredTensor("w", self.source, shape, Path("x"), 0)
        op = ApplyTerms(self.work, tuple(term for term, _ in self.terms))
        return TensorPlan("w", self.out, stored, op, "merged")

    @property
    def raw(self) -> dict[StoredTensor, bytearray]:
        return {
            factor: bytearray(to_bytes(tensor))
            for term, tensors in self.terms
            for factor, tensor in zip(term.factors, tensors, strict=True)
        }

    def read_source(
        self, offset: int, buffer: memoryview, source: StoredTensor | None = None
    ) -> None:
        """Give a part of the weight, as the engine reads it from the base."""
        assert source in {None, self.target.source}
        buffer[:] = to_bytes(self.weight)[offset : offset + len(buffer)]


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def stored(tensor: torch.Tensor, dtype: Dtype = Dtype.F32) -> StoredTensor:
    """Give a tensor a name of its own: factors are told apart by it."""
    return StoredTensor(f"f{next(NUMBERS)}", dtype, tuple(tensor.shape), Path("x"), 0)


def case(
    rows: int,
    columns: int,
    *,
    work: Dtype = Dtype.BF16,
    out: Dtype | None = None,
    source: Dtype | None = None,
    rank: int = 5,
    terms: int = 1,
    is_transposed: bool = False,
    rounds_delta: bool = False,
    dora: bool = False,
    scaling: float = 1.7,
) -> Case:
    random = torch.Generator().manual_seed(rows * 1000 + columns)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    source = source or work
    weight = values(rows, columns).to(torch_dtype(source))
    made: list[tuple[Term, list[torch.Tensor]]] = []
    for number in range(terms):
        n, k = (columns, rows) if is_transposed else (rows, columns)
        tensors = [values(rank, k), values(n, rank)]
        magnitude = values(n).abs() + 0.5 if dora else None
        if magnitude is not None:
            tensors.append(magnitude)
        term = LoraTerm(
            Factor(stored(tensors[0])),
            Factor(stored(tensors[1])),
            scaling * (number + 1),
            is_transposed,
            rounds_delta,
            None if magnitude is None else stored(magnitude),
        )
        made.append((term, tensors))
    return Case(weight, made, work, out or work, source)


def apply(
    one: Case,
    *,
    numerics: Numerics = "peft",
    scratch_bytes: int = 1 << 20,
    edges: list[int] | None = None,
    spare: int = 0,
) -> tuple[torch.Tensor, bool]:
    """Merge tile by tile as the pipeline does; check that nothing around a tile is touched."""
    backend = TorchCpuBackend(numerics=numerics, scratch_bytes=scratch_bytes)
    factors = backend.load_factors(one.target, one.raw, one.read_source)
    rows = one.weight.shape[0]
    pieces, is_finite = b"", True
    for begin, end in itertools.pairwise(edges or [0, rows]):
        piece, fine = merge_tile(backend, factors, one, (begin, end), spare=spare)
        pieces, is_finite = pieces + piece, is_finite & fine
    result = torch.frombuffer(bytearray(pieces), dtype=torch_dtype(one.out))
    return result.view(one.weight.shape), is_finite


def merge_tile(
    backend: TorchCpuBackend,
    factors: TargetFactors,
    one: Case,
    rows: tuple[int, int],
    *,
    spare: int = 0,
) -> tuple[bytes, bool]:
    """Merge rows that lie so far back in a buffer that the output reaches none too early."""
    begin, end = rows
    data = to_bytes(one.weight[begin:end])
    nbytes = one.out.nbytes(one.weight[begin:end].numel())
    used = max(nbytes, len(data))
    # any place in a buffer will do, such as the middle of a page
    output_offset = 8 * (spare // 16)
    source_offset = output_offset + used - len(data)
    around = bytearray([POISON]) * spare
    buffer = bytearray([POISON]) * output_offset + bytearray(used) + around
    buffer[source_offset : source_offset + len(data)] = data
    tile = Tile(
        one.target,
        begin,
        end,
        memoryview(buffer),
        output_offset=output_offset,
        source_offset=source_offset,
    )
    is_finite = backend.apply(tile, factors)
    assert buffer[:output_offset] == around[:output_offset]
    assert buffer[output_offset + used :] == around
    return bytes(buffer[output_offset : output_offset + nbytes]), is_finite


def reference(one: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fp64 result without roundings, and the sum of the magnitudes that went in."""
    total = one.weight.to(torch_dtype(one.work)).double()
    size = total.abs()
    for term, tensors in one.terms:
        doubles = [tensor.double() for tensor in tensors]
        if isinstance(term, BiasTerm):
            delta = (doubles[0] * term.scaling).view(total.shape)
            total, size = total + delta, size + delta.abs()
            continue
        a, b = doubles[:2]
        delta = term.scaling * (b @ a)
        most = abs(term.scaling) * (b.abs() @ a.abs())
        if term.is_transposed:
            delta, most = delta.T, most.T
        total, size = total + delta, size + most
        if term.magnitude is not None:
            factor = (doubles[2] / torch.linalg.vector_norm(total, dim=1)).unsqueeze(1)
            total, size = total * factor, size * factor
    return total, size


def eps(dtype: Dtype) -> float:
    return torch.finfo(torch_dtype(dtype)).eps


def bound(one: Case, size: torch.Tensor, *, rank: int = 5, roundings: int = 1) -> torch.Tensor:
    """Roundings of the compute dtype per product and sum, then of the work and output dtypes."""
    compute = 2**-52 if one.work is Dtype.F64 else 2**-23
    steps = (rank + 4) * max(1, len(one.terms)) * compute
    if any(isinstance(t, LoraTerm) and t.magnitude is not None for t, _ in one.terms):
        steps += (one.weight.shape[1] + 6) * compute
    # a delta of an embedding is rounded before it is added, and the sum after it
    steps += roundings * max(1, len(one.terms)) * eps(one.work) / 2 + eps(one.out) / 2
    smallest = torch.finfo(torch_dtype(one.out)).tiny
    return size * steps * 1.01 + smallest


def assert_close(one: Case, result: torch.Tensor, *, roundings: int = 1) -> None:
    expected, size = reference(one)
    error = (result.double() - expected).abs()
    assert bool((error <= bound(one, size, roundings=roundings)).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("work", WORK, ids=str)
@pytest.mark.parametrize("numerics", ["peft", "fp32"])
@pytest.mark.parametrize("terms", [1, 2])
def test_merge_is_within_its_roundings(
    shape: tuple[int, int], work: Dtype, numerics: Numerics, terms: int
) -> None:
    one = case(*shape, work=work, terms=terms)
    result, is_finite = apply(one, numerics=numerics)
    assert is_finite
    assert_close(one, result)


@pytest.mark.parametrize("shape", [(3, 5), (17, 129)], ids=str)
@pytest.mark.parametrize("work", [Dtype.BF16, Dtype.F32], ids=str)
def test_embedding_delta_is_rounded_before_it_is_added(shape: tuple[int, int], work: Dtype) -> None:
    one = case(*shape, work=work, is_transposed=True, rounds_delta=True)
    result, _ = apply(one)
    assert_close(one, result, roundings=2)
    (term, (a, b)), weight = one.terms[0], one.weight
    delta = (torch.mm(b, a) * term.scaling).T.to(weight.dtype)
    assert torch.equal(result, weight + delta)


@pytest.mark.parametrize("work", WORK, ids=str)
def test_fp32_numerics_round_an_embedding_once(work: Dtype) -> None:
    one = case(33, 12, work=work, is_transposed=True, rounds_delta=True)
    assert_close(one, apply(one, numerics="fp32")[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("work", WORK, ids=str)
def test_transposed_weights(shape: tuple[int, int], work: Dtype) -> None:
    one = case(*shape, work=work, is_transposed=True)
    assert_close(one, apply(one)[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("work", WORK, ids=str)
@pytest.mark.parametrize("numerics", ["peft", "fp32"])
def test_dora(shape: tuple[int, int], work: Dtype, numerics: Numerics) -> None:
    one = case(*shape, work=work, dora=True)
    expected, size = reference(one)
    result, _ = apply(one, numerics=numerics)
    # cancellation in a row's norm magnifies its error
    norm = torch.linalg.vector_norm(size, dim=1, keepdim=True)
    magnified = size * norm / torch.linalg.vector_norm(expected, dim=1, keepdim=True)
    limit = bound(one, torch.maximum(size, magnified))
    assert bool(((result.double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("rows", [1, 3, 37])
@pytest.mark.parametrize("work", WORK, ids=str)
@pytest.mark.parametrize("numerics", ["peft", "fp32"])
def test_bias(rows: int, work: Dtype, numerics: Numerics) -> None:
    vector = torch.linspace(-2, 3, rows)
    weight = torch.linspace(1, -1, rows).to(torch_dtype(work))
    one = Case(weight, [(BiasTerm(stored(vector), 0.7), [vector])], work, work, work)
    for edges in (None, [0, 4, rows] if rows > 8 else None):
        assert_close(one, apply(one, numerics=numerics, edges=edges)[0])


def test_two_terms_round_twice_as_peft_does_and_once_in_fp32() -> None:
    one = case(16, 16, work=Dtype.BF16, terms=2)
    weight = one.weight
    total = weight.float()
    for term, (a, b) in one.terms:
        delta = torch.mm(b, a) * term.scaling
        weight, total = (weight.float() + delta).bfloat16(), total + delta
    assert torch.equal(apply(one)[0], weight)
    assert torch.equal(apply(one, numerics="fp32")[0], total.bfloat16())
    assert not torch.equal(weight, total.bfloat16())


@pytest.mark.parametrize("source", WORK, ids=str)
@pytest.mark.parametrize("out", WORK, ids=str)
@pytest.mark.parametrize("scratch_bytes", [64, 1 << 20])
def test_casts_without_terms_are_torch_casts(source: Dtype, out: Dtype, scratch_bytes: int) -> None:
    one = case(37, 9, work=source, out=out, terms=0)
    result, is_finite = apply(one, scratch_bytes=scratch_bytes, spare=64)
    assert is_finite
    assert torch.equal(result, one.weight.to(torch_dtype(out)))


@pytest.mark.parametrize("source", WORK, ids=str)
@pytest.mark.parametrize("work", WORK, ids=str)
@pytest.mark.parametrize("out", WORK, ids=str)
def test_casts_on_the_way_in_and_out(source: Dtype, work: Dtype, out: Dtype) -> None:
    one = case(37, 9, source=source, work=work, out=out)
    whole, _ = apply(one, spare=64)
    assert_close(one, whole)
    tiles, _ = apply(one, spare=64, scratch_bytes=64, edges=[0, 4, 9, 37])
    assert torch.equal(tiles, whole)


@pytest.mark.parametrize("work", WORK, ids=str)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_bits_do_not_depend_on_scratch_or_tiles(
    work: Dtype, is_transposed: bool, rank: int
) -> None:
    one = case(61, 47, work=work, is_transposed=is_transposed, rank=rank, terms=2)
    whole, _ = apply(one)
    for scratch_bytes in (64, 1000, 2048, 5000, 40_000):
        for edges in ([0, 61], [0, 4, 61], [0, 57, 61], [*list(range(0, 58, 4)), 61]):
            result, _ = apply(one, scratch_bytes=scratch_bytes, edges=edges, spare=32)
            assert torch.equal(result, whole), (scratch_bytes, edges)


def test_dora_bits_do_not_depend_on_scratch_or_tiles() -> None:
    one = case(61, 47, dora=True)
    whole, _ = apply(one)
    for scratch_bytes in (64, 3000):
        for edges in ([0, 4, 61], [0, 30, 57, 61]):
            assert torch.equal(apply(one, scratch_bytes=scratch_bytes, edges=edges)[0], whole)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("work", WORK, ids=str)
@pytest.mark.parametrize("at", [0, 20, 36])
def test_nan_and_inf_are_seen_wherever_they_are(value: float, work: Dtype, at: int) -> None:
    one = case(37, 9, work=work)
    one.weight[at, 4] = value
    assert apply(one, scratch_bytes=64)[1] is False
    assert apply(one)[1] is False


def test_overflow_of_the_output_dtype_is_seen() -> None:
    one = case(8, 8, work=Dtype.F32, out=Dtype.F16)
    assert apply(one)[1] is True
    one.weight[3, 3] = 1e6
    assert apply(one)[1] is False


# the greatest value, and the least that is rounded to infinity
EDGES = {
    Dtype.F16: (65504.0, 65520.0),
    Dtype.BF16: (3.3895313892515355e38, 3.3961775292304601e38),
    Dtype.F32: (3.4028234663852886e38, math.inf),
}


@pytest.mark.parametrize("out", EDGES, ids=str)
@pytest.mark.parametrize("work", [Dtype.F32, Dtype.F64], ids=str)
@pytest.mark.parametrize("numerics", ["peft", "fp32"])
@pytest.mark.parametrize("terms", [0, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_edge_of_the_output_dtype(
    out: Dtype, work: Dtype, numerics: Numerics, terms: int, sign: int
) -> None:
    greatest, too_great = EDGES[out]
    for value, expected in ((greatest, True), (too_great, False)):
        one = case(8, 8, work=work, out=out, terms=terms, scaling=0.0)
        one.weight[:] = 0
        one.weight[3, 3] = sign * value
        result, is_finite = apply(one, numerics=numerics)
        assert is_finite is expected
        assert bool(torch.isfinite(result).all()) is expected


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(WORK),
    st.sampled_from(WORK),
    st.sampled_from(["peft", "fp32"]),
    st.integers(0, 2),
    st.lists(
        st.tuples(
            st.integers(0, 62),
            st.one_of(
                st.floats(),
                st.sampled_from([6e4, 65503.9, 65504, 65519, 65520, 3.38e38, 3.39e38, 3.4e38]),
            ),
        ),
        max_size=4,
    ),
    st.sampled_from([None, math.nan, math.inf, 1e4, 1e19, 1e30, 1e38]),
)
def test_what_apply_says_is_what_isfinite_says(
    work: Dtype,
    out: Dtype,
    numerics: Numerics,
    terms: int,
    values: list[tuple[int, float]],
    factor: float | None,
) -> None:
    one = case(9, 7, work=work, out=out, terms=terms)
    for at, value in values:
        one.weight[at // 7, at % 7] = torch.tensor(value, dtype=torch.float64).to(one.weight.dtype)
    if factor is not None and terms:
        one.terms[-1][1][1][4, 2] = factor
    result, is_finite = apply(one, numerics=numerics, scratch_bytes=120)
    assert is_finite is bool(torch.isfinite(result).all())


@pytest.mark.parametrize("work", WORK, ids=str)
def test_a_bias_that_is_not_finite_is_seen(work: Dtype) -> None:
    for value, expected in ((1.0, True), (math.nan, False), (math.inf, False)):
        vector = torch.full((9,), value)
        weight = torch.ones(9, dtype=torch_dtype(work))
        one = Case(weight, [(BiasTerm(stored(vector), 0.7), [vector])], work, work, work)
        assert apply(one)[1] is expected


@pytest.mark.parametrize("work", WORK, ids=str)
@pytest.mark.parametrize("kind", ["plain", "transposed", "dora", "cast"])
def test_threads_at_the_same_time_give_the_bits_of_one(work: Dtype, kind: str) -> None:
    one = case(
        67,
        47,
        work=work,
        out=Dtype.F16 if kind == "cast" else None,
        terms=2,
        is_transposed=kind == "transposed",
        dora=kind == "dora",
    )
    backend = TorchCpuBackend(numerics="peft", scratch_bytes=2000)
    factors = backend.load_factors(one.target, one.raw, one.read_source)
    edges = [*range(0, 64, 4), 67]
    tiles = list(itertools.pairwise(edges))
    expected = [merge_tile(backend, factors, one, rows) for rows in tiles]
    together = threading.Barrier(4)

    def work_on(number: int) -> dict[int, tuple[bytes, bool]]:
        found = {}
        for _ in range(5):
            together.wait(60)
            for index in range(number, len(tiles), 4):
                found[index] = merge_tile(backend, factors, one, tiles[index])
        return found

    with ThreadPoolExecutor(4) as pool:
        found = [item for part in pool.map(work_on, range(4)) for item in part.items()]
    assert [part for _, part in sorted(found)] == expected


def test_a_product_is_as_large_as_the_tuning_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = torch.mm

    def mm(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        seen.append(len(left))
        return real(left, right, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    tuning = ComputeTuning(((4, 40 * 4 * 20), (1 << 30, 40 * 4 * 10)))
    for rank, scratch_bytes, rows in ((4, None, 17), (5, None, 7), (4, 40 * 4 * 8, 5)):
        one = case(100, 40, rank=rank)
        backend = TorchCpuBackend(numerics="peft", scratch_bytes=scratch_bytes, tuning=tuning)
        seen.clear()
        merge_tile(
            backend, backend.load_factors(one.target, one.raw, one.read_source), one, (0, 100)
        )
        # a short tail joins the last one, and still fits
        assert set(seen[:-1]) == {rows}
        assert seen[-1] < rows + 4
        assert sum(seen) == 100


def test_zero_rows_of_dora_are_not_finite() -> None:
    one = case(4, 4, work=Dtype.F32, dora=True, scaling=0.0)
    one.weight[2] = 0
    assert apply(one)[1] is False


# parts of a target

EXPERTS, ROWS, COLUMNS = 3, 11, 14
COLUMN_RANGES = [range(COLUMNS), range(0, COLUMNS, 2), range(1, COLUMNS, 2), range(3, 9)]


def experts_case(
    *,
    work: Dtype,
    columns: range = COLUMN_RANGES[0],
    is_transposed: bool = False,
    rounds_delta: bool = True,
    turns: int = 1,
    only: int | None = None,
) -> Case:
    """A fused tensor; each expert takes its part of the factors of all."""
    random = torch.Generator().manual_seed(11)
    rank, made = 4, []
    n, k = (len(columns), ROWS) if is_transposed else (ROWS, len(columns))
    weight = torch.randn((EXPERTS * ROWS, COLUMNS), generator=random).to(torch_dtype(work))
    for turn in range(turns):
        tensors = [
            torch.randn((EXPERTS * rank, k), generator=random),
            torch.randn((n, EXPERTS * rank), generator=random),
        ]
        a, b = map(stored, tensors)
        for expert in range(EXPERTS) if only is None else [only]:
            term = LoraTerm(
                Factor(a, rows=range(expert * rank, (expert + 1) * rank)),
                Factor(b, columns=range(expert, EXPERTS * rank, EXPERTS)),
                0.7 + turn,
                is_transposed,
                rounds_delta,
                region=Region(range(expert * ROWS, (expert + 1) * ROWS), columns),
            )
            made.append((term, tensors))
    return Case(weight, made, work, work, work, (EXPERTS, ROWS, COLUMNS))


def add_whole(one: Case, numerics: Numerics) -> torch.Tensor:
    """Add the whole product of each term to its region, rounding as PEFT does or once."""
    compute = torch.float64 if one.work is Dtype.F64 else torch.float32
    work = torch_dtype(one.work)
    wide = one.weight.to(compute, copy=True)
    for term, tensors in one.terms:
        assert isinstance(term, LoraTerm)
        a, b = (tensor.to(compute) for tensor in tensors)
        if term.a.rows is not None and term.b.columns is not None:
            a = a[term.a.rows.start : term.a.rows.stop]
            b = b[:, term.b.columns.start :: term.b.columns.step].contiguous()
        delta = torch.mm(b, a) * term.scaling
        delta = delta.T if term.is_transposed else delta
        rows, columns = range(len(wide)), range(wide.shape[1])
        if term.region is not None:
            rows, columns = term.region.rows, term.region.columns
        part = wide[rows.start : rows.stop, columns.start : columns.stop : columns.step]
        if numerics == "peft":
            delta = delta.to(work) if term.rounds_delta else delta
            part.copy_((part.to(work) + delta).to(work))
        else:
            part += delta
    return wide.to(work)


@pytest.mark.parametrize("work", WORK, ids=str)
@pytest.mark.parametrize("numerics", ["peft", "fp32"])
@pytest.mark.parametrize("columns", COLUMN_RANGES, ids=str)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("rounds_delta", [False, True])
def test_a_term_changes_its_region_alone(
    work: Dtype, numerics: Numerics, columns: range, is_transposed: bool, rounds_delta: bool
) -> None:
    one = experts_case(
        work=work, columns=columns, is_transposed=is_transposed, rounds_delta=rounds_delta
    )
    result, is_finite = apply(one, numerics=numerics)
    assert is_finite
    assert torch.equal(result, add_whole(one, numerics))
    untouched = [at for at in range(COLUMNS) if at not in columns]
    assert torch.equal(result[:, untouched], one.weight[:, untouched])


@pytest.mark.parametrize("work", WORK, ids=str)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("columns", COLUMN_RANGES[:2], ids=str)
def test_bits_of_regions_do_not_depend_on_scratch_or_tiles(
    work: Dtype, is_transposed: bool, columns: range
) -> None:
    one = experts_case(work=work, is_transposed=is_transposed, columns=columns, turns=2)
    expected = add_whole(one, "peft")
    # of a region there are from one row to all of them in a tile
    every = [[0, at, 33] for at in range(4, 30)]
    for edges in (*every, [0, 4, 8, 12, 16, 20, 24, 28, 33], [0, 9, 14, 20, 24, 33]):
        for scratch_bytes in (64, 1000, 1 << 20):
            result, _ = apply(one, scratch_bytes=scratch_bytes, edges=edges)
            assert torch.equal(result, expected), (edges, scratch_bytes)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_regions_of_few_rows(rows: int, is_transposed: bool) -> None:
    random = torch.Generator().manual_seed(rows)
    weight = torch.randn((12, 40), generator=random).bfloat16()
    made: list[tuple[Term, list[torch.Tensor]]] = []
    for start in (0, 4, 12 - rows):
        n, k = (40, rows) if is_transposed else (rows, 40)
        tensors = [torch.randn((64, k), generator=random), torch.randn((n, 64), generator=random)]
        a, b = (Factor(stored(tensor)) for tensor in tensors)
        region = Region(range(start, start + rows), range(40))
        term = LoraTerm(a, b, 1.3, is_transposed, rounds_delta=True, region=region)
        made.append((term, tensors))
    one = Case(weight, made, Dtype.BF16, Dtype.BF16, Dtype.BF16)
    for edges in ([0, 12], [0, 4, 12], [0, 8, 12], [0, 4, 8, 12], [0, 5, 12], [0, 7, 12]):
        assert torch.equal(apply(one, edges=edges)[0], add_whole(one, "peft")), edges


def test_rows_that_no_region_has_keep_their_bits() -> None:
    one = experts_case(work=Dtype.BF16, only=1)
    one.weight[0, 0] = -0.0
    result, _ = apply(one, edges=[0, 4, 9, 33])
    for rows in (range(ROWS), range(2 * ROWS, 3 * ROWS)):
        kept = result[rows.start : rows.stop].view(torch.int16)
        assert torch.equal(kept, one.weight[rows.start : rows.stop].view(torch.int16))
    assert not torch.equal(result[ROWS : 2 * ROWS], one.weight[ROWS : 2 * ROWS])


@pytest.mark.parametrize("work", [Dtype.BF16, Dtype.F32], ids=str)
@pytest.mark.parametrize("numerics", ["peft", "fp32"])
@pytest.mark.parametrize("order", ["part first", "whole first", "part, whole, part"])
def test_parts_and_the_whole_are_rounded_in_turn(
    work: Dtype, numerics: Numerics, order: str
) -> None:
    one = case(13, 10, work=work, terms=3)
    region = Region(range(13), range(10))
    parts = {"part first": [0], "whole first": [1, 2], "part, whole, part": [0, 2]}[order]
    for number in parts:
        term, tensors = one.terms[number]
        assert isinstance(term, LoraTerm)
        one.terms[number] = (replace(term, region=region), tensors)
    expected = add_whole(one, numerics)
    for edges in ([0, 13], [0, 4, 13], [0, 5, 9, 13]):
        assert torch.equal(apply(one, numerics=numerics, edges=edges)[0], expected), edges


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_region_that_is_not_finite_is_seen(value: float) -> None:
    one = experts_case(work=Dtype.BF16)
    one.terms[0][1][0][5, 3] = value
    assert apply(one)[1] is False


# terms that bring their arithmetic along


@dataclass(frozen=True, slots=True)
class Scaled(TunerTerm):
    """Multiply by a number per row, in the dtype of the weight."""

    vector: StoredTensor
    in_place: bool = True

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        return (self.vector,)

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        factor = state[0][begin : begin + len(rows)].to(rows.dtype).view(-1, 1)
        return rows.mul_(factor) if self.in_place else rows * factor


@dataclass(frozen=True, slots=True)
class Centred(TunerTerm):
    """Take away the mean of each column, which is known after a look at all of the weight."""

    by_tiles: bool
    seen: list[tuple[tuple[int, ...], torch.dtype, torch.dtype]]

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        return ()

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> torch.Tensor:
        self.seen.append((weight.shape, weight.dtype, weight.compute_dtype))
        if self.by_tiles:
            parts = [(begin, rows.clone()) for begin, rows in weight.tiles()]
            assert [begin for begin, _ in parts] == [
                sum(len(rows) for _, rows in parts[:number]) for number in range(len(parts))
            ]
            whole = torch.cat([rows for _, rows in parts])
        else:
            whole = weight.whole()
        assert whole.dtype is weight.dtype
        return whole.double().mean(dim=0)

    def apply(self, rows: torch.Tensor, begin: int, state: torch.Tensor) -> torch.Tensor:
        return (rows.double() - state).to(rows.dtype)


@pytest.mark.parametrize("work", WORK, ids=str)
@pytest.mark.parametrize("numerics", ["peft", "fp32"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("out", [None, Dtype.F32, Dtype.BF16], ids=str)
def test_a_tuner_s_term_sees_what_peft_sees(
    work: Dtype, numerics: Numerics, in_place: bool, out: Dtype | None
) -> None:
    one = case(17, 9, work=work, out=out, terms=2)
    vector = torch.linspace(-1, 2, 17)
    scaled: tuple[Term, list[torch.Tensor]] = (Scaled(stored(vector), in_place), [vector])
    one.terms.insert(1, scaled)
    compute = torch.float64 if work is Dtype.F64 else torch.float32
    narrow = torch_dtype(work) if numerics == "peft" else compute
    expected = one.weight.to(narrow)
    for term, tensors in one.terms:
        wide = [tensor.to(compute) for tensor in tensors]
        if isinstance(term, LoraTerm):
            delta = torch.mm(wide[1], wide[0]) * term.scaling
            expected = (expected.to(compute) + delta).to(narrow)
        else:
            expected = expected * vector.to(narrow).view(-1, 1)
    if numerics == "fp32" and work is not one.out:
        expected = expected.to(compute)
    expected = expected.to(torch_dtype(one.out))
    for edges in ([0, 17], [0, 4, 9, 17]):
        for scratch_bytes in (64, 1 << 20):
            result, _ = apply(
                one, numerics=numerics, edges=edges, scratch_bytes=scratch_bytes, spare=32
            )
            assert torch.equal(result, expected), (edges, scratch_bytes)


@pytest.mark.parametrize("work", WORK, ids=str)
@pytest.mark.parametrize("numerics", ["peft", "fp32"])
@pytest.mark.parametrize("by_tiles", [False, True])
@pytest.mark.parametrize("scratch_bytes", [64, 400, 1 << 20])
def test_a_term_may_look_at_the_weight_after_the_terms_before_it(
    work: Dtype, numerics: Numerics, by_tiles: bool, scratch_bytes: int
) -> None:
    one = case(37, 9, work=work, terms=1)
    before, _ = apply(one, numerics=numerics)
    compute = torch.float64 if work is Dtype.F64 else torch.float32
    dtype = torch_dtype(work) if numerics == "peft" else compute
    term, (a, b) = one.terms[0]
    assert isinstance(term, LoraTerm)
    if numerics == "fp32":
        delta = torch.mm(b.to(compute), a.to(compute)) * term.scaling
        before = one.weight.to(compute) + delta
    centred = Centred(by_tiles, [])
    one.terms.append((centred, []))
    # what comes after it is not in what it sees
    one.terms += case(37, 9, work=work, terms=1).terms
    result, _ = apply(one, numerics=numerics, scratch_bytes=scratch_bytes, edges=[0, 4, 20, 37])
    expected = (before.double() - before.double().mean(dim=0)).to(dtype)
    _, (a, b) = one.terms[2]
    delta = torch.mm(b.to(compute), a.to(compute)) * term.scaling
    expected = (expected.to(compute) + delta).to(dtype).to(torch_dtype(work))
    assert torch.equal(result, expected)
    assert centred.seen == [((37, 9), dtype, compute)]


def test_an_unread_weight_is_no_matter_where_no_term_looks_at_it() -> None:
    one = case(9, 7, work=Dtype.BF16)
    backend = TorchCpuBackend(numerics="peft")
    factors = backend.load_factors(one.target, one.raw)
    expected, _ = apply(one)
    piece, _ = merge_tile(backend, factors, one, (0, 9))
    assert piece == to_bytes(expected)


@dataclass(frozen=True, slots=True)
class Counting(Scaled):
    """It wants torch's threads, and keeps how many there are."""

    depends_on_threads: ClassVar[bool] = True
    seen: list[int] = field(default_factory=list)

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> list[torch.Tensor]:
        self.seen.append(torch.get_num_threads())
        return factors


def test_a_term_has_torch_s_threads_while_it_needs_them() -> None:
    vector = torch.ones(9)
    for threads, term_type, expected in ((3, Counting, 3), (1, Counting, 1)):
        torch.set_num_threads(threads)
        term = term_type(stored(vector))
        one = Case(torch.ones(9, 4), [(term, [vector])], Dtype.F32, Dtype.F32, Dtype.F32)
        apply(one)
        assert term.seen == [expected]
        assert torch.get_num_threads() == 1


def test_threads_are_taken_back_from_a_term_that_fails() -> None:
    class Failing(Counting):
        def prepare(self, factors: list[torch.Tensor], weight: Weight) -> list[torch.Tensor]:
            raise RuntimeError("broken")

    torch.set_num_threads(3)
    vector = torch.ones(9)
    one = Case(torch.ones(9, 4), [(Failing(stored(vector)), [vector])], *[Dtype.F32] * 3)
    with pytest.raises(RuntimeError, match="broken"):
        apply(one)
    assert torch.get_num_threads() == 1


# DoRA on weights that are stored transposed


@pytest.mark.parametrize("work", WORK, ids=str)
@pytest.mark.parametrize("numerics", ["peft", "fp32"])
@pytest.mark.parametrize("shape", [(5, 3), (33, 12), (12, 33), (40, 1)], ids=str)
def test_transposed_dora_scales_columns(
    work: Dtype, numerics: Numerics, shape: tuple[int, int]
) -> None:
    one = case(*shape, work=work, is_transposed=True, dora=True)
    (term, (a, b, magnitude)) = one.terms[0]
    assert isinstance(term, LoraTerm)
    compute = torch.float64 if work is Dtype.F64 else torch.float32
    delta = (torch.mm(b.to(compute), a.to(compute)) * term.scaling).T
    total = one.weight.to(compute) + delta
    norm = torch.linalg.vector_norm(total.double(), dim=0)
    expected = total.double() * magnitude.double() / norm
    rounding = eps(work) + (shape[0] + 8) * torch.finfo(compute).eps
    whole, is_finite = apply(one, numerics=numerics)
    assert is_finite
    error = (whole.double() - expected).abs()
    assert bool((error <= expected.abs() * rounding + torch.finfo(whole.dtype).tiny).all())
    for edges in ([0, 4, shape[0]] if shape[0] > 8 else [0, shape[0]],):
        for scratch_bytes in (64, 1000):
            result, _ = apply(one, numerics=numerics, edges=edges, scratch_bytes=scratch_bytes)
            assert torch.equal(result, whole)


def test_transposed_dora_looks_at_what_an_adapter_before_it_made() -> None:
    one = case(33, 12, is_transposed=True, dora=True, terms=2)
    first, _ = apply(replace_terms(one, one.terms[:1]))
    alone = replace_terms(one, one.terms[1:])
    alone.weight = first
    expected, _ = apply(alone)
    assert torch.equal(apply(one, edges=[0, 4, 20, 33], scratch_bytes=64)[0], expected)


def replace_terms(one: Case, terms: list[tuple[Term, list[torch.Tensor]]]) -> Case:
    return replace(one, terms=terms)


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F16, Dtype.F64], ids=str)
def test_factors_may_have_any_float_dtype(dtype: Dtype) -> None:
    one = case(9, 11, work=Dtype.F32)
    term, tensors = one.terms[0]
    assert isinstance(term, LoraTerm)
    narrow = [tensor.to(torch_dtype(dtype)) for tensor in tensors]
    a, b = (Factor(stored(factor, dtype)) for factor in narrow)
    narrowed = LoraTerm(a, b, term.scaling, False, False)
    one.terms = [(narrowed, narrow)]
    assert_close(one, apply(one)[0])


def test_a_scalar_and_a_vector_are_cast() -> None:
    for weight in (torch.tensor(1.00390625), torch.arange(5.0)):
        one = Case(weight, [], Dtype.F32, Dtype.BF16, Dtype.F32)
        target = one.target
        backend = TorchCpuBackend(numerics="peft")
        buffer = bytearray(to_bytes(weight))
        rows = weight.shape[0] if weight.shape else 1
        factors = backend.load_factors(target, {})
        tile = Tile(target, 0, rows, memoryview(buffer), output_offset=0, source_offset=0)
        assert backend.apply(tile, factors)
        count = weight.numel()
        got = torch.frombuffer(buffer, dtype=torch.bfloat16, count=count)
        assert torch.equal(got, weight.bfloat16().view(count))


def test_cuda_needs_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streammerge.backends.select.missing_driver", lambda: "no driver")
    check_device("cpu")
    check_device("auto")
    with pytest.raises(UnsupportedError, match="cuda needs a GPU; got no driver"):
        check_device("cuda")
    monkeypatch.setattr("streammerge.backends.select.missing_driver", lambda: None)
    check_device("cuda")


def test_select_gives_the_cpu_backend() -> None:
    backend = select_backend(numerics="peft", scratch_bytes=4096, tuning=ComputeTuning())
    assert isinstance(backend, TorchCpuBackend)
    assert backend.name == "torch-cpu"
    assert torch.get_num_threads() == 1


def test_torch_has_its_threads_again_after_a_run() -> None:
    torch.set_num_threads(2)
    backend = TorchCpuBackend(numerics="peft")
    assert torch.get_num_threads() == 1
    backend.close()
    assert torch.get_num_threads() == 2
