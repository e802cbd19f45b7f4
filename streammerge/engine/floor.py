"""The floor of a merge: the same bytes read and written, with no arithmetic.

No merge on the machine is faster than that. Blocks travel from reader threads to writer threads in
a closed set of page-aligned buffers, past the page cache where the file system allows it.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

from streammerge.checkpoint.direct import REFUSED
from streammerge.checkpoint.reader import read_failing
from streammerge.checkpoint.slab import PAGE, address_of
from streammerge.checkpoint.writer import writing
from streammerge.errors import CheckpointError, OutputExistsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from streammerge.config.tuning import DiskTuning, FileMode

__all__ = ["FloorResult", "move_bytes", "read_bytes", "write_bytes"]

# while one is with the reader or the writer, another waits for its turn
_BUFFERS_PER_THREAD = 2


@dataclass(frozen=True, slots=True)
class FloorResult:
    """What one transfer took."""

    nbytes: int
    seconds: float
    """Until the last file is durable."""
    read_mode: FileMode | None
    """How files were read in the end: `buffered` where the file system refused direct transfers.
    None if none was read.
    """
    write_mode: FileMode | None
    """How files were written in the end; None if none was."""


def move_bytes(
    sources: Sequence[Path], target: Path, *, tuning: DiskTuning, discard: bool = False
) -> FloorResult:
    """Write a copy of each file into a folder, and make it durable.

    Args:
        sources: Files whose names differ.
        target: The folder; it is made if need be.
        tuning: How to read and write.
        discard: Whether to delete each copy when it is finished.

    Raises:
        OutputExistsError: The folder has a file of such a name, which may be the source itself.
        CheckpointError: A source cannot be read.
        ResourceError: A copy cannot be written.
    """
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    jobs = [_Job(path, target / path.name, _size(path)) for path in sources]
    return _Transfer(jobs, tuning, discard=discard).run(tuning.readers, tuning.writers)


def read_bytes(sources: Sequence[Path], *, tuning: DiskTuning) -> FloorResult:
    """Read files from front to back, and do nothing with them.

    Raises:
        CheckpointError: A file cannot be read.
    """
    jobs = [_Job(path, None, _size(path)) for path in sources]
    return _Transfer(jobs, tuning, discard=False).run(tuning.readers, 0)


def write_bytes(
    target: Path, *, nbytes: int, tuning: DiskTuning, discard: bool = True
) -> FloorResult:
    """Write a file of random bytes, and make it durable.

    Args:
        target: The file.
        nbytes: Its size.
        tuning: How to write.
        discard: Whether to delete it in the end.

    Raises:
        OutputExistsError: The file exists.
        ResourceError: It cannot be written.
    """
    return _Transfer([_Job(None, target, nbytes)], tuning, discard=discard).run(0, tuning.writers)


@dataclass(frozen=True, slots=True)
class _Job:
    """A file to read, a file to write, or both."""

    source: Path | None
    target: Path | None
    nbytes: int


class _File:
    """An open file, with direct transfers for as long as the file system takes them."""

    def __init__(self, path: Path, flags: int, *, mode: FileMode, nbytes: int) -> None:
        self.path, self.mode, self.nbytes = path, mode, nbytes
        self._missing = nbytes
        self._counting = threading.Lock()
        direct = os.O_DIRECT if mode == "direct" else 0
        try:
            self.descriptor = os.open(path, flags | direct, 0o666)
        except OSError as error:
            if not direct or error.errno not in REFUSED:
                raise
            self.mode = "buffered"
            # the refused call may have created the file
            self.descriptor = os.open(path, flags & ~os.O_EXCL, 0o666)

    def close(self) -> None:
        """Release the file; a second call does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _count(self, nbytes: int) -> bool:
        """Count bytes that are done; return whether they were the last."""
        with self._counting:
            self._missing -= nbytes
            return not self._missing

    def _attempt(
        self, call: Callable[[int, list[memoryview], int], int], data: memoryview, offset: int
    ) -> int:
        """Transfer, through the page cache from now on if the direct way is refused."""
        mode = self.mode
        try:
            return call(self.descriptor, [data], offset)
        except OSError as error:
            if mode != "direct" or error.errno not in REFUSED:
                raise
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.mode = "buffered"
        return call(self.descriptor, [data], offset)


class _Source(_File):
    """A file that is read."""

    def __init__(self, path: Path, *, mode: FileMode, nbytes: int) -> None:
        self._map: mmap.mmap | None = None
        try:
            super().__init__(path, os.O_RDONLY, mode=mode, nbytes=nbytes)
            if mode == "mmap" and nbytes:
                self._map = mmap.mmap(self.descriptor, nbytes, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot open the file ({error})", where=path) from error

    def close(self) -> None:
        """Release the mapping and the file."""
        super().close()
        if self._map is not None:
            self._map.close()

    def read(self, offset: int, buffer: memoryview, nbytes: int) -> None:
        """Fill `buffer[:nbytes]`; what follows in the last page may be overwritten."""
        if self._map is not None:
            self._copy(self._map, offset, buffer, nbytes)
        else:
            self._read(offset, buffer, nbytes)
        if self._count(nbytes):
            self.close()

    def _read(self, offset: int, buffer: memoryview, nbytes: int) -> None:
        done, end = 0, _whole_pages(nbytes)
        while done < nbytes:
            try:
                count = self._attempt(os.preadv, buffer[done:end], offset + done)
            except OSError as error:
                raise read_failing(self.path, offset + done, error) from error
            if not count:
                raise CheckpointError(
                    "file became shorter", where=self.path, expected=self.nbytes, got=offset + done
                )
            done += count

    @staticmethod
    def _copy(mapped: mmap.mmap, offset: int, buffer: memoryview, nbytes: int) -> None:
        with memoryview(mapped) as view:
            # ctypes calls without the interpreter lock, so that page faults overlap
            ctypes.memmove(address_of(buffer), address_of(view) + offset, nbytes)
        mapped.madvise(mmap.MADV_DONTNEED, offset, nbytes)


class _Target(_File):
    """A file that is written in any order, and made durable when every byte has come."""

    def __init__(self, path: Path, *, mode: FileMode, nbytes: int, discard: bool) -> None:
        self._discard = discard
        with writing(path):
            try:
                super().__init__(
                    path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=mode, nbytes=nbytes
                )
            except FileExistsError as error:
                raise OutputExistsError(
                    "the file exists", where=path, hint="name another folder"
                ) from error

    def write(self, offset: int, buffer: memoryview, nbytes: int) -> None:
        """Write `buffer[:nbytes]`, and what follows in the last page, which is cut off later."""
        done, end = 0, _whole_pages(nbytes)
        with writing(self.path):
            while done < end:
                done += self._attempt(os.pwritev, buffer[done:end], offset + done)
            if self._count(nbytes):
                os.ftruncate(self.descriptor, self.nbytes)
                os.fsync(self.descriptor)
                self.close()
                if self._discard:
                    self.path.unlink()


@dataclass(frozen=True, slots=True)
class _Block:
    """A range of a file."""

    source: _Source | None
    target: _Target | None
    offset: int
    nbytes: int


class _Transfer:
    """Blocks on their way from readers to writers; without one side, the other works alone."""

    def __init__(self, jobs: list[_Job], tuning: DiskTuning, *, discard: bool) -> None:
        self._tuning = tuning
        self._discard = discard
        self._nbytes = sum(job.nbytes for job in jobs)
        self._block_bytes = _whole_pages(tuning.block_bytes)
        self._sources: list[_Source] = []
        self._targets: list[_Target] = []
        self._blocks = self._cut(jobs)
        self._taking = threading.Lock()
        self._is_stopped = False
        # None tells a thread that nothing more comes
        self._free: SimpleQueue[memoryview | None] = SimpleQueue()
        self._full: SimpleQueue[tuple[_Block, memoryview] | None] = SimpleQueue()

    def run(self, readers: int, writers: int) -> FloorResult:
        """Move everything; raise what a thread raised first."""
        self._reading = readers
        self._threads = threads = readers + writers
        has_both = readers > 0 and writers > 0
        count = threads * (_BUFFERS_PER_THREAD if has_both else 1)
        buffers = [memoryview(mmap.mmap(-1, self._block_bytes)) for _ in range(count)]
        if not readers:
            for buffer in buffers:
                buffer[:] = os.urandom(self._block_bytes)
        started = time.perf_counter()
        for buffer in buffers:
            self._free.put(buffer)
        try:
            with ThreadPoolExecutor(threads) as pool:
                lines = [pool.submit(self._read, has_writers=has_both) for _ in range(readers)]
                lines += [pool.submit(self._write, has_readers=has_both) for _ in range(writers)]
                try:
                    for line in as_completed(lines):
                        line.result()
                finally:
                    self._stop()
        finally:
            for file in (*self._sources, *self._targets):
                file.close()
        seconds = time.perf_counter() - started
        return FloorResult(self._nbytes, seconds, _mode(self._sources), _mode(self._targets))

    def _read(self, *, has_writers: bool) -> None:
        """Fill free buffers, until there is nothing left to read."""
        while (buffer := self._free.get()) is not None:
            block = self._take()
            if block is None:
                break
            assert block.source is not None
            block.source.read(block.offset, buffer, block.nbytes)
            if has_writers:
                self._full.put((block, buffer))
            else:
                self._free.put(buffer)
        with self._taking:
            self._reading -= 1
            is_last = not self._reading
        if is_last:
            # behind the last block, so that no writer leaves before it is written
            self._release()

    def _write(self, *, has_readers: bool) -> None:
        """Write full buffers, or blocks of what the buffers hold where nothing is read."""
        if has_readers:
            while (item := self._full.get()) is not None and not self._is_stopped:
                block, buffer = item
                assert block.target is not None
                block.target.write(block.offset, buffer, block.nbytes)
                self._free.put(buffer)
            return
        held = self._free.get()
        assert held is not None
        while (alone := self._take()) is not None:
            assert alone.target is not None
            alone.target.write(alone.offset, held, alone.nbytes)

    def _take(self) -> _Block | None:
        """Return the next block; files are opened as their turn comes."""
        with self._taking:
            return None if self._is_stopped else next(self._blocks, None)

    def _stop(self) -> None:
        """Let every thread end; without effect on threads that have."""
        self._is_stopped = True
        self._release()

    def _release(self) -> None:
        for _ in range(self._threads):
            self._free.put(None)
            self._full.put(None)

    def _cut(self, jobs: list[_Job]) -> Iterator[_Block]:
        tuning = self._tuning
        for job in jobs:
            source = target = None
            if job.source is not None:
                source = _Source(job.source, mode=tuning.read_mode, nbytes=job.nbytes)
                self._sources.append(source)
            if job.target is not None:
                target = _Target(
                    job.target, mode=tuning.write_mode, nbytes=job.nbytes, discard=self._discard
                )
                self._targets.append(target)
            # a file of no bytes has one block of none, with which it is finished
            for offset in range(0, max(job.nbytes, 1), self._block_bytes):
                yield _Block(source, target, offset, min(self._block_bytes, job.nbytes - offset))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"cannot open the file ({error.strerror})", where=path) from error


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _mode(files: Sequence[_File]) -> FileMode | None:
    """Return the mode that files had in the end; one that was refused counts for all."""
    modes = {file.mode for file in files}
    return "buffered" if "buffered" in modes else next(iter(modes), None)
