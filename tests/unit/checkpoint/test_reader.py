"""Every way of reading gives the same bytes, and a short file is an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

import pytest

from streammerge.checkpoint.direct import DirectReader
from streammerge.checkpoint.header import StoredTensor
from streammerge.checkpoint.reader import (
    BufferedReader,
    MappedReader,
    ReaderPool,
    open_reader,
    read_failing,
)
from streammerge.checkpoint.slab import FRONT_BYTES, PAGE, Slab
from streammerge.config.tuning import FileMode
from streammerge.dtypes import Dtype
from streammerge.errors import CheckpointError

MODES: tuple[FileMode, ...] = get_args(FileMode)
DATA = bytes(i * 7 % 251 for i in range(4096 * 3 + 17))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "data"
    file.write_bytes(DATA)
    return file


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 1), (0, len(DATA)), (1, 4096), (4095, 2), (4096, 4096), (8192, 4113), (len(DATA) - 1, 1)],
)
def test_read_fills_the_buffer(path: Path, mode: FileMode, offset: int, size: int) -> None:
    buffer = bytearray(b"\xaa" * (size + 2))
    reader = open_reader(path, mode=mode)
    for _ in range(2):
        reader.read_into(offset, memoryview(buffer)[1:-1])
        reader.forget(offset, size)
    reader.close()
    assert buffer == b"\xaa" + DATA[offset : offset + size] + b"\xaa"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [4096, 4097])
def test_empty_tensor_at_the_end_of_a_file_is_read(
    tmp_path: Path, mode: FileMode, size: int
) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(size))
    with ReaderPool(mode=mode) as pool:
        pool.read_tensor(StoredTensor("t", Dtype.F32, (0,), path, size), memoryview(bytearray()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("offset", "size"), [(0, len(DATA) + 1), (len(DATA) - 1, 2), (len(DATA) + 9, 1)]
)
def test_read_beyond_the_end_is_truncated(
    path: Path, mode: FileMode, offset: int, size: int
) -> None:
    reader = open_reader(path, mode=mode)
    with pytest.raises(CheckpointError) as caught:
        reader.read_into(offset, memoryview(bytearray(size)))
    reader.close()
    assert caught.value.what == "file is truncated"
    assert caught.value.where == str(path)
    assert caught.value.expected == f"at least {offset + size} bytes"


@pytest.mark.parametrize("mode", MODES)
def test_file_cut_after_it_was_opened_is_truncated(path: Path, mode: FileMode) -> None:
    reader = open_reader(path, mode=mode)
    os.truncate(path, 5000)
    buffer = bytearray(5000)
    reader.read_into(0, memoryview(buffer))
    assert buffer == DATA[:5000]
    with pytest.raises(CheckpointError, match=r"file is truncated, .*got 5000"):
        reader.read_into(4000, memoryview(bytearray(4000)))
    reader.close()


def test_buffered_reader_goes_on_after_a_short_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.preadv

    def short(file: int, buffers: list[memoryview], offset: int) -> int:
        return whole(file, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", short)
    buffer = bytearray(5555)
    reader = BufferedReader(path)
    reader.read_into(3, memoryview(buffer))
    reader.close()
    assert buffer == DATA[3:5558]


def test_device_fault_is_a_checkpoint_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> int:
        raise OSError(5, "Input/output error")

    reader = BufferedReader(path)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError) as caught:
        reader.read_into(7, memoryview(bytearray(1)))
    reader.close()
    assert str(caught.value) == f"cannot read (Input/output error), in {path} at byte 7"


def test_each_mode_has_its_reader(path: Path) -> None:
    assert MODES == ("direct", "buffered", "mmap")
    for mode, kind in zip(MODES, (DirectReader, BufferedReader, MappedReader), strict=True):
        reader = open_reader(path, mode=mode)
        assert type(reader) is kind
        reader.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 1), (0, 0), (0, len(DATA)), (1, 4096), (4095, 2), (8192, 4113), (len(DATA) - 1, 1)],
)
@pytest.mark.parametrize("place", [0, 1, PAGE - 1])
def test_read_fills_a_slab(path: Path, mode: FileMode, offset: int, size: int, place: int) -> None:
    slab = Slab(len(DATA))
    at = FRONT_BYTES + place
    slab.view[:at] = b"\xaa" * at
    reader = open_reader(path, mode=mode)
    for _ in range(2):
        reader.read_slab(offset, slab, at=at, nbytes=size)
        assert slab.view[at : at + size] == DATA[offset : offset + size]
        assert slab.view[:at] == b"\xaa" * at
        reader.forget(offset, size)
    reader.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("offset", "size"), [(0, len(DATA) + 1), (len(DATA) - 1, 2), (len(DATA) + 9, 1)]
)
def test_a_slab_filled_beyond_the_end_is_truncated(
    path: Path, mode: FileMode, offset: int, size: int
) -> None:
    reader = open_reader(path, mode=mode)
    with pytest.raises(CheckpointError) as caught:
        reader.read_slab(offset, Slab(size), at=FRONT_BYTES, nbytes=size)
    reader.close()
    assert caught.value.what == "file is truncated"
    assert caught.value.where == str(path)
    assert caught.value.expected == f"at least {offset + size} bytes"


def test_a_fault_says_where_it_was() -> None:
    error = read_failing(Path("file"), 12, OSError(5, "Input/output error"))
    assert str(error) == "cannot read (Input/output error), in file at byte 12"


@pytest.mark.parametrize("mode", MODES)
def test_missing_file_cannot_be_opened(tmp_path: Path, mode: FileMode) -> None:
    with pytest.raises(CheckpointError, match="cannot open the file"):
        open_reader(tmp_path / "none", mode=mode)


def test_empty_file_cannot_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="cannot open the file"):
        open_reader(tmp_path / "empty", mode="mmap")


@pytest.mark.parametrize("mode", MODES)
def test_pool_opens_a_file_once_and_closes_all(path: Path, tmp_path: Path, mode: FileMode) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"0123456789")
    before = open_files()
    with ReaderPool(mode=mode) as pool:
        assert pool.reader(path) is pool.reader(path)
        assert pool.reader(path) is not pool.reader(other)
        buffer = bytearray(8)
        pool.read_tensor(StoredTensor("t", Dtype.I16, (2, 2), other, 1), memoryview(buffer))
        assert buffer == b"12345678"
    assert open_files() == before
