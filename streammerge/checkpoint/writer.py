"""Write output shards at planned places, under a temporary name until they are safe."""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from streammerge.checkpoint.torch_bin import STORAGE_ALIGNMENT, encode_state_dict
from streammerge.errors import DiskSpaceError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import IO

    from streammerge.checkpoint.header import TensorSpec
    from streammerge.checkpoint.slab import Slab

__all__ = [
    "PARTIAL_SUFFIX",
    "SafetensorsWriter",
    "ShardFile",
    "ShardWriter",
    "TorchBinWriter",
    "require_space",
    "writing",
]

PARTIAL_SUFFIX = ".partial"
# sidecars, the index and the file system's own records
SPARE_DISK_BYTES = 64 * 10**6
# write-back starts as soon as a stretch of this size is full, and its pages are dropped one stretch
# later
WRITE_BEHIND_BYTES = 32 << 20
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into the error that says what to do.

    Raises:
        DiskSpaceError: The disk, the quota or the file size limit is exhausted.
        ResourceError: The device or the file system failed otherwise.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise DiskSpaceError(
                f"no space for the output ({error.strerror})",
                where=path,
                hint="free some space, or set export_dir on another disk, and run again",
            ) from error
        raise ResourceError(f"cannot write ({error.strerror})", where=path) from error


def require_space(place: Path, *, needed: int, purpose: str, hint: str, held: int = 0) -> None:
    """Refuse what a disk cannot take, with some room to spare.

    Args:
        place: A folder that exists, on the disk.
        needed: Bytes that will be written.
        purpose: What they are for, as the message has it.
        hint: What to do about it.
        held: Bytes that become free on the way.

    Raises:
        DiskSpaceError: There is too little free space.
    """
    needed += SPARE_DISK_BYTES
    free = shutil.disk_usage(place).free + held
    if free < needed:
        raise DiskSpaceError(
            f"not enough free disk space {purpose}",
            where=place,
            expected=f"{needed / 10**9:.2f} GB free",
            got=f"{free / 10**9:.2f} GB",
            hint=hint,
        )


class ShardWriter(Protocol):
    """One output shard: `write_slab` its data, then `finish`."""

    def write_slab(self, offset: int, slab: Slab, *, at: int, nbytes: int) -> None:
        """Write `slab[at : at + nbytes]` at `offset`, a place of the plan's layout."""

    def finish(self) -> int:
        """Make the shard durable, give it its name, and return its size in bytes."""

    def abort(self) -> None:
        """Close the unfinished file; it keeps its temporary name."""


class ShardFile:
    """A shard under its temporary name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        with writing(path):
            self._file = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def finish(self) -> int:
        """Make the shard durable, give it its name, and return its size in bytes."""
        with writing(self.path):
            try:
                os.fsync(self._file)
                size = os.fstat(self._file).st_size
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(self._file)
            self._partial.replace(self.path)
        return size

    def abort(self) -> None:
        """Close the unfinished file."""
        os.close(self._file)


class SafetensorsWriter(ShardFile):
    """Write a safetensors shard through the page cache; offsets count from the start of the file.

    Pages go to the disk, and out of the cache, while later ones are written.
    """

    def __init__(self, path: Path, *, head: bytes) -> None:
        super().__init__(path)
        self._started = self._dropped = 0
        try:
            self.write(0, memoryview(head))
        except BaseException:
            self.abort()
            raise

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data` at `offset`."""
        done = 0
        with writing(self.path):
            while done < len(data):
                done += os.pwrite(self._file, data[done:], offset + done)
        self._write_behind(offset + len(data))

    def write_slab(self, offset: int, slab: Slab, *, at: int, nbytes: int) -> None:
        """Write `slab[at : at + nbytes]` at `offset`."""
        self.write(offset, slab.view[at : at + nbytes])

    def _write_behind(self, end: int) -> None:
        # on Linux DONTNEED on dirty pages starts their write-back, and on clean ones drops them
        if end - self._started < WRITE_BEHIND_BYTES:
            return
        advise, dontneed = os.posix_fadvise, os.POSIX_FADV_DONTNEED
        advise(self._file, self._started, end - self._started, dontneed)
        advise(self._file, self._dropped, self._started - self._dropped, dontneed)
        self._dropped, self._started = self._started, end


class TorchBinWriter:
    """Write a `pytorch_model*.bin` shard.

    Offsets count through the tensors' data alone, in order.
    """

    def __init__(self, path: Path, *, specs: Sequence[TensorSpec]) -> None:
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self._sizes = [spec.nbytes for spec in specs]
        self._next = self._left = self._position = 0
        self._member: IO[bytes] | None = None
        pickled = encode_state_dict(specs)
        with writing(path):
            self._file = self._partial.open("wb")
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        try:
            with writing(path):
                self._archive.writestr(_member("archive/data.pkl"), pickled)
                self._archive.writestr(_member("archive/byteorder"), "little")
        except BaseException:
            self.abort()
            raise

    def write_slab(self, offset: int, slab: Slab, *, at: int, nbytes: int) -> None:
        """Append `slab[at : at + nbytes]`, which must continue where the last write ended."""
        self.write(offset, slab.view[at : at + nbytes])

    def write(self, offset: int, data: memoryview) -> None:
        """Append `data`, which must continue where the last write ended."""
        if offset != self._position:
            msg = f"{self._path.name} is written in order: at {self._position}, not {offset}"
            raise ValueError(msg)
        self._position += len(data)
        with writing(self._path):
            while len(data):
                if not self._left:
                    self._open_next()
                    continue
                assert self._member is not None
                part = data[: self._left]
                self._member.write(part)
                self._left -= len(part)
                data = data[len(part) :]

    def finish(self) -> int:
        """Make the shard durable, give it its name, and return its size in bytes."""
        with writing(self._path):
            while self._next < len(self._sizes):
                self._open_next()
            self._close_member()
            self._archive.writestr(_member("archive/version"), "3\n")
            self._archive.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            size = self._file.tell()
            self._file.close()
            self._partial.replace(self._path)
        return size

    def abort(self) -> None:
        """Close the unfinished file."""
        # a ZipFile writes its directory when it is collected: give it nowhere to write to
        self._archive.fp = None
        self._member = None
        self._file.close()

    def _open_next(self) -> None:
        self._close_member()
        info = _member(f"archive/data/{self._next}")
        self._left = info.file_size = self._sizes[self._next]
        # the zip64 field that zipfile adds itself is 20 bytes
        head = self._file.tell() + 30 + len(info.filename) + 20
        info.extra = _padding(-head % STORAGE_ALIGNMENT)
        self._member = self._archive.open(info, "w", force_zip64=True)
        self._next += 1

    def _close_member(self) -> None:
        if self._member is not None:
            self._member.close()
            self._member = None


def _member(name: str) -> zipfile.ZipInfo:
    # a fixed date, so that the same input gives the same bytes
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))


def _padding(nbytes: int) -> bytes:
    """Make an extra field of the private kind torch uses, 4 to 67 bytes long."""
    length = nbytes if nbytes >= 4 else nbytes + STORAGE_ALIGNMENT
    return b"FB" + (length - 4).to_bytes(2, "little") + b"Z" * (length - 4)
