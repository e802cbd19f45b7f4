"""The safetensors header: what is sound is read, and everything else is a CheckpointError."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from streammerge.checkpoint import header as header_module
from streammerge.checkpoint.header import (
    MAX_HEADER_BYTES,
    StoredTensor,
    TensorSpec,
    encode_header,
    parse_header,
    read_header,
)
from streammerge.dtypes import Dtype
from streammerge.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


def entry(shape: Any = (2,), begin: Any = 0, end: Any = 8, dtype: Any = "F32") -> dict[str, Any]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def fault_of(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert caught.value.exit_code == 3
    assert len(str(caught.value).splitlines()) == 1
    assert path.name in str(caught.value)
    return caught.value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.safetensors"


def test_tensors_come_in_the_order_of_their_bytes(path: Path) -> None:
    header = {"b": entry(begin=8, end=16), "__metadata__": {"k": "v"}, "a": entry()}
    write(path, header, bytes(16))
    start = path.stat().st_size - 16
    assert read_header(path) == (
        [
            StoredTensor("a", Dtype.F32, (2,), path, start),
            StoredTensor("b", Dtype.F32, (2,), path, start + 8),
        ],
        {"k": "v"},
    )


@pytest.mark.parametrize("dtype", list(Dtype))
def test_every_dtype_of_the_format_is_read(path: Path, dtype: Dtype) -> None:
    size = dtype.nbytes(8)
    write(path, {"t": entry((8,), 0, size, dtype.value)}, bytes(size))
    (tensor,), _ = read_header(path)
    assert (tensor.dtype, tensor.nbytes) == (dtype, size)


def test_scalar_and_empty_tensors_are_read(path: Path) -> None:
    header = {"e": entry((2, 0, 3), 0, 0), "s": entry((), 0, 4), "z": entry((0,), 4, 4)}
    tensors = read_header(write(path, header, bytes(4)))[0]
    assert [(t.name, t.nbytes) for t in tensors] == [
        ("e", 0),
        ("s", 4),
        ("z", 0),
    ]


def test_header_padded_with_spaces_is_read(path: Path) -> None:
    raw = json.dumps({"t": entry()}).encode() + b"   "
    (tensor,), metadata = read_header(write(path, raw, bytes(8)))
    assert tensor.offset == 8 + len(raw)
    assert metadata == {}


def test_null_metadata_is_none(path: Path) -> None:
    assert read_header(write(path, {"__metadata__": None, "t": entry()}, bytes(8)))[1] == {}


@pytest.mark.parametrize("size", range(8))
def test_file_shorter_than_the_length_field_is_truncated(path: Path, size: int) -> None:
    path.write_bytes(bytes(size))
    assert str(fault_of(path)) == (
        f"shard is truncated, in {path}; expected at least 8 bytes; got {size}; "
        "download or copy the file again"
    )


def test_header_beyond_the_end_is_truncated(path: Path) -> None:
    path.write_bytes((100).to_bytes(8, "little") + b"{}")
    fault = fault_of(path)
    assert fault.what == "shard is truncated: its header does not fit"
    assert (fault.expected, fault.got) == ("at least 108 bytes", "10")


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 63, (1 << 64) - 1])
def test_length_field_beyond_the_limit_is_refused(path: Path, length: int) -> None:
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    fault = fault_of(path)
    assert fault.what == "header is too long"
    assert fault.got == str(length)


def test_header_at_the_limit_passes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, b"{}   ")
    monkeypatch.setattr(header_module, "MAX_HEADER_BYTES", 5)
    assert read_header(path) == ([], {})


def test_missing_file_and_folder_cannot_be_read(tmp_path: Path) -> None:
    assert fault_of(tmp_path / "none").what == "cannot read the shard (No such file or directory)"
    assert fault_of(tmp_path).what == "not a regular file"


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", "header is not a JSON object"),
        (b"[]", "header is not a JSON object"),
        (b" {}", "header is not a JSON object"),
        (b"\xef\xbb\xbf{}", "header is not a JSON object"),
        (b"{", "header is not valid JSON"),
        (b"{}x", "header is not valid JSON"),
        (b'{"a": \xff}', "header is not valid JSON"),
        (b'{"a":' * 100_000, "header is not valid JSON"),
        (b'{"a":' + b"[" * 100_000, "header is not valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "header is not valid JSON"),
        ("{}".encode("utf-16-le"), "header is not valid JSON"),
        ("{}".encode("utf-32-le"), "header is not valid JSON"),
    ],
)
def test_header_that_is_not_a_json_object_is_refused(path: Path, raw: bytes, what: str) -> None:
    assert fault_of(write(path, raw)).what == what


def test_duplicate_tensor_name_is_refused(path: Path) -> None:
    one = json.dumps(entry())
    fault = fault_of(write(path, f'{{"t": {one}, "t": {one}}}'.encode(), bytes(8)))
    assert fault.what == "header holds 't' twice"


def test_duplicate_key_inside_an_entry_is_refused(path: Path) -> None:
    raw = b'{"t": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}'
    assert fault_of(write(path, raw, bytes(8))).what == "header holds 'dtype' twice"


@pytest.mark.parametrize(
    "metadata", [[], "pt", 1, True, {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"a": ["b"]}]
)
def test_metadata_must_be_a_map_of_strings(path: Path, metadata: object) -> None:
    fault = fault_of(write(path, {"__metadata__": metadata}))
    assert fault.what == "header's __metadata__ is not a map of strings"
    assert fault.got == repr(metadata)


@pytest.mark.parametrize(
    "name", ["", "a\nb", "a\x00", "\x1b[31m", "a\u202eb", "\ud800", "a\u2028b"]
)
def test_unprintable_name_is_refused(path: Path, name: str) -> None:
    fault = fault_of(write(path, {name: entry()}, bytes(8)))
    assert fault.what == "header holds an unprintable tensor name"
    assert fault.got == repr(name)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        "F32",
        {},
        {"dtype": "F32", "shape": [2]},
        {**entry(), "extra": 1},
    ],
)
def test_malformed_entry_is_refused(path: Path, bad: object) -> None:
    fault = fault_of(write(path, {"t": bad}, bytes(8)))
    assert fault.what == "header entry is malformed"
    assert fault.expected == "dtype, shape and data_offsets"
    assert fault.where == f"tensor 't' of {path}"


@pytest.mark.parametrize("dtype", ["f32", "Q4", "", None, 32, ["F32"], {"F32": 1}, True])
def test_unknown_dtype_is_refused(path: Path, dtype: object) -> None:
    fault = fault_of(write(path, {"t": entry(dtype=dtype)}, bytes(8)))
    assert fault.what == "unknown dtype"
    assert fault.got == repr(dtype)
    assert fault.expected is not None
    assert fault.expected.startswith("one of BOOL, U8, ")


@pytest.mark.parametrize(
    "shape",
    [
        None,
        2,
        "2",
        {},
        [2.0],
        [True],
        [-2],
        ["2"],
        [None],
        [[2]],
        [1 << 63],
        [float("nan")],
        [1] * 65,
    ],
)
def test_bad_shape_is_refused(path: Path, shape: object) -> None:
    fault = fault_of(write(path, {"t": entry(shape)}, bytes(8)))
    assert fault.what == "bad shape"
    assert fault.got == repr(shape)[:80]


def test_64_dimensions_pass(path: Path) -> None:
    (tensor,), _ = read_header(write(path, {"t": entry((1,) * 63 + (2,))}, bytes(8)))
    assert len(tensor.shape) == 64


@pytest.mark.parametrize(
    "offsets",
    [None, 8, [], [0], [0, 8, 16], [-8, 0], [0.0, 8.0], [False, 8], ["0", "8"], [0, 1 << 63], {}],
)
def test_bad_data_offsets_are_refused(path: Path, offsets: object) -> None:
    fault = fault_of(write(path, {"t": {**entry(), "data_offsets": offsets}}, bytes(8)))
    assert fault.what == "bad data_offsets"
    assert fault.got == repr(offsets)


@pytest.mark.parametrize(
    ("shape", "begin", "end"),
    [((3,), 0, 8), ((1,), 0, 8), ((2,), 8, 0), ((), 0, 8), ((0,), 0, 8), ((1 << 62, 1 << 62), 0, 8),
     (((1 << 62),) * 64, 0, 8)],
)  # fmt: skip
def test_size_that_is_not_dtype_times_shape_is_refused(
    path: Path, shape: tuple[int, ...], begin: int, end: int
) -> None:
    fault = fault_of(write(path, {"t": entry(shape, begin, end)}, bytes(8)))
    assert fault.what == (
        "header lies about offsets: dtype times shape is not the size of the data"
    )
    assert fault.got == f"data_offsets [{begin}, {end}]"


def test_packed_dtype_must_fill_whole_bytes(path: Path) -> None:
    fault = fault_of(write(path, {"t": entry((3,), 0, 1, "F4")}, bytes(1)))
    assert fault.what == "3 elements of F4 do not fill whole bytes"


def test_overlap_is_refused(path: Path) -> None:
    fault = fault_of(write(path, {"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)))
    assert fault.what == "header lies about offsets: tensor 'b' overlaps the tensor before it"
    assert (fault.expected, fault.got) == ("data_offsets to begin at 8", "4")


def test_two_tensors_in_one_place_are_refused(path: Path) -> None:
    fault = fault_of(write(path, {"a": entry(), "b": entry()}, bytes(8)))
    assert fault.what == "header lies about offsets: tensor 'b' overlaps the tensor before it"


@pytest.mark.parametrize("begin", [4, 1000])
def test_hole_is_refused(path: Path, begin: int) -> None:
    header = {"a": entry((1,), 0, 4), "b": entry(begin=begin + 4, end=begin + 12)}
    fault = fault_of(write(path, header, bytes(begin + 12)))
    assert fault.what == "header lies about offsets: tensor 'b' follows a hole"


def test_hole_before_the_first_tensor_is_refused(path: Path) -> None:
    fault = fault_of(write(path, {"a": entry(begin=4, end=12)}, bytes(12)))
    assert fault.what == "header lies about offsets: tensor 'a' follows a hole"


@pytest.mark.parametrize(
    ("data", "what"),
    [(7, "shard is truncated"), (0, "shard is truncated"), (9, "shard has bytes after its data")],
)
def test_file_of_another_size_is_refused(path: Path, data: int, what: str) -> None:
    write(path, {"t": entry()}, bytes(data))
    fault = fault_of(path)
    size = path.stat().st_size
    assert fault.what == what
    assert (fault.expected, fault.got) == (f"{size - data + 8} bytes", str(size))


def test_parse_header_checks_the_given_file_size(path: Path) -> None:
    assert parse_header(b"{}", path=path, file_bytes=10) == ([], {})
    with pytest.raises(CheckpointError, match="shard has bytes after its data"):
        parse_header(b"{}", path=path, file_bytes=11)


def test_encoded_header_without_alignment_is_exact() -> None:
    head, offsets = encode_header(
        [TensorSpec("é", Dtype.BF16, (2, 3)), TensorSpec("s", Dtype.I64, ())], alignment=1
    )
    text = (
        '{"__metadata__":{"format":"pt"},'
        '"é":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        '"s":{"dtype":"I64","shape":[],"data_offsets":[12,20]}}'
    ).encode()
    assert head == len(text).to_bytes(8, "little") + text
    assert offsets == [len(head), len(head) + 12]


@pytest.mark.parametrize("pad", range(4060, 4100, 3))
def test_data_starts_on_a_page(pad: int) -> None:
    head, offsets = encode_header([TensorSpec("n" * pad, Dtype.U8, (1,))])
    assert len(head) % 4096 == 0
    assert offsets == [len(head)]
    assert int.from_bytes(head[:8], "little") == len(head) - 8
    assert len(head) - 8 - len(head[8:].rstrip(b" ")) < 4096
