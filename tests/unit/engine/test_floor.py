"""The floor moves every byte, whatever the sizes and the file system; faults of threads show."""

from __future__ import annotations

import errno
import itertools
import os
from typing import TYPE_CHECKING, Any

import pytest

from streammerge.config.tuning import DiskTuning
from streammerge.engine import floor
from streammerge.engine.floor import FloorResult, move_bytes, read_bytes, write_bytes
from streammerge.errors import CheckpointError, DiskSpaceError, OutputExistsError

if TYPE_CHECKING:
    from pathlib import Path

SIZES = [0, 1, 4095, 4096, 4097, 3 * 8192, 10 * 8192 + 77]
WAYS = [
    DiskTuning(read_mode=read, write_mode=write, block_bytes=8192, readers=readers, writers=writers)
    for read, write, (readers, writers) in itertools.product(
        ("direct", "buffered", "mmap"), ("direct", "buffered"), ((1, 1), (3, 2))
    )
]
SMALL = DiskTuning(block_bytes=8192)


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "base"
    folder.mkdir()
    paths = [folder / f"{size}.safetensors" for size in SIZES]
    for path, size in zip(paths, SIZES, strict=True):
        path.write_bytes(os.urandom(size))
    return paths


def assert_moved(sources: list[Path], target: Path, result: FloorResult) -> None:
    assert result.nbytes == sum(SIZES)
    assert result.seconds > 0
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in sources)
    for path in sources:
        assert (target / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("tuning", WAYS, ids=str)
def test_every_byte_arrives(sources: list[Path], tmp_path: Path, tuning: DiskTuning) -> None:
    target = tmp_path / "new" / "copy"
    assert_moved(sources, target, move_bytes(sources, target, tuning=tuning))


def test_blocks_are_rounded_up_to_pages(sources: list[Path], tmp_path: Path) -> None:
    result = move_bytes(sources, tmp_path / "copy", tuning=DiskTuning(block_bytes=5000))
    assert_moved(sources, tmp_path / "copy", result)


def test_sparse_files_are_read(tmp_path: Path) -> None:
    source = tmp_path / "sparse"
    with source.open("wb") as file:
        file.truncate(100_001)
    move_bytes([source], tmp_path / "copy", tuning=SMALL)
    assert (tmp_path / "copy" / "sparse").read_bytes() == bytes(100_001)


def test_discarded_copies_leave_nothing(sources: list[Path], tmp_path: Path) -> None:
    result = move_bytes(sources, tmp_path / "copy", tuning=SMALL, discard=True)
    assert result.nbytes == sum(SIZES)
    assert not list((tmp_path / "copy").iterdir())
    assert all(path.exists() for path in sources)


@pytest.mark.parametrize("tuning", WAYS[:6], ids=str)
def test_one_direction_alone(sources: list[Path], tmp_path: Path, tuning: DiskTuning) -> None:
    read = read_bytes(sources, tuning=tuning)
    assert (read.nbytes, read.write_mode) == (sum(SIZES), None)
    for size in SIZES:
        path = tmp_path / f"written-{size}"
        written = write_bytes(path, nbytes=size, tuning=tuning)
        assert (written.nbytes, written.read_mode) == (size, None)
        assert not path.exists()
    write_bytes(path, nbytes=SIZES[-1], tuning=tuning, discard=False)
    assert path.stat().st_size == SIZES[-1]


def test_nothing_to_read(tmp_path: Path) -> None:
    assert read_bytes([], tuning=SMALL).read_mode is None
    assert move_bytes([], tmp_path / "copy", tuning=SMALL).nbytes == 0


def test_refused_when_opened(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            if flags & os.O_CREAT:
                # as tmpfs did: the file is there, and the call fails
                os.close(plain(path, flags & ~os.O_DIRECT, *rest, **named))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    result = move_bytes(sources, tmp_path / "copy", tuning=SMALL)
    monkeypatch.undo()
    assert (result.read_mode, result.write_mode) == ("buffered", "buffered")
    assert_moved(sources, tmp_path / "copy", result)


def test_refused_when_transferred(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # addresses and lengths that no device takes: the file system refuses them by itself
    monkeypatch.setattr(floor, "PAGE", 1)
    tuning = DiskTuning(block_bytes=5001)
    result = move_bytes(sources, tmp_path / "copy", tuning=tuning)
    monkeypatch.undo()
    assert_moved(sources, tmp_path / "copy", result)


def test_an_existing_file_is_kept(sources: list[Path]) -> None:
    before = [path.read_bytes() for path in sources]
    with pytest.raises(OutputExistsError, match="the file exists"):
        move_bytes(sources, sources[0].parent, tuning=SMALL)
    assert [path.read_bytes() for path in sources] == before


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot open"):
        read_bytes([tmp_path / "none"], tuning=SMALL)


@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_a_file_that_shrinks(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    monkeypatch.setattr(floor, "_size", lambda path: path.stat().st_size + 8192)
    with pytest.raises(CheckpointError, match="became shorter"):
        move_bytes(sources, tmp_path / "copy", tuning=DiskTuning(mode, block_bytes=8192))


@pytest.mark.parametrize(
    ("call", "fault"), [("preadv", CheckpointError), ("pwritev", DiskSpaceError)]
)
@pytest.mark.parametrize("after", [0, 5])
def test_a_fault_in_a_thread_is_raised(
    sources: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    fault: type[Exception],
    after: int,
) -> None:
    plain, calls = getattr(os, call), itertools.count()

    def fail(*arguments: Any) -> int:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(plain(*arguments))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(fault):
        move_bytes(sources, tmp_path / "copy", tuning=SMALL)
