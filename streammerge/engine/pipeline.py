"""Run blocks through read, compute and write at the same time, in a fixed set of buffers.

Several threads read, several merge, the calling thread among them, several write, and one makes
finished shards durable. A block travels in a slab, taken from a closed set in the order of the
output: when no slab is free the readers wait, so memory does not depend on which stage is slow, and
the earliest block always has what it needs. Blocks without a target go from reader to writer
untouched. The first failure stops every stage and is raised to the caller.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streammerge.backends.base import Tile
from streammerge.checkpoint.digest import new_digest
from streammerge.checkpoint.reader import ReaderPool
from streammerge.checkpoint.slab import Slab
from streammerge.engine.channels import Channel, InOrder, Stopped
from streammerge.engine.factors import FactorStore
from streammerge.errors import NonFiniteError
from streammerge.plan.tiles import cut_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from concurrent.futures import Future

    from streammerge.backends.base import Backend
    from streammerge.checkpoint.digest import Digest
    from streammerge.checkpoint.writer import ShardWriter
    from streammerge.config.tuning import IoChoice
    from streammerge.engine.factors import LoadedFactors
    from streammerge.plan.layout import ShardPlan
    from streammerge.plan.memory import MemoryPlan
    from streammerge.plan.tiles import Block, MergeTile, SidePiece

__all__ = ["Pipeline", "StageSeconds"]


@dataclass(slots=True)
class StageSeconds:
    """Busy time of each stage, summed over its threads; they overlap."""

    read: float = 0.0
    compute: float = 0.0
    write: float = 0.0


@dataclass(slots=True)
class _ShardRun:
    """A shard that is being written."""

    plan: ShardPlan
    digest: Digest
    left: int
    """Blocks that are not written yet."""
    writer: ShardWriter | None = None


@dataclass(slots=True)
class _Job:
    """A block in a slab."""

    number: int
    run: _ShardRun
    block: Block
    slab: Slab
    factors: list[LoadedFactors]
    """Those of each tile, or of the weight that it describes."""

    @property
    def at(self) -> int:
        """Where the block's output is in the slab."""
        return self.slab.place(self.block.offset)


@dataclass
class Pipeline:
    """One run over a list of shards."""

    memory: MemoryPlan
    open_backend: Callable[[], Backend]
    """Called once, in the calling thread, while the first blocks are read."""
    io: IoChoice
    open_writer: Callable[[ShardPlan], ShardWriter]
    on_written: Callable[[int], None]
    """Told the bytes of each block once they are written; called from a writer's thread."""
    on_shard: Callable[[ShardPlan, int, str], None]
    """Told of each durable shard, its file size and digest, which is empty if the shard is not made
    in the order of its bytes; called from the finisher's thread.
    """
    allow_nonfinite: bool = False
    seconds: StageSeconds = field(default_factory=StageSeconds)

    def __post_init__(self) -> None:
        self._free: Channel[Slab] = Channel()
        self._loaded: Channel[_Job | None] = Channel()
        self._merged: InOrder[_Job] = InOrder()
        self._factors = FactorStore(
            self.memory.factor_bytes, max_shared_bytes=self.memory.shared_factor_bytes
        )
        self._backend: Backend | None = None
        self._backend_ready = threading.Event()
        self._cutting = threading.Lock()
        self._taking = threading.Lock()
        self._counting = threading.Lock()
        self._runs: dict[int, _ShardRun] = {}
        self._readers_left = self.io.readers
        self._failure: BaseException | None = None

    def run(self, shards: Iterable[ShardPlan]) -> None:
        """Write the shards.

        Raises:
            StreamMergeError: A stage failed; unfinished shards keep their temporary names.
        """
        for _ in range(self.memory.slab_count):
            self._free.put(Slab(self.memory.slab_bytes))
        self._jobs = self._cut(list(shards))
        with ThreadPoolExecutor(1, "finish") as self._finisher:
            self._finished: list[Future[None]] = []
            stages = [
                *self._threads(self.io.readers, self._read),
                *self._threads(self.memory.workers - 1, self._compute),
                *self._threads(self.io.writers, self._write),
            ]
            try:
                for stage in stages:
                    stage.start()
                self._guard(self._start_backend)
                self._guard(self._compute)
                _join(stages)
            except BaseException as error:
                # a signal in this thread: the others end first, so that nothing writes behind our
                # back
                self._fail(error)
                _join(stages)
                raise
            finally:
                self._jobs.close()
                self._abort_unfinished()
                if self._backend is not None:
                    self._backend.close()
                # the slabs go back now, and not with whoever still reads the times
                self._free = Channel()
        if self._failure is not None:
            raise self._failure

    def _threads(self, count: int, stage: Callable[[], None]) -> list[threading.Thread]:
        name = stage.__name__.strip("_")
        return [
            threading.Thread(target=self._guard, args=(stage,), name=f"{name}-{number}")
            for number in range(count)
        ]

    def _guard(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except Stopped:
            pass
        except Exception as error:  # noqa: BLE001 (every failure is carried to the caller)
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._counting:
            self._failure = self._failure or error
        for channel in (self._free, self._loaded, self._merged, self._factors):
            channel.stop()
        self._backend_ready.set()

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            with self._counting:
                setattr(self.seconds, stage, getattr(self.seconds, stage) + spent)

    # read

    def _cut(self, shards: list[ShardPlan]) -> Generator[_Job, None, None]:
        """Yield the jobs in the order of the output, each when a slab and its factors fit."""
        number = 0
        with ReaderPool(mode="buffered") as adapters:
            for shard in shards:
                blocks = list(
                    cut_shard(
                        shard,
                        slab_bytes=self.memory.slab_bytes,
                        max_factor_bytes=self.memory.factor_bytes // 2,
                    )
                )
                kind = self.io.digest if shard.is_sequential else "none"
                run = _ShardRun(shard, new_digest(kind), len(blocks))
                for block in blocks:
                    slab = self._free.get()
                    factors = [self._factors.take(tile, adapters) for tile in block.tiles]
                    if block.side is not None:
                        factors.append(self._factors.last())
                    yield _Job(number, run, block, slab, factors)
                    number += 1
        self._merged.close(number)

    def _read(self) -> None:
        with ReaderPool(mode=self.io.read_mode) as weights:
            while True:
                with self._cutting:
                    job = next(self._jobs, None)
                if job is None:
                    break
                with self._timed("read"):
                    for segment in job.block.segments:
                        reader = weights.reader(segment.file)
                        reader.read_slab(
                            segment.offset, job.slab, at=job.at + segment.at, nbytes=segment.nbytes
                        )
                        reader.forget(segment.offset, segment.nbytes)
                if job.block.tiles:
                    self._loaded.put(job)
                else:
                    self._merged.put(job.number, job)
        with self._counting:
            self._readers_left -= 1
            is_last = not self._readers_left
        if is_last:
            for _ in range(self.memory.workers):
                self._loaded.put(None)

    # compute

    def _start_backend(self) -> None:
        self._backend = self.open_backend()
        self._backend_ready.set()

    def _compute(self) -> None:
        self._backend_ready.wait()
        if self._backend is None:
            raise Stopped
        while (job := self._loaded.get()) is not None:
            with self._timed("compute"):
                self._merge(job, self._backend)
            self._merged.put(job.number, job)

    def _merge(self, job: _Job, backend: Backend) -> None:
        merged = backend.apply_block(
            (
                Tile(
                    tile.target,
                    tile.begin,
                    tile.end,
                    job.slab.view,
                    output_offset=job.at + tile.output_at,
                    source_offset=job.at + tile.source_at,
                ),
                factors.loaded(backend),
            )
            for tile, factors in zip(job.block.tiles, job.factors, strict=True)
        )
        for is_finite, tile, factors in zip(merged, job.block.tiles, job.factors, strict=True):
            self._factors.give_back(factors, rows=tile.end - tile.begin)
            self._check(tile, is_finite=is_finite)

    def _check(self, tile: MergeTile, *, is_finite: bool) -> None:
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
        while True:
            with self._taking:
                job = self._merged.get()
                if job is None:
                    return
                writer = self._begin(job)
            block, run = job.block, job.run
            with self._timed("write"):
                writer.write_slab(block.offset, job.slab, at=job.at, nbytes=block.nbytes)
            self.on_written(block.nbytes)
            self._free.put(job.slab)
            with self._counting:
                run.left -= 1
                is_done = not run.left
            if is_done:
                self._finished.append(self._finisher.submit(self._finish, run, writer))

    def _begin(self, job: _Job) -> ShardWriter:
        """Take a block in the order of the file: open its shard with the first, digest it."""
        run, start = job.run, job.at
        if job.block.side is not None:
            # every block before it has been merged, and so all rows of the weight
            self._fill(job, job.block.side)
        if run.writer is None:
            run.writer = self.open_writer(run.plan)
            self._runs[id(run)] = run
            run.digest.update(run.plan.head)
        run.digest.update(job.slab.view[start : start + job.block.nbytes])
        return run.writer

    def _fill(self, job: _Job, side: SidePiece) -> None:
        """Put what describes the codes of a weight into its slab."""
        (factors,) = job.factors
        assert self._backend is not None
        nbytes = job.block.nbytes
        with self._timed("compute"):
            part = self._backend.side(factors.loaded(self._backend), side.part)
            job.slab.view[job.at : job.at + nbytes] = part[side.begin : side.begin + nbytes]
        if side.is_last:
            self._factors.give_back(factors, rows=1)

    def _finish(self, run: _ShardRun, writer: ShardWriter) -> None:
        del self._runs[id(run)]
        try:
            self.on_shard(run.plan, writer.finish(), run.digest.hexdigest())
        except BaseException as error:
            self._fail(error)
            raise

    def _abort_unfinished(self) -> None:
        for future in self._finished:
            future.exception()
        for run in self._runs.values():
            if run.writer is not None:
                run.writer.abort()


def _join(stages: list[threading.Thread]) -> None:
    """Wait for the threads that were started; a further signal waits with us."""
    waiting = [stage for stage in stages if stage.ident is not None]
    try:
        for stage in waiting:
            stage.join()
    except KeyboardInterrupt:
        _join(stages)
        raise
