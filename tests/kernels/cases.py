"""Every operation on inputs of odd shapes, with what has to come out and how far it may be off.

A case takes `place`, which puts a tensor where the kernel shall find it: on a device, or against a
guard page. Results are compared on the CPU.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from streammerge_kernels.dora import dora_merge_, dora_row_norm
from streammerge_kernels.e4m3 import fp32_to_e4m3
from streammerge_kernels.fp8 import fp8_lora_merge, fp8_lora_requantize
from streammerge_kernels.grouped import grouped_lora_merge_
from streammerge_kernels.merge import lora_merge_
from streammerge_kernels.merge_tma import lora_merge_tma_
from streammerge_kernels.mxfp4 import mxfp4_lora_merge
from streammerge_kernels.nf4 import Nf4Weight, nf4_lora_merge
from streammerge_kernels.reference import (
    fp8_decode,
    lora_merge,
    mxfp4_decode,
    nf4_decode,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
# unit roundoff, and half the least number above zero
ROUNDING = {BF16: (2.0**-8, 2.0**-134), FP16: (2.0**-11, 2.0**-25), FP32: (2.0**-24, 2.0**-150)}
U32 = 2.0**-24

Place = Callable[[torch.Tensor], torch.Tensor]
Terms = list[tuple[torch.Tensor, torch.Tensor, float]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A result beside the exact one, all in fp64."""

    got: torch.Tensor
    exact: torch.Tensor
    tolerance: torch.Tensor

    @property
    def violations(self) -> int:
        """Elements that are off by more than they may be, or that were not written."""
        return int((~((self.got - self.exact).abs() <= self.tolerance)).sum())

    @property
    def worst(self) -> float:
        """The greatest error in units of what is allowed."""
        return float(((self.got - self.exact).abs() / self.tolerance).max())


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of one call."""

    operation: str
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    dtype: torch.dtype
    """Of the weight, or of the result if the weight is quantized."""
    factor_dtype: torch.dtype
    variant: str = ""

    @property
    def name(self) -> str:
        dtypes = f"{str(self.dtype)[6:]}-{str(self.factor_dtype)[6:]}"
        return f"{self.operation} {self.variant} {self.shape} ranks {self.ranks} {dtypes}"


class Draw:
    """Random inputs, the same for the same case on every machine."""

    def __init__(self, case: Case, place: Place) -> None:
        self._random = torch.Generator().manual_seed(sum(case.name.encode()))
        self._case = case
        self._place = place

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._random)

    def bytes(self, *shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=self._random, dtype=torch.uint8)

    def terms(self, shape: tuple[int, int] | None = None) -> Terms:
        n, k = shape or self._case.shape
        dtype = self._case.factor_dtype
        terms = []
        for rank, scaling in zip(self._case.ranks, (0.3333, -16.0, 2.0), strict=False):
            a = (self.normal(rank, k) * 0.3).to(dtype)
            b = (self.normal(n, rank) * 0.3).to(dtype)
            terms.append((self._place(a), self._place(b), scaling))
        return terms


def poison(place: Place, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return place(torch.full(shape, torch.nan).to(dtype))


def on_cpu(terms: Terms) -> Terms:
    return [(a.cpu(), b.cpu(), scaling) for a, b, scaling in terms]


def fp32_error(weight: torch.Tensor, terms: Terms) -> torch.Tensor:
    """Bound the error before the rounding: (R + 3) 2^-24 (|W| + sum |scaling| |B| |A|)."""
    rank = sum(a.shape[0] for a, _, _ in terms)
    size = weight.double().abs()
    for a, b, scaling in terms:
        size = size + abs(scaling) * (b.double().abs() @ a.double().abs())
    return (rank + 3) * U32 * size


def compare(got: torch.Tensor, exact: torch.Tensor, error: torch.Tensor) -> Comparison:
    u, least = ROUNDING[got.dtype]
    return Comparison(got.cpu().double(), exact, u * (exact.abs() + error) + least + error)


def compare_merge(got: torch.Tensor, weight: torch.Tensor, terms: Terms) -> Comparison:
    weight, terms = weight.cpu(), on_cpu(terms)
    exact = lora_merge(weight, terms, torch.float64)
    return compare(got, exact, fp32_error(weight, terms))


def merge(case: Case, place: Place) -> Comparison:
    draw, (n, k) = Draw(case, place), case.shape
    weight, terms = place(draw.normal(n, k).to(case.dtype)), draw.terms()
    before = weight.cpu().clone()
    gain = None
    if case.variant == "in place":
        got = lora_merge_(weight, terms)
        assert got is weight
    elif case.variant == "gain":
        gain = place(draw.normal(n))
        out = poison(place, case.shape, case.dtype)
        got = lora_merge_(weight, terms, row_gain=gain, out=out)
    else:
        precision = case.variant if case.variant.startswith("bf16x") else "ieee"
        out = poison(place, case.shape, case.dtype)
        got = lora_merge_(weight, terms, out=out, input_precision=precision)
        assert torch.equal(weight.cpu(), before), "the weight was written to"
    result = compare_merge(got, before, terms)
    if gain is None:
        return result
    # one more rounding, that of the product with the gain
    factor = gain.cpu().double().unsqueeze(1)
    exact = lora_merge(before, on_cpu(terms), torch.float64)
    error = fp32_error(before, on_cpu(terms)) * factor.abs() + U32 * (factor * exact).abs()
    return compare(got, factor * exact, 1.001 * error)


def strided(case: Case, place: Place) -> Comparison:
    """A view in the middle of a larger tensor, of which the rest has to stay."""
    draw, (n, k) = Draw(case, place), case.shape
    whole = place(draw.normal(n + 5, k + 13).to(case.dtype))
    before = whole.cpu().clone()
    terms = draw.terms()
    got = lora_merge_(whole[2 : n + 2, 5 : k + 5], terms)
    after = whole.cpu().clone()
    after[2 : n + 2, 5 : k + 5] = before[2 : n + 2, 5 : k + 5]
    assert torch.equal(after, before), "something around the view was written to"
    return compare_merge(got, before[2 : n + 2, 5 : k + 5], terms)


def tma(case: Case, place: Place) -> Comparison:
    draw, (n, k) = Draw(case, place), case.shape
    weight, terms = place(draw.normal(n, k).to(case.dtype)), draw.terms()
    out = poison(place, case.shape, case.dtype)
    return compare_merge(lora_merge_tma_(weight, terms, out=out), weight, terms)


def norm_error(weight: torch.Tensor, terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norms, and a bound of their error.

    That of V is at most its own norm; the squares, their sum over K and the root add (K + 4) / 2
    roundings to the norm, in the worst of all orders.
    """
    adapted = lora_merge(weight, terms, torch.float64)
    norm = adapted.norm(dim=1)
    error = fp32_error(weight, terms).norm(dim=1)
    return norm, 1.001 * (error + (weight.shape[1] + 4) / 2 * U32 * norm)


def dora_norm(case: Case, place: Place) -> Comparison:
    draw, (n, k) = Draw(case, place), case.shape
    weight, terms = place(draw.normal(n, k).to(case.dtype)), draw.terms()
    got = dora_row_norm(weight, terms)
    return Comparison(got.cpu().double(), *norm_error(weight.cpu(), on_cpu(terms)))


def dora(case: Case, place: Place) -> Comparison:
    draw, (n, k) = Draw(case, place), case.shape
    weight, terms = place(draw.normal(n, k).to(case.dtype)), draw.terms()
    magnitude = place((draw.normal(n).abs() + 0.5).to(case.factor_dtype))
    out = poison(place, case.shape, case.dtype)
    got = dora_merge_(weight, terms, magnitude, out=out)
    weight, terms = weight.cpu(), on_cpu(terms)
    adapted = lora_merge(weight, terms, torch.float64)
    norm, off = norm_error(weight, terms)
    gain = (magnitude.cpu().double() / norm).unsqueeze(1)
    relative = (off / norm).unsqueeze(1) + 3 * U32
    error = gain * (fp32_error(weight, terms) + relative * adapted.abs())
    return compare(got, gain * adapted, 1.001 * error)


def grouped(case: Case, place: Place) -> Comparison:
    draw, (n, k) = Draw(case, place), case.shape
    shapes = [(n, k), (1, k), (n + 7, 3), (2, 2), (n, k + 16)]
    weights = [place(draw.normal(*shape).to(case.dtype)) for shape in shapes]
    terms = [draw.terms(shape)[0] for shape in shapes]
    terms = [(a, b, 0.5 + index) for index, (a, b, _) in enumerate(terms)]
    outs = [poison(place, shape, case.dtype) for shape in shapes]
    if case.variant == "one":
        weights, terms, outs = weights[:1], terms[:1], outs[:1]
    grouped_lora_merge_(weights, terms, out=outs)
    parts = [
        compare_merge(got, weight, [term])
        for got, weight, term in zip(outs, weights, terms, strict=True)
    ]
    return Comparison(
        torch.cat([part.got.flatten() for part in parts]),
        torch.cat([part.exact.flatten() for part in parts]),
        torch.cat([part.tolerance.flatten() for part in parts]),
    )


def nf4(case: Case, place: Place) -> Comparison:
    draw, (n, k), size = Draw(case, place), case.shape, int(case.variant)
    packed, absmax = place(draw.bytes(n * k // 2)), place(draw.normal(-(-n * k // size)).abs())
    terms, out = draw.terms(), poison(place, case.shape, case.dtype)
    got = nf4_lora_merge(Nf4Weight(packed, absmax, size), terms, out=out)
    return compare_merge(got, nf4_decode(packed.cpu(), absmax.cpu(), (n, k), size), terms)


def mxfp4(case: Case, place: Place) -> Comparison:
    draw, (n, k) = Draw(case, place), case.shape
    packed = place(draw.bytes(n, k // 2))
    exponents = place(draw.bytes(n, k // 32) // 16 + 118)
    terms, out = draw.terms(), poison(place, case.shape, case.dtype)
    got = mxfp4_lora_merge(packed, exponents, terms, out=out)
    return compare_merge(got, mxfp4_decode(packed.cpu(), exponents.cpu()), terms)


def fp8_inputs(case: Case, place: Place) -> tuple[torch.Tensor, torch.Tensor, Terms]:
    draw, (n, k) = Draw(case, place), case.shape
    blocks = (-(-n // 128), -(-k // 128))
    shape = {"tensor": (1,), "row": (n, 1), "block": blocks}[case.variant]
    quantized = place((draw.normal(n, k) * 100).to(E4M3))
    return quantized, place(draw.normal(*shape).abs() * 0.02 + 0.01), draw.terms()


def fp8(case: Case, place: Place) -> Comparison:
    quantized, scale, terms = fp8_inputs(case, place)
    out = poison(place, case.shape, case.dtype)
    got = fp8_lora_merge(quantized, scale, terms, out=out)
    return compare_merge(got, fp8_decode(quantized.cpu(), scale.cpu()), terms)


def requantize(case: Case, place: Place) -> Comparison:
    """What comes back is within half a step of e4m3 of the exact sum, and the scales are right."""
    quantized, scale, terms = fp8_inputs(case, place)
    out = poison(place, case.shape, E4M3)
    got, got_scale = fp8_lora_requantize(quantized, scale, terms, out=out)
    weight = fp8_decode(quantized.cpu(), scale.cpu())
    exact = lora_merge(weight, on_cpu(terms), torch.float64)
    error = fp32_error(weight, on_cpu(terms))
    scales = fp8_decode(torch.ones(case.shape).to(E4M3), got_scale.cpu())
    largest = shared_maximum(exact.abs(), case.variant)
    off = (scales * 448 - largest).abs()
    is_right = off <= shared_maximum(error, case.variant) + 4 * U32 * largest
    # half a step is 2^-4 of the value, or 2^-10 of the scale among subnormals
    tolerance = 1.001 * (error + 2.0**-4 * exact.abs()) + 2.0**-10 * scales
    decoded = fp8_decode(got.cpu(), got_scale.cpu())
    return Comparison(torch.where(is_right, decoded, torch.nan), exact, tolerance)


def shared_maximum(values: torch.Tensor, granularity: str) -> torch.Tensor:
    if granularity == "tensor":
        return values.max().expand_as(values)
    if granularity == "row":
        return values.amax(1, keepdim=True).expand_as(values)
    result = torch.empty_like(values)
    for row, column in itertools.product(*(range(0, size, 128) for size in values.shape)):
        block = slice(row, row + 128), slice(column, column + 128)
        result[block] = values[block].max()
    return result


OPERATIONS: dict[str, Callable[[Case, Place], Comparison]] = {
    "merge": merge,
    "strided": strided,
    "tma": tma,
    "dora_norm": dora_norm,
    "dora": dora,
    "grouped": grouped,
    "nf4": nf4,
    "mxfp4": mxfp4,
    "fp8": fp8,
    "requantize": requantize,
}
VARIANTS = {
    "merge": ("in place", "out", "gain", "bf16x6"),
    "grouped": ("all", "one"),
    "nf4": ("64", "32", "128"),
    "fp8": ("tensor", "row", "block"),
    "requantize": ("tensor", "row", "block"),
}
SHAPES = [(1, 1), (3, 17), (65, 129), (127, 300), (200, 513)]
# K even, a multiple of 32, of 8
SHAPES_OF = {
    "nf4": [(1, 2), (3, 18), (65, 192), (70, 130), (129, 256)],
    "mxfp4": [(1, 32), (65, 160), (130, 256)],
    "tma": [(1, 8), (65, 136), (130, 264)],
}
RANKS = [(1,), (4,), (16,), (20,), (64,), (100,), (256,), (4, 20), (1, 64, 3)]
RANKS_OF = {"tma": [(8,), (16,), (40,), (100, 20)], "grouped": [(4,), (16,), (20,), (100,)]}
DTYPES = [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, BF16), (FP32, FP32)]


def sample(operation: str, seed: int, count: int) -> list[Case]:
    """Draw some of the thousands of combinations."""
    combinations = itertools.product(
        SHAPES_OF.get(operation, SHAPES),
        RANKS_OF.get(operation, RANKS),
        DTYPES,
        VARIANTS.get(operation, ("",)),
    )
    cases = [
        Case(operation, shape, ranks, *dtypes, variant)
        for shape, ranks, dtypes, variant in combinations
        # bf16 pieces bring more roundings than the bound has, which only a wide result shows
        if variant != "bf16x6" or BF16 in dtypes[:1]
    ]
    return random.Random(seed).sample(cases, count)


@triton.jit
def encode_kernel(values: tl.tensor, out: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    codes = fp32_to_e4m3(tl.load(values + index, mask=mask, other=0.0))
    tl.store(out + index, codes, mask=mask)


def check_e4m3_encoding(place: Place) -> int:
    """Compare with torch: every tie, its neighbours, specials, and random bit patterns."""
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    ties = torch.cat([(codes[1:] + codes[:-1]) / 2, codes])
    near = torch.cat([ties, ties.nextafter(torch.tensor(9e9)), ties.nextafter(torch.tensor(-1.0))])
    random = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (1 << 17,), generator=random).to(torch.int32)
    special = torch.tensor([torch.inf, torch.nan, 1e-45, 464.0, 465.0, 1e30])
    values = torch.cat([near, special, patterns.view(FP32), torch.randn(1 << 16, generator=random)])
    values = torch.cat([values, -values])
    out = place(torch.empty(values.numel(), dtype=torch.uint8))
    grid = (triton.cdiv(values.numel(), 4096),)
    encode_kernel[grid](place(values), out, values.numel(), BLOCK=4096, enable_fp_fusion=True)
    clamped = torch.where(values.isnan(), values, values.clamp(-448, 448))
    got, want = out.cpu().view(E4M3), clamped.to(E4M3)
    both_nan = got.float().isnan() & want.float().isnan()
    same = got.view(torch.uint8) == want.view(torch.uint8)
    return int((~(same | both_nan)).sum())


def check_decoding(place: Place) -> dict[str, int]:
    """Count the codes of every format whose merge with zeros is not exactly their value."""
    zeros = place(torch.zeros(1, 512, dtype=BF16))
    every = torch.arange(256, dtype=torch.uint8)

    def differing(got: torch.Tensor, exact: torch.Tensor) -> int:
        got = got.cpu().double()
        return int((~((got == exact) | (got.isnan() & exact.isnan()))).sum())

    def terms(n: int, k: int) -> Terms:
        return [(zeros[:, :k], place(torch.zeros(n, 1, dtype=BF16)), 1.0)]

    wrong = {}
    out = poison(place, (1, 512), FP32)
    absmax = torch.ones(8)
    nf4_lora_merge(Nf4Weight(place(every), place(absmax)), terms(1, 512), out=out)
    wrong["nf4"] = differing(out, nf4_decode(every, absmax, (1, 512), 64))
    out = poison(place, (1, 256), FP32)
    fp8_lora_merge(
        place(every.view(1, 256).view(E4M3)), place(torch.ones(1)), terms(1, 256), out=out
    )
    wrong["e4m3"] = differing(out, every.view(1, 256).view(E4M3).double())
    # every code with every exponent
    codes = (torch.arange(16, dtype=torch.uint8) * 17).expand(256, 16).contiguous()
    exponents = every.view(256, 1)
    out = poison(place, (256, 32), FP32)
    mxfp4_lora_merge(place(codes), place(exponents), terms(256, 32), out=out)
    wrong["mxfp4"] = differing(out, mxfp4_decode(codes, exponents).float().double())
    return wrong
