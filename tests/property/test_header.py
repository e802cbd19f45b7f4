"""Headers: encoded ones read back, the safetensors library agrees both ways, and noise is
refused.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import save_file

from streammerge.checkpoint.header import (
    StoredTensor,
    TensorSpec,
    encode_header,
    parse_header,
    read_header,
)
from streammerge.dtypes import Dtype
from streammerge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

TORCH = {
    Dtype.BOOL: torch.bool,
    Dtype.U8: torch.uint8,
    Dtype.I8: torch.int8,
    Dtype.I16: torch.int16,
    Dtype.I32: torch.int32,
    Dtype.I64: torch.int64,
    Dtype.F16: torch.float16,
    Dtype.BF16: torch.bfloat16,
    Dtype.F32: torch.float32,
    Dtype.F64: torch.float64,
    Dtype.C64: torch.complex64,
    Dtype.F8_E4M3: torch.float8_e4m3fn,
    Dtype.F8_E5M2: torch.float8_e5m2,
}
NAMES = st.text(min_size=1, max_size=20).filter(
    lambda name: name.isprintable() and name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def specs(dtypes: Sequence[Dtype]) -> st.SearchStrategy[list[TensorSpec]]:
    one = st.builds(TensorSpec, NAMES, st.sampled_from(dtypes), SHAPES)
    return st.lists(one, max_size=6, unique_by=lambda spec: spec.name)


def values(spec: TensorSpec) -> torch.Tensor:
    numbers = torch.arange(torch.Size(spec.shape).numel())
    return numbers.reshape(spec.shape).to(TORCH[spec.dtype])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "s.safetensors"


@given(specs([dtype for dtype in Dtype if dtype.bits >= 8]))
def test_encoded_header_reads_back(path: Path, wanted: list[TensorSpec]) -> None:
    head, offsets = encode_header(wanted)
    assert len(head) % 4096 == 0
    path.write_bytes(head + bytes(sum(spec.nbytes for spec in wanted)))
    tensors, metadata = read_header(path)
    expected = [
        StoredTensor(spec.name, spec.dtype, spec.shape, path, offset)
        for spec, offset in zip(wanted, offsets, strict=True)
    ]
    assert sorted(tensors, key=lambda t: t.name) == sorted(expected, key=lambda t: t.name)
    assert [t.offset for t in tensors] == sorted(offsets)
    assert metadata == {"format": "pt"}


@settings(max_examples=50)
@given(specs(list(TORCH)), st.randoms(use_true_random=False))
def test_safetensors_loads_what_is_encoded(
    path: Path, wanted: list[TensorSpec], random: Any
) -> None:
    head, offsets = encode_header(wanted)
    data = random.randbytes(sum(spec.nbytes for spec in wanted))
    path.write_bytes(head + data)
    whole = head + data
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == sorted(spec.name for spec in wanted)
        assert file.metadata() == {"format": "pt"}
        for spec, offset in zip(wanted, offsets, strict=True):
            tensor = file.get_tensor(spec.name)
            assert (tensor.dtype, tuple(tensor.shape)) == (TORCH[spec.dtype], spec.shape)
            raw = bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
            assert raw == whole[offset : offset + spec.nbytes]


@settings(max_examples=50)
@given(
    specs(list(TORCH)).filter(
        bool
    ),  # the library writes broken JSON for no tensor and empty metadata
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
def test_what_safetensors_saves_is_read_equal(
    path: Path, wanted: list[TensorSpec], metadata: dict[str, str]
) -> None:
    saved = {
        spec.name: torch.arange(torch.Size(spec.shape).numel())
        .reshape(spec.shape)
        .to(TORCH[spec.dtype])
        for spec in wanted
    }
    save_file(saved, path, metadata=metadata)
    tensors, found = read_header(path)
    assert found == metadata
    assert {t.name: (t.dtype, t.shape) for t in tensors} == {
        s.name: (s.dtype, s.shape) for s in wanted
    }
    whole = path.read_bytes()
    for stored in tensors:
        tensor = saved[stored.name]
        raw = bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
        assert whole[stored.offset : stored.offset + stored.nbytes] == raw


@given(st.binary(max_size=200))
def test_random_file_is_read_or_refused(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        read_header(path)


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=6),
        st.sampled_from(["F32", "BF16", "F4"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "t"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from([d.value for d in Dtype]), JSON),
        "shape": st.one_of(st.lists(st.integers(-1, 3), max_size=3), JSON),
        "data_offsets": st.one_of(st.lists(st.integers(-1, 30), min_size=2, max_size=2), JSON),
    }
)


@given(st.dictionaries(st.text(max_size=4), st.one_of(ENTRY, JSON), max_size=3), st.integers(0, 60))
def test_any_json_header_tiles_its_file_or_is_refused(header: dict[str, Any], data: int) -> None:
    raw = json.dumps(header).encode()
    try:
        tensors, _ = parse_header(raw, path=Path("s"), file_bytes=8 + len(raw) + data)
    except CheckpointError:
        return
    assert sum(tensor.nbytes for tensor in tensors) == data
    position = 8 + len(raw)
    for tensor in tensors:
        assert tensor.offset == position
        position += tensor.nbytes


@given(st.binary(max_size=300))
def test_random_header_bytes_are_parsed_or_refused(raw: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        parse_header(b"{" + raw, path=Path("s"), file_bytes=9 + len(raw))


@given(specs([Dtype.F32, Dtype.BF16]).filter(bool), st.data())
def test_one_changed_byte_never_escapes_the_error(
    wanted: list[TensorSpec], data: st.DataObject
) -> None:
    head, _ = encode_header(wanted, alignment=1)
    raw = bytearray(head[8:])
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    size = len(head) + sum(spec.nbytes for spec in wanted)
    with contextlib.suppress(CheckpointError):
        parse_header(bytes(raw), path=Path("s"), file_bytes=size)
