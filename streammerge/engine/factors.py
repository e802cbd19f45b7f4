"""The factors of the targets in flight, in a bounded amount of memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from streammerge.checkpoint.header import StoredTensor
from streammerge.checkpoint.reader import ReaderPool
from streammerge.engine.channels import Stopped
from streammerge.plan.ops import ApplyTerms, LoraTerm, unique_factors
from streammerge.plan.tiles import factor_bytes, is_scattered

if TYPE_CHECKING:
    from streammerge.adapters.terms import Factor
    from streammerge.backends.base import Backend, TargetFactors
    from streammerge.plan.ops import TensorPlan, Term
    from streammerge.plan.tiles import MergeTile

__all__ = ["FactorStore", "LoadedFactors"]

# of a factor that there is no room to keep, this much is looked through at a time
PIECE_BYTES = 1 << 20


@dataclass
class LoadedFactors:
    """The factors of one target, converted by whoever needs them first."""

    target: TensorPlan
    raw: dict[StoredTensor, bytearray]
    nbytes: int
    rows_left: int
    """Rows of the target that are not merged yet, and one for what describes its codes."""
    _converted: TargetFactors | None = None
    _converting: threading.Lock = field(default_factory=threading.Lock)

    def loaded(self, backend: Backend) -> TargetFactors:
        """Return the factors in the backend's form."""
        # not by way of `self`: what is loaded may keep the reader, and would keep itself alive
        own = self.target.source

        def read_source(
            offset: int, buffer: memoryview, source: StoredTensor | None = None
        ) -> None:
            with ReaderPool(mode="buffered") as weights:
                weights.read_part(own if source is None else source, offset, buffer)

        with self._converting:
            if self._converted is None:
                self._converted = backend.load_factors(self.target, self.raw, read_source)
                self.raw = {}
            return self._converted


class FactorStore:
    """Give factors to tiles in the order of the output, and wait where too many are in memory."""

    def __init__(self, max_bytes: int, *, max_shared_bytes: int = 0) -> None:
        """Begin empty.

        Args:
            max_bytes: Most bytes of factors of targets that are not merged yet.
            max_shared_bytes: Most bytes of stored factors that are kept beyond that, because
                targets take parts of them that lie far apart.
        """
        self._max_bytes = max_bytes
        self._max_shared_bytes = max_shared_bytes
        self._shared: OrderedDict[StoredTensor, bytearray] = OrderedDict()
        self._held = 0
        self._current: LoadedFactors | None = None
        self._room = threading.Condition()
        self._is_stopped = False

    def take(self, tile: MergeTile, adapters: ReaderPool) -> LoadedFactors:
        """Return the factors of a tile's target; its first tile reads them.

        Raises:
            Stopped: The run failed.
        """
        if tile.is_first or self._current is None:
            self._current = self._read(tile.target, adapters)
        return self._current

    def last(self) -> LoadedFactors:
        """Return the factors that were taken last."""
        assert self._current is not None
        return self._current

    def give_back(self, factors: LoadedFactors, *, rows: int) -> None:
        """Count rows as merged; the last of a target makes room."""
        with self._room:
            factors.rows_left -= rows
            if not factors.rows_left:
                self._held -= factors.nbytes
                self._room.notify_all()

    def stop(self) -> None:
        """Wake whoever waits."""
        with self._room:
            self._is_stopped = True
            self._room.notify_all()

    def _read(self, target: TensorPlan, adapters: ReaderPool) -> LoadedFactors:
        nbytes = factor_bytes(target)
        with self._room:
            while self._held and self._held + nbytes > self._max_bytes and not self._is_stopped:
                self._room.wait()
            if self._is_stopped:
                raise Stopped
            self._held += nbytes
        raw: dict[StoredTensor, bytearray] = {}
        target = self._read_terms(target, raw, adapters)
        if target.encoding is not None:
            # whose scales follow from all of them
            others = [self._read_terms(t, raw, adapters) for t in target.encoding.together]
            target = replace(target, encoding=replace(target.encoding, together=tuple(others)))
        rows = target.rows + (target.encoding is not None)
        return LoadedFactors(target, raw, nbytes, rows)

    def _read_terms(
        self, target: TensorPlan, raw: dict[StoredTensor, bytearray], adapters: ReaderPool
    ) -> TensorPlan:
        """Read the factors of a target; return it with parts of factors in their place."""
        if isinstance(target.op, ApplyTerms):
            terms = tuple(self._with_parts(term, raw, adapters) for term in target.terms)
            target = replace(target, op=replace(target.op, terms=terms))
        for factor in unique_factors(target.terms):
            if factor not in raw:
                raw[factor] = bytearray(factor.nbytes)
                adapters.read_tensor(factor, memoryview(raw[factor]))
        return target

    def _with_parts(
        self, term: Term, raw: dict[StoredTensor, bytearray], adapters: ReaderPool
    ) -> Term:
        """Read the parts of factors that a term takes; return it with them in their place."""
        if not isinstance(term, LoraTerm):
            return term
        return replace(
            term,
            a=self._with_part(term.a, raw, adapters),
            b=self._with_part(term.b, raw, adapters),
        )

    def _with_part(
        self, factor: Factor, raw: dict[StoredTensor, bytearray], adapters: ReaderPool
    ) -> Factor:
        if not factor.is_part:
            return factor
        part, buffer = self._read_part(factor, adapters)
        raw[part] = buffer
        return replace(factor, tensor=part, rows=None, columns=None)

    def _read_part(self, factor: Factor, adapters: ReaderPool) -> tuple[StoredTensor, bytearray]:
        """Read rows and columns of a factor as a tensor of their own."""
        tensor = factor.tensor
        length, item = prod(tensor.shape[1:]), tensor.dtype.item_bytes
        rows = factor.rows if factor.rows is not None else range(tensor.shape[0])
        columns = factor.columns if factor.columns is not None else range(length)
        name = f"{tensor.name}[{rows}, {columns}]"
        shape = (len(rows), len(columns))
        part = StoredTensor(name, tensor.dtype, shape, tensor.path, tensor.offset)
        buffer = bytearray(part.nbytes)
        values = np.frombuffer(buffer, f"u{item}").reshape(shape)
        chosen = slice(columns.start, columns.stop, columns.step)
        kept = self._kept(factor, adapters)
        if kept is not None:
            matrix = np.frombuffer(kept, f"u{item}").reshape(-1, length)
            values[:] = matrix[rows.start : rows.stop : rows.step, chosen]
            return part, buffer
        reader = adapters.reader(tensor.path)
        count = max(1, PIECE_BYTES // max(1, length * item))
        for at in range(0, len(rows), count):
            some = rows[at : at + count]
            piece = bytearray((some[-1] + 1 - some[0]) * length * item)
            reader.read_into(tensor.offset + some[0] * length * item, memoryview(piece))
            matrix = np.frombuffer(piece, f"u{item}").reshape(-1, length)
            values[at : at + len(some)] = matrix[:: rows.step, chosen]
        return part, buffer

    def _kept(self, factor: Factor, adapters: ReaderPool) -> bytearray | None:
        """Return all of a factor whose parts are scattered, read once if there is room for it."""
        tensor = factor.tensor
        if not is_scattered(factor) or tensor.nbytes > self._max_shared_bytes:
            return None
        if tensor in self._shared:
            self._shared.move_to_end(tensor)
            return self._shared[tensor]
        kept = sum(map(len, self._shared.values()))
        while self._shared and kept + tensor.nbytes > self._max_shared_bytes:
            # those that were not asked for the longest
            kept -= len(self._shared.popitem(last=False)[1])
        buffer = bytearray(tensor.nbytes)
        adapters.read_tensor(tensor, memoryview(buffer))
        self._shared[tensor] = buffer
        return buffer
