"""The factors of the targets in flight, in a bounded amount of memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streammerge.engine.channels import Stopped
from streammerge.plan.tiles import factor_bytes

if TYPE_CHECKING:
    from streammerge.backends.base import Backend, TargetFactors
    from streammerge.checkpoint.reader import ReaderPool
    from streammerge.plan.ops import TensorPlan
    from streammerge.plan.tiles import MergeTile

__all__ = ["FactorStore", "LoadedFactors"]


@dataclass
class LoadedFactors:
    """The factors of one target, converted by whoever needs them first."""

    target: TensorPlan
    raw: list[bytearray]
    nbytes: int
    rows_left: int
    """Rows of the target that are not merged yet."""
    _converted: TargetFactors | None = None
    _converting: threading.Lock = field(default_factory=threading.Lock)

    def loaded(self, backend: Backend) -> TargetFactors:
        """Return the factors in the backend's form."""
        with self._converting:
            if self._converted is None:
                self._converted = backend.load_factors(self.target, self.raw)
                self.raw = []
            return self._converted


class FactorStore:
    """Give factors to tiles in the order of the output, and wait where too many are in memory."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
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
        raw = []
        for term in target.terms:
            for factor in term.factors:
                buffer = bytearray(factor.nbytes)
                adapters.read_tensor(factor, memoryview(buffer))
                raw.append(buffer)
        return LoadedFactors(target, raw, nbytes, target.shape[0] if target.shape else 1)
