"""AQLM against all codes there are, least squares in float64, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from streammerge.config.codebooks import Codebooks
from streammerge.errors import QuantizationError
from streammerge.quantize import aqlm, aqlm_search
from streammerge.quantize.aqlm import AqlmOptions, CodebookInputs, quantize_aqlm
from streammerge.quantize.aqlm_fit import fit_books, fit_scales, losses
from streammerge.quantize.aqlm_search import Beam, search
from streammerge.quantize.aqlm_start import start_books, start_scales
from streammerge.quantize.codebooks import CodebookLinear, sums_of
from streammerge.quantize.gptq import Factored, GptqOptions, Hessian, quantize_gptq
from streammerge.quantize.linear import Grid


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(features: int, tokens: int = 400, seed: int = 1) -> torch.Tensor:
    """Return the matrix of inputs that depend on each other, some of them greater than others."""
    mixed = torch.eye(features) + draw(features, features, seed=seed) / features**0.5
    sizes = draw(features, seed=seed + 1).exp()
    hessian = Hessian(features)
    hessian.add(draw(tokens, features, seed=seed + 2) @ mixed * sizes)
    return hessian.matrix


def options_of(count: int = 2, bits: int = 4, size: int = 4, **others: Any) -> AqlmOptions:
    return AqlmOptions(Codebooks(count, bits, size), **others)


def inputs_of(hessian: torch.Tensor, options: AqlmOptions) -> CodebookInputs:
    return CodebookInputs(hessian.clone(), options, name="weight")


def exact(weight: torch.Tensor, linear: CodebookLinear, matrix: torch.Tensor) -> torch.Tensor:
    """Return what each row loses, by the definition, in float64."""
    codes, books = linear.codes.long(), linear.books.double()
    groups = [
        sum(books[c][codes[:, g, c]] for c in range(len(books))) for g in range(codes.shape[1])
    ]
    lost = torch.cat(groups, dim=1) * linear.scales.double()[:, None] - weight.double()
    return ((lost @ matrix.double()) * lost).sum(dim=1)


@pytest.mark.parametrize(
    ("count", "bits", "size", "features"), [(1, 2, 2, 8), (2, 1, 2, 6), (3, 2, 4, 4), (2, 3, 1, 2)]
)
def test_a_wide_beam_finds_the_best_of_all_codes(
    count: int, bits: int, size: int, features: int
) -> None:
    options = options_of(count, bits, size)
    inputs = inputs_of(hessian_of(features), options)
    weight, books = draw(5, features), draw(count, 1 << bits, size, seed=7)
    scales = draw(5, seed=8).abs() + 0.5
    every = 1 << (count * bits)
    found = search(weight, books, scales, inputs.triangle, Beam(every**2, every))
    got = exact(weight, CodebookLinear(found, books, scales), inputs.matrix)
    choices = list(itertools.product(range(1 << bits), repeat=count * features // size))
    least = torch.full((5,), torch.inf, dtype=torch.float64)
    for choice in choices:
        codes = torch.tensor(choice).view(1, -1, count).expand(5, -1, -1)
        least = least.minimum(exact(weight, CodebookLinear(codes, books, scales), inputs.matrix))
    # every choice survives, so that only rounding in float32 is left
    assert torch.allclose(got, least, rtol=1e-4)


def test_more_survivors_and_picks_lose_less() -> None:
    options = options_of(bits=5)
    inputs = inputs_of(hessian_of(96), options)
    weight, books, scales = draw(40, 96), draw(2, 32, 4, seed=7), torch.ones(40)
    lost = [
        float(
            exact(
                weight,
                CodebookLinear(search(weight, books, scales, inputs.triangle, beam), books, scales),
                inputs.matrix,
            ).sum()
        )
        for beam in (Beam(1, 1), Beam(1, 8), Beam(8, 8))
    ]
    assert lost == sorted(lost, reverse=True)
    assert lost[2] < 0.97 * lost[0]


def test_chunks_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(bits=5)
    inputs = inputs_of(hessian_of(96), options)
    weight, books, scales = draw(40, 96), draw(2, 32, 4, seed=7), torch.ones(40)
    whole = search(weight, books, scales, inputs.triangle, Beam(4, 4))
    monkeypatch.setattr(aqlm_search, "CHUNK_VALUES", 96 * 4 * 7)
    monkeypatch.setattr(aqlm_search, "BLOCK", 16)
    parts = search(weight, books, scales, inputs.triangle, Beam(4, 4))
    # sums are rounded in another order, which turns near ties
    assert float((whole == parts).float().mean()) > 0.99


def random_linear(
    rows: int, features: int, *, count: int = 2, bits: int = 2, size: int = 4
) -> CodebookLinear:
    generator = torch.Generator().manual_seed(11)
    shape = rows, features // size, count
    codes = torch.randint(1 << bits, shape, generator=generator, dtype=torch.int32)
    scales = draw(rows, seed=12).abs() + 0.5
    return CodebookLinear(codes, draw(count, 1 << bits, size, seed=13), scales)


def design_of(linear: CodebookLinear) -> torch.Tensor:
    """Return the matrix (N K, C V G) that takes codebooks to what codes stand for, in float64."""
    units = torch.eye(linear.books.numel(), dtype=torch.float64)
    columns = []
    for unit in units:
        sums = sums_of(linear.codes, unit.view_as(linear.books))
        columns.append((sums * linear.scales.double()[:, None]).flatten())
    return torch.stack(columns, dim=1)


def test_codebooks_are_least_squares() -> None:
    weight, matrix = draw(30, 16), inputs_of(hessian_of(16), options_of()).matrix
    linear = random_linear(30, 16)
    root = torch.linalg.cholesky(matrix.double())
    design = design_of(linear).view(30, 16, -1)
    rotated = torch.einsum("nkp,kj->njp", design, root).flatten(0, 1)
    wanted = (weight.double() @ root).flatten()
    best = torch.linalg.lstsq(rotated, wanted[:, None], driver="gelsd").solution[:, 0]
    least = float((rotated @ best - wanted).square().sum())
    before = float(exact(weight, linear, matrix).sum())
    for _ in range(3):
        linear.books = fit_books(weight, matrix, linear)
        after = float(exact(weight, linear, matrix).sum())
        assert after <= before * (1 + 1e-6)
        before = after
    # 31 unknowns: three times ten steps of conjugate gradients, which begin anew
    assert least <= after < least * 1.01


def test_entries_that_no_code_names_stay() -> None:
    linear = random_linear(30, 16)
    linear.codes.clamp_(max=2)
    fitted = fit_books(draw(30, 16), hessian_of(16), linear)
    assert torch.equal(fitted[:, 3], linear.books[:, 3])
    assert not torch.equal(fitted[:, :3], linear.books[:, :3])


def test_scales_are_least_squares() -> None:
    weight, matrix, linear = draw(30, 16), hessian_of(16), random_linear(30, 16)
    linear.scales = fit_scales(weight, matrix, linear)
    sums = sums_of(linear.codes, linear.books.double())
    best = (sums @ matrix.double() * weight).sum(1) / (sums @ matrix.double() * sums).sum(1)
    is_positive = best > 1e-3
    assert 5 < int(is_positive.sum()) < 30
    assert torch.allclose(linear.scales[is_positive].double(), best[is_positive], rtol=1e-4)
    assert torch.equal(linear.scales[~is_positive], random_linear(30, 16).scales[~is_positive])


def test_losses_are_those_of_the_definition() -> None:
    weight, matrix, linear = draw(30, 16), hessian_of(16), random_linear(30, 16)
    got, wanted = losses(weight, matrix, linear), exact(weight, linear, matrix)
    assert torch.allclose(got, wanted, rtol=1e-5)


def test_no_step_loses_more_than_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, options = draw(64, 64), options_of(bits=4, least_gain=0.0)
    inputs = inputs_of(hessian_of(64), options)
    seen: list[tuple[str, float]] = []

    def watch(name: str, target: str | None) -> None:
        inner = getattr(aqlm, name)

        def run(*arguments: Any) -> Any:
            linear = next(part for part in arguments if isinstance(part, CodebookLinear))
            result = inner(*arguments)
            after = CodebookLinear(linear.codes, linear.books, linear.scales)
            if target:
                setattr(after, target, result)
            seen.append((name, float(exact(weight, after, inputs.matrix).sum())))
            return result

        monkeypatch.setattr(aqlm, name, run)

    watch("fit_books", "books")
    watch("fit_scales", "scales")
    watch("_choose", None)
    quantize_aqlm(weight, inputs, options)
    lost = [value for _, value in seen]
    assert len(lost) == 3 * options.rounds + 1
    for before, after in itertools.pairwise(lost[:-1]):
        assert after <= before * (1 + 1e-5)
    # between the last two is rounding to float16: 2^-11 of each value of the weight
    assert lost[-1] <= lost[-2] * 1.001
    assert lost[-1] < 0.8 * lost[0]


def nearest(weight: torch.Tensor, hessian: torch.Tensor, options: AqlmOptions) -> CodebookLinear:
    """Return what k-means alone makes of a weight: each group by itself, one codebook at a time."""
    shape = options.codebooks
    scales = start_scales(weight)
    books = start_books(
        weight, scales, hessian.diagonal(), shape=(shape.count, shape.entries, shape.group_size),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    left = (weight / scales[:, None]).view(-1, shape.group_size)
    codes = []
    for book in books:
        number = torch.cdist(left, book).argmin(dim=1)
        left = left - book[number]
        codes.append(number.view(len(weight), -1))
    return CodebookLinear(torch.stack(codes, dim=-1).to(torch.int32), books, scales)


@pytest.mark.parametrize(("count", "bits", "size"), [(2, 6, 8), (1, 8, 4), (3, 4, 8)])
def test_it_beats_nearest_entries_and_gptq_of_as_many_bits(
    count: int, bits: int, size: int
) -> None:
    weight, hessian = draw(96, 128), hessian_of(128, tokens=1000)
    options = options_of(count, bits, size)
    inputs = inputs_of(hessian, options)
    got = quantize_aqlm(weight, inputs, options)
    before = float(((weight @ hessian) * weight).sum())
    wanted = float(exact(weight, got, hessian).sum()) / before
    assert got.relative_error == pytest.approx(wanted, rel=1e-3)
    plain = float(exact(weight, nearest(weight, hessian, options), hessian).sum()) / before
    assert got.relative_error < 0.6 * plain
    # of two bits, where the codebooks here have two or less
    gptq = GptqOptions(Grid(2), 32)
    other = quantize_gptq(weight, Factored(hessian, gptq), gptq)
    assert got.relative_error < other.relative_error


def test_a_weight_of_entries_is_found_exactly() -> None:
    generator = torch.Generator().manual_seed(2)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)))
    codes = torch.randint(16, (32, 12), generator=generator)
    scales = 2.0 ** torch.randint(-6, 3, (32,), generator=generator)
    weight = (signs[codes] * scales[:, None, None]).flatten(1)
    options = options_of(1, 4, 4)
    got = quantize_aqlm(weight, inputs_of(hessian_of(48), options), options)
    assert torch.equal(got.dequantize(), weight)
    assert got.relative_error == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_the_same_twice_and_changes_nothing(dtype: torch.dtype) -> None:
    weight, hessian = draw(40, 64).to(dtype), hessian_of(64)
    before = weight.clone()
    options = options_of()
    one, other = (quantize_aqlm(weight, inputs_of(hessian, options), options) for _ in range(2))
    assert torch.equal(weight, before)
    for name in ("codes", "books", "scales"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    another = options_of(seed=1)
    changed = quantize_aqlm(weight, inputs_of(hessian, another), another)
    assert not torch.equal(changed.codes, one.codes)


def test_rows_and_inputs_of_zeros_do_no_harm() -> None:
    weight, hessian = draw(40, 64), hessian_of(64)
    weight[3] = 0
    # float16 has no such scale
    weight[4] *= 1e-9
    hessian[:8] = 0
    hessian[:, :8] = 0
    options = options_of(bits=5)
    got = quantize_aqlm(weight, inputs_of(hessian, options), options)
    assert torch.isfinite(got.dequantize()).all()
    assert 0 < got.relative_error < 0.2
    nothing = quantize_aqlm(weight, inputs_of(torch.zeros(64, 64), options), options)
    assert nothing.relative_error == 0
    # no inputs tell weights apart: all count the same
    assert float((nothing.dequantize() - weight).square().sum() / weight.square().sum()) < 0.2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_broken_weights_are_refused(bad: float) -> None:
    weight, options = draw(40, 64), options_of()
    weight[3, 5] = bad
    with pytest.raises(QuantizationError, match="'up_proj' holds NaN, Inf"):
        quantize_aqlm(weight, inputs_of(hessian_of(64), options), options, name="up_proj")


def test_broken_inputs_are_refused() -> None:
    hessian = hessian_of(64)
    hessian[3, 3] = float("nan")
    with pytest.raises(QuantizationError, match="inputs of 'weight' that are NaN"):
        inputs_of(hessian, options_of())
