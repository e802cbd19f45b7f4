"""Direct reads and writes: the same bytes as any other way, whatever the file system says."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import tempfile
import threading
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from streammerge.checkpoint import direct
from streammerge.checkpoint.direct import DirectReader, DirectWriter
from streammerge.checkpoint.reader import open_reader
from streammerge.checkpoint.slab import FRONT_BYTES, PAGE, Slab
from streammerge.errors import CheckpointError, DiskSpaceError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POISON = 0xA5
# not a whole number of pages
DATA = bytes(n * 7 % 251 for n in range(9 * PAGE + 1234))
EDGES = [0, 1, 511, 512, 4095]
LENGTHS = [0, 1, 511, 4095, 4096, 4097, 3 * PAGE, 3 * PAGE + 1, 5 * PAGE - 1]
SHM = Path("/dev/shm")
PREADV, PWRITE = os.preadv, os.pwrite


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def is_direct(file: int) -> bool:
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)


def fault(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def cool(path: Path) -> None:
    """Put the file on the disk and out of the page cache."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "data"
    file.write_bytes(DATA)
    return file


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in the page cache."""

    def preadv(file: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise fault(errno.EAGAIN)
        return PREADV(file, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)


def check_read(reader: DirectReader, slab: Slab, offset: int, nbytes: int, at: int) -> None:
    """Read a run into a slab of poison, and look at what is around it."""
    slab.view[:] = bytes([POISON]) * len(slab.view)
    reader.read_slab(offset, slab, at=at, nbytes=nbytes)
    assert slab.view[at : at + nbytes] == DATA[offset : offset + nbytes]
    # nothing before it changes, and nothing more than a page after it
    assert slab.view[:at] == bytes([POISON]) * at
    rest = slab.view[at + nbytes + PAGE :]
    assert rest == bytes([POISON]) * len(rest)


@pytest.mark.parametrize("cache", ["warm", "cold", "none"])
@pytest.mark.parametrize("nbytes", LENGTHS)
def test_runs_of_every_offset_and_place(
    cache: str, nbytes: int, path: Path, request: pytest.FixtureRequest
) -> None:
    if cache == "none":
        request.getfixturevalue("no_cache")
    slab = Slab(nbytes)
    reader = DirectReader(path)
    for start in (0, 2 * PAGE):
        for offset in EDGES:
            for place in EDGES:
                if cache == "cold":
                    cool(path)
                check_read(reader, slab, start + offset, nbytes, FRONT_BYTES + place)
    reader.close()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(DATA)), st.integers(0, 6 * PAGE), st.integers(0, PAGE - 1), st.booleans())
def test_any_run(offset: int, nbytes: int, place: int, is_cached: bool) -> None:
    nbytes = min(nbytes, len(DATA) - offset)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        file = Path(folder) / "data"
        file.write_bytes(DATA)
        if not is_cached:
            patch.setattr(DirectReader, "_read_cached", lambda *_: 0)
        reader = DirectReader(file)
        check_read(reader, Slab(nbytes), offset, nbytes, FRONT_BYTES + place)
        reader.close()


@pytest.mark.parametrize("nbytes", [0, 1, 1233, 1234, 1235, PAGE + 1234, len(DATA)])
@pytest.mark.parametrize("place", EDGES)
def test_runs_to_the_end_of_the_file(nbytes: int, place: int, path: Path, no_cache: None) -> None:
    reader = DirectReader(path)
    check_read(reader, Slab(nbytes), len(DATA) - nbytes, nbytes, FRONT_BYTES + place)
    reader.close()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 8 * PAGE), st.integers(0, 6000)), min_size=1, max_size=8),
    st.integers(0, PAGE - 1),
    st.sampled_from(["all", "none", "first page"]),
)
def test_runs_one_after_the_other_keep_the_earlier_ones(
    runs: list[tuple[int, int]], place: int, cached: str
) -> None:
    runs = [(offset, min(nbytes, len(DATA) - offset)) for offset, nbytes in runs]
    total = sum(nbytes for _, nbytes in runs)
    slab = Slab(total)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        file = Path(folder) / "data"
        file.write_bytes(DATA)
        if cached != "all":
            real = DirectReader._read_cached
            most = PAGE if cached == "first page" else 0
            patch.setattr(
                DirectReader, "_read_cached", lambda self, at, into: real(self, at, into[:most])
            )
        reader = DirectReader(file)
        at = FRONT_BYTES + place
        for offset, nbytes in runs:
            reader.read_slab(offset, slab, at=at, nbytes=nbytes)
            at += nbytes
        reader.close()
    expected = b"".join(DATA[offset : offset + nbytes] for offset, nbytes in runs)
    assert slab.view[FRONT_BYTES + place :][:total] == expected


def test_reads_that_come_in_parts_go_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []

    def preadv(file: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise fault(errno.EAGAIN)
        assert is_direct(file)
        parts.append(offset)
        return PREADV(file, [buffers[0][: 2 * PAGE]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    reader = DirectReader(path)
    for offset in EDGES:
        for place in EDGES:
            parts.clear()
            check_read(reader, Slab(7 * PAGE), offset, 7 * PAGE, FRONT_BYTES + place)
            assert len(parts) == 4
            assert all(part % PAGE == 0 for part in parts)
    reader.close()


def test_direct_reads_are_of_whole_pages(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def preadv(file: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise fault(errno.EAGAIN)
        if is_direct(file):
            seen.append((direct_address(buffers[0]), len(buffers[0]), offset))
        return PREADV(file, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    reader = DirectReader(path)
    check_read(reader, Slab(5000), 4000, 5000, FRONT_BYTES + 17)
    reader.close()
    ((address, length, offset),) = seen
    assert (address % PAGE, length, offset) == (0, 3 * PAGE, 0)


def direct_address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@pytest.mark.parametrize("keep", [0, 1, PAGE, PAGE + 1, 5000, 3 * PAGE])
@pytest.mark.parametrize("is_cached", [False, True])
def test_a_file_cut_under_the_reader_is_truncated(
    keep: int, is_cached: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = DirectReader(path)
    os.truncate(path, keep)
    if not is_cached:
        monkeypatch.setattr(DirectReader, "_read_cached", lambda *_: 0)
    slab = Slab(5 * PAGE)
    for offset in (0, 100, PAGE, 4 * PAGE + 3):
        with pytest.raises(CheckpointError) as caught:
            reader.read_slab(offset, slab, at=FRONT_BYTES + 5, nbytes=4 * PAGE)
        assert caught.value.what == "file is truncated"
        assert caught.value.where == str(path)
        assert caught.value.expected == f"at least {offset + 4 * PAGE} bytes"
    if keep:
        reader.read_slab(0, slab, at=FRONT_BYTES, nbytes=keep)
        assert slab.view[FRONT_BYTES : FRONT_BYTES + keep] == DATA[:keep]
    reader.close()


def refuse_open(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    real = os.open

    def open_(name: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise fault(code)
        return real(name, flags, *rest)

    monkeypatch.setattr(os, "open", open_)


def refuse_read(monkeypatch: pytest.MonkeyPatch, code: int, *, after: int = 0) -> None:
    """Fail direct reads, after some that work; nothing is in the cache."""
    left = after

    def preadv(file: int, buffers: Any, offset: int, flags: int = 0) -> int:
        nonlocal left
        if flags & os.RWF_NOWAIT:
            raise fault(errno.EOPNOTSUPP)
        if is_direct(file):
            if not left:
                raise fault(code)
            left -= 1
        return PREADV(file, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("when", ["open", "first read", "second read"])
def test_a_file_system_that_refuses_is_read_through_the_cache(
    code: int, when: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    if when == "open":
        refuse_open(monkeypatch, code)
    else:
        refuse_read(monkeypatch, code, after=int(when == "second read"))
    reader = DirectReader(path)
    for offset in EDGES:
        for nbytes in LENGTHS:
            check_read(reader, Slab(nbytes), offset, nbytes, FRONT_BYTES + 77)
    assert reader._direct is None
    reader.forget(0, len(DATA))
    reader.close()
    assert open_files() == before


def test_another_fault_at_open_leaves_no_descriptor(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    refuse_open(monkeypatch, errno.EMFILE)
    with pytest.raises(CheckpointError, match="cannot open the file"):
        open_reader(path, mode="direct")
    assert open_files() == before


def test_another_fault_of_a_read_is_a_checkpoint_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = DirectReader(path)
    refuse_read(monkeypatch, errno.EIO)
    with pytest.raises(CheckpointError) as caught:
        reader.read_slab(5, Slab(10), at=FRONT_BYTES, nbytes=10)
    reader.close()
    assert str(caught.value) == f"cannot read (Input/output error), in {path} at byte 5"


def test_what_a_direct_reader_did_not_cache_it_does_not_drop(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = DirectReader(path)
    advice: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, at, size, _: advice.append((at, size)))
    reader.forget(0, 5000)
    assert advice == []
    reader._direct, kept = None, reader._direct
    reader.forget(0, 5000)
    assert advice == [(0, 5000)]
    reader._direct = kept
    reader.close()


@pytest.mark.skipif(not SHM.is_dir(), reason="no file system in memory here")
def test_a_file_system_in_memory_is_read() -> None:
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        file = Path(folder) / "data"
        file.write_bytes(DATA)
        reader = DirectReader(file)
        for offset in EDGES:
            for nbytes in LENGTHS:
                check_read(reader, Slab(nbytes), offset, nbytes, FRONT_BYTES + 1)
        reader.close()


# writer


Piece = tuple[int, int]


def pieces_of(start: int, end: int, cuts: list[int]) -> list[Piece]:
    edges = [start, *sorted(start + cut % (end - start + 1) for cut in cuts), end]
    return list(pairwise(edges))


def write_piece(writer: DirectWriter, content: bytes, piece: Piece) -> None:
    start, end = piece
    slab = Slab(end - start)
    # what is around a piece in its slab must not get into the file
    slab.view[:] = bytes([POISON]) * len(slab.view)
    at = slab.place(start)
    slab.view[at : at + end - start] = content[start:end]
    writer.write_slab(start, slab, at=at, nbytes=end - start)


def write_all(writer: DirectWriter, content: bytes, pieces: list[Piece], threads: int) -> None:
    failures: list[BaseException] = []

    def work(mine: list[Piece]) -> None:
        try:
            for piece in mine:
                write_piece(writer, content, piece)
        except BaseException as error:  # noqa: BLE001 (carried to the test)
            failures.append(error)

    workers = [
        threading.Thread(target=work, args=(pieces[number::threads],)) for number in range(threads)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


def check_file(
    folder: Path, content: bytes, head: int, pieces: list[Piece], threads: int = 1
) -> None:
    path = folder / "shard"
    before = open_files()
    writer = DirectWriter(path, head=content[:head], nbytes=len(content))
    write_all(writer, content, pieces, threads)
    assert [file.name for file in folder.iterdir()] == ["shard.partial"]
    assert writer.finish() == len(content)
    assert path.read_bytes() == content
    assert [file.name for file in folder.iterdir()] == ["shard"]
    assert open_files() == before


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(st.integers(0, 3 * PAGE), st.sampled_from(LENGTHS)),
    st.one_of(st.integers(0, 4 * PAGE), st.sampled_from(LENGTHS)),
    st.lists(st.integers(0, 4 * PAGE), max_size=12),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_pieces_in_any_order_from_several_threads(
    head: int, nbytes: int, cuts: list[int], threads: int, random: Any
) -> None:
    content = (DATA * 2)[: head + nbytes]
    pieces = pieces_of(head, head + nbytes, cuts)
    random.shuffle(pieces)
    with tempfile.TemporaryDirectory() as folder:
        check_file(Path(folder), content, head, pieces, threads)


@pytest.mark.parametrize("head", [0, 1, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 5 * PAGE])
def test_one_piece(head: int, nbytes: int, tmp_path: Path) -> None:
    check_file(tmp_path, DATA[: head + nbytes], head, [(head, head + nbytes)])


@pytest.mark.parametrize("size", [1, 7, 100, 4096])
def test_many_small_pieces(size: int, tmp_path: Path) -> None:
    end = 2 * PAGE + 50
    pieces = [(at, min(at + size, end)) for at in range(33, end, size)]
    check_file(tmp_path, DATA[:end], 33, pieces[::-1], threads=3)


def test_whole_pages_are_written_from_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        seen.append((is_direct(file), direct_address(data) % PAGE, len(data) % PAGE, offset % PAGE))
        return PWRITE(file, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    end = 5 * PAGE + 7
    check_file(tmp_path, DATA[:end], 100, [(100, 9000), (9000, end)])
    # pages 0 and 2 are shared, 1 and 3 to 4 are whole, 5 is the last
    assert seen == [(True, 0, 0, 0)] * 5


# a page that both neighbours share, the first piece, the last, whole pages alone
@pytest.mark.parametrize("missing", range(5))
@pytest.mark.parametrize("nbytes", [6 * PAGE, 6 * PAGE + 9])
def test_a_missing_piece_is_seen(missing: int, nbytes: int, tmp_path: Path) -> None:
    content = DATA[:nbytes]
    pieces = list(pairwise([10, 100, PAGE, 3 * PAGE, 3 * PAGE + 5, nbytes]))
    before = open_files()
    writer = DirectWriter(tmp_path / "shard", head=content[:10], nbytes=nbytes)
    write_all(writer, content, pieces[:missing] + pieces[missing + 1 :], 1)
    with pytest.raises(ValueError, match="shard: not every byte was written before finish"):
        writer.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["shard.partial"]
    assert open_files() == before


def test_an_aborted_shard_keeps_its_temporary_name(tmp_path: Path) -> None:
    before = open_files()
    writer = DirectWriter(tmp_path / "shard", head=DATA[:10], nbytes=PAGE)
    write_piece(writer, DATA, (10, 50))
    writer.abort()
    assert [file.name for file in tmp_path.iterdir()] == ["shard.partial"]
    assert open_files() == before


def test_an_older_file_is_overwritten(tmp_path: Path) -> None:
    for name in ("shard", "shard.partial"):
        (tmp_path / name).write_bytes(bytes(100_000))
    writer = DirectWriter(tmp_path / "shard", head=DATA[:10], nbytes=1000)
    write_piece(writer, DATA, (10, 1000))
    assert writer.finish() == 1000
    assert (tmp_path / "shard").read_bytes() == DATA[:1000]


def failing_pwrite(code: int, *, only_direct: bool, after: int = 0) -> Callable[..., int]:
    left = after

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        nonlocal left
        if not only_direct or is_direct(file):
            if not left:
                raise fault(code)
            left -= 1
        return PWRITE(file, data, offset)

    return pwrite


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_write_that_is_refused_goes_through_the_cache(
    code: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", failing_pwrite(code, only_direct=True, after=after))
    end = 5 * PAGE + 7
    check_file(tmp_path, DATA[:end], 100, pieces_of(100, end, [3000, 9000, 12_000]))


def test_writes_that_are_refused_at_the_same_time_go_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)
    fail = failing_pwrite(errno.EINVAL, only_direct=True)

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        # one of them fails after the other has switched
        if is_direct(file) and both.wait(60):
            while is_direct(file):
                time.sleep(0.001)
            raise fault(errno.EINVAL)
        return fail(file, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    check_file(tmp_path, DATA[: 4 * PAGE], 0, [(0, 2 * PAGE), (2 * PAGE, 4 * PAGE)], threads=2)


def test_a_file_system_without_direct_writes_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.fcntl

    def control(file: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL and value & os.O_DIRECT:
            raise fault(errno.EINVAL)
        return real(file, command, value)

    monkeypatch.setattr(fcntl, "fcntl", control)
    check_file(tmp_path, DATA, 100, pieces_of(100, len(DATA), [3000, 9000, 12_000]))


def test_another_fault_of_the_switch_is_a_resource_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    real = fcntl.fcntl

    def control(file: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL:
            raise fault(errno.EPERM)
        return real(file, command, value)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", control)
        with pytest.raises(ResourceError, match="cannot write"):
            DirectWriter(tmp_path / "shard", head=b"", nbytes=100)
    assert open_files() == before


def test_writes_that_come_in_parts_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: PWRITE(file, data[:PAGE], at))
    check_file(tmp_path, DATA, 100, pieces_of(100, len(DATA), [3000, 9000]))


def test_a_part_that_ends_inside_a_page_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a signal or a quota may stop a write anywhere; what is left is not aligned any more
    def pwrite(file: int, data: memoryview, offset: int) -> int:
        if is_direct(file) and offset % PAGE:
            raise fault(errno.EINVAL)
        if not is_direct(file):
            return PWRITE(file, data, offset)
        copy = os.open(tmp_path / "shard.partial", os.O_WRONLY)
        try:
            return PWRITE(copy, data[:1000], offset)
        finally:
            os.close(copy)

    monkeypatch.setattr(os, "pwrite", pwrite)
    check_file(tmp_path, DATA, 100, pieces_of(100, len(DATA), [3000, 9000]))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("where", ["piece", "last page"])
def test_a_failed_write_says_so(
    code: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    writer = DirectWriter(tmp_path / "shard", head=b"", nbytes=2 * PAGE + 5)
    write_piece(writer, DATA, (2 * PAGE, 2 * PAGE + 5))
    if where == "last page":
        write_piece(writer, DATA, (0, 2 * PAGE))
    kind = ResourceError if code == errno.EIO else DiskSpaceError
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_pwrite(code, only_direct=False))
        step = (
            partial(write_piece, writer, DATA, (0, 2 * PAGE)) if where == "piece" else writer.finish
        )
        with pytest.raises(ResourceError) as caught:
            step()
    assert type(caught.value) is kind
    assert caught.value.where == str(tmp_path / "shard")
    if where == "piece":
        writer.abort()
    assert [file.name for file in tmp_path.iterdir()] == ["shard.partial"]
    assert open_files() == before


def test_a_failed_header_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_pwrite(errno.ENOSPC, only_direct=False))
        with pytest.raises(DiskSpaceError):
            DirectWriter(tmp_path / "shard", head=bytes(PAGE), nbytes=2 * PAGE)
    assert open_files() == before


class Libc:
    """A C library whose `fallocate` fails."""

    def __init__(self, code: int) -> None:
        self.code = code

    def fallocate(self, *_: object) -> int:
        ctypes.set_errno(self.code)
        return -1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_too_small_for_the_shard_is_seen_at_once(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    monkeypatch.setattr(direct.ctypes, "CDLL", lambda *_, **__: Libc(code))
    with pytest.raises(DiskSpaceError, match="no space for the output"):
        DirectWriter(tmp_path / "shard", head=b"", nbytes=100)
    assert open_files() == before


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_does_not_reserve_is_written_all_the_same(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct.ctypes, "CDLL", lambda *_, **__: Libc(code))
    check_file(tmp_path, DATA, 100, pieces_of(100, len(DATA), [3000, 9000]))


def test_the_space_is_reserved_before_the_first_write(tmp_path: Path) -> None:
    writer = DirectWriter(tmp_path / "shard", head=b"", nbytes=50 * PAGE + 1)
    status = (tmp_path / "shard.partial").stat()
    writer.abort()
    assert status.st_size in {0, 50 * PAGE + 1}
    if status.st_size:
        assert status.st_blocks * 512 >= status.st_size


def test_a_folder_that_is_not_there_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot write"):
        DirectWriter(tmp_path / "absent" / "shard", head=b"", nbytes=1)


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    if not SHM.is_dir():
        pytest.skip("no file system in memory here")
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        yield Path(folder)


def test_a_file_system_in_memory_is_written(memory_folder: Path) -> None:
    check_file(memory_folder, DATA, 100, pieces_of(100, len(DATA), [3000, 9000, 20_000])[::-1])
