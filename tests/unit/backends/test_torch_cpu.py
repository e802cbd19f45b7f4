"""The CPU backend against fp64, and its independence of tiles and scratch."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from streammerge.backends.base import Tile
from streammerge.backends.select import check_device, select_backend
from streammerge.backends.torch_cpu import TorchCpuBackend, torch_dtype
from streammerge.checkpoint.header import StoredTensor
from streammerge.dtypes import Dtype
from streammerge.engine.pipeline import _source_offset
from streammerge.errors import UnsupportedError
from streammerge.plan.ops import ApplyTerms, BiasTerm, LoraTerm, TensorPlan, Term
from streammerge.plan.tiles import MergeTile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streammerge.plan.ops import Numerics

WORK = [Dtype.BF16, Dtype.F16, Dtype.F32, Dtype.F64]
SHAPES = [(1, 1), (1, 7), (3, 5), (4, 64), (5, 33), (17, 129), (64, 31)]
POISON = 0xA5


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

    @property
    def target(self) -> TensorPlan:
        shape = tuple(self.weight.shape)
        stored = StoredTensor("w", self.source, shape, Path("x"), 0)
        op = ApplyTerms(self.work, tuple(term for term, _ in self.terms))
        return TensorPlan("w", self.out, stored, op, "merged")

    @property
    def raw(self) -> list[bytearray]:
        return [bytearray(to_bytes(t)) for _, tensors in self.terms for t in tensors]


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def stored(tensor: torch.Tensor, dtype: Dtype = Dtype.F32) -> StoredTensor:
    return StoredTensor("f", dtype, tuple(tensor.shape), Path("x"), 0)


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
            stored(tensors[0]),
            stored(tensors[1]),
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
    """Merge tile by tile as the pipeline does; check that nothing past a tile is touched."""
    backend = TorchCpuBackend(numerics=numerics, threads=1, scratch_bytes=scratch_bytes)
    target = one.target
    factors = backend.load_factors(target, one.raw)
    rows = one.weight.shape[0]
    edges = edges or [0, rows]
    pieces, is_finite = b"", True
    for begin, end in itertools.pairwise(edges):
        tile = MergeTile(target, begin, end, 0, is_first=begin == 0, is_last=end == rows)
        data = to_bytes(one.weight[begin:end])
        assert len(data) == tile.source.nbytes
        used = max(tile.nbytes, len(data))
        buffer = bytearray([POISON]) * (used + spare)
        offset = _source_offset(tile)
        assert offset + len(data) <= used
        buffer[offset : offset + len(data)] = data
        is_finite &= backend.apply(Tile(target, begin, end, memoryview(buffer), offset), factors)
        assert buffer[used:] == bytearray([POISON]) * spare
        pieces += buffer[: tile.nbytes]
    result = torch.frombuffer(bytearray(pieces), dtype=torch_dtype(target.dtype))
    return result.view(one.weight.shape), is_finite


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


def test_zero_rows_of_dora_are_not_finite() -> None:
    one = case(4, 4, work=Dtype.F32, dora=True, scaling=0.0)
    one.weight[2] = 0
    assert apply(one)[1] is False


@pytest.mark.parametrize("dtype", [Dtype.BF16, Dtype.F16, Dtype.F64], ids=str)
def test_factors_may_have_any_float_dtype(dtype: Dtype) -> None:
    one = case(9, 11, work=Dtype.F32)
    term, tensors = one.terms[0]
    assert isinstance(term, LoraTerm)
    narrow = [tensor.to(torch_dtype(dtype)) for tensor in tensors]
    narrowed = LoraTerm(
        stored(narrow[0], dtype), stored(narrow[1], dtype), term.scaling, False, False
    )
    one.terms = [(narrowed, narrow)]
    assert_close(one, apply(one)[0])


def test_a_scalar_and_a_vector_are_cast() -> None:
    for weight in (torch.tensor(1.00390625), torch.arange(5.0)):
        one = Case(weight, [], Dtype.F32, Dtype.BF16, Dtype.F32)
        target = one.target
        backend = TorchCpuBackend(numerics="peft", threads=1, scratch_bytes=0)
        buffer = bytearray(to_bytes(weight))
        rows = weight.shape[0] if weight.shape else 1
        factors = backend.load_factors(target, [])
        assert backend.apply(Tile(target, 0, rows, memoryview(buffer), 0), factors)
        count = weight.numel()
        got = torch.frombuffer(buffer, dtype=torch.bfloat16, count=count)
        assert torch.equal(got, weight.bfloat16().view(count))


def test_cuda_has_no_backend() -> None:
    check_device("cpu")
    check_device("auto")
    with pytest.raises(UnsupportedError, match="cuda has no backend"):
        check_device("cuda")


def test_select_gives_the_cpu_backend() -> None:
    backend = select_backend(numerics="peft", threads=1, scratch_bytes=4096)
    assert isinstance(backend, TorchCpuBackend)
    assert backend.name == "torch-cpu"
    assert torch.get_num_threads() == 1
