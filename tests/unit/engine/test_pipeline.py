"""The pipeline writes the planned bytes, and carries the first failure to its caller."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from streammerge.checkpoint.header import StoredTensor
from streammerge.dtypes import Dtype
from streammerge.engine.pipeline import Pipeline
from streammerge.errors import CheckpointError, NonFiniteError
from streammerge.plan.layout import ShardPlan, lay_out
from streammerge.plan.memory import MemoryPlan
from streammerge.plan.ops import ApplyTerms, BiasTerm, CopyBytes, TensorPlan

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.backends.base import Tile

MEMORY = MemoryPlan(256, 3, 0, 0, 0, 0)
ROWS = 200


class Planned(Exception):  # noqa: N818 (a failure that a test provokes)
    """The failure that must come out."""


class Backend:
    """Adds one to every byte, and fails where it is told to."""

    name = "test"

    def __init__(self, *, fails: str = "", is_finite: bool = True) -> None:
        self.fails, self.is_finite, self.threads = fails, is_finite, set[str]()
        self.factors: list[bytes] = []

    def load_factors(self, target: TensorPlan, raw: list[bytearray]) -> Any:
        self._fail("load")
        self.factors.extend(map(bytes, raw))
        return raw

    def apply(self, tile: Tile, factors: Any) -> bool:
        self._fail("apply")
        self.threads.add(threading.current_thread().name)
        count = (tile.end - tile.begin) * tile.target.dtype.item_bytes
        for n in range(count):
            tile.buffer[n] = (tile.buffer[n] + 1) % 256
        return self.is_finite

    def _fail(self, step: str) -> None:
        if self.fails == step:
            raise Planned(step)


class Writer:
    """A shard in memory."""

    def __init__(self, shard: ShardPlan, fails: str) -> None:
        self.data = bytearray(shard.file_bytes)
        self.fails, self.ended = fails, ""

    def write(self, offset: int, data: memoryview) -> None:
        if self.fails == "write":
            raise Planned("write")
        self.data[offset : offset + len(data)] = data

    def finish(self) -> int:
        if self.fails == "finish":
            raise Planned("finish")
        self.ended = "finished"
        return len(self.data)

    def abort(self) -> None:
        self.ended = "aborted"


class Run:
    """A run over two shards of copies and targets."""

    def __init__(self, folder: Path, *, fails: str = "", backend: Backend | None = None) -> None:
        self.path = folder / "source.bin"
        self.content = bytes(n % 251 for n in range(4000))
        self.path.write_bytes(self.content)
        self.fails = fails
        self.backend = backend or Backend(fails=fails)
        self.writers: dict[str, Writer] = {}
        self.written = 0
        self.done: list[tuple[str, int]] = []
        factor = StoredTensor("f", Dtype.U8, (7,), self.path, 100)
        term = BiasTerm(factor, 1.0)
        tensors = []
        for number in range(4):
            source = StoredTensor(f"t{number}", Dtype.U8, (ROWS,), self.path, 300 * number)
            op = ApplyTerms(Dtype.U8, (term,)) if number % 2 else CopyBytes()
            tensors.append(TensorPlan(f"t{number}", Dtype.U8, source, op, "copied"))
        self.shards = lay_out(tensors, max_shard_bytes=2 * ROWS, layout="torch_bin")

    def open_writer(self, shard: ShardPlan) -> Writer:
        self._fail("open")
        return self.writers.setdefault(shard.name, Writer(shard, self.fails))

    def on_written(self, nbytes: int) -> None:
        self._fail("on_written")
        self.written += nbytes

    def on_shard(self, shard: ShardPlan, nbytes: int) -> None:
        self._fail("on_shard")
        self.done.append((shard.name, nbytes))

    def _fail(self, step: str) -> None:
        if self.fails == step:
            raise Planned(step)

    def pipeline(self, **options: Any) -> Pipeline:
        options = {"memory": MEMORY, "io_mode": "buffered", **options}
        return Pipeline(
            backend=self.backend,
            open_writer=self.open_writer,
            on_written=self.on_written,
            on_shard=self.on_shard,
            **options,
        )


def stages() -> set[str]:
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if name.startswith(("read", "write", "finish"))}


@pytest.mark.parametrize("io_mode", ["buffered", "mmap", "auto"])
@pytest.mark.parametrize(("slab_bytes", "slab_count"), [(256, 3), (8, 1), (4096, 6)])
def test_every_byte_arrives(io_mode: str, slab_bytes: int, slab_count: int, tmp_path: Path) -> None:
    run = Run(tmp_path)
    memory = MemoryPlan(slab_bytes, slab_count, 0, 0, 0, 0)
    pipeline = run.pipeline(memory=memory, io_mode=io_mode)
    pipeline.run(run.shards)
    assert run.done == [(shard.name, 2 * ROWS) for shard in run.shards]
    assert run.written == 4 * ROWS
    for number, shard in enumerate(run.shards):
        start = 600 * number
        copied = run.content[start : start + ROWS]
        merged = bytes((b + 1) % 256 for b in run.content[start + 300 : start + 300 + ROWS])
        assert bytes(run.writers[shard.name].data) == copied + merged
        assert run.writers[shard.name].ended == "finished"
    assert run.backend.factors == [run.content[100:107]] * 2
    assert run.backend.threads == {threading.current_thread().name}
    assert pipeline.seconds.compute > 0
    assert stages() == set()


@pytest.mark.parametrize(
    "step", ["load", "apply", "open", "write", "finish", "on_written", "on_shard"]
)
def test_a_failure_comes_out_as_it_is(step: str, tmp_path: Path) -> None:
    run = Run(tmp_path, fails=step)
    with pytest.raises(Planned, match=f"^{step}$"):
        run.pipeline().run(run.shards)
    assert stages() == set()
    if step in {"write", "on_written"}:
        assert {writer.ended for writer in run.writers.values()} == {"aborted"}
    if step in {"load", "apply"}:
        assert {writer.ended for writer in run.writers.values()} <= {"aborted"}
    assert run.done == []


def test_a_truncated_source_is_the_reader_s_error(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.path.write_bytes(run.content[:700])
    with pytest.raises(CheckpointError, match="truncated"):
        run.pipeline().run(run.shards)
    assert stages() == set()


def test_a_missing_source_ends_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.path.unlink()
    with pytest.raises((CheckpointError, OSError)):
        run.pipeline().run(run.shards)
    assert stages() == set()


def test_an_interrupt_ends_every_stage(tmp_path: Path) -> None:
    class Interrupted(Backend):
        def apply(self, tile: Tile, factors: Any) -> bool:
            raise KeyboardInterrupt

    run = Run(tmp_path, backend=Interrupted())
    with pytest.raises(KeyboardInterrupt):
        run.pipeline().run(run.shards)
    assert stages() == set()
    assert {writer.ended for writer in run.writers.values()} <= {"aborted"}


def test_nonfinite_results_are_an_error_unless_allowed(tmp_path: Path) -> None:
    run = Run(tmp_path, backend=Backend(is_finite=False))
    with pytest.raises(NonFiniteError, match="'t1' holds NaN or Inf") as caught:
        run.pipeline().run(run.shards)
    assert caught.value.where == "rows 0 to 199"
    run = Run(tmp_path, backend=Backend(is_finite=False))
    run.pipeline(allow_nonfinite=True).run(run.shards)
    assert len(run.done) == 2


def test_no_shard_is_no_work(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.pipeline().run([])
    assert run.done == []
    assert stages() == set()
