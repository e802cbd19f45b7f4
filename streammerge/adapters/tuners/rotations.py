"""Multiply weights from the right by a square matrix, tile by tile: `W @ M`, as OFT, BOFT, HRA do.

PEFT multiplies by all of M (K, K), which is mostly zeros where it is block-diagonal. A zero adds
nothing to a sum, so the windows along the diagonal that hold the blocks give the same bits, as long
as BLAS does not divide its sum over K inside a block. What MKL does was measured (2024.2, AVX-512,
one thread, F32): up to 384 columns it adds up in one go, up to 768 in two halves, beyond that in
pieces of 384, a multiple of 64. Hence:

| columns | blocks | windows |
|---|---|---|
| up to 768 | any | one: M as PEFT has it |
| more | of a size that divides 64 | of 64 columns |
| up to 8192 | of another size | one: M as PEFT has it |
| more | of another size | of one block, or of some small ones; sums are divided otherwise |

A product of less than 16 rows takes other kernels, which round otherwise: short tiles are filled up
with zeros. With a right factor that is not stored transposed that holds for less than some 200
rows, so it is always stored so. A whole weight of less than 16 rows is multiplied beforehand in
PEFT's own words.

Where a weight has more than 768 columns and less than some 300 rows, MKL divides sums otherwise
again, by the number of threads too: there PEFT's bits are met only if the blocks are of a size that
divides 64 and the columns a multiple of 64.

Shapes: N out_features, K columns: in_features, of a convolution with its window.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from streammerge.adapters.tuners.dense import linear_size

if TYPE_CHECKING:
    import torch

    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import Layer

__all__ = ["DENSE_COLUMNS", "MIN_ROWS", "Product", "Windows", "product_bytes", "rotated_columns"]

MIN_ROWS = 16
WHOLE_COLUMNS = 768
WINDOW = 64
DENSE_COLUMNS = 8192


def rotated_columns(layer: Layer) -> int:
    """Return K of a layer whose inputs are rotated: a linear one, a 2-D convolution, an embedding.

    Raises:
        PlanError: It is another layer, for which PEFT has no adapter of the kind.
    """
    weight = layer.parameters.get("weight")
    if weight is not None and len(weight.shape) == 4:
        return prod(weight.shape[1:])
    if weight is not None and len(weight.shape) == 2 and layer.module.is_embedding:
        return weight.shape[1]
    return linear_size(layer)[1]


def window_width(columns: int, block: int) -> int:
    """Return the columns of a window."""
    if columns <= WHOLE_COLUMNS:
        return columns
    if WINDOW % block == 0:
        return WINDOW
    return columns if columns <= DENSE_COLUMNS else min(columns, -(-WINDOW // block) * block)


def product_bytes(shape: tuple[int, ...], block: int) -> int:
    """Return the bytes of the windows in float64, and of what is multiplied beforehand.

    Args:
        shape: Of the weight as stored.
        block: Columns of a block of M.
    """
    columns = prod(shape[1:])
    width = window_width(columns, block)
    beforehand = 3 * columns * shape[0] + width * width if shape[0] < MIN_ROWS else 0
    return 8 * (-(-columns // width) * width * width + beforehand)


@dataclass(frozen=True, slots=True)
class Product:
    """`W @ M`, row by row."""

    windows: tuple[tuple[int, torch.Tensor], ...]
    """Each with its first column. They cover M, and agree where they overlap."""
    done: torch.Tensor | None = None
    """(N, K): all of it, where there are few rows."""

    def rows(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        """Return rows `begin, ...` of the product in the dtype of M, from those of W (n, K)."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        count = len(rows)
        if self.done is not None:
            return self.done[begin : begin + count]
        wide = rows.to(self.windows[0][1].dtype)
        if count < MIN_ROWS:
            wide = torch.cat([wide, wide.new_zeros(MIN_ROWS - count, wide.shape[1])])
        if len(self.windows) == 1:
            return torch.mm(wide, self.windows[0][1])[:count]
        result = torch.empty_like(wide)
        for first, window in self.windows:
            part = slice(first, first + len(window))
            torch.mm(wide[:, part], window, out=result[:, part])
        return result[:count]


class Windows:
    """A block-diagonal L, as dense windows along its diagonal, for `W @ L.T`."""

    def __init__(
        self,
        columns: int,
        reach: int,
        *,
        dtype: torch.dtype,
        block: int | None = None,
        is_shared: bool = False,
    ) -> None:
        """Begin with zeros.

        Args:
            columns: K.
            reach: Columns of a block, of a product of several L that of the product.
            dtype: Of L.
            block: Columns of a block of this one, if they are less.
            is_shared: Whether all blocks are the same.
        """
        import torch  # noqa: PLC0415 (planning needs no torch)

        self._block = block or reach
        self._width = width = window_width(columns, reach)
        # the last window ends with L, so that it is not a narrow one
        self._starts = [*range(0, columns - width, width), columns - width]
        self._is_shared = is_shared
        count = 1 if is_shared else len(self._starts)
        self._windows = [torch.zeros(width, width, dtype=dtype) for _ in range(count)]

    def put(self, number: int, block: torch.Tensor) -> None:
        """Put one of the blocks in its place; of shared ones, the only one in all places."""
        size = self._block
        if self._is_shared:
            for at in range(0, self._width, size):
                self._windows[0][at : at + size, at : at + size] = block
            return
        first = number * size
        last = len(self._starts) - 1
        for window in {min(first // self._width, last), last}:
            at = first - self._starts[window]
            if 0 <= at <= self._width - size:
                self._windows[window][at : at + size, at : at + size] = block

    def put_columns(self, first: int, columns: torch.Tensor) -> None:
        """Put columns `first, ...` (K, n) of an L that is one window in their place."""
        self._windows[0][:, first : first + columns.shape[1]] = columns

    def turn(self, order: torch.Tensor) -> None:
        """Reorder rows and columns: `P @ L @ P.T`, where row i of P is one at `order[i]`.

        Args:
            order: (K,); it leaves each block where it is.
        """
        for number, start in enumerate(self._starts[: len(self._windows)]):
            inside = order[start : start + self._width] - start
            self._windows[number] = self._windows[number][inside][:, inside]

    def multiply_left(self, left: Windows) -> None:
        """Put `left @ L` in the place of L; both have the same windows."""
        for number, window in enumerate(left._windows):
            self._windows[number] = window @ self._windows[number]

    def product(self, weight: Weight, *, is_left: bool) -> Product:
        """Return the product with a weight.

        Args:
            weight: The weight.
            is_left: Whether PEFT has L, and multiplies `L @ W.T`; else it has its transpose M, and
                multiplies `W @ M`.
        """
        import torch  # noqa: PLC0415 (planning needs no torch)

        done = None
        if len(self._starts) == 1 and weight.shape[0] < MIN_ROWS:
            left = self._windows[0]
            whole = weight.whole()
            if is_left:
                done = torch.mm(left, whole.t().to(left.dtype)).t()
            else:
                done = torch.mm(whole.to(left.dtype), left.t().contiguous())
        factors = [window.t() for window in self._windows]
        if self._is_shared:
            factors *= len(self._starts)
        return Product(tuple(zip(self._starts, factors, strict=True)), done)
