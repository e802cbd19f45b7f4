"""torch's zip format, read without torch and without running anything."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch

from streammerge.checkpoint import torch_bin
from streammerge.checkpoint.header import TensorSpec
from streammerge.checkpoint.torch_bin import encode_state_dict, read_torch_bin, storage_class
from streammerge.dtypes import Dtype
from streammerge.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = {
    torch.float64: Dtype.F64,
    torch.float32: Dtype.F32,
    torch.float16: Dtype.F16,
    torch.bfloat16: Dtype.BF16,
    torch.int64: Dtype.I64,
    torch.int32: Dtype.I32,
    torch.int16: Dtype.I16,
    torch.int8: Dtype.I8,
    torch.uint8: Dtype.U8,
    torch.bool: Dtype.BOOL,
}
# torch.save's way of writing one float32 tensor of three elements
STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x03tQ"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def raw_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def assert_reads_equal(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    stored = read_torch_bin(path)
    whole = path.read_bytes()
    assert {t.name for t in stored} == tensors.keys()
    assert [t.offset for t in stored] == sorted(t.offset for t in stored)
    for found in stored:
        expected = tensors[found.name]
        assert found.path == path
        assert found.dtype is DTYPES[expected.dtype]
        assert found.shape == tuple(expected.shape)
        assert whole[found.offset : found.offset + found.nbytes] == raw_bytes(expected)


def write_archive(
    path: Path, data: bytes, *, members: dict[str, bytes] | None = None, compress: bool = False
) -> None:
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in (
            {"archive/data/0": bytes(12)} if members is None else members
        ).items():
            archive.writestr(name, content)


def one_tensor(
    *, size: bytes = b"K\x03\x85", stride: bytes = b"K\x01\x85", offset: bytes = b"K\x00"
) -> bytes:
    """Pickle `{"t": tensor}` with size, stride and offset as pickle code."""
    rebuilt = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + offset + size + stride + b"\x89}tR"
    )
    return b"\x80\x02}X\x01\x00\x00\x00t" + rebuilt + b"s."


def fault_of(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_torch_bin(path)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_reads_as_torch_saved_it(path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.arange(15).reshape(3, 5).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.zeros(0, dtype=dtype),
        "row": torch.ones(1, 7, dtype=dtype),
    }
    torch.save(tensors, path)
    assert_reads_equal(path, tensors)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3), (2, 3, 0), (1, 0), (0, 0)])
def test_tensor_without_elements_reads_as_torch_saved_it(
    path: Path, shape: tuple[int, ...]
) -> None:
    tensors = {"t": torch.zeros(shape)}
    torch.save(tensors, path)
    assert_reads_equal(path, tensors)


def test_state_dict_of_a_module_is_read(path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), path)
    assert_reads_equal(path, dict(module.state_dict()))


def test_parameters_are_read(path: Path) -> None:
    tensors = {"p": torch.nn.Parameter(torch.randn(2, 3)), "q": torch.nn.Parameter(torch.ones(1))}
    torch.save(OrderedDict(tensors), path)
    assert_reads_equal(path, dict(tensors))


def test_shared_storage_is_read_at_one_place(path: Path) -> None:
    tied = torch.randn(4, 3)
    torch.save({"a": tied, "b": tied}, path)
    first, second = read_torch_bin(path)
    assert first.offset == second.offset
    assert_reads_equal(path, {"a": tied, "b": tied})


def test_contiguous_views_are_read_at_their_offset(path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    tensors = {
        "all": whole,
        "rows": whole[2:4],
        "flat": whole.view(-1)[5:9],
        "column": whole[1:2].T,
    }
    torch.save(tensors, path)
    assert_reads_equal(path, tensors)


@pytest.mark.parametrize(
    ("shape", "stride"), [((4, 3), (1, 4)), ((2, 2), (4, 1)), ((3,), (2,)), ((3, 3), (0, 1))]
)
def test_view_that_is_not_contiguous_is_refused(
    path: Path, shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    torch.save({"t": torch.zeros(20).as_strided(shape, stride)}, path)
    fault = fault_of(path)
    assert fault.what == "tensor 't' is not contiguous"
    assert fault.got == f"strides {stride} for shape {shape}"


def test_negated_view_is_not_read_with_the_wrong_sign(path: Path) -> None:
    torch.save({"t": torch._neg_view(torch.ones(3))}, path)
    try:
        (stored,) = read_torch_bin(path)
    except CheckpointError:
        return
    assert path.read_bytes()[stored.offset : stored.offset + 12] == raw_bytes(-torch.ones(3))


class _Attack:
    def __init__(self, target: str) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._target}",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_malicious_pickle_is_refused_and_not_run(path: Path, tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "pwned"
    write_archive(path, pickle.dumps({"t": _Attack(str(target))}, protocol=protocol))
    fault = fault_of(path)
    assert fault.what == ".bin file is not a plain state dict (it asks for posix.system)"
    assert not target.exists()


def test_malicious_object_saved_by_torch_is_refused_and_not_run(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    torch.save({"w": torch.ones(1), "t": _Attack(str(target))}, path)
    fault_of(path)
    assert not target.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "torch.load", "torch._utils._rebuild_tensor", "collections.defaultdict"],
)
def test_global_outside_the_list_is_refused(path: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    write_archive(path, f"c{module}\n{attribute}\n.".encode())
    assert f"it asks for {name}" in fault_of(path).what


def test_legacy_format_is_refused(path: Path) -> None:
    torch.save({"t": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert str(fault_of(path)) == (
        f".bin file is truncated, or in the format of torch < 1.6, in {path}; "
        "download it again, or load and save it once with a current torch"
    )


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -100])
def test_truncated_file_is_refused(path: Path, keep: int) -> None:
    torch.save({"t": torch.ones(200)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert fault_of(path).what == ".bin file is truncated, or in the format of torch < 1.6"


def test_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    assert fault_of(tmp_path / "none").what == "cannot read the file (No such file or directory)"
    assert fault_of(tmp_path).what == "not a regular file"


@pytest.mark.parametrize("value", [[torch.ones(1)], torch.ones(1), 5, None, "x"])
def test_what_is_not_a_state_dict_is_refused(path: Path, value: object) -> None:
    torch.save(value, path)
    assert fault_of(path).what == ".bin file does not hold a state dict"


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ({"step": 5}, "'step': int"),
        ({"optimizer": {"a": torch.ones(1)}}, "'optimizer': dict"),
        ({1: torch.ones(1)}, "1: _Tensor"),
        ({"a\nb": torch.ones(1)}, "'a\\nb': _Tensor"),
    ],
)
def test_state_dict_of_other_things_is_refused(path: Path, value: object, got: str) -> None:
    torch.save(value, path)
    fault = fault_of(path)
    assert fault.what == ".bin file holds something that is not a named tensor"
    assert fault.got == got


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16])
def test_dtype_without_a_legacy_storage_is_refused(path: Path, dtype: torch.dtype) -> None:
    torch.save({"t": torch.zeros(2).to(dtype)}, path)
    assert ".bin file is not a plain state dict" in fault_of(path).what


def test_hand_written_tensor_is_read(path: Path) -> None:
    write_archive(path, one_tensor())
    (stored,) = read_torch_bin(path)
    assert (stored.name, stored.dtype, stored.shape, stored.nbytes) == ("t", Dtype.F32, (3,), 12)


@pytest.mark.parametrize(
    ("size", "offset"),
    [
        (b"K\x04\x85", b"K\x00"),
        (b"K\x03\x85", b"K\x01"),
        (b"K\x03\x85", b"J\xff\xff\xff\xff"),
        (b"J\xff\xff\xff\xff\x85", b"K\x00"),
    ],
)
def test_tensor_beyond_its_storage_is_refused(path: Path, size: bytes, offset: bytes) -> None:
    write_archive(path, one_tensor(size=size, offset=offset))
    assert fault_of(path).what == "tensor 't' reaches beyond its storage"


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        (b"K\x03K\x01\x86", b"K\x01\x85", b"K\x00"),
        (b"K\x03\x85", b")", b"K\x00"),
        (b"X\x01\x00\x00\x003\x85", b"K\x01\x85", b"K\x00"),
        (b"]\x85", b"K\x01\x85", b"K\x00"),
        (b"K\x03\x85", b"K\x01\x85", b"X\x01\x00\x00\x000"),
        (b"N", b"K\x01\x85", b"K\x00"),
        (b"G\x40\x08\x00\x00\x00\x00\x00\x00\x85", b"K\x01\x85", b"K\x00"),
    ],
    ids=[
        "ranks differ",
        "no strides",
        "text size",
        "list size",
        "text offset",
        "no size",
        "float size",
    ],
)
def test_tensor_of_senseless_sizes_is_refused(
    path: Path, size: bytes, stride: bytes, offset: bytes
) -> None:
    write_archive(path, one_tensor(size=size, stride=stride, offset=offset))
    fault_of(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"garbage",
        b"\x80\x02}",
        b"\x80\x02}X\x01\x00\x00\x00ah\x05s.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.",
        b"(X\x07\x00\x00\x00storageK\x01K\x01K\x01K\x01tQ.",
        b"(X\x04\x00\x00\x00filectorch\nFloatStorage\nK\x00K\x00K\x00tQ.",
        b"K\x01Q.",
        b"ctorch\nFloatStorage\n)R.",
    ],
)
def test_damaged_pickle_is_refused(path: Path, data: bytes) -> None:
    write_archive(path, data)
    fault_of(path)


def test_missing_storage_is_refused(path: Path) -> None:
    write_archive(path, one_tensor(), members={})
    assert ".bin file is not a plain state dict" in fault_of(path).what


def test_archive_without_one_pickle_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/version", "3")
    assert fault_of(path).what == ".bin file has no usable data.pkl"
    write_archive(path, one_tensor(), members={"other/data.pkl": b"."})
    assert fault_of(path).what == ".bin file has no usable data.pkl"


def test_huge_pickle_is_not_loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(path, one_tensor())
    monkeypatch.setattr(torch_bin, "_MAX_PICKLE_BYTES", 10)
    assert fault_of(path).what == ".bin file has no usable data.pkl"


def test_byte_order_must_be_little(path: Path) -> None:
    members = {"archive/data/0": bytes(12)}
    write_archive(path, one_tensor(), members={**members, "archive/byteorder": b"little"})
    assert len(read_torch_bin(path)) == 1
    write_archive(path, one_tensor(), members={**members, "archive/byteorder": b"big"})
    assert fault_of(path).what == ".bin file is big-endian"


def test_compressed_storage_is_refused(path: Path) -> None:
    write_archive(path, one_tensor(), compress=True)
    fault = fault_of(path)
    assert fault.what == ".bin file is compressed or encrypted"
    assert fault.where == f"archive/data/0 of {path}"


def set_central_field(path: Path, member: str, position: int, raw: bytes) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    while data[at + 46 : at + 46 + len(member)] != member.encode():
        at = data.index(b"PK\x01\x02", at + 1)
    data[at + position : at + position + len(raw)] = raw
    path.write_bytes(data)


@pytest.mark.parametrize("member", ["archive/data/0", "archive/data.pkl"])
def test_encrypted_member_is_refused(path: Path, member: str) -> None:
    write_archive(path, one_tensor())
    set_central_field(path, member, 8, b"\x01\x00")
    fault_of(path)


@pytest.mark.parametrize("method", [8, 12, 99])
def test_pickle_that_lies_about_its_compression_is_refused(path: Path, method: int) -> None:
    write_archive(path, one_tensor())
    set_central_field(path, "archive/data.pkl", 10, struct.pack("<H", method))
    fault_of(path)


def test_damaged_local_header_is_refused(path: Path) -> None:
    write_archive(path, one_tensor())
    data = path.read_bytes()
    at = zipfile.ZipFile(io.BytesIO(data)).getinfo("archive/data/0").header_offset
    path.write_bytes(data[:at] + b"XX" + data[at + 2 :])
    fault = fault_of(path)
    assert fault.what == ".bin file has a damaged local header"
    assert fault.where == f"archive/data/0 of {path}"


@pytest.mark.parametrize(("kind", "dtype"), DTYPES.items())
def test_storage_class_is_the_one_that_torch_pickles(
    path: Path, kind: torch.dtype, dtype: Dtype
) -> None:
    torch.save({"t": torch.zeros(1, dtype=kind)}, path)
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        assert f"ctorch\n{storage_class(dtype, name='t')}\n".encode() in archive.read(name)


def test_storage_class_refuses_what_the_format_lacks() -> None:
    for dtype in set(Dtype) - set(DTYPES.values()):
        with pytest.raises(UnsupportedError) as caught:
            storage_class(dtype, name="t")
        assert str(caught.value) == (
            f"tensor 't' cannot be stored in the legacy format; got {dtype.value}; "
            "set export_legacy_format: false"
        )


def test_encoded_state_dict_of_nothing_is_exact() -> None:
    assert encode_state_dict([]) == b"\x80\x02ccollections\nOrderedDict\n)R(u."


@pytest.mark.parametrize("shape", [(), (1,), (255, 256), (0, 3), (2, 0, 3), (1 << 40, 3)])
def test_encoded_state_dict_describes_its_tensors(shape: tuple[int, ...]) -> None:
    spec = TensorSpec("näme", Dtype.BF16, shape)
    unpickler = torch_bin._StateDictUnpickler(io.BytesIO(encode_state_dict([spec])))
    ((name, tensor),) = unpickler.load().items()
    assert name == "näme"
    assert (tensor.storage.dtype, tensor.storage.key) == (Dtype.BF16, "0")
    assert (tensor.offset, tensor.shape) == (0, shape)
    assert tensor.storage.numel == spec.nbytes // 2


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\x80\x02}N" + b"\x85" * 100_000 + b"Ns.", "nested too deep"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "memo index beyond its size"),
        (b"\x80\x02\x85.", "malformed"),
        (b"\x80\x02(u.", "malformed"),
        (b"\x80\x02)bu.", "malformed"),
    ],
    ids=["depth", "memo", "empty stack", "no mapping", "mark alone"],
)
def test_pickle_that_would_harm_the_process_is_not_loaded(
    tmp_path: Path, raw: bytes, reason: str
) -> None:
    path = tmp_path / "pytorch_model.bin"
    write_archive(path, raw)
    with pytest.raises(CheckpointError, match=reason):
        read_torch_bin(path)
