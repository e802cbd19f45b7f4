"""FP8 as transformers and DeepSeek store it: codes, and one scale for each block.

    weight              F8_E4M3 (N, K), or (E, N, K)
    weight_scale_inv    float32 or F8_E8M0 (ceil(N / B0), ceil(K / B1)), or one scale for all

B0 x B1 is `weight_block_size`; blocks are cut at the edges. Without it there is one scale for the
whole weight. A value is `code * scale` in float32, rounded to the model's dtype.

transformers takes for the size of a block what the shapes suggest, N / ceil(N / B0): it refuses
weights whose last block is cut, or multiplies by the scale of another block. Here B0 and B1 are
those of the configuration, as in DeepSeek's own conversion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from streammerge.checkpoint.header import TensorSpec
from streammerge.codecs.base import (
    Codec,
    CodedWeight,
    Encoder,
    Extent,
    Found,
    Part,
    misfit,
    missing,
    sort_out,
)
from streammerge.dtypes import Dtype
from streammerge.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from streammerge.codecs.base import Stored

__all__ = ["CODECS", "Fp8Codec", "Fp8Weight"]

_MAX = 448.0  # the largest value of F8_E4M3
_SCALES = (Dtype.F32, Dtype.BF16, Dtype.F16, Dtype.F8_E8M0, Dtype.U8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight(CodedWeight):
    """One weight of FP8 codes."""

    block: tuple[int, int] | None
    """Rows and columns of a block; None for one scale for all."""

    @property
    def row_step(self) -> int:
        """Any row can be decoded by itself."""
        return 1

    def extents(self, begin: int, end: int) -> tuple[Extent, ...]:
        """Return the bytes that rows are decoded from."""
        self.check_tile(begin, end)
        codes = self.by_rows("weight", begin, end)
        if self.block is None:
            return (codes, self.whole("weight_scale_inv"))
        return (codes, self.by_rows("weight_scale_inv", begin, end, step=self.block[0]))

    def values(self, begin: int, end: int, data: Mapping[str, memoryview]) -> torch.Tensor:
        """Return (end - begin, K) float32."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        from streammerge.codecs.tensors import as_tensor  # noqa: PLC0415

        dtype = self.part("weight").dtype
        codes = as_tensor(data, "weight", dtype, (end - begin, self.columns)).float()
        stored = self.part("weight_scale_inv").dtype
        if self.block is None:
            return codes.mul_(_scales(as_tensor(data, "weight_scale_inv", stored, (1,))))
        _, first, last = self.in_matrix(begin, end)
        high, wide = self.block
        lines = -(-last // high) - first // high
        width = -(-self.columns // wide)
        scales = _scales(as_tensor(data, "weight_scale_inv", stored, (lines, width)))
        columns = scales.repeat_interleave(wide, dim=1)[:, : self.columns]
        line = torch.arange(first, last) // high - first // high
        return codes.mul_(columns[line])


@dataclass(frozen=True, slots=True)
class Fp8Codec(Codec):
    """transformers' `fp8`."""

    title: ClassVar[str] = "FP8, block and per tensor"
    selector: ClassVar[str] = "quant_method: fp8"
    stored: ClassVar[str] = "weight, weight_scale_inv"
    reference: ClassVar[str] = "transformers"
    encodes: ClassVar[bool] = True
    remarks: ClassVar[str] = (
        "blocks cut at the edges are decoded and encoded, which transformers refuses or gets wrong"
    )

    block: tuple[int, int] | None
    dtype: Dtype
    scale_dtype: Dtype = Dtype.F32
    """Of scales that are written; any are read."""

    @classmethod
    def of(cls, section: Mapping[str, Any], dtype: Dtype) -> Fp8Codec | None:
        """Return the codec if the section selects it."""
        if section.get("quant_method") != "fp8":
            return None
        block = section.get("weight_block_size")
        where = "quantization_config"
        if block is not None and not _is_block(block):
            raise UnsupportedError(
                "blocks of FP8 have two sizes",
                where=f"{where}.weight_block_size",
                expected="two positive numbers",
                got=repr(block)[:80],
            )
        if section.get("fmt", "e4m3") != "e4m3":
            raise UnsupportedError(
                "FP8 codes of this kind are not decoded",
                where=f"{where}.fmt",
                expected="e4m3",
                got=section["fmt"],
            )
        scales = {"float": Dtype.F32, "ue8m0": Dtype.F8_E8M0}
        scale_format = section.get("scale_fmt") or "float"
        if scale_format not in scales:
            raise UnsupportedError(
                "scales of FP8 of this kind are unknown",
                where=f"{where}.scale_fmt",
                expected=" or ".join(scales),
                got=repr(scale_format)[:80],
            )
        return cls(None if block is None else (block[0], block[1]), dtype, scales[scale_format])

    def find(self, tensors: Iterable[Stored], read: Callable[[Stored], bytes]) -> Found:
        """Group codes with their scales."""
        del read  # shapes are all in the headers
        by_name = {tensor.name: tensor for tensor in tensors}
        weights = []
        for name, tensor in by_name.items():
            if tensor.dtype is not Dtype.F8_E4M3:
                continue
            scale = by_name.get(f"{name}_scale_inv")
            if scale is None:
                raise missing(name, f"{name}_scale_inv")
            weights.append(self._weight(tensor, scale))
        return sort_out(by_name, weights, marks=("_scale_inv",))

    def _weight(self, codes: Stored, scale: Stored) -> Fp8Weight:
        if len(codes.shape) not in (2, 3):
            raise misfit(codes, "(N, K) or (E, N, K)")
        block = self.block
        if math.prod(scale.shape) == 1 and len(codes.shape) == 2:
            block = None
        if scale.dtype not in _SCALES:
            raise misfit(scale, " or ".join(dtype.value for dtype in _SCALES))
        if block is not None:
            grid = (
                *codes.shape[:-2],
                -(-codes.shape[-2] // block[0]),
                -(-codes.shape[-1] // block[1]),
            )
            if scale.shape != grid:
                raise misfit(scale, grid)
        elif math.prod(scale.shape) != 1:
            raise misfit(scale, "one scale for the whole weight")
        parts = (Part("weight", codes), Part("weight_scale_inv", scale))
        return Fp8Weight(
            name=codes.name, shape=codes.shape, dtype=self.dtype, parts=parts, block=block
        )

    def holds_whole(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a weight is made of whole blocks."""
        return self.block is None or not (shape[-2] % self.block[0] or shape[-1] % self.block[1])

    def like(self, weight: CodedWeight) -> Codec:
        """Return the codec with the blocks and the scales of a weight."""
        assert isinstance(weight, Fp8Weight)
        scale = weight.part("weight_scale_inv").dtype
        return replace(self, block=weight.block, scale_dtype=scale)

    def encoder(self, name: str, shape: tuple[int, ...], dtype: Dtype) -> Encoder:
        """Return an encoder of a matrix."""
        if len(shape) != 2 or not dtype.is_mergeable:
            raise UnsupportedError(
                "FP8 codes are made of matrices of floats", where=name, got=f"{dtype.value} {shape}"
            )
        high, wide = self.block or shape
        grid = (-(-shape[0] // high), -(-shape[1] // wide))
        weight = self._weight(
            TensorSpec(name, Dtype.F8_E4M3, shape),
            TensorSpec(f"{name}_scale_inv", self.scale_dtype, grid),
        )
        return _BlockEncoder(weight) if weight.block is not None else _TensorEncoder(weight)


CODECS = (Fp8Codec,)


class _BlockEncoder(Encoder):
    """A block is encoded by itself."""

    def __init__(self, weight: Fp8Weight) -> None:
        assert weight.block is not None
        self.weight = weight
        self.row_step, self._wide = weight.block

    def encode(self, begin: int, end: int, tile: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch  # noqa: PLC0415 (planning needs no torch)

        self.check_tile(begin, end, tile)
        rows, columns = tile.shape
        high, wide = self.row_step, self._wide
        # zeros change no maximum of sizes
        full = torch.nn.functional.pad(tile.float(), (0, -columns % wide, 0, -rows % high))
        blocks = full.view(len(full) // high, high, -1, wide)
        stored = self.weight.part("weight_scale_inv").dtype
        forward, inverse = _fp8_scales(blocks.abs().amax(dim=(1, 3)), stored)
        codes = _fp8_codes(blocks * forward[:, None, :, None]).view(full.shape)
        return {"weight": codes[:rows, :columns].contiguous(), "weight_scale_inv": inverse}


class _TensorEncoder(Encoder):
    """One scale, found by a pass over all tiles before."""

    needs_scan = True
    row_step = 1

    def __init__(self, weight: Fp8Weight) -> None:
        self.weight = weight
        self._largest = 0.0
        self._is_nan = False

    def scan(self, begin: int, end: int, tile: torch.Tensor) -> None:
        self.check_tile(begin, end, tile)
        largest = tile.float().abs().max().item()
        self._is_nan |= math.isnan(largest)
        self._largest = max(self._largest, largest)

    def encode(self, begin: int, end: int, tile: torch.Tensor) -> dict[str, torch.Tensor]:
        self.check_tile(begin, end, tile)
        return {"weight": _fp8_codes(tile.float() * self._scales()[0])}

    def finish(self) -> dict[str, torch.Tensor]:
        return {"weight_scale_inv": self._scales()[1]}

    def _scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        import torch  # noqa: PLC0415 (planning needs no torch)

        largest = torch.tensor([[math.nan if self._is_nan else self._largest]])
        return _fp8_scales(largest, self.weight.part("weight_scale_inv").dtype)


def _is_block(block: object) -> bool:
    return (
        isinstance(block, (list, tuple))
        and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
    )


def _scales(stored: torch.Tensor) -> torch.Tensor:
    """Return scales in float32."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    from streammerge.codecs.tensors import exponents  # noqa: PLC0415

    return exponents(stored) if stored.dtype is torch.uint8 else stored.float()


def _fp8_scales(largest: torch.Tensor, stored: Dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what values are multiplied by, and its inverse in the dtype in which it is stored."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    is_used = largest > 0
    forward = torch.where(is_used, _MAX / torch.where(is_used, largest, 1.0), 1.0)
    inverse = 1.0 / forward
    if stored is Dtype.F8_E8M0:
        # up to a power of two, so that no value gets too large
        exponent = torch.log2(inverse.clamp(min=torch.finfo(torch.float32).tiny)).ceil()
        inverse = torch.pow(2.0, exponent).to(torch.float8_e8m0fnu)
        forward = 1.0 / inverse.float()
    return forward, inverse


def _fp8_codes(values: torch.Tensor) -> torch.Tensor:
    import torch  # noqa: PLC0415 (planning needs no torch)

    return values.clamp(-_MAX, _MAX).to(torch.float8_e4m3fn)
