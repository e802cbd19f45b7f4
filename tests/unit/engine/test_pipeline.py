"""The pipeline writes the planned bytes, and carries the first failure to its caller."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
import xxhash

from streammerge.adapters.terms import Factor, Region
from streammerge.checkpoint.direct import DirectWriter
from streammerge.checkpoint.header import StoredTensor
from streammerge.checkpoint.reader import BufferedReader
from streammerge.checkpoint.writer import SafetensorsWriter
from streammerge.config.tuning import DigestKind, FileMode, IoChoice
from streammerge.dtypes import Dtype
from streammerge.engine.pipeline import Pipeline
from streammerge.errors import CheckpointError, NonFiniteError
from streammerge.plan.layout import Layout, ShardPlan, lay_out
from streammerge.plan.memory import MemoryPlan
from streammerge.plan.ops import ApplyTerms, BiasTerm, CopyBytes, LoraTerm, TensorPlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from streammerge.backends.base import SourceReader, Tile
    from streammerge.checkpoint.slab import Slab
    from streammerge.checkpoint.writer import ShardWriter

# the factor of a target, as stored and in the compute dtype
FACTOR_BYTES = 7 * (1 + 4)
ROWS = 200
HASHES = {
    "xxh3-128": lambda data: xxhash.xxh3_128(data).hexdigest(),
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
    "none": lambda _: "",
}


def memory_plan(slab_bytes: int = 256, slab_count: int = 3, workers: int = 1) -> MemoryPlan:
    return MemoryPlan(
        slab_bytes,
        slab_count,
        workers,
        scratch_bytes=0,
        factor_bytes=2 * FACTOR_BYTES,
        shared_factor_bytes=0,
        predicted_peak_bytes=0,
        least_bytes=0,
    )


class Planned(Exception):  # noqa: N818 (a failure that a test provokes)
    """The failure that must come out."""


class Backend:
    """Adds one to every byte, and fails where it is told to."""

    name = "test"

    def __init__(self, *, fails: str = "", is_finite: bool = True, seconds: float = 0) -> None:
        self.fails, self.is_finite, self.threads = fails, is_finite, set[str]()
        self.factors: list[bytes] = []
        self.targets: dict[str, bytearray] = {}
        self.seconds = seconds

    def close(self) -> None:
        pass

    def load_factors(
        self, target: TensorPlan, raw: dict[StoredTensor, bytearray], read_source: SourceReader
    ) -> Any:
        self._fail("load")
        self.factors.extend(map(bytes, raw.values()))
        self.targets[target.name] = bytearray(target.source.nbytes)
        read_source(0, memoryview(self.targets[target.name]))
        return raw

    def apply_block(self, tiles: Iterable[tuple[Tile, Any]]) -> Iterator[bool]:
        for tile, factors in tiles:
            yield self.apply(tile, factors)

    def apply(self, tile: Tile, factors: Any) -> bool:
        self._fail("apply")
        time.sleep(self.seconds)
        self.threads.add(threading.current_thread().name)
        count = (tile.end - tile.begin) * tile.target.dtype.nbytes(tile.target.columns)
        for n in range(count):
            value = tile.buffer[tile.source_offset + n]
            tile.buffer[tile.output_offset + n] = (value + 1) % 256
        return self.is_finite

    def _fail(self, step: str) -> None:
        if self.fails == step:
            raise Planned(step)


class Writer:
    """A shard in memory."""

    def __init__(self, shard: ShardPlan, fails: str = "", seconds: float = 0) -> None:
        self.data = bytearray(shard.file_bytes)
        self.data[: len(shard.head)] = shard.head
        self.fails, self.ended, self.seconds = fails, "", seconds

    def write_slab(self, offset: int, slab: Slab, *, at: int, nbytes: int) -> None:
        if self.fails == "write":
            raise Planned("write")
        time.sleep(self.seconds)
        assert not self.ended
        assert at == slab.place(offset)
        assert offset + nbytes <= len(self.data)
        self.data[offset : offset + nbytes] = slab.view[at : at + nbytes]

    def finish(self) -> int:
        if self.fails == "finish":
            raise Planned("finish")
        assert not self.ended
        self.ended = "finished"
        return len(self.data)

    def abort(self) -> None:
        assert not self.ended
        self.ended = "aborted"


class Run:
    """A run over two shards of copies and targets."""

    def __init__(
        self,
        folder: Path,
        *,
        fails: str = "",
        backend: Backend | None = None,
        layout: Layout = "torch_bin",
        tensors: int = 4,
    ) -> None:
        self.path = folder / "source.bin"
        self.content = bytes(n % 251 for n in range(300 * tensors + 2800))
        self.path.write_bytes(self.content)
        self.fails = fails
        self.backend = backend or Backend(fails=fails)
        self.writers: dict[str, Writer] = {}
        self.write_seconds = 0.0
        self.written = 0
        self.done: list[tuple[str, int]] = []
        self.digests: dict[str, str] = {}
        self._counting = threading.Lock()
        factor = StoredTensor("f", Dtype.U8, (7,), self.path, 100)
        term = BiasTerm(factor, 1.0)
        planned = []
        for number in range(tensors):
            source = StoredTensor(f"t{number}", Dtype.U8, (ROWS,), self.path, 300 * number)
            op = ApplyTerms(Dtype.U8, (term,)) if number % 2 else CopyBytes()
            planned.append(TensorPlan(f"t{number}", Dtype.U8, source, op, "copied"))
        self.shards = lay_out(planned, max_shard_bytes=2 * ROWS, layout=layout)

    def expected(self, shard: ShardPlan) -> bytes:
        """The bytes of a shard, made in one piece."""
        data = shard.head
        for placed in shard.tensors:
            source = placed.tensor.source
            piece = self.content[source.offset : source.offset + source.nbytes]
            if isinstance(placed.tensor.op, ApplyTerms):
                piece = bytes((b + 1) % 256 for b in piece)
            data += piece
        return data

    def open_backend(self) -> Backend:
        self._fail("backend")
        return self.backend

    def open_writer(self, shard: ShardPlan) -> ShardWriter:
        self._fail("open")
        return self.writers.setdefault(shard.name, Writer(shard, self.fails, self.write_seconds))

    def on_written(self, nbytes: int) -> None:
        self._fail("on_written")
        with self._counting:
            self.written += nbytes

    def on_shard(self, shard: ShardPlan, nbytes: int, digest: str) -> None:
        self._fail("on_shard")
        self.done.append((shard.name, nbytes))
        self.digests[shard.name] = digest

    def _fail(self, step: str) -> None:
        if self.fails == step:
            raise Planned(step)

    def pipeline(self, **options: Any) -> Pipeline:
        callbacks = {
            "open_backend": self.open_backend,
            "open_writer": self.open_writer,
            "on_written": self.on_written,
            "on_shard": self.on_shard,
        }
        return Pipeline(**{"memory": memory_plan(), "io": IoChoice(), **callbacks, **options})

    def check(self, digest: DigestKind = "xxh3-128") -> None:
        """Compare what was written with what was planned."""
        # shards are finished by one thread, in the order in which their last bytes were written
        sizes = sorted((shard.name, shard.file_bytes) for shard in self.shards)
        assert sorted(self.done) == sizes
        assert self.written == sum(shard.data_bytes for shard in self.shards)
        for shard in self.shards:
            writer = self.writers[shard.name]
            assert bytes(writer.data) == self.expected(shard)
            assert writer.ended == "finished"
            assert self.digests[shard.name] == HASHES[digest](self.expected(shard))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("read_mode", get_args(FileMode))
@pytest.mark.parametrize(("slab_bytes", "slab_count"), [(256, 3), (8, 1), (4096, 6)])
def test_every_byte_arrives(
    read_mode: FileMode, slab_bytes: int, slab_count: int, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    pipeline = run.pipeline(
        memory=memory_plan(slab_bytes, slab_count), io=IoChoice(read_mode=read_mode)
    )
    pipeline.run(run.shards)
    run.check()
    assert run.done == [(shard.name, 2 * ROWS) for shard in run.shards]
    assert run.backend.factors == [run.content[100:107]] * 2
    # a term may look at all of its target first, whatever the tiles
    sources = {"t1": run.content[300:500], "t3": run.content[900:1100]}
    assert run.backend.targets == sources
    assert run.backend.threads == {threading.current_thread().name}
    assert pipeline.seconds.compute > 0


@pytest.mark.parametrize("slow", ["", "read", "compute", "write"])
@pytest.mark.parametrize(
    "sizes",
    # bytes and number of slabs; threads that read, merge and write
    [(24, 1, 3, 3, 3), (24, 2, 1, 3, 1), (24, 7, 3, 1, 2), (40, 9, 2, 4, 3), (4096, 3, 4, 4, 4)],
)
def test_no_number_of_threads_changes_a_byte_or_stops(
    slow: str,
    sizes: tuple[int, int, int, int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slab_bytes, slab_count, readers, workers, writers = sizes
    seconds = {slow: 0.0005}
    real = BufferedReader.read_slab

    def read_slab(reader: BufferedReader, *arguments: Any, **options: Any) -> None:
        time.sleep(seconds.get("read", 0))
        real(reader, *arguments, **options)

    monkeypatch.setattr(BufferedReader, "read_slab", read_slab)
    backend = Backend(seconds=seconds.get("compute", 0))
    run = Run(tmp_path, backend=backend, layout="safetensors", tensors=10)
    run.write_seconds = seconds.get("write", 0)
    memory = memory_plan(slab_bytes, slab_count, workers)
    io = IoChoice(readers=readers, writers=writers)
    finish_in_time(run.pipeline(memory=memory, io=io), run)
    run.check()
    # each target's factors were read and converted once
    assert len(run.backend.factors) == 5


def finish_in_time(pipeline: Pipeline, run: Run) -> None:
    """Run in a thread that may be given up, so that a run that stands still is a failure."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            pipeline.run(run.shards)
        except BaseException as error:  # noqa: BLE001 (carried to the test)
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    if thread.is_alive():
        pipeline._fail(Planned("it stood still"))
        thread.join(60)
    if failures:
        raise failures[0]


def test_a_backend_that_opens_late_is_waited_for(tmp_path: Path) -> None:
    run = Run(tmp_path)

    def open_late() -> Backend:
        time.sleep(0.05)
        return run.backend

    pipeline = run.pipeline(open_backend=open_late, memory=memory_plan(workers=3))
    pipeline.run(run.shards)
    run.check()


def test_several_threads_merge(tmp_path: Path) -> None:
    together = threading.Barrier(3)

    class Meeting(Backend):
        def apply(self, tile: Tile, factors: Any) -> bool:
            # the first three tiles are merged at the same time
            if len(self.threads) < 3 and threading.current_thread().name not in self.threads:
                together.wait(60)
            return super().apply(tile, factors)

    run = Run(tmp_path, backend=Meeting())
    run.pipeline(memory=memory_plan(8, 12, workers=3), io=IoChoice(readers=3)).run(run.shards)
    run.check()
    assert len(run.backend.threads) == 3


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("slab_bytes", [24, 64, 4096])
@pytest.mark.parametrize("max_shared_bytes", [0, 1000])
def test_experts_in_one_tensor_are_merged_one_by_one(
    threads: int, slab_bytes: int, max_shared_bytes: int, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    count, rows, columns, touched = 7, 5, 4, (1, 2, 5)
    a = StoredTensor("a", Dtype.U8, (count, columns), run.path, 100)
    b = StoredTensor("b", Dtype.U8, (rows, count), run.path, 200)
    terms = tuple(
        LoraTerm(
            Factor(a, rows=range(number, number + 1)),
            Factor(b, columns=range(number, count, count)),
            1.0,
            is_transposed=False,
            rounds_delta=False,
            region=Region(range(number * rows, (number + 1) * rows), range(columns)),
        )
        for number in touched
    )
    source = StoredTensor("experts", Dtype.U8, (count, rows, columns), run.path, 300)
    op = ApplyTerms(Dtype.U8, terms)
    fused = TensorPlan("experts", Dtype.U8, source, op, "merged")
    run.shards = lay_out([fused], max_shard_bytes=None, layout="torch_bin")
    memory = replace(memory_plan(slab_bytes, 6, threads), shared_factor_bytes=max_shared_bytes)
    io = IoChoice(readers=threads, writers=threads)
    finish_in_time(run.pipeline(memory=memory, io=io), run)
    (writer,) = run.writers.values()
    expected = bytearray(run.content[300 : 300 + source.nbytes])
    for number in touched:
        for at in range(number * rows * columns, (number + 1) * rows * columns):
            expected[at] = (expected[at] + 1) % 256
    assert writer.data[len(run.shards[0].head) :] == expected
    # of the factors, each was given its own part
    given = [
        part
        for number in touched
        for part in (
            run.content[100 + number * columns : 100 + (number + 1) * columns],
            run.content[200 + number : 200 + count * rows : count],
        )
    ]
    assert sorted(run.backend.factors) == sorted(given)


@pytest.mark.parametrize("kind", get_args(DigestKind))
@pytest.mark.parametrize("writers", [1, 3])
@pytest.mark.parametrize("write_mode", ["direct", "buffered"])
def test_digests_are_those_of_the_finished_files(
    kind: DigestKind, writers: int, write_mode: str, tmp_path: Path
) -> None:
    run = Run(tmp_path, layout="safetensors")

    def open_writer(shard: ShardPlan) -> ShardWriter:
        if write_mode == "direct":
            return DirectWriter(tmp_path / shard.name, head=shard.head, nbytes=shard.file_bytes)
        return SafetensorsWriter(tmp_path / shard.name, head=shard.head)

    # pages of a buffered file are written in their order, by one thread; the bytes are the same
    io = IoChoice(readers=2, writers=writers, digest=kind)
    pipeline = run.pipeline(open_writer=open_writer, io=io, memory=memory_plan(16, 8, 2))
    pipeline.run(run.shards)
    for shard in run.shards:
        content = (tmp_path / shard.name).read_bytes()
        assert content == run.expected(shard)
        assert run.digests[shard.name] == HASHES[kind](content)


@pytest.mark.parametrize("layout", ["torch_bin", "safetensors"])
def test_a_shard_of_empty_tensors_is_written(layout: Layout, tmp_path: Path) -> None:
    run = Run(tmp_path)
    tensors = [
        TensorPlan(
            f"e{number}",
            Dtype.U8,
            StoredTensor(f"e{number}", Dtype.U8, (0, 3), run.path, 0),
            ApplyTerms(Dtype.U8, ()) if number % 2 else CopyBytes(),
            "copied",
        )
        for number in range(3)
    ]
    empty = lay_out(tensors, max_shard_bytes=None, layout=layout)
    # alone, and before and after others
    run.shards = empty
    run.pipeline().run(empty)
    run.check()
    run = Run(tmp_path, layout=layout)
    run.pipeline(io=IoChoice(readers=2, writers=2)).run([*empty, *run.shards])
    run.done.remove((empty[0].name, empty[0].file_bytes))
    run.check()


STEPS = ["backend", "load", "apply", "open", "write", "finish", "on_written", "on_shard"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_failure_comes_out_as_it_is(step: str, threads: int, tmp_path: Path) -> None:
    run = Run(tmp_path, fails=step)
    before = set(threading.enumerate())
    memory = memory_plan(64, 2, workers=threads)
    pipeline = run.pipeline(memory=memory, io=IoChoice(readers=threads, writers=threads))
    with pytest.raises(Planned, match=f"^{step}$"):
        pipeline.run(run.shards)
    assert set(threading.enumerate()) == before
    ends = {writer.ended for writer in run.writers.values()}
    if step in {"write", "on_written"}:
        assert ends == {"aborted"}
    if step in {"backend", "load", "apply"}:
        assert ends <= {"aborted"}
    if step == "on_shard":
        # what is finished stays so
        assert ends <= {"finished", "aborted"}
    assert run.done == []


@pytest.mark.parametrize("threads", [1, 3])
def test_shards_before_a_failure_are_finished(threads: int, tmp_path: Path) -> None:
    class Late(Run):
        def on_written(self, nbytes: int) -> None:
            # the first shard is whole, the second is not
            if self.written >= 2 * ROWS:
                while not self.done:
                    time.sleep(0.001)
                raise Planned("late")
            super().on_written(nbytes)

    run = Late(tmp_path)
    io = IoChoice(readers=threads, writers=1)
    with pytest.raises(Planned, match="late"):
        run.pipeline(io=io, memory=memory_plan(64, 4, workers=threads)).run(run.shards)
    first, second = run.shards
    assert run.done == [(first.name, 2 * ROWS)]
    assert run.writers[first.name].ended == "finished"
    assert run.writers[second.name].ended == "aborted"


@pytest.mark.parametrize("read_mode", get_args(FileMode))
@pytest.mark.parametrize("threads", [1, 3])
def test_a_truncated_source_is_the_reader_s_error(
    read_mode: FileMode, threads: int, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    run.path.write_bytes(run.content[:700])
    io = IoChoice(read_mode=read_mode, readers=threads, writers=threads)
    with pytest.raises(CheckpointError, match="truncated"):
        run.pipeline(io=io).run(run.shards)
    # the first shard is whole; whether it was finished before the failure is a matter of speed
    assert run.done in ([], [(run.shards[0].name, 2 * ROWS)])


def test_a_missing_source_ends_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.path.unlink()
    with pytest.raises(CheckpointError, match="cannot open the file"):
        run.pipeline(io=IoChoice(readers=2, writers=2)).run(run.shards)


@pytest.mark.parametrize("step", ["apply", "backend"])
def test_an_interrupt_ends_every_stage(step: str, tmp_path: Path) -> None:
    class Interrupted(Backend):
        def apply(self, tile: Tile, factors: Any) -> bool:
            raise KeyboardInterrupt

    def interrupt() -> Backend:
        raise KeyboardInterrupt

    run = Run(tmp_path, backend=Interrupted())
    options = {"open_backend": interrupt} if step == "backend" else {}
    with pytest.raises(KeyboardInterrupt):
        run.pipeline(io=IoChoice(readers=2, writers=2), **options).run(run.shards)
    assert {writer.ended for writer in run.writers.values()} <= {"aborted"}


@pytest.mark.parametrize("step", ["", "read", "apply", "write"])
def test_no_file_stays_open(step: str, tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    run = Run(tmp_path, fails=step)
    if step == "read":
        run.path.write_bytes(run.content[:950])
    pipeline = run.pipeline(io=IoChoice(read_mode="direct"), memory=memory_plan(64))
    if step:
        with pytest.raises((Planned, CheckpointError)):
            pipeline.run(run.shards)
    else:
        pipeline.run(run.shards)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_nonfinite_results_are_an_error_unless_allowed(tmp_path: Path) -> None:
    run = Run(tmp_path, backend=Backend(is_finite=False))
    with pytest.raises(NonFiniteError, match="'t1' holds NaN or Inf") as caught:
        run.pipeline(memory=memory_plan(4096)).run(run.shards)
    assert caught.value.where == "rows 0 to 199"
    run = Run(tmp_path, backend=Backend(is_finite=False))
    run.pipeline(allow_nonfinite=True).run(run.shards)
    assert len(run.done) == 2


def test_no_shard_is_no_work(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.pipeline(io=IoChoice(readers=3, writers=3), memory=memory_plan(workers=3)).run([])
    assert run.done == []
