"""PyTorch's zip format (`pytorch_model*.bin`), read without torch and written as a stream.

A file is a zip archive of uncompressed members: `<root>/data.pkl`, a pickle that describes tensors,
and `<root>/data/<key>`, one storage each. The reader answers the pickle's globals from a closed
list of inert stand-ins, so no code of the file or of torch runs, and yields places in the file; the
bytes are then streamed like those of a safetensors shard.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.checkpoint.header import StoredTensor
from streammerge.checkpoint.jsonfile import check_regular
from streammerge.checkpoint.pickle_check import check_pickle
from streammerge.dtypes import Dtype
from streammerge.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from streammerge.checkpoint.header import TensorSpec

__all__ = ["STORAGE_ALIGNMENT", "encode_state_dict", "read_torch_bin", "storage_class"]

STORAGE_ALIGNMENT = 64  # as torch.save aligns its storages
_MAX_PICKLE_BYTES = 100_000_000
_STORAGES = {
    "DoubleStorage": Dtype.F64,
    "FloatStorage": Dtype.F32,
    "HalfStorage": Dtype.F16,
    "BFloat16Storage": Dtype.BF16,
    "LongStorage": Dtype.I64,
    "IntStorage": Dtype.I32,
    "ShortStorage": Dtype.I16,
    "CharStorage": Dtype.I8,
    "ByteStorage": Dtype.U8,
    "BoolStorage": Dtype.BOOL,
}
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items()}


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: Dtype
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _OrderedDict(OrderedDict[str, Any]):
    """Stands in for the pickled state dict, without the `_metadata` that torch adds."""

    def __setstate__(self, state: object) -> None:
        pass


def _rebuild_tensor(
    storage: _Storage, offset: int, size: Any, stride: Any, *rest: object
) -> _Tensor:
    # after requires_grad and hooks comes metadata: bits that say conjugated or negated
    if len(rest) > 2 and rest[2]:
        msg = "a tensor of it is a conjugated or negated view"
        raise pickle.UnpicklingError(msg)
    if not all(type(number) is int for number in (offset, *size, *stride)):
        msg = "a shape of it is not of whole numbers"
        raise pickle.UnpicklingError(msg)
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(data: _Tensor, *_ignored: object) -> _Tensor:
    return data


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _StateDictUnpickler(pickle.Unpickler):
    """Resolve nothing but the inert stand-ins of `_GLOBALS`."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, numel = pid
        if kind != "storage" or not isinstance(dtype, Dtype) or not isinstance(numel, int):
            raise pickle.UnpicklingError("its storages are not of a known kind")
        return _Storage(dtype, str(key), numel)


def read_torch_bin(path: Path) -> list[StoredTensor]:
    """List the tensors of a zip-format `.bin` file, in the order of their bytes.

    Raises:
        CheckpointError: The file is damaged, hostile, in the format of torch < 1.6, or holds a
            tensor
            that is not contiguous.
    """
    try:
        check_regular(path, error=CheckpointError)
        stored = _read_archive(path)
    except OSError as error:
        raise CheckpointError(f"cannot read the file ({error.strerror})", where=path) from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            ".bin file is truncated, or in the format of torch < 1.6",
            where=path,
            hint="download it again, or load and save it once with a current torch",
        ) from error
    except Exception as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f".bin file is not a plain state dict ({error})",
            where=path,
            hint="load it with torch.load(weights_only=True) and save it as safetensors",
        ) from error
    return sorted(stored, key=lambda tensor: tensor.offset)


def _read_archive(path: Path) -> list[StoredTensor]:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1 or members[pickles[0]].file_size > _MAX_PICKLE_BYTES:
            raise CheckpointError(".bin file has no usable data.pkl", where=path)
        root = pickles[0].removesuffix("data.pkl")
        order = members.get(root + "byteorder")
        if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
            raise CheckpointError(".bin file is big-endian", where=path)
        raw = archive.read(pickles[0])
        check_pickle(raw)
        state = _StateDictUnpickler(io.BytesIO(raw)).load()
        found = _named_tensors(state, path=path)
        places = {
            key: _data_offset(file, members, f"{root}data/{key}", path)
            for key in {tensor.storage.key for tensor in found.values()}
        }
        return [_place(name, tensor, places, path) for name, tensor in found.items()]


def _named_tensors(state: object, *, path: Path) -> dict[str, _Tensor]:
    if not isinstance(state, dict):
        raise CheckpointError(".bin file does not hold a state dict", where=path)
    for name, value in state.items():
        if not isinstance(name, str) or not name.isprintable() or not isinstance(value, _Tensor):
            raise CheckpointError(
                ".bin file holds something that is not a named tensor",
                where=path,
                got=f"{name!r}: {type(value).__name__}"[:120],
                hint="a training checkpoint? Save the model's state dict alone",
            )
    return dict(state)


def _data_offset(
    file: io.BufferedReader, members: dict[str, zipfile.ZipInfo], name: str, path: Path
) -> tuple[int, int]:
    """Offset and size of an uncompressed member's data."""
    info = members[name]
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise CheckpointError(".bin file is compressed or encrypted", where=f"{name} of {path}")
    file.seek(info.header_offset)
    local = file.read(30)
    signature, name_length, extra_length = local[:4], *struct.unpack("<HH", local[26:30])
    if signature != b"PK\x03\x04":
        raise CheckpointError(".bin file has a damaged local header", where=f"{name} of {path}")
    return info.header_offset + 30 + name_length + extra_length, info.file_size


def _place(
    name: str, tensor: _Tensor, places: dict[str, tuple[int, int]], path: Path
) -> StoredTensor:
    dtype, expected_stride = tensor.storage.dtype, 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if tensor.shape.count(0) == 0 and size != 1 and stride != expected_stride:
            raise CheckpointError(
                f"tensor '{name}' is not contiguous",
                where=path,
                got=f"strides {tensor.stride} for shape {tensor.shape}",
                hint="load it with torch.load and save it as safetensors",
            )
        expected_stride *= size
    start, size = places[tensor.storage.key]
    begin = tensor.offset * dtype.item_bytes
    end = begin + dtype.nbytes(prod(tensor.shape))
    if tensor.offset < 0 or any(n < 0 for n in tensor.shape) or end > size:
        raise CheckpointError(
            f"tensor '{name}' reaches beyond its storage",
            where=path,
            expected=f"at most {size} bytes",
            got=end,
        )
    return StoredTensor(name, dtype, tensor.shape, path, start + begin)


def storage_class(dtype: Dtype, *, name: str) -> str:
    """Name torch's storage class for a dtype.

    Raises:
        UnsupportedError: The legacy format has no storage class for it.
    """
    try:
        return _STORAGE_NAMES[dtype]
    except KeyError:
        raise UnsupportedError(
            f"tensor '{name}' cannot be stored in the legacy format",
            got=dtype.value,
            hint="set export_legacy_format: false",
        ) from None


def encode_state_dict(specs: Sequence[TensorSpec]) -> bytes:
    """Encode `data.pkl`: an OrderedDict of tensors, tensor i in storage `data/i`.

    Written by hand in pickle protocol 2, because pickling torch's own objects needs their data.
    """
    out = io.BytesIO()
    write = out.write

    def text(value: str) -> None:
        raw = value.encode()
        write(b"X" + struct.pack("<I", len(raw)) + raw)

    def integer(value: int) -> None:
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        write(b"\x8a" + bytes([len(raw)]) + raw)

    def integers(values: Sequence[int]) -> None:
        write(b"(")
        for value in values:
            integer(value)
        write(b"t")

    empty_dict: Callable[[], int] = lambda: write(b"ccollections\nOrderedDict\n)R")  # noqa: E731
    write(b"\x80\x02")
    empty_dict()
    write(b"(")
    for number, spec in enumerate(specs):
        text(spec.name)
        write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
        text("storage")
        write(b"ctorch\n" + storage_class(spec.dtype, name=spec.name).encode() + b"\n")
        text(str(number))
        text("cpu")
        integer(prod(spec.shape))
        write(b"tQ")
        integer(0)
        integers(spec.shape)
        integers([prod(spec.shape[axis + 1 :]) for axis in range(len(spec.shape))])
        write(b"\x89")
        empty_dict()
        write(b"tR")
    write(b"u.")
    return out.getvalue()
