"""Golden bytes: a file of the reference library's, and the header as this project writes it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from streammerge.checkpoint.header import StoredTensor, TensorSpec, encode_header, read_header
from streammerge.checkpoint.torch_bin import encode_state_dict
from streammerge.checkpoint.writer import SafetensorsWriter
from streammerge.dtypes import Dtype

TINY = Path(__file__).parent / "tiny.safetensors"
TINY_SHA256 = "c6872984c6459ead2b8bff94791d9b573007439dfbb231f02993214894653d10"
WRITTEN_SHA256 = "f0455ac32fdda80652c9f8261e9d2856dd889eb2f66d53d51a6756be383bae67"
SPECS = [
    TensorSpec("model.norm.weight", Dtype.F32, (4,)),
    TensorSpec("lm_head.weight", Dtype.BF16, (3, 2)),
    TensorSpec("step", Dtype.U8, ()),
    TensorSpec("empty", Dtype.U8, (0, 2)),
]
HEADER = (
    b'{"__metadata__":{"format":"pt"},'
    b'"model.norm.weight":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
    b'"lm_head.weight":{"dtype":"BF16","shape":[3,2],"data_offsets":[16,28]},'
    b'"step":{"dtype":"U8","shape":[],"data_offsets":[28,29]},'
    b'"empty":{"dtype":"U8","shape":[0,2],"data_offsets":[29,29]}}'
)
DATA = bytes.fromhex("0000803f000000c00000003f00000080803f00c0003f0080c07f807f07")


def test_golden_file_is_unchanged() -> None:
    assert hashlib.sha256(TINY.read_bytes()).hexdigest() == TINY_SHA256


def test_golden_file_is_read() -> None:
    tensors, metadata = read_header(TINY)
    start = TINY.stat().st_size - len(DATA)
    assert metadata == {"format": "pt"}
    assert {tensor.name: tensor for tensor in tensors} == {
        spec.name: StoredTensor(spec.name, spec.dtype, spec.shape, TINY, start + offset)
        for spec, offset in zip(SPECS, (0, 16, 28, 28), strict=True)
    }
    assert TINY.read_bytes()[start:] == DATA


def test_encoded_header_has_its_golden_bytes() -> None:
    head, offsets = encode_header(SPECS)
    assert len(head) == 4096
    assert head == (4088).to_bytes(8, "little") + HEADER.ljust(4088, b" ")
    assert offsets == [4096, 4112, 4124, 4125]


def test_written_file_has_its_golden_bytes(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    writer = SafetensorsWriter(path, head=encode_header(SPECS)[0])
    writer.write(4096, memoryview(DATA))
    assert writer.finish() == 4096 + len(DATA)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == WRITTEN_SHA256
    ours, reference = load_file(path), load_file(TINY)
    assert ours.keys() == reference.keys()
    for name, tensor in ours.items():
        raw, expected = tensor.reshape(-1), reference[name].reshape(-1)
        assert (tensor.dtype, tensor.shape) == (reference[name].dtype, reference[name].shape)
        assert torch.equal(raw.view(torch.uint8), expected.view(torch.uint8))


def test_encoded_state_dict_has_its_golden_bytes() -> None:
    assert encode_state_dict([TensorSpec("w", Dtype.BF16, (3, 200))]) == (
        b"\x80\x02ccollections\nOrderedDict\n)R(X\x01\x00\x00\x00w"
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
        b"ctorch\nBFloat16Storage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu\x8a\x02X\x02tQ"
        b"\x8a\x01\x00(\x8a\x01\x03\x8a\x02\xc8\x00t(\x8a\x02\xc8\x00\x8a\x01\x01t\x89"
        b"ccollections\nOrderedDict\n)RtRu."
    )
