"""The safetensors header: a bounded, suspicious parser and a byte-exact encoder.

A file is `u64 little-endian N`, N bytes of JSON (may end in spaces), then the data. Every tensor's
`data_offsets` are relative to the end of the header. The parser takes nothing on trust: lengths,
JSON types, names, dtype times shape, overlaps, holes, and the size of the file itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.checkpoint.jsonfile import check_regular
from streammerge.dtypes import Dtype
from streammerge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from streammerge.checkpoint.reader import ReadableFile

__all__ = [
    "DATA_ALIGNMENT",
    "MAX_HEADER_BYTES",
    "StoredTensor",
    "TensorSpec",
    "encode_header",
    "parse_header",
    "read_header",
]

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
MAX_NDIM = 64
# data starts on a page, so that direct I/O and mappings of the data need no shift
DATA_ALIGNMENT = 4096
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is, apart from where it is."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return self.dtype.nbytes(prod(self.shape))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A contiguous tensor in a file: safetensors shards and zip-format `.bin` files alike."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    """First byte, counted from the start of the file."""

    @property
    def file(self) -> ReadableFile:
        """What a reader opens, and finds its bytes in from `offset` on."""
        return self.path

    @property
    def stored_bytes(self) -> int:
        """Bytes that are read for it."""
        return self.nbytes

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that its bytes depend on."""
        return (self.path,)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return self.dtype.nbytes(prod(self.shape))


def read_header(path: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """Read and check the header of one safetensors file.

    Returns:
        The tensors in the order of their bytes, and `__metadata__`.

    Raises:
        CheckpointError: The file is truncated, too long, or its header is not sound.
    """
    try:
        check_regular(path, error=CheckpointError)
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            length_field = file.read(_LENGTH_BYTES)
            if len(length_field) < _LENGTH_BYTES:
                raise CheckpointError(
                    "shard is truncated",
                    where=path,
                    expected="at least 8 bytes",
                    got=f"{file_bytes}",
                    hint="download or copy the file again",
                )
            length = int.from_bytes(length_field, "little")
            _check_length(path, length=length, file_bytes=file_bytes)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read the shard ({error.strerror})", where=path) from error
    return parse_header(raw, path=path, file_bytes=file_bytes)


def parse_header(
    raw: bytes, *, path: Path, file_bytes: int
) -> tuple[list[StoredTensor], dict[str, str]]:
    """Parse the JSON of a header and check it against the size of its file.

    Args:
        raw: The header's bytes, without the length field.
        path: The file, for messages and for the returned tensors.
        file_bytes: Size of the whole file.

    Returns:
        The tensors in the order of their bytes, and `__metadata__`.

    Raises:
        CheckpointError: Anything at all is wrong; the message names the tensor.
    """
    entries = _load_json(raw, path=path)
    metadata = _check_metadata(entries.pop("__metadata__", None), path=path)
    data_start = _LENGTH_BYTES + len(raw)
    tensors = [_parse_entry(name, entry, path, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.offset + tensor.nbytes))
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            fault = (
                "overlaps the tensor before it" if tensor.offset < position else "follows a hole"
            )
            raise CheckpointError(
                f"header lies about offsets: tensor '{tensor.name}' {fault}",
                where=path,
                expected=f"data_offsets to begin at {position - data_start}",
                got=f"{tensor.offset - data_start}",
                hint="download or copy the file again",
            )
        position += tensor.nbytes
    if position != file_bytes:
        what = "shard is truncated" if file_bytes < position else "shard has bytes after its data"
        raise CheckpointError(
            what,
            where=path,
            expected=f"{position} bytes",
            got=f"{file_bytes}",
            hint="download or copy the file again",
        )
    return tensors, metadata


def encode_header(
    specs: Sequence[TensorSpec], *, alignment: int = DATA_ALIGNMENT
) -> tuple[bytes, list[int]]:
    """Encode the length field and the JSON of a shard that holds `specs` in this order.

    Returns:
        The bytes up to the data, a multiple of `alignment`, and each tensor's offset in the file.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    starts = []
    for spec in specs:
        end = position + spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype.value,
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        starts.append(position)
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    padding = -(_LENGTH_BYTES + len(text)) % alignment
    raw = text + b" " * padding
    head = len(raw).to_bytes(_LENGTH_BYTES, "little") + raw
    return head, [len(head) + start for start in starts]


def _check_length(path: Path, *, length: int, file_bytes: int) -> None:
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            "header is too long",
            where=path,
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            got=length,
            hint="the file is not safetensors, or it is damaged",
        )
    if _LENGTH_BYTES + length > file_bytes:
        raise CheckpointError(
            "shard is truncated: its header does not fit",
            where=path,
            expected=f"at least {_LENGTH_BYTES + length} bytes",
            got=file_bytes,
            hint="download or copy the file again",
        )


def _load_json(raw: bytes, *, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise CheckpointError(f"header holds '{name}' twice", where=path)
            found[name] = value
        return found

    if not raw.startswith(b"{"):
        raise CheckpointError("header is not a JSON object", where=path)
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError("header is not valid JSON", where=path, got=error) from error
    return dict(entries)


def _check_metadata(metadata: object, *, path: Path) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            "header's __metadata__ is not a map of strings", where=path, got=repr(metadata)[:80]
        )
    return metadata


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _parse_entry(name: str, entry: object, path: Path, data_start: int) -> StoredTensor:
    if not name or not name.isprintable():
        raise CheckpointError("header holds an unprintable tensor name", where=path, got=repr(name))
    where = f"tensor '{name}' of {path}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            "header entry is malformed",
            where=where,
            expected="dtype, shape and data_offsets",
            got=repr(entry)[:80],
        )
    try:
        dtype = Dtype[entry["dtype"]]
    except (KeyError, TypeError):
        raise CheckpointError(
            "unknown dtype", where=where, expected=_dtype_names(), got=repr(entry["dtype"])[:40]
        ) from None
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > MAX_NDIM or not all(map(_is_count, shape)):
        raise CheckpointError("bad shape", where=where, got=repr(shape)[:80])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError("bad data_offsets", where=where, got=repr(offsets)[:80])
    begin, end = offsets
    try:
        nbytes = dtype.nbytes(prod(shape))
    except ValueError as error:
        raise CheckpointError(str(error), where=where) from error
    if end - begin != nbytes:
        raise CheckpointError(
            "header lies about offsets: dtype times shape is not the size of the data",
            where=where,
            expected=f"{nbytes} bytes for {dtype.value} {tuple(shape)}",
            got=f"data_offsets [{begin}, {end}]",
        )
    return StoredTensor(name, dtype, tuple(shape), path, data_start + begin)


def _dtype_names() -> str:
    return "one of " + ", ".join(dtype.value for dtype in Dtype)
