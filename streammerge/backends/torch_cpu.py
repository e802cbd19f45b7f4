"""The CPU backend: PEFT's arithmetic, bit for bit, on tiles of rows.

Per tile of a weight W (N, K), with A (R, K) and B (N, R) in the compute dtype P (F64 for an F64
base, else F32):

    delta = (B[i:j] @ A) * scaling        product, then one multiplication
    W[i:j] += delta                       one addition in P, one rounding to W's dtype

`addmm` would fuse the scaling and round otherwise. The product of a tile equals the rows of the
whole product to the bit if the tile has four rows or more; a shorter tail joins the tile before it.
For a weight stored (K, N) the tile is a range of A's columns and the product is added transposed,
because the product of the transposed factors rounds otherwise in short tiles. A term on a region
(one expert of a fused tensor) does the same to the part of the region that is in the tile.

DoRA, with m (N,): V = W + delta; W = (m / ||V||_2 per row) * V, rounded once (peft, lora/dora.py).
On a weight stored (K, N) the norms are those of columns, which are measured before the first tile:
torch adds the squares of a column one after the other in P, so the pieces of it can be added up in
the order of the file with the same roundings.

Above rank 512 BLAS splits the sum over R by the shape of the product, so PEFT's own bits depend on
the number of threads there; the result is within the rounding of the F32 product.
"""

from __future__ import annotations

import functools
import math
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from streammerge.backends.base import TargetFactors
from streammerge.backends.encoding import WeightEncoder
from streammerge.backends.torch_factors import (
    LoraFactors,
    WholeWeight,
    column_norms,
    load_term_factors,
)
from streammerge.codecs.tensors import torch_dtype
from streammerge.config.tuning import ComputeTuning
from streammerge.dtypes import Dtype
from streammerge.plan.ops import ApplyTerms, BiasTerm, LoraTerm, TunerTerm, rank_of
from streammerge.plan.tiles import MIN_TILE_ROWS, split_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from streammerge.backends.base import SourceReader, Tile
    from streammerge.checkpoint.header import StoredTensor
    from streammerge.plan.ops import Numerics, TensorPlan

__all__ = ["TorchCpuBackend"]


@dataclass(slots=True)
class _Factors(TargetFactors):
    states: list[Any]
    """What each term needs: `LoraFactors`, a list with a bias, or what a tuner prepared."""
    encoder: WeightEncoder | None = None
    """What makes codes of the rows."""


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
        self._has_all_threads = threading.Lock()
        self._scanning = threading.Lock()
        self._scanned: dict[str, WeightEncoder] = {}

    def close(self) -> None:
        """Give torch the threads back that it had before."""
        torch.set_num_threads(self._threads_before)

    def load_factors(
        self,
        target: TensorPlan,
        raw: Mapping[StoredTensor, bytearray],
        read_source: SourceReader | None = None,
    ) -> _Factors:
        """Convert factors to the compute dtype, and look at the weight for those that need it."""
        self._work_alone()
        factors = self._load_terms(target, raw, read_source)
        if target.encoding is not None:
            factors.encoder = self._encoder(target, factors, raw, read_source)
        return factors

    def _load_terms(
        self,
        target: TensorPlan,
        raw: Mapping[StoredTensor, bytearray],
        read_source: SourceReader | None,
    ) -> _Factors:
        compute = self._compute_dtype(target)
        factors = _Factors([])
        for term in target.terms:
            state = load_term_factors(term, raw, compute)
            if isinstance(term, TunerTerm):
                with self._threads_for(term):
                    state = term.prepare(state, self._weight(target, factors, read_source))
            elif isinstance(term, LoraTerm) and term.needs_scan:
                norms = column_norms(
                    self._weight(target, factors, read_source),
                    functools.partial(self._delta, term, state, compute=compute),
                )
                state.column_scale = state.magnitude / norms
            factors.states.append(state)
        return factors

    def _encoder(
        self,
        target: TensorPlan,
        factors: _Factors,
        raw: Mapping[StoredTensor, bytearray],
        read_source: SourceReader | None,
    ) -> WeightEncoder:
        """Return what encodes a weight, which has seen all of it if its format wants that.

        Weights that share a scale are looked at together; the others' encoders wait for them.
        """
        assert target.encoding is not None
        encoder = WeightEncoder(target.encoding)
        if not encoder.needs_scan:
            return encoder
        with self._scanning:
            if target.name not in self._scanned:
                found = {target.name: encoder}
                self._scan(target, factors, encoder, read_source)
                for other in target.encoding.together:
                    assert other.encoding is not None
                    found[other.name] = encoder = WeightEncoder(other.encoding)
                    terms = self._load_terms(other, raw, read_source)
                    self._scan(other, terms, encoder, read_source)
                if len(found) > 1:
                    for one in found.values():
                        one.join(list(found.values()))
                self._scanned.update(found)
            return self._scanned.pop(target.name)

    def _scan(
        self,
        target: TensorPlan,
        factors: _Factors,
        encoder: WeightEncoder,
        read_source: SourceReader | None,
    ) -> None:
        """Show all rows of a merged weight to its encoder."""
        for at, values in self._weight(target, factors, read_source).tiles():
            encoder.scan(at, values.to(torch_dtype(target.dtype)))

    def _work_alone(self) -> None:
        """Let this thread multiply alone: MKL's number of threads is each thread's own.

        A new thread has MKL's default until torch first divides some work in it, and the first
        product may come before that.
        """
        if not getattr(self._local, "is_alone", False):
            torch.set_num_threads(1)
            self._local.is_alone = True

    def _weight(
        self, target: TensorPlan, before: _Factors, read_source: SourceReader | None
    ) -> WholeWeight:
        """Give a view of the weight as the next term finds it."""
        assert read_source is not None, "a term has to look at its weight"
        compute = self._compute_dtype(target)
        states = _Factors(list(before.states))
        return WholeWeight(
            target,
            functools.partial(read_source, source=target.source),
            compute_dtype=compute,
            is_rounded=self._numerics == "peft",
            piece_bytes=self._product_bytes(target),
            apply_before=lambda work, at: self._add_terms(target, work, at, states, compute),
        )

    @contextmanager
    def _threads_for(self, term: TunerTerm) -> Iterator[None]:
        """Give a term torch's threads back while it needs them for PEFT's bits."""
        if not term.depends_on_threads or self._threads_before == 1:
            yield
            return
        with self._has_all_threads:
            torch.set_num_threads(self._threads_before)
            try:
                yield
            finally:
                torch.set_num_threads(1)

    def apply_block(self, tiles: Iterable[tuple[Tile, TargetFactors]]) -> Iterator[bool]:
        """Merge the tiles of one block, one after the other."""
        for tile, factors in tiles:
            yield self.apply(tile, factors)

    def apply(self, tile: Tile, factors: TargetFactors) -> bool:
        """Merge one tile in place; return whether all of its results are finite."""
        assert isinstance(factors, _Factors)
        self._work_alone()
        target = tile.target
        assert isinstance(target.op, ApplyTerms)
        rows, columns = tile.end - tile.begin, target.columns
        source = _rows_of(tile.buffer, target.source.dtype, (rows, columns), tile.source_offset)
        steps = self._steps(target, rows, columns, self._compute_dtype(target))
        if factors.encoder is not None:
            return self._apply_encoding(tile, source, steps, factors)
        output = _rows_of(tile.buffer, target.dtype, (rows, columns), tile.output_offset)
        is_finite = True
        for begin, end in steps:
            rows_at = tile.begin + begin
            is_finite &= self._merge(target, source[begin:end], output[begin:end], rows_at, factors)
        return is_finite

    def _apply_encoding(
        self,
        tile: Tile,
        source: torch.Tensor,
        steps: list[tuple[int, int]],
        factors: _Factors,
    ) -> bool:
        """Merge the rows of a tile, and put their codes where its output goes.

        Codes take less room than what they are made of, so that none reaches rows still to come.
        """
        assert factors.encoder is not None
        is_finite, at = True, tile.output_offset
        for begin, end in steps:
            rows = source[begin:end]
            values = self._take("values", torch_dtype(tile.target.dtype), rows.shape)
            is_finite &= self._merge(tile.target, rows, values, tile.begin + begin, factors)
            at += factors.encoder.encode(tile.begin + begin, values, tile.buffer[at:])
        return is_finite

    def _merge(
        self,
        target: TensorPlan,
        work: torch.Tensor,
        result: torch.Tensor,
        at: int,
        factors: _Factors,
    ) -> bool:
        """Merge rows `at, ...` into `result`; return whether all of it is finite."""
        assert isinstance(target.op, ApplyTerms)
        work_dtype = torch_dtype(target.op.work_dtype)
        if work.dtype != work_dtype:
            work = self._take("work", work_dtype, work.shape).copy_(work)
        if not target.terms:
            self._store(work, result)
            return _is_finite(result)
        wide = self._add_terms(target, work, at, factors, self._compute_dtype(target))
        # asked before the result is stored, which may be where these values are
        is_sure = _fits(wide, work.dtype, result.dtype)
        if self._numerics == "peft" and work.dtype != wide.dtype:
            work.copy_(wide)
            self._store(work, result)
        else:
            self._store(wide, result)
        return is_sure or _is_finite(result)

    def side(self, factors: TargetFactors, part: int) -> memoryview:
        """Return what describes the codes of a weight, all of whose rows were applied."""
        assert isinstance(factors, _Factors)
        assert factors.encoder is not None
        self._work_alone()
        return factors.encoder.side(part)

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
        rounds = self._numerics == "peft" and work.dtype != compute
        # a term's result is rounded before the next one, and the last one's by the caller
        is_rounded = True
        for term, state in zip(target.terms, factors.states, strict=False):
            if isinstance(term, LoraTerm) and term.region is not None:
                self._add_to_region(term, state, wide, at, work.dtype if rounds else None)
                is_rounded = False
                continue
            if rounds and not is_rounded:
                wide.copy_(work.copy_(wide))
            is_rounded = False
            if isinstance(term, TunerTerm):
                self._apply_tuner(term, state, work if rounds else wide, wide, at)
            elif isinstance(term, BiasTerm):
                # a bias is one column: its rows are those of the vector
                wide.add_((state[0][at : at + len(work)] * term.scaling).view(work.shape))
            else:
                self._add_lora(term, state, wide, at, work.dtype if rounds else None)
        return wide

    @staticmethod
    def _apply_tuner(
        term: TunerTerm, state: Any, rows: torch.Tensor, wide: torch.Tensor, at: int
    ) -> None:
        """Let a tuner's own arithmetic change the rows, in the dtype in which PEFT has them."""
        if rows is not wide:
            rows.copy_(wide)
        result = term.apply(rows, at, state)
        if result is not wide:
            wide.copy_(result)

    def _add_lora(
        self,
        term: LoraTerm,
        factors: LoraFactors,
        wide: torch.Tensor,
        at: int,
        rounded: torch.dtype | None,
    ) -> None:
        """Add a delta to whole rows, or give DoRA's norms to what it makes of them.

        Args:
            term: The term.
            factors: Its factors.
            wide: (n, K) in the compute dtype; changed in place.
            at: Number of its first row.
            rounded: The dtype to which PEFT rounds, if that is not the compute dtype.
        """
        delta = self._delta(term, factors, at, wide.shape, wide.dtype)
        if factors.column_scale is not None:
            wide.add_(delta).mul_(factors.column_scale)
            return
        if factors.magnitude is not None:
            _scale_rows(wide, delta, factors.magnitude[at : at + len(wide)])
            return
        self._add_delta(wide, delta, rounded if term.rounds_delta else None)

    def _add_delta(
        self, wide: torch.Tensor, delta: torch.Tensor, rounded: torch.dtype | None
    ) -> None:
        if rounded is not None:
            delta.copy_(self._take("cast", rounded, delta.shape).copy_(delta))
        wide.add_(delta)

    def _add_to_region(
        self,
        term: LoraTerm,
        factors: LoraFactors,
        wide: torch.Tensor,
        at: int,
        rounded: torch.dtype | None,
    ) -> None:
        """Add a delta to those rows of its region that are here."""
        assert term.region is not None
        rows, columns = term.region.rows, term.region.columns
        begin, end = max(rows.start, at), min(rows.stop, at + len(wide))
        if begin >= end:
            return
        part = wide[begin - at : end - at, columns.start : columns.stop : columns.step]
        # a product of fewer rows rounds otherwise: take some that are not here along
        first = min(begin, max(rows.start, end - MIN_TILE_ROWS))
        last = max(end, min(rows.stop, first + MIN_TILE_ROWS))
        shape = torch.Size((last - first, part.shape[1]))
        delta = self._delta(term, factors, first - rows.start, shape, wide.dtype)
        if rounded is not None:
            # what an adapter before this one left
            part.copy_(part.to(rounded))
        rounded = rounded if term.rounds_delta else None
        self._add_delta(part, delta[begin - first : end - first], rounded)

    def _delta(
        self,
        term: LoraTerm,
        factors: LoraFactors,
        at: int,
        shape: torch.Size,
        compute: torch.dtype,
    ) -> torch.Tensor:
        """`scaling * B @ A` for rows `at, ...` of what it is added to, in scratch."""
        a, b, rows = factors.a, factors.b, shape[0]
        if term.is_transposed and len(b) < MIN_TILE_ROWS:
            # a part of so narrow a product rounds otherwise than the whole
            product = torch.mm(b, a)[:, at : at + rows]
        elif term.is_transposed:
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
        fitting = self._product_bytes(target) // max(1, columns * compute.itemsize)
        step = max(MIN_TILE_ROWS, fitting - MIN_TILE_ROWS + 1)
        if target.encoding is not None:
            multiple = target.encoding.row_step
            step = max(step - step % multiple, -(-MIN_TILE_ROWS // multiple) * multiple)
        return split_rows(0, rows, step)

    def _product_bytes(self, target: TensorPlan) -> int:
        """Return the most bytes of one product."""
        wanted = self._tuning.scratch_for(rank_of(target))
        return min(wanted, self._scratch_bytes) if self._scratch_bytes else wanted

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


def _rows_of(buffer: memoryview, dtype: Dtype, shape: tuple[int, int], offset: int) -> torch.Tensor:
    """View a part of a buffer as rows."""
    count = shape[0] * shape[1]
    return torch.frombuffer(buffer, dtype=torch_dtype(dtype), count=count, offset=offset).view(
        shape
    )


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
