"""Run tiles through read, compute and write at the same time, in a fixed set of buffers.

One thread reads, the calling thread computes, one thread writes, and one makes finished shards
durable. A tile travels in a slab, taken from a closed set: when no slab is free the reader waits,
so memory does not depend on which stage is slow. The first failure stops every stage and is raised
to the caller.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from streammerge.backends.base import Tile
from streammerge.checkpoint.reader import ReaderPool
from streammerge.errors import NonFiniteError
from streammerge.plan.memory import FACTOR_SLOTS
from streammerge.plan.tiles import CopyTile, MergeTile, cut_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from streammerge.backends.base import Backend, TargetFactors
    from streammerge.checkpoint.reader import IoMode
    from streammerge.checkpoint.writer import ShardWriter
    from streammerge.plan.layout import ShardPlan
    from streammerge.plan.memory import MemoryPlan
    from streammerge.plan.ops import TensorPlan
    from streammerge.plan.tiles import ShardTile

__all__ = ["Pipeline", "StageSeconds"]

_T = TypeVar("_T")


@dataclass(slots=True)
class StageSeconds:
    """Busy time of each stage; they overlap."""

    read: float = 0.0
    compute: float = 0.0
    write: float = 0.0


class _Stopped(Exception):  # noqa: N818 (a signal between stages, not an error)
    """Another stage failed."""


class _Channel(Generic[_T]):
    """A queue between two stages that can be stopped from either side."""

    def __init__(self) -> None:
        self._items: deque[_T] = deque()
        self._ready = threading.Condition()
        self._is_stopped = False

    def put(self, item: _T) -> None:
        with self._ready:
            self._items.append(item)
            self._ready.notify()

    def get(self) -> _T:
        with self._ready:
            while not self._items and not self._is_stopped:
                self._ready.wait()
            if self._is_stopped:
                raise _Stopped
            return self._items.popleft()

    def stop(self) -> None:
        with self._ready:
            self._is_stopped = True
            self._ready.notify_all()


@dataclass(slots=True)
class _Loaded:
    """A tile whose bytes are in a slab."""

    shard: ShardPlan
    tile: ShardTile
    slab: memoryview
    raw_factors: list[bytearray] | None = None
    """The target's factors as stored, with its first tile."""


@dataclass(frozen=True, slots=True)
class _ShardEnd:
    shard: ShardPlan


_Item = _Loaded | _ShardEnd | None


@dataclass
class Pipeline:
    """One run over a list of shards."""

    memory: MemoryPlan
    backend: Backend
    io_mode: IoMode
    open_writer: Callable[[ShardPlan], ShardWriter]
    on_written: Callable[[int], None]
    """Told the bytes of each tile once they are written; called from the writer's thread."""
    on_shard: Callable[[ShardPlan, int], None]
    """Told of each durable shard and its file size; called from the finisher's thread."""
    allow_nonfinite: bool = False
    seconds: StageSeconds = field(default_factory=StageSeconds)

    def __post_init__(self) -> None:
        self._free: _Channel[memoryview] = _Channel()
        self._factor_slots: _Channel[None] = _Channel()
        self._loaded: _Channel[_Item] = _Channel()
        self._merged: _Channel[_Item] = _Channel()
        self._failure: BaseException | None = None
        self._failing = threading.Lock()

    def run(self, shards: Iterable[ShardPlan]) -> None:
        """Write the shards.

        Raises:
            StreamMergeError: A stage failed; unfinished shards keep their temporary names.
        """
        for _ in range(self.memory.slab_count):
            # anonymous mappings: page-aligned, and given back to the system when they are dropped
            self._free.put(memoryview(mmap.mmap(-1, self.memory.slab_bytes)))
        for _ in range(FACTOR_SLOTS):
            self._factor_slots.put(None)
        stages = [
            threading.Thread(target=self._guard, args=(self._read, list(shards)), name="read"),
            threading.Thread(target=self._guard, args=(self._write,), name="write"),
        ]
        try:
            for stage in stages:
                stage.start()
            self._guard(self._compute)
            _join(stages)
        except BaseException as error:
            # a signal in this thread: the others end first, so that nothing writes behind our back
            self._fail(error)
            _join(stages)
            raise
        if self._failure is not None:
            raise self._failure

    def _guard(self, stage: Callable[..., None], *args: object) -> None:
        try:
            stage(*args)
        except _Stopped:
            pass
        except Exception as error:  # noqa: BLE001 (every failure is carried to the caller)
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._failing:
            self._failure = self._failure or error
        for channel in (self._free, self._factor_slots, self._loaded, self._merged):
            channel.stop()

    # read

    def _read(self, shards: list[ShardPlan]) -> None:
        with ReaderPool(mode=self.io_mode) as weights, ReaderPool(mode=self.io_mode) as factors:
            for shard in shards:
                for tile in cut_shard(shard, slab_bytes=self.memory.slab_bytes):
                    item = _Loaded(shard, tile, self._free.get())
                    if isinstance(tile, MergeTile) and tile.is_first:
                        self._factor_slots.get()
                    started = time.perf_counter()
                    self._fill(item, weights)
                    if isinstance(tile, MergeTile) and tile.is_first:
                        item.raw_factors = _read_factors(tile.target, factors)
                    self.seconds.read += time.perf_counter() - started
                    self._loaded.put(item)
                self._loaded.put(_ShardEnd(shard))
            self._loaded.put(None)

    def _fill(self, item: _Loaded, readers: ReaderPool) -> None:
        tile = item.tile
        segments = tile.segments if isinstance(tile, CopyTile) else (tile.source,)
        position = 0 if isinstance(tile, CopyTile) else _source_offset(tile)
        for segment in segments:
            reader = readers.reader(segment.path)
            reader.read_into(segment.offset, item.slab[position : position + segment.nbytes])
            reader.forget(segment.offset, segment.nbytes)
            position += segment.nbytes

    # compute

    def _compute(self) -> None:
        factors: TargetFactors | None = None
        while True:
            item = self._loaded.get()
            if isinstance(item, _Loaded) and isinstance(item.tile, MergeTile):
                started = time.perf_counter()
                if item.raw_factors is not None:
                    factors = self.backend.load_factors(item.tile.target, item.raw_factors)
                    item.raw_factors = None
                assert factors is not None
                self._merge(item, item.tile, factors)
                if item.tile.is_last:
                    factors = None
                    self._factor_slots.put(None)
                self.seconds.compute += time.perf_counter() - started
            self._merged.put(item)
            if item is None:
                return

    def _merge(self, item: _Loaded, tile: MergeTile, factors: TargetFactors) -> None:
        is_finite = self.backend.apply(
            Tile(tile.target, tile.begin, tile.end, item.slab, _source_offset(tile)), factors
        )
        if not is_finite and not self.allow_nonfinite:
            raise NonFiniteError(
                f"merged tensor '{tile.target.name}' holds NaN or Inf",
                where=f"rows {tile.begin} to {tile.end - 1}",
                hint="the adapter or the base is broken"
                + (", or the result overflows F16" if tile.target.dtype.value == "F16" else "")
                + "; allow_nonfinite: true lets it pass",
            )

    # write

    def _write(self) -> None:
        writer: ShardWriter | None = None
        pending: list[Future[None]] = []
        with ThreadPoolExecutor(1, "finish") as finisher:
            try:
                while True:
                    item = self._merged.get()
                    if item is None:
                        break
                    if writer is None:
                        writer = self.open_writer(item.shard)
                    if isinstance(item, _ShardEnd):
                        pending.append(finisher.submit(self._finish, writer, item.shard))
                        writer = None
                        continue
                    started = time.perf_counter()
                    writer.write(item.tile.offset, item.slab[: item.tile.nbytes])
                    self.seconds.write += time.perf_counter() - started
                    self.on_written(item.tile.nbytes)
                    self._free.put(item.slab)
            finally:
                if writer is not None:
                    writer.abort()
            for future in pending:
                future.result()

    def _finish(self, writer: ShardWriter, shard: ShardPlan) -> None:
        try:
            self.on_shard(shard, writer.finish())
        except BaseException as error:
            self._fail(error)
            raise


def _join(stages: list[threading.Thread]) -> None:
    """Wait for the threads that were started; a further signal waits with us."""
    waiting = [stage for stage in stages if stage.ident is not None]
    try:
        for stage in waiting:
            stage.join()
    except KeyboardInterrupt:
        _join(stages)
        raise


def _source_offset(tile: MergeTile) -> int:
    """Return where a tile's source rows go: at the end of the output's room if narrower."""
    return max(0, tile.nbytes - tile.source.nbytes)


def _read_factors(target: TensorPlan, readers: ReaderPool) -> list[bytearray]:
    raw = []
    for term in target.terms:
        for factor in term.factors:
            buffer = bytearray(factor.nbytes)
            readers.read_tensor(factor, memoryview(buffer))
            raw.append(buffer)
    return raw
