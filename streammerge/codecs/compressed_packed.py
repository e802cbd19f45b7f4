"""compressed-tensors, `pack-quantized`: integer codes of 1 to 8 bits, packed along the inputs.

    weight_packed      int32 (N, ceil(K b / 32))
    weight_scale       see `compressed`
    weight_zero_point  int32 (ceil(N b / 32), groups), zeros of neighbouring outputs in one word;
                       int8 (1,) with one scale for all; only where codes are not symmetric
    weight_shape       int64 (2,): N and K

Codes and packed zeros are stored with 2^(b - 1) added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from streammerge.checkpoint.header import TensorSpec
from streammerge.codecs.base import Encoder, Extent, Part, misfit
from streammerge.codecs.compressed import (
    SCALE_DTYPES,
    CompressedCodec,
    ScaledWeight,
    WeightArgs,
    find_scales,
    refusal,
    round_to_codes,
)
from streammerge.dtypes import Dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from streammerge.codecs.base import Stored

__all__ = ["CODECS", "PackedCodec", "PackedWeight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight(ScaledWeight):
    """One weight of packed codes."""

    @property
    def row_step(self) -> int:
        """Rows whose packed zeros fill whole words; 1 where there are none."""
        return 32 // math.gcd(32, self.args.bits) if self._has_packed_zeros else 1

    @property
    def _has_packed_zeros(self) -> bool:
        return not self.args.is_symmetric and self.args.strategy != "tensor"

    def extents(self, begin: int, end: int) -> tuple[Extent, ...]:
        """Return the bytes that rows are decoded from."""
        self.check_tile(begin, end)
        found = [
            self.by_rows("weight_packed", begin, end),
            self.scale_extent("weight_scale", begin, end),
        ]
        if self._has_packed_zeros:
            width = 4 * self.part("weight_zero_point").shape[1]
            first, last = self._words(begin, end)
            found.append(Extent("weight_zero_point", first * width, (last - first) * width))
        elif not self.args.is_symmetric:
            found.append(self.whole("weight_zero_point"))
        return tuple(found)

    def values(self, begin: int, end: int, data: Mapping[str, memoryview]) -> torch.Tensor:
        """Return (end - begin, K) float32."""
        from streammerge.codecs.tensors import as_tensor, unpack_words  # noqa: PLC0415

        words = self.part("weight_packed").shape[1]
        packed = as_tensor(data, "weight_packed", Dtype.I32, (end - begin, words))
        codes = unpack_words(packed, self.args.bits, self.columns).float()
        codes -= self._zeros(begin, end, data)
        return codes.mul_(
            self.spread(self.load_scales("weight_scale", begin, end, data), begin, end)
        )

    def _zeros(self, begin: int, end: int, data: Mapping[str, memoryview]) -> torch.Tensor | int:
        """Return what is subtracted from stored codes."""
        from streammerge.codecs.tensors import as_tensor, unpack_words  # noqa: PLC0415

        middle = 1 << (self.args.bits - 1)
        if self.args.is_symmetric:
            return middle
        if not self._has_packed_zeros:
            return self.load_scales("weight_zero_point", begin, end, data) + middle
        groups = self.part("weight_zero_point").shape[1]
        first, last = self._words(begin, end)
        packed = as_tensor(data, "weight_zero_point", Dtype.I32, (last - first, groups))
        zeros = unpack_words(packed.T.contiguous(), self.args.bits, end - begin)
        return self.spread(zeros.T.float(), begin, end)

    def _words(self, begin: int, end: int) -> tuple[int, int]:
        """Return the range of words that the zeros of rows are in."""
        return begin * self.args.bits // 32, -(-end * self.args.bits // 32)


@dataclass(frozen=True, slots=True)
class PackedCodec(CompressedCodec):
    """Packed integer codes."""

    title: ClassVar[str] = "compressed-tensors packed integers, 1 to 8 bits"
    selector: ClassVar[str] = "quant_method: compressed-tensors, format: pack-quantized"
    stored: ClassVar[str] = "weight_packed, weight_scale, weight_zero_point, weight_shape"
    reference: ClassVar[str] = "compressed-tensors"
    encodes: ClassVar[bool] = True
    remarks: ClassVar[str] = (
        "per tensor, channel or group; written per channel and per group; no groups out of order"
    )
    formats: ClassVar[tuple[str, ...]] = ("pack-quantized",)
    coded: ClassVar[str] = "weight_packed"

    @classmethod
    def check(cls, args: WeightArgs) -> None:
        """Make sure that codes are integers with scales that can be decoded."""
        if args.kind != "int":
            raise refusal("weights.type", "int", args.kind)
        if args.strategy not in ("tensor", "channel", "group"):
            raise refusal("weights.strategy", "tensor, channel or group", args.strategy)

    def weight(
        self, name: str, held: Mapping[str, Stored], read: Callable[[Stored], bytes]
    ) -> PackedWeight:
        """Return the weight that tensors make up."""
        packed, scales = held["weight_packed"], held["weight_scale"]
        size = self.require(held, "weight_shape", name)
        if size.dtype is not Dtype.I64 or size.shape != (2,):
            raise misfit(size, "I64 (2,)")
        raw = read(size)
        rows, columns = (int.from_bytes(raw[at : at + 8], "little", signed=True) for at in (0, 8))
        words = -(-columns * self.args.bits // 32)
        if columns < 1 or packed.dtype is not Dtype.I32 or packed.shape != (rows, words):
            raise misfit(packed, f"I32 {(rows, words)}")
        if columns % (self.args.group_size or 1):
            raise misfit(packed, f"groups of {self.args.group_size} inputs, of {columns}")
        grid = self.args.grid(rows, columns)
        if scales.dtype not in SCALE_DTYPES or (scales.shape or (1,)) != grid:
            raise misfit(scales, f"F32, F16 or BF16 {grid}")
        parts = [Part("weight_packed", packed), Part("weight_scale", scales)]
        if not self.args.is_symmetric:
            zeros = self.require(held, "weight_zero_point", name)
            expected = self._zeros_spec(name, rows, columns)
            if zeros.dtype is not expected.dtype or (zeros.shape or (1,)) != expected.shape:
                raise misfit(zeros, f"{expected.dtype.value} {expected.shape}")
            parts.append(Part("weight_zero_point", zeros))
        return PackedWeight(
            name=name,
            shape=(rows, columns),
            dtype=scales.dtype,
            parts=(*parts, Part("weight_shape", size)),
            args=self.args,
        )

    def _zeros_spec(self, name: str, rows: int, columns: int) -> TensorSpec:
        full = f"{name}_zero_point"
        if self.args.strategy == "tensor":
            return TensorSpec(full, Dtype.I8, (1,))
        groups = self.args.grid(rows, columns)[1]
        return TensorSpec(full, Dtype.I32, (-(-rows * self.args.bits // 32), groups))

    def encoder(self, name: str, shape: tuple[int, ...], dtype: Dtype) -> Encoder:
        """Return an encoder of a matrix."""
        self.check_encoded(name, shape, dtype)
        args = self.args
        if args.strategy == "tensor":
            raise refusal("weights.strategy", "channel or group", args.strategy)
        rows, columns = shape
        words = -(-columns * args.bits // 32)
        specs = {
            "weight_packed": TensorSpec(f"{name}_packed", Dtype.I32, (rows, words)),
            "weight_scale": TensorSpec(f"{name}_scale", dtype, args.grid(rows, columns)),
        }
        if not args.is_symmetric:
            specs["weight_zero_point"] = self._zeros_spec(name, rows, columns)
        specs["weight_shape"] = TensorSpec(f"{name}_shape", Dtype.I64, (2,))
        parts = tuple(Part(role, spec) for role, spec in specs.items())
        return _PackedEncoder(
            PackedWeight(name=name, shape=shape, dtype=dtype, parts=parts, args=args)
        )


CODECS = (PackedCodec,)


class _PackedEncoder(Encoder):
    """Each row by itself, but for the words of the zeros."""

    def __init__(self, weight: PackedWeight) -> None:
        self.weight: PackedWeight = weight
        self.row_step = weight.row_step

    def encode(self, begin: int, end: int, tile: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch  # noqa: PLC0415 (planning needs no torch)

        from streammerge.codecs.tensors import pack_words  # noqa: PLC0415

        self.check_tile(begin, end, tile)
        args, middle = self.weight.args, 1 << (self.weight.args.bits - 1)
        groups = tile.view(len(tile), -1, args.group_size or self.weight.columns)
        scales, zeros = find_scales(groups.amin(dim=-1), groups.amax(dim=-1), args)
        wide = None if zeros is None else zeros[..., None]
        steps = round_to_codes(groups, scales[..., None], wide, args).round_().to(torch.int8)
        codes = (steps.flatten(1).int() + middle).to(torch.uint8)
        found = {"weight_packed": pack_words(codes, args.bits), "weight_scale": scales}
        if zeros is not None:
            lifted = (zeros.int() + middle).to(torch.uint8)
            found["weight_zero_point"] = pack_words(lifted.T, args.bits).T.contiguous()
        return found

    def finish(self) -> dict[str, torch.Tensor]:
        import torch  # noqa: PLC0415 (planning needs no torch)

        return {"weight_shape": torch.tensor(self.weight.shape)}
