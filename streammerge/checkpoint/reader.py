"""Bounded reads of weight files into buffers of the caller's.

Three ways, equal to the byte: `direct` (past the page cache), `buffered` (positional reads), and
`mmap` (a mapping whose pages are dropped as soon as they are copied). The last two ask the kernel
to read ahead, and drop the page cache behind a file that is read once from front to back, so that a
merge of a 140 GB base does not evict everything else.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from streammerge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.checkpoint.header import StoredTensor
    from streammerge.checkpoint.slab import Slab
    from streammerge.config.tuning import FileMode

__all__ = ["FileReader", "OpensItself", "ReadableFile", "ReaderPool", "open_reader", "read_failing"]

_PAGE = mmap.PAGESIZE
READ_AHEAD_BYTES = 32 << 20
# shards of a base come one after the other; an adapter's tensors come from one file
_MAX_OPEN_FILES = 16


class FileReader(Protocol):
    """Positional reads of one file."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`.

        Raises:
            CheckpointError: The file ends before the buffer is full, or the device fails.
        """

    def read_slab(self, offset: int, slab: Slab, *, at: int, nbytes: int) -> None:
        """Fill `slab[at : at + nbytes]` with the bytes at `offset`; bytes after it may change.

        Raises:
            CheckpointError: The file ends before, or the device fails.
        """

    def forget(self, offset: int, nbytes: int) -> None:
        """Drop the cached pages that lie wholly inside the range; it will not be read again."""

    def close(self) -> None:
        """Release the file."""


class BufferedReader:
    """Read with `preadv`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        self._ahead = 0
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._file, [buffer[done:]], offset + done)
            except OSError as error:
                raise read_failing(self.path, offset + done, error) from error
            if count == 0:
                raise self.truncated(offset + len(buffer), offset + done)
            done += count
        self._read_ahead(offset + len(buffer))

    def read_slab(self, offset: int, slab: Slab, *, at: int, nbytes: int) -> None:
        """Fill `slab[at : at + nbytes]` with the bytes at `offset`."""
        self.read_into(offset, slab.view[at : at + nbytes])

    def forget(self, offset: int, nbytes: int) -> None:
        """Drop the cached pages that lie wholly inside the range."""
        os.posix_fadvise(self._file, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Release the file."""
        os.close(self._file)

    def truncated(self, expected: int, got: int) -> CheckpointError:
        """Return the error that says where the file ends too early."""
        return _truncated(self.path, expected, got)

    def _read_ahead(self, end: int) -> None:
        # asked for in strides: once per read costs more than the reads where tensors are small
        if not self._ahead - READ_AHEAD_BYTES <= end <= self._ahead - READ_AHEAD_BYTES // 2:
            self._ahead = end + READ_AHEAD_BYTES
            os.posix_fadvise(self._file, end, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


class MappedReader:
    """Copy out of a read-only mapping, and unmap the pages right after."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDONLY)
        self._map = mmap.mmap(self._file, 0, prot=mmap.PROT_READ)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`."""
        if not len(buffer):
            return
        # a page beyond the end of a file that shrank kills the process when touched: look first
        size, end = os.fstat(self._file).st_size, offset + len(buffer)
        if end > size:
            raise _truncated(self._path, end, size)
        ahead = offset - offset % _PAGE
        if ahead < size:
            self._map.madvise(mmap.MADV_WILLNEED, ahead, min(end + READ_AHEAD_BYTES, size) - ahead)
        # numpy copies without the interpreter lock, so other stages run while pages come in
        np.copyto(np.frombuffer(buffer, dtype=np.uint8), self._bytes[offset:end])
        self._drop(offset, end)

    def read_slab(self, offset: int, slab: Slab, *, at: int, nbytes: int) -> None:
        """Fill `slab[at : at + nbytes]` with the bytes at `offset`."""
        self.read_into(offset, slab.view[at : at + nbytes])

    def forget(self, offset: int, nbytes: int) -> None:
        """Drop the cached pages that lie wholly inside the range."""
        os.posix_fadvise(self._file, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Release the mapping and the file."""
        del self._bytes
        self._map.close()
        os.close(self._file)

    def _drop(self, offset: int, end: int) -> None:
        first = offset - offset % _PAGE
        self._map.madvise(mmap.MADV_DONTNEED, first, end - first)


def open_reader(path: Path, *, mode: FileMode) -> FileReader:
    """Open a file for positional reads.

    Raises:
        CheckpointError: The file cannot be opened.
    """
    from streammerge.checkpoint.direct import DirectReader  # noqa: PLC0415 (it builds on this one)

    kinds: dict[FileMode, Callable[[Path], FileReader]]
    kinds = {"direct": DirectReader, "buffered": BufferedReader, "mmap": MappedReader}
    try:
        return kinds[mode](path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot open the file ({error})", where=path) from error


class OpensItself(Protocol):
    """What has bytes to be read, and is no file."""

    def open_reader(self, pool: ReaderPool, /) -> FileReader:
        """Return a reader of its bytes, which may read files of a pool."""


ReadableFile = Path | OpensItself


class ReaderPool:
    """The open files of one thread, opened on first use; the one unused for longest is closed."""

    def __init__(self, *, mode: FileMode) -> None:
        self._mode = mode
        self._readers: OrderedDict[ReadableFile, FileReader] = OrderedDict()

    def __enter__(self) -> ReaderPool:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def reader(self, file: ReadableFile) -> FileReader:
        """Return the open reader of a file."""
        if file in self._readers:
            self._readers.move_to_end(file)
        else:
            if len(self._readers) == _MAX_OPEN_FILES:
                self._readers.popitem(last=False)[1].close()
            self._readers[file] = (
                open_reader(file, mode=self._mode)
                if isinstance(file, Path)
                else file.open_reader(self)
            )
        return self._readers[file]

    def read_tensor(self, tensor: StoredTensor, buffer: memoryview) -> None:
        """Fill `buffer`, of exactly the tensor's size, with its bytes."""
        self.reader(tensor.file).read_into(tensor.offset, buffer)

    def read_part(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes from `offset` of a tensor, which nobody will soon read again."""
        reader = self.reader(tensor.file)
        reader.read_into(tensor.offset + offset, buffer)
        reader.forget(tensor.offset + offset, len(buffer))

    def close(self) -> None:
        """Close every file."""
        while self._readers:
            self._readers.popitem()[1].close()


def read_failing(path: Path, offset: int, error: OSError) -> CheckpointError:
    """Return the error that says where a device failed."""
    return CheckpointError(f"cannot read ({error.strerror})", where=f"{path} at byte {offset}")


def _truncated(path: Path, expected: int, got: int) -> CheckpointError:
    return CheckpointError(
        "file is truncated",
        where=path,
        expected=f"at least {expected} bytes",
        got=got,
        hint="it changed during the run: download or copy it again",
    )
