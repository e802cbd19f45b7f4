"""The best codebooks for given codes and scales, and the best scales for given codebooks.

With W^ what codes stand for, both minimize `tr((W^ - W) M (W^ - W)^T)`, which is quadratic in
either. Codebooks take steps of conjugate gradients, preconditioned by the diagonal: every step
loses less than the one before. Scales have the answer `s_n = (u_n M w_n) / (u_n M u_n)`, with u
the sums of entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from streammerge.quantize.codebooks import LEAST_SCALE, sums_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streammerge.quantize.codebooks import CodebookLinear

__all__ = ["fit_books", "fit_scales", "losses"]

STEPS = 10
# a step that gains this share of the first is the last
LEAST_GAIN = 1e-3
# values in float32 at a time
CHUNK_VALUES = 1 << 21


def losses(weight: torch.Tensor, matrix: torch.Tensor, linear: CodebookLinear) -> torch.Tensor:
    """Return what each row loses, (N,) float64.

    Args:
        weight: (N, K), any float dtype.
        matrix: (K, K) float32: M.
        linear: What stands in the weight's place.
    """
    found = []
    for rows in _rows(weight):
        lost = linear.dequantize(rows=rows).sub_(weight[rows])
        found.append((lost @ matrix).mul_(lost).sum(dim=1, dtype=torch.float64))
    return torch.cat(found)


def fit_scales(weight: torch.Tensor, matrix: torch.Tensor, linear: CodebookLinear) -> torch.Tensor:
    """Return the best scales, (N,) float32; a row whose best is not positive keeps its own."""
    found = []
    for rows in _rows(weight):
        sums = sums_of(linear.codes[rows], linear.books)
        product = sums @ matrix
        below = (product * sums).sum(dim=1)
        above = product.mul_(weight[rows]).sum(dim=1)
        best = above / below
        is_better = (below > 0) & (best >= LEAST_SCALE) & torch.isfinite(best)
        found.append(torch.where(is_better, best, linear.scales[rows]))
    return torch.cat(found)


def fit_books(weight: torch.Tensor, matrix: torch.Tensor, linear: CodebookLinear) -> torch.Tensor:
    """Return better codebooks, (C, V, G) float32; entries that no code names stay as they are."""
    books = linear.books.clone()
    diagonal = _diagonal(matrix, linear)
    diagonal[diagonal == 0] = 1.0
    left = torch.zeros_like(books)
    for rows in _rows(weight):
        lost = weight[rows] - linear.dequantize(rows=rows)
        _add(left, (lost @ matrix).mul_(linear.scales[rows, None]), linear.codes[rows])
    solved = left / diagonal
    direction, product = solved.clone(), _inner(left, solved)
    first = 0.0
    for _ in range(STEPS):
        curved = _curve(direction, matrix, linear)
        curvature = _inner(direction, curved)
        if curvature <= 0 or product <= 0:
            break
        step = product / curvature
        books += direction * step
        left -= curved * step
        first = first or step * product
        if step * product < LEAST_GAIN * first:
            break
        solved = left / diagonal
        last, product = product, _inner(left, solved)
        direction = solved + direction * (product / last)
    return books


def _curve(books: torch.Tensor, matrix: torch.Tensor, linear: CodebookLinear) -> torch.Tensor:
    """Return the quadratic form's matrix times codebooks."""
    total = torch.zeros_like(books)
    for rows in _rows(linear.codes[:, :, 0], books.shape[2]):
        scales = linear.scales[rows, None]
        values = sums_of(linear.codes[rows], books).mul_(scales)
        _add(total, (values @ matrix).mul_(scales), linear.codes[rows])
    return total


def _diagonal(matrix: torch.Tensor, linear: CodebookLinear) -> torch.Tensor:
    """Return the diagonal of the quadratic form, (C, V, G)."""
    total = torch.zeros_like(linear.books)
    for rows in _rows(linear.codes[:, :, 0], linear.books.shape[2]):
        squares = linear.scales[rows, None].square()
        _add(total, squares * matrix.diagonal(), linear.codes[rows])
    return total


def _add(total: torch.Tensor, values: torch.Tensor, codes: torch.Tensor) -> None:
    """Add each group of values (n, K) to the entries that codes (n, groups, C) name."""
    flat = values.view(-1, total.shape[2])
    for number, book in enumerate(total):
        book.index_add_(0, codes[:, :, number].flatten(), flat)


def _inner(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one * other).sum(dtype=torch.float64))


def _rows(matrix: torch.Tensor, per_value: int = 1) -> Iterator[slice]:
    """Yield ranges of rows that hold as many values as are taken at a time."""
    step = max(1, CHUNK_VALUES // (matrix.shape[1] * per_value))
    for begin in range(0, len(matrix), step):
        yield slice(begin, begin + step)
