"""Decode and encode whole weights in tiles, with every stored tensor in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from streammerge.checkpoint.header import TensorSpec
from streammerge.dtypes import Dtype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streammerge.codecs.base import Codec, CodedWeight, Encoder

DTYPES = {
    torch.float32: Dtype.F32,
    torch.float16: Dtype.F16,
    torch.bfloat16: Dtype.BF16,
    torch.float8_e4m3fn: Dtype.F8_E4M3,
    torch.uint8: Dtype.U8,
    torch.int8: Dtype.I8,
    torch.int16: Dtype.I16,
    torch.int32: Dtype.I32,
    torch.int64: Dtype.I64,
}


class Bench:
    """What tests do with a codec."""

    @staticmethod
    def raw(tensor: torch.Tensor) -> bytes:
        flat = tensor.flatten().clone(memory_format=torch.contiguous_format)
        return flat.view(torch.uint8).numpy().tobytes()

    @staticmethod
    def words(*shape: int, seed: int) -> torch.Tensor:
        """Return random int32 of all bits."""
        random = torch.Generator().manual_seed(seed)
        wide = torch.randint(-(2**31), 2**31, shape, generator=random, dtype=torch.int64)
        return wide.to(torch.int32)

    @staticmethod
    def specs(tensors: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
        return [TensorSpec(name, DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]

    def find(self, codec: Codec, tensors: Mapping[str, torch.Tensor]) -> CodedWeight:
        found = codec.find(self.specs(tensors), lambda tensor: self.raw(tensors[tensor.name]))
        assert not found.plain
        (weight,) = found.weights
        return weight

    def decode(
        self,
        weight: CodedWeight,
        tensors: Mapping[str, torch.Tensor],
        cuts: Sequence[int] = (),
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Decode in tiles that end at `cuts`, and where matrices do."""
        stored = {
            part.role: memoryview(self.raw(tensors[part.tensor.name])) for part in weight.parts
        }
        ends = sorted({*cuts, *range(0, weight.rows + 1, weight.matrix_rows)} - {0})
        tiles = []
        for begin, end in zip([0, *ends], ends, strict=False):
            data = {x.role: x.take(stored[x.role]) for x in weight.extents(begin, end)}
            tiles.append(weight.decode(begin, end, data, dtype=dtype))
        return torch.cat(tiles)

    def encode(
        self, encoder: Encoder, weight: torch.Tensor, cuts: Sequence[int] = ()
    ) -> dict[str, bytes]:
        """Encode in tiles that end at `cuts`; a scan goes backwards."""
        stored = {part.role: bytearray(part.tensor.nbytes) for part in encoder.weight.parts}
        ends = sorted({*cuts, len(weight)} - {0})
        tiles = list(zip([0, *ends], ends, strict=False))
        encoder.begin()
        if encoder.needs_scan:
            for begin, end in reversed(tiles):
                encoder.scan(begin, end, weight[begin:end])
        for begin, end in tiles:
            extents = {extent.role: extent for extent in encoder.weight.extents(begin, end)}
            for role, tensor in encoder.encode(begin, end, weight[begin:end]).items():
                data = self.raw(tensor)
                assert len(data) == extents[role].total_bytes
                extents[role].put(memoryview(data), memoryview(stored[role]))
        for role, tensor in encoder.finish().items():
            stored[role][:] = self.raw(tensor)
        return {role: bytes(data) for role, data in stored.items()}


@pytest.fixture(scope="session")
def bench() -> Bench:
    return Bench()
