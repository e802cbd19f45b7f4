"""Shards as written: exact bytes, a temporary name until they are safe, torch reads the legacy
ones.
"""

from __future__ import annotations

import errno
import os
import zipfile
from pathlib import Path

import pytest
import torch

from streammerge.checkpoint import writer as writer_module
from streammerge.checkpoint.header import TensorSpec, encode_header
from streammerge.checkpoint.slab import Slab
from streammerge.checkpoint.torch_bin import read_torch_bin
from streammerge.checkpoint.writer import (
    SafetensorsWriter,
    ShardWriter,
    TorchBinWriter,
    writing,
)
from streammerge.dtypes import Dtype
from streammerge.errors import DiskSpaceError, ResourceError, UnsupportedError

TORCH = {
    Dtype.F64: torch.float64,
    Dtype.F32: torch.float32,
    Dtype.F16: torch.float16,
    Dtype.BF16: torch.bfloat16,
    Dtype.I64: torch.int64,
    Dtype.I32: torch.int32,
    Dtype.I16: torch.int16,
    Dtype.I8: torch.int8,
    Dtype.U8: torch.uint8,
    Dtype.BOOL: torch.bool,
}
HEAD, _ = encode_header([TensorSpec("a", Dtype.U8, (10,))])


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def raw_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def write_bin(path: Path, tensors: dict[str, torch.Tensor], *, chunk: int) -> int:
    kinds = {value: key for key, value in TORCH.items()}
    specs = [TensorSpec(name, kinds[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    data = b"".join(raw_bytes(tensor) for tensor in tensors.values())
    writer = TorchBinWriter(path, specs=specs)
    for at in range(0, len(data), chunk):
        writer.write(at, memoryview(data)[at : at + chunk])
    return writer.finish()


@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_safetensors_shard_holds_the_expected_bytes(tmp_path: Path, chunk: int) -> None:
    path, data = tmp_path / "m.safetensors", b"0123456789"
    writer = SafetensorsWriter(path, head=HEAD)
    for at in range(0, 10, chunk):
        writer.write(len(HEAD) + at, memoryview(data)[at : at + chunk])
    assert writer.finish() == len(HEAD) + 10
    assert path.read_bytes() == HEAD + data


@pytest.mark.parametrize("layout", ["safetensors", "torch_bin"])
@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_slabs_are_written_as_their_bytes_are(tmp_path: Path, layout: str, chunk: int) -> None:
    specs = [TensorSpec("a", Dtype.U8, (4,)), TensorSpec("b", Dtype.U8, (6,))]
    head, _ = encode_header(specs)
    data, start = b"0123456789", len(head) if layout == "safetensors" else 0
    writers: dict[str, ShardWriter] = {
        name: SafetensorsWriter(tmp_path / name, head=head)
        if layout == "safetensors"
        else TorchBinWriter(tmp_path / name, specs=specs)
        for name in ("slabs", "views")
    }
    slab = Slab(10)
    for offset in range(0, 10, chunk):
        part = data[offset : offset + chunk]
        at = slab.place(start + offset)
        slab.view[at : at + len(part)] = part
        writers["slabs"].write_slab(start + offset, slab, at=at, nbytes=len(part))
        writers["slabs"].write_slab(start + offset + len(part), slab, at=at, nbytes=0)
    views = writers["views"]
    assert isinstance(views, (SafetensorsWriter, TorchBinWriter))
    views.write(start, memoryview(data))
    sizes = {writer.finish() for writer in writers.values()}
    assert (tmp_path / "slabs").read_bytes() == (tmp_path / "views").read_bytes()
    assert sizes == {(tmp_path / "slabs").stat().st_size}


def test_shard_has_its_temporary_name_until_it_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    writer = SafetensorsWriter(path, head=HEAD)
    writer.write(len(HEAD), memoryview(bytes(10)))
    assert names(tmp_path) == ["m.safetensors.partial"]
    writer.finish()
    assert names(tmp_path) == ["m.safetensors"]


def test_aborted_shard_keeps_its_temporary_name_and_no_descriptor(tmp_path: Path) -> None:
    before = open_files()
    SafetensorsWriter(tmp_path / "m.safetensors", head=HEAD).abort()
    writer = TorchBinWriter(tmp_path / "m.bin", specs=[TensorSpec("a", Dtype.U8, (10,))])
    writer.write(0, memoryview(b"01234"))
    writer.abort()
    assert names(tmp_path) == ["m.bin.partial", "m.safetensors.partial"]
    assert open_files() == before


def test_older_temporary_file_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors.partial").write_bytes(bytes(100_000))
    writer = SafetensorsWriter(tmp_path / "m.safetensors", head=HEAD)
    assert writer.finish() == len(HEAD)


def test_finished_shard_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    SafetensorsWriter(path, head=HEAD).finish()
    assert path.read_bytes() == HEAD


def test_writer_goes_on_after_a_short_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pwrite

    def short(file: int, data: memoryview, offset: int) -> int:
        return whole(file, data[:7], offset)

    monkeypatch.setattr(os, "pwrite", short)
    writer = SafetensorsWriter(tmp_path / "m.safetensors", head=HEAD)
    writer.write(len(HEAD), memoryview(b"0123456789"))
    writer.finish()
    assert (tmp_path / "m.safetensors").read_bytes() == HEAD + b"0123456789"


def test_write_back_starts_behind_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = []
    monkeypatch.setattr(writer_module, "WRITE_BEHIND_BYTES", 1000)
    writer = SafetensorsWriter(tmp_path / "m.safetensors", head=bytes(500))
    monkeypatch.setattr(
        os,
        "posix_fadvise",
        lambda _file, start, size, _advice: ranges.append((start, size)),
    )
    writer.write(500, memoryview(bytes(400)))
    assert ranges == []
    writer.write(900, memoryview(bytes(200)))
    writer.write(1100, memoryview(bytes(1000)))
    assert ranges == [(0, 1100), (0, 0), (1100, 1000), (0, 1100)]
    writer.finish()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_a_disk_space_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_args: object) -> int:
        raise OSError(code, os.strerror(code))

    path = tmp_path / "m.safetensors"
    writer = SafetensorsWriter(path, head=HEAD)
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(DiskSpaceError) as caught:
        writer.write(len(HEAD), memoryview(bytes(10)))
    writer.abort()
    assert caught.value.exit_code == 4
    assert str(caught.value) == (
        f"no space for the output ({os.strerror(code)}), in {path}; "
        "free some space, or set export_dir on another disk, and run again"
    )
    assert not path.exists()


def test_full_disk_at_the_header_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = open_files()
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(DiskSpaceError):
        SafetensorsWriter(tmp_path / "m.safetensors", head=HEAD)
    assert open_files() == before


def test_other_write_faults_are_resource_errors(tmp_path: Path) -> None:
    path = tmp_path / "none" / "m.safetensors"
    with pytest.raises(ResourceError) as caught:
        SafetensorsWriter(path, head=HEAD)
    assert type(caught.value) is ResourceError
    assert str(caught.value) == f"cannot write (No such file or directory), in {path}"
    with pytest.raises(ResourceError, match="cannot write"):
        TorchBinWriter(tmp_path / "none" / "m.bin", specs=[])


def test_writing_lets_other_errors_through(tmp_path: Path) -> None:
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError


@pytest.mark.parametrize("dtype", TORCH.values())
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_torch_loads_every_dtype_equal(tmp_path: Path, dtype: torch.dtype, chunk: int) -> None:
    path = tmp_path / "m.bin"
    tensors = {
        "first.empty": torch.zeros(0, 3, dtype=dtype),
        "matrix": torch.arange(-7, 8).reshape(3, 5).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "between.empty": torch.zeros(2, 0, 3, dtype=dtype),
        "wide": torch.arange(300).to(dtype),
        "last.empty": torch.zeros(0, dtype=dtype),
    }
    assert write_bin(path, tensors, chunk=chunk) == path.stat().st_size
    for mapped in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert list(loaded) == list(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert loaded[name].shape == tensor.shape
            assert loaded[name].is_contiguous()
            assert torch.equal(loaded[name], tensor)


def test_legacy_shard_is_a_sound_zip_with_aligned_storages(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    tensors = {f"t{n}": torch.arange(n, dtype=torch.uint8) for n in range(1, 130, 9)}
    write_bin(path, tensors, chunk=11)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [
            "archive/data.pkl",
            "archive/byteorder",
            *(f"archive/data/{number}" for number in range(len(tensors))),
            "archive/version",
        ]
        assert archive.read("archive/byteorder") == b"little"
        assert archive.read("archive/version") == b"3\n"
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    for stored in read_torch_bin(path):
        assert stored.offset % 64 == 0
        assert path.read_bytes()[stored.offset :][: stored.nbytes] == raw_bytes(
            tensors[stored.name]
        )


def test_legacy_shard_without_tensors_loads(tmp_path: Path) -> None:
    write_bin(tmp_path / "m.bin", {}, chunk=1)
    assert torch.load(tmp_path / "m.bin", weights_only=True) == {}


def test_same_tensors_give_the_same_legacy_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(9), "b": torch.ones(3, dtype=torch.bfloat16)}
    write_bin(tmp_path / "one.bin", tensors, chunk=5)
    write_bin(tmp_path / "two.bin", tensors, chunk=64)
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()


def test_legacy_shard_has_its_temporary_name_until_it_is_finished(tmp_path: Path) -> None:
    writer = TorchBinWriter(tmp_path / "m.bin", specs=[TensorSpec("a", Dtype.U8, (2,))])
    writer.write(0, memoryview(b"ab"))
    assert names(tmp_path) == ["m.bin.partial"]
    writer.finish()
    assert names(tmp_path) == ["m.bin"]


def test_legacy_shard_is_written_in_order(tmp_path: Path) -> None:
    writer = TorchBinWriter(tmp_path / "m.bin", specs=[TensorSpec("a", Dtype.U8, (9,))])
    writer.write(0, memoryview(b"abc"))
    with pytest.raises(ValueError, match=r"m\.bin is written in order: at 3, not 4"):
        writer.write(4, memoryview(b"d"))
    writer.abort()


def test_legacy_shard_refuses_a_dtype_without_storage_class(tmp_path: Path) -> None:
    before = open_files()
    with pytest.raises(UnsupportedError, match="tensor 'a' cannot be stored in the legacy format"):
        TorchBinWriter(tmp_path / "m.bin", specs=[TensorSpec("a", Dtype.F8_E4M3, (9,))])
    assert open_files() == before
