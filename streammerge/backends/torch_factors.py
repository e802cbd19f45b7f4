"""Factors and weights as torch tensors: what a term multiplies, and what it looks at beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from streammerge.codecs.tensors import torch_dtype
from streammerge.plan.ops import ApplyTerms, LoraTerm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from streammerge.adapters.terms import Factor, Term
    from streammerge.backends.base import SourceReader
    from streammerge.checkpoint.header import StoredTensor
    from streammerge.plan.ops import TensorPlan

__all__ = ["LoraFactors", "WholeWeight", "column_norms", "load_term_factors"]

# a piece of a weight, in the compute dtype, while all of it is looked at
SCAN_BYTES = 4 << 20


@dataclass(slots=True)
class LoraFactors:
    """The factors of one `LoraTerm` in the compute dtype."""

    a: torch.Tensor
    """(R, K)"""
    b: torch.Tensor
    """(N, R)"""
    magnitude: torch.Tensor | None = None
    """(N,)"""
    column_scale: torch.Tensor | None = None
    """(N,): `m / ||V||`, known beforehand where the weight is stored (K, N)."""


def load_term_factors(
    term: Term, raw: Mapping[StoredTensor, bytearray], compute: torch.dtype
) -> Any:
    """Return a term's factors as tensors: `LoraFactors`, or a list in the order of the term."""
    if isinstance(term, LoraTerm):
        a = _view(term.a, raw[term.a.tensor], compute)
        b = _view(term.b, raw[term.b.tensor], compute)
        if term.gain is not None:
            b = b * _stored(term.gain, raw[term.gain]).to(compute).view(1, -1)
        magnitude = None
        if term.magnitude is not None:
            magnitude = _stored(term.magnitude, raw[term.magnitude]).to(compute).view(-1)
        return LoraFactors(a, b, magnitude)
    tensors = [_stored(factor, raw[factor]) for factor in term.factors]
    return [tensor.to(compute) if tensor.is_floating_point() else tensor for tensor in tensors]


def _stored(factor: StoredTensor, raw: bytearray) -> torch.Tensor:
    if not raw:
        return torch.empty(factor.shape, dtype=torch_dtype(factor.dtype))
    return torch.frombuffer(raw, dtype=torch_dtype(factor.dtype)).view(factor.shape)


def _view(factor: Factor, raw: bytearray, compute: torch.dtype) -> torch.Tensor:
    """Return a factor as a matrix in the compute dtype; converted after it is cut, not before."""
    matrix = _stored(factor.tensor, raw)
    matrix = matrix.reshape(matrix.shape[0], -1)
    if factor.rows is not None:
        matrix = matrix[factor.rows.start : factor.rows.stop : factor.rows.step]
    if factor.columns is not None:
        matrix = matrix[:, factor.columns.start : factor.columns.stop : factor.columns.step]
    matrix = matrix.to(compute).contiguous()
    if factor.diagonal_blocks > 1:
        matrix = torch.block_diag(  # type: ignore[no-untyped-call]
            *matrix.chunk(factor.diagonal_blocks, dim=0)
        )
    if factor.column_repeats > 1:
        # a copy, so that the gain may be applied in place
        matrix = matrix.repeat_interleave(factor.column_repeats, dim=1)
        return matrix.mul_(factor.gain)
    return matrix * factor.gain if factor.gain != 1.0 else matrix


class WholeWeight:
    """A target as a term finds it: what it is made from, with the terms before it applied."""

    def __init__(
        self,
        target: TensorPlan,
        read_source: SourceReader,
        *,
        compute_dtype: torch.dtype,
        is_rounded: bool,
        piece_bytes: int,
        apply_before: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> None:
        """Look at a target.

        Args:
            target: The target.
            read_source: Reads its source.
            compute_dtype: The dtype of the factors.
            is_rounded: Whether the terms before left a weight in the dtype it has in memory.
            piece_bytes: Most bytes of a piece of it in the compute dtype.
            apply_before: Applies those terms to rows as they are in memory, the first of which is
                given, and returns them in the compute dtype.
        """
        assert isinstance(target.op, ApplyTerms)
        work_dtype = torch_dtype(target.op.work_dtype)
        self.shape = target.shape
        self.dtype = work_dtype if is_rounded else compute_dtype
        self.compute_dtype = compute_dtype
        self._source = torch_dtype(target.source.dtype)
        self._work_dtype = work_dtype
        self._read = read_source
        self._piece_bytes = min(piece_bytes, SCAN_BYTES)
        self._apply_before = apply_before
        self._rows, self._columns = target.rows, target.columns

    def tiles(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the first row and the values of one piece of rows after the other, each (n, K).

        A piece is overwritten when the next one is asked for.
        """
        row_bytes = self._columns * self._source.itemsize
        if not row_bytes or not self._rows:
            return
        # three more rows may join the last piece
        count = max(4, self._piece_bytes // (self._columns * self.compute_dtype.itemsize) - 3)
        edges = list(range(0, self._rows, count))
        if len(edges) > 1 and self._rows - edges[-1] < 4:
            # BLAS rounds otherwise in a shorter tile
            edges.pop()
        buffer = bytearray(min(self._rows, count + 3) * row_bytes)
        for begin, end in zip(edges, [*edges[1:], self._rows], strict=True):
            view = memoryview(buffer)[: (end - begin) * row_bytes]
            self._read(begin * row_bytes, view)
            stored = torch.frombuffer(view, dtype=self._source).view(end - begin, self._columns)
            # the terms before may write over these rows
            work = stored.to(self._work_dtype)
            yield begin, self._apply_before(work, begin).to(self.dtype)

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Return some of its rows, read again; in `apply` too, whose own rows it may write over."""
        # four at least, as BLAS rounds otherwise with less
        first = max(0, min(begin, self._rows - 4))
        last = min(self._rows, max(end, first + 4))
        row_bytes = self._columns * self._source.itemsize
        buffer = bytearray((last - first) * row_bytes)
        self._read(first * row_bytes, memoryview(buffer))
        stored = torch.frombuffer(buffer, dtype=self._source).view(last - first, self._columns)
        values = self._apply_before(stored.to(self._work_dtype), first)
        # what the terms before return is scratch
        return values[begin - first : end - first].to(self.dtype, copy=True)

    def whole(self) -> torch.Tensor:
        """Return all of it as one new matrix of `shape[0]` rows."""
        rows = self.shape[0] if self.shape else 1
        result = torch.empty((self._rows, self._columns), dtype=self.dtype)
        for begin, values in self.tiles():
            result[begin : begin + len(values)] = values
        return result.view(rows, prod(self.shape[1:]))


def column_norms(
    weight: WholeWeight, delta: Callable[[int, torch.Size], torch.Tensor]
) -> torch.Tensor:
    """Return the norm of each column of `weight + delta`, to the bit what torch makes of it whole.

    torch adds the squares of a column one after the other in the compute dtype, none of it fused.

    Args:
        weight: Stored (K, N).
        delta: Gives the rows from a first one on, of a shape (n, N).

    Returns:
        (N,) in the compute dtype.
    """
    compute, columns = weight.compute_dtype, prod(weight.shape[1:])
    # a single column, whose values lie side by side, is reduced in another order
    whole = torch.empty((1, weight.shape[0]), dtype=compute) if columns == 1 else None
    squares = torch.zeros(columns, dtype=compute)
    for at, rows in weight.tiles():
        wide = rows.to(compute)
        wide.add_(delta(at, wide.shape))
        if whole is not None:
            whole[0, at : at + len(wide)] = wide[:, 0]
            continue
        wide.square_()[0].add_(squares)
        # down the columns NumPy adds row after row
        np.add.reduce(wide.numpy(), axis=0, out=squares.numpy())
    # rounded correctly, as the root inside of torch's norm is; torch's own is not always
    np.sqrt(squares.numpy(), out=squares.numpy())
    norms: torch.Tensor = squares if whole is None else torch.linalg.norm(whole, dim=1)
    return norms
