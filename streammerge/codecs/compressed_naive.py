"""compressed-tensors, a code in a byte: `float-quantized`, `int-quantized`, `naive-quantized`.

weight             F8_E4M3 or int8 (N, K)
weight_scale       see `compressed`
weight_zero_point  int8, shaped as the scales; only where codes are not symmetric
"""

from __future__ import annotations

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

__all__ = ["CODECS", "NaiveCodec", "NaiveWeight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NaiveWeight(ScaledWeight):
    """One weight of codes of a byte."""

    @property
    def row_step(self) -> int:
        """Any row can be decoded by itself."""
        return 1

    def extents(self, begin: int, end: int) -> tuple[Extent, ...]:
        """Return the bytes that rows are decoded from."""
        self.check_tile(begin, end)
        found = [
            self.by_rows("weight", begin, end),
            self.scale_extent("weight_scale", begin, end),
        ]
        if self.has("weight_zero_point"):
            found.append(self.scale_extent("weight_zero_point", begin, end))
        return tuple(found)

    def values(self, begin: int, end: int, data: Mapping[str, memoryview]) -> torch.Tensor:
        """Return (end - begin, K) float32."""
        from streammerge.codecs.tensors import as_tensor  # noqa: PLC0415 (it imports torch)

        dtype = self.part("weight").dtype
        codes = as_tensor(data, "weight", dtype, (end - begin, self.columns)).float()
        if self.has("weight_zero_point"):
            zeros = self.load_scales("weight_zero_point", begin, end, data)
            codes -= self.spread(zeros, begin, end)
        return codes.mul_(
            self.spread(self.load_scales("weight_scale", begin, end, data), begin, end)
        )


@dataclass(frozen=True, slots=True)
class NaiveCodec(CompressedCodec):
    """Codes of a byte."""

    title: ClassVar[str] = "compressed-tensors FP8 and INT8"
    selector: ClassVar[str] = (
        "quant_method: compressed-tensors, format: float-quantized, int-quantized, naive-quantized"
    )
    stored: ClassVar[str] = "weight, weight_scale, weight_zero_point"
    reference: ClassVar[str] = "compressed-tensors"
    encodes: ClassVar[bool] = True
    remarks: ClassVar[str] = (
        "per tensor, channel, group or block; written per tensor and per channel, symmetric"
    )
    formats: ClassVar[tuple[str, ...]] = ("float-quantized", "int-quantized", "naive-quantized")
    coded: ClassVar[str] = "weight"

    @classmethod
    def check(cls, args: WeightArgs) -> None:
        """Make sure that codes have a byte."""
        if args.bits != 8:
            raise refusal("weights.num_bits", 8, args.bits)

    def is_coded(self, tensor: Stored) -> bool:
        """Tell codes from weights that are stored as they are."""
        return tensor.dtype is self._code_dtype

    @property
    def _code_dtype(self) -> Dtype:
        return Dtype.F8_E4M3 if self.args.kind == "float" else Dtype.I8

    def weight(
        self, name: str, held: Mapping[str, Stored], read: Callable[[Stored], bytes]
    ) -> NaiveWeight:
        """Return the weight that tensors make up."""
        del read  # shapes are all in the headers
        codes, scales = held["weight"], held["weight_scale"]
        if len(codes.shape) != 2 or codes.shape[1] % (self.args.group_size or 1):
            raise misfit(codes, f"(N, K), in groups of {self.args.group_size or 'any'} inputs")
        grid = self.args.grid(*codes.shape)
        if scales.dtype not in SCALE_DTYPES or _shape(scales) != grid:
            raise misfit(scales, f"F32, F16 or BF16 {grid}")
        parts = [Part("weight", codes), Part("weight_scale", scales)]
        # older versions stored the zeros of symmetric codes too
        if not self.args.is_symmetric or "weight_zero_point" in held:
            zeros = self.require(held, "weight_zero_point", name)
            if zeros.dtype not in (Dtype.I8, codes.dtype) or _shape(zeros) != grid:
                raise misfit(zeros, f"I8 {grid}")
            parts.append(Part("weight_zero_point", zeros))
        return NaiveWeight(
            name=name, shape=codes.shape, dtype=scales.dtype, parts=tuple(parts), args=self.args
        )

    def encoder(self, name: str, shape: tuple[int, ...], dtype: Dtype) -> Encoder:
        """Return an encoder of a matrix."""
        self.check_encoded(name, shape, dtype)
        args = self.args
        if args.strategy not in ("tensor", "channel") or not args.is_symmetric:
            raise refusal("weights.strategy", "tensor or channel, symmetric", args.strategy)
        parts = (
            Part("weight", TensorSpec(name, self._code_dtype, shape)),
            Part("weight_scale", TensorSpec(f"{name}_scale", dtype, args.grid(*shape))),
        )
        weight = NaiveWeight(name=name, shape=shape, dtype=dtype, parts=parts, args=args)
        return _TensorEncoder(weight) if args.strategy == "tensor" else _ChannelEncoder(weight)


CODECS = (NaiveCodec,)


class _ChannelEncoder(Encoder):
    """Each row by itself."""

    row_step = 1

    def __init__(self, weight: NaiveWeight) -> None:
        self.weight: NaiveWeight = weight

    def encode(self, begin: int, end: int, tile: torch.Tensor) -> dict[str, torch.Tensor]:
        self.check_tile(begin, end, tile)
        low, high = tile.amin(dim=1, keepdim=True), tile.amax(dim=1, keepdim=True)
        scales, _ = find_scales(low, high, self.weight.args)
        return {"weight": _codes(tile, scales, self.weight.args), "weight_scale": scales}


class _TensorEncoder(Encoder):
    """One scale, found by a pass over all tiles before."""

    needs_scan = True
    row_step = 1

    def __init__(self, weight: NaiveWeight) -> None:
        self.weight: NaiveWeight = weight
        self._low: torch.Tensor | None = None
        self._high: torch.Tensor | None = None

    def scan(self, begin: int, end: int, tile: torch.Tensor) -> None:
        import torch  # noqa: PLC0415 (planning needs no torch)

        self.check_tile(begin, end, tile)
        low, high = torch.aminmax(tile)
        self._low = low if self._low is None else torch.minimum(low, self._low)
        self._high = high if self._high is None else torch.maximum(high, self._high)

    def encode(self, begin: int, end: int, tile: torch.Tensor) -> dict[str, torch.Tensor]:
        self.check_tile(begin, end, tile)
        return {"weight": _codes(tile, self._scales(), self.weight.args)}

    def finish(self) -> dict[str, torch.Tensor]:
        return {"weight_scale": self._scales()}

    def _scales(self) -> torch.Tensor:
        assert self._low is not None
        assert self._high is not None
        return find_scales(self._low, self._high, self.weight.args)[0].reshape(1)


def _codes(tile: torch.Tensor, scales: torch.Tensor, args: WeightArgs) -> torch.Tensor:
    import torch  # noqa: PLC0415 (planning needs no torch)

    steps = round_to_codes(tile, scales, None, args)
    return steps.to(torch.float8_e4m3fn) if args.kind == "float" else steps.round_().to(torch.int8)


def _shape(tensor: Stored) -> tuple[int, ...]:
    """Return a shape, with that of a single number as (1,)."""
    return tensor.shape or (1,)
