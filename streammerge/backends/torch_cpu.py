"""The CPU backend: PEFT's arithmetic, bit for bit, on tiles of rows.

Per tile of a weight W (N, K), with A (R, K) and B (N, R) in the compute dtype P (F64 for an F64
base, else F32):

    delta = (B[i:j] @ A) * scaling        product, then one multiplication
    W[i:j] += delta                       one addition in P, one rounding to W's dtype

`addmm` would fuse the scaling and round otherwise. The product of a tile equals the rows of the
whole product to the bit if the tile has four rows or more; a shorter tail joins the tile before it.
For a weight stored (K, N) the tile is a range of A's columns and the product is added transposed,
because the product of the transposed factors rounds otherwise in short tiles.

DoRA, with m (N,): V = W + delta; W = (m / ||V||_2 per row) * V, rounded once (peft, lora/dora.py).

Above rank 512 BLAS splits the sum over R by the shape of the product, so PEFT's own bits depend on
the number of threads there; the result is within the rounding of the F32 product.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from streammerge.backends.base import TargetFactors
from streammerge.config.tuning import ComputeTuning
from streammerge.dtypes import Dtype
from streammerge.plan.ops import ApplyTerms, BiasTerm, LoraTerm, rank_of
from streammerge.plan.tiles import MIN_TILE_ROWS, split_rows

if TYPE_CHECKING:
    from streammerge.backends.base import Tile
    from streammerge.plan.ops import Numerics, TensorPlan

__all__ = ["TorchCpuBackend", "torch_dtype"]

_TORCH = {
    Dtype.BOOL: torch.bool, Dtype.U8: torch.uint8, Dtype.I8: torch.int8, Dtype.I16: torch.int16,
    Dtype.I32: torch.int32, Dtype.I64: torch.int64, Dtype.F16: torch.float16,
    Dtype.BF16: torch.bfloat16, Dtype.F32: torch.float32, Dtype.F64: torch.float64,
}  # fmt: skip


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """Return the torch dtype of a stored dtype that arithmetic can be done on."""
    return _TORCH[dtype]


@dataclass(frozen=True, slots=True)
class _Factors(TargetFactors):
    tensors: tuple[tuple[torch.Tensor, ...], ...]
    """Per term: (A, B), (A, B, magnitude), or (bias,), in the compute dtype."""


class TorchCpuBackend:
    """Merge tiles with torch on the CPU.

    Each thread that calls it has scratch of its own, and does its arithmetic alone: threads that
    share one product wait for each other, above all where the machine has other work.
    """

    name = "torch-cpu"

    def __init__(
        self,
        *,
        numerics: Numerics,
        scratch_bytes: int | None = None,
        tuning: ComputeTuning | None = None,
    ) -> None:
        """Take charge of torch's threads.

        Args:
            numerics: What a merge rounds, and when.
            scratch_bytes: Most bytes of one product; by default what the tuning says.
            tuning: How large a product is, by rank.
        """
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._numerics = numerics
        self._tuning = tuning or ComputeTuning()
        self._scratch_bytes = scratch_bytes
        self._local = threading.local()

    def close(self) -> None:
        """Give torch the threads back that it had before."""
        torch.set_num_threads(self._threads_before)

    def load_factors(self, target: TensorPlan, raw: list[bytearray]) -> _Factors:
        """Convert a target's factors to the compute dtype."""
        compute = self._compute_dtype(target)
        parts = iter(raw)
        tensors = []
        for term in target.terms:
            found = []
            for factor in term.factors:
                stored = torch.frombuffer(next(parts), dtype=_TORCH[factor.dtype])
                found.append(stored.view(factor.shape).to(compute))
            tensors.append(tuple(found))
        return _Factors(tuple(tensors))

    def apply(self, tile: Tile, factors: TargetFactors) -> bool:
        """Merge one tile in place; return whether all of its results are finite."""
        assert isinstance(factors, _Factors)
        target = tile.target
        assert isinstance(target.op, ApplyTerms)
        rows, columns = tile.end - tile.begin, prod(target.shape[1:])
        source = torch.frombuffer(
            tile.buffer, dtype=_TORCH[target.source.dtype], count=rows * columns,
            offset=tile.source_offset,
        ).view(rows, columns)  # fmt: skip
        output = torch.frombuffer(
            tile.buffer, dtype=_TORCH[target.dtype], count=rows * columns,
            offset=tile.output_offset,
        ).view(rows, columns)  # fmt: skip
        work_dtype, compute = _TORCH[target.op.work_dtype], self._compute_dtype(target)
        is_finite = True
        for begin, end in self._steps(target, rows, columns, compute):
            work = source[begin:end]
            if work.dtype != work_dtype:
                work = self._take("work", work_dtype, work.shape).copy_(work)
            result = output[begin:end]
            if not target.terms:
                self._store(work, result)
                is_finite &= _is_finite(result)
                continue
            wide = self._add_terms(target, work, tile.begin + begin, factors, compute)
            # asked before the result is stored, which may be where these values are
            is_sure = _fits(wide, work.dtype, result.dtype)
            if self._numerics == "peft" and work.dtype != wide.dtype:
                work.copy_(wide)
                self._store(work, result)
            else:
                self._store(wide, result)
            is_finite &= is_sure or _is_finite(result)
        return is_finite

    def _store(self, values: torch.Tensor, output: torch.Tensor) -> None:
        """Round values to the output, which they may overlap or be."""
        if values.data_ptr() == output.data_ptr() and values.dtype == output.dtype:
            return
        if values.dtype != output.dtype:
            # by way of scratch: the source's rows may overlap those of the output
            values = self._take("cast", output.dtype, values.shape).copy_(values)
        output.copy_(values)

    def _add_terms(
        self,
        target: TensorPlan,
        work: torch.Tensor,
        at: int,
        factors: _Factors,
        compute: torch.dtype,
    ) -> torch.Tensor:
        """Return `work` plus the terms for its rows `at, ...` in the compute dtype.

        The last sum is not rounded to the dtype of `work` yet. Converting a narrow weight to the
        compute dtype, adding there, and rounding back gives the same bits as torch's addition of
        mixed dtypes, in a third of the time: that one allocates (0.5 against 1.0 to 2.4 ns per BF16
        element; one thread of a Xeon, torch 2.13.0).
        """
        wide = work
        if work.dtype != compute:
            wide = self._take("wide", compute, work.shape).copy_(work)
        rounds_each = self._numerics == "peft" and work.dtype != compute
        for number, (term, tensors) in enumerate(zip(target.terms, factors.tensors, strict=True)):
            if number and rounds_each:
                wide.copy_(work.copy_(wide))
            if isinstance(term, BiasTerm):
                # a bias is one column: its rows are those of the vector
                wide.add_((tensors[0][at : at + len(work)] * term.scaling).view(work.shape))
                continue
            delta = self._delta(term, tensors, at, wide.shape, compute)
            if term.magnitude is not None:
                _scale_rows(wide, delta, tensors[2][at : at + len(work)])
                continue
            if term.rounds_delta and rounds_each:
                delta.copy_(self._take("cast", work.dtype, delta.shape).copy_(delta))
            wide.add_(delta)
        return wide

    def _delta(
        self,
        term: LoraTerm,
        tensors: tuple[torch.Tensor, ...],
        at: int,
        shape: torch.Size,
        compute: torch.dtype,
    ) -> torch.Tensor:
        """`scaling * B @ A` for rows `at, ...`, in scratch."""
        a, b, rows = tensors[0], tensors[1], shape[0]
        if term.is_transposed:
            product = self._take("delta", compute, torch.Size((shape[1], rows)))
            torch.mm(b, a[:, at : at + rows], out=product)
        else:
            product = self._take("delta", compute, shape)
            torch.mm(b[at : at + rows], a, out=product)
        if term.scaling != 1.0:
            product.mul_(term.scaling)
        return product.T if term.is_transposed else product

    def _steps(
        self, target: TensorPlan, rows: int, columns: int, compute: torch.dtype
    ) -> list[tuple[int, int]]:
        """Divide a tile so that a product fits the scratch and no step is too short."""
        wanted = self._tuning.scratch_for(rank_of(target))
        nbytes = min(wanted, self._scratch_bytes) if self._scratch_bytes else wanted
        fitting = nbytes // max(1, columns * compute.itemsize)
        step = max(MIN_TILE_ROWS, fitting - MIN_TILE_ROWS + 1)
        return split_rows(0, rows, step)

    def _take(self, use: str, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        """Return a piece of this thread's scratch; it holds what its last user left."""
        scratch: dict[str, torch.Tensor] = self._local.__dict__
        count = shape.numel()
        kept = scratch.get(use)
        if kept is None or kept.numel() < count * dtype.itemsize:
            kept = scratch[use] = torch.empty(max(count * dtype.itemsize, 64), dtype=torch.uint8)
        return kept[: count * dtype.itemsize].view(dtype).view(shape)

    @staticmethod
    def _compute_dtype(target: TensorPlan) -> torch.dtype:
        assert isinstance(target.op, ApplyTerms)
        return torch.float64 if target.op.work_dtype is Dtype.F64 else torch.float32


def _scale_rows(weight: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor) -> None:
    """DoRA: give the rows of `weight + delta` the norms `magnitude`; the sum overwrites `delta`."""
    delta.add_(weight)
    norm = torch.linalg.norm(delta, dim=1)
    delta.mul_((magnitude / norm).view(-1, 1))
    weight.copy_(delta)


def _fits(values: torch.Tensor, *dtypes: torch.dtype) -> bool:
    """Return whether the values are surely finite, and stay so when they are rounded to the dtypes.

    The sum of squares bounds each of them: 0.05 ns per element, against 0.23 to 0.4 for the least
    and the greatest (one thread of a Xeon, torch 2.13.0). Where it says no, that is looked at.
    """
    if not all(dtype.is_floating_point for dtype in dtypes):
        return False
    flat = values.view(-1)
    squares = torch.dot(flat, flat).item()
    limit = min(torch.finfo(dtype).max for dtype in dtypes)
    return math.isfinite(squares) and squares < limit * limit


def _is_finite(values: torch.Tensor) -> bool:
    # one pass without a temporary: 10 to 20 GB/s against 1.3 for isfinite().all() on BF16
    if values.numel() == 0 or not values.is_floating_point():
        return True
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) and torch.isfinite(high))
