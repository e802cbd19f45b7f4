"""compressed-tensors, 4-bit floats: `nvfp4-pack-quantized` and `mxfp4-pack-quantized`.

    weight_packed        uint8 (N, K / 2)      two codes a byte, the low one first
    weight_scale         F8_E4M3 (N, K / 16)   NVFP4
                         uint8 (N, K / 32)     MXFP4: exponents of two, 127 for 1
    weight_global_scale  float32 (1,)          NVFP4: what scales were multiplied by

An NVFP4 value is `code * (scale / global_scale)` in float32, an MXFP4 value is
`code * 2^(scale - 127)`; both are rounded to bfloat16, whatever the dtype of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from streammerge.checkpoint.header import TensorSpec
from streammerge.codecs.base import Encoder, Extent, Part, misfit
from streammerge.codecs.compressed import CompressedCodec, ScaledWeight, WeightArgs, refusal
from streammerge.dtypes import Dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from streammerge.codecs.base import Stored

__all__ = ["CODECS", "Fp4Codec", "Fp4Weight"]

_NV_GROUP, _MX_GROUP = 16, 32
_LARGEST = 6.0
_LARGEST_SCALE = 448.0
# what takes the place of a scale of 0: F8_E4M3's step at 1, and 1
_NV_SMALLEST, _MX_SMALLEST = 0.125, 1.0
# halfway between two codes; a value there goes to the code whose last bit is 0
_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp4Weight(ScaledWeight):
    """One weight of 4-bit floats."""

    @property
    def row_step(self) -> int:
        """Any row can be decoded by itself."""
        return 1

    @property
    def is_nv(self) -> bool:
        """Whether it is NVFP4."""
        return self.args.group_size == _NV_GROUP

    def extents(self, begin: int, end: int) -> tuple[Extent, ...]:
        """Return the bytes that rows are decoded from."""
        self.check_tile(begin, end)
        found = (
            self.by_rows("weight_packed", begin, end),
            self.by_rows("weight_scale", begin, end),
        )
        return (*found, self.whole("weight_global_scale")) if self.is_nv else found

    def values(self, begin: int, end: int, data: Mapping[str, memoryview]) -> torch.Tensor:
        """Return (end - begin, K) float32."""
        from streammerge.codecs.tensors import as_tensor, decode_e2m1, exponents  # noqa: PLC0415

        packed = as_tensor(data, "weight_packed", Dtype.U8, (end - begin, self.columns // 2))
        tensor = self.part("weight_scale")
        stored = as_tensor(data, "weight_scale", tensor.dtype, (end - begin, tensor.shape[1]))
        if self.is_nv:
            whole = as_tensor(data, "weight_global_scale", Dtype.F32, (1,))
            scales = stored.float() / whole
        else:
            scales = exponents(stored)
        return decode_e2m1(packed).mul_(self.spread(scales, begin, end))


@dataclass(frozen=True, slots=True)
class Fp4Codec(CompressedCodec):
    """4-bit floats."""

    title: ClassVar[str] = "compressed-tensors NVFP4 and MXFP4"
    selector: ClassVar[str] = (
        "quant_method: compressed-tensors, format: nvfp4-pack-quantized, mxfp4-pack-quantized"
    )
    stored: ClassVar[str] = "weight_packed, weight_scale, weight_global_scale"
    reference: ClassVar[str] = "compressed-tensors"
    encodes: ClassVar[bool] = True
    remarks: ClassVar[str] = "decoded to bfloat16"
    formats: ClassVar[tuple[str, ...]] = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
    coded: ClassVar[str] = "weight_packed"

    @classmethod
    def check(cls, args: WeightArgs) -> None:
        """Make sure that it is one of the two formats of 4-bit floats."""
        if (args.bits, args.kind, args.is_symmetric) != (4, "float", True):
            raise refusal("weights", "symmetric floats of 4 bits", args)
        if args.group_size not in (_NV_GROUP, _MX_GROUP):
            raise refusal("weights.group_size", f"{_NV_GROUP} or {_MX_GROUP}", args.group_size)

    @property
    def shares_scales(self) -> bool:
        """NVFP4 has a scale of the whole weight, of which vLLM takes one for joined weights."""
        return self._size == _NV_GROUP

    @property
    def _size(self) -> int:
        return _NV_GROUP if self.args.group_size == _NV_GROUP else _MX_GROUP

    def _specs(self, name: str, rows: int, columns: int) -> dict[str, TensorSpec]:
        is_nv = self._size == _NV_GROUP
        scale = Dtype.F8_E4M3 if is_nv else Dtype.U8
        specs = {
            "weight_packed": TensorSpec(f"{name}_packed", Dtype.U8, (rows, columns // 2)),
            "weight_scale": TensorSpec(f"{name}_scale", scale, (rows, columns // self._size)),
        }
        if is_nv:
            specs["weight_global_scale"] = TensorSpec(f"{name}_global_scale", Dtype.F32, (1,))
        return specs

    def weight(
        self, name: str, held: Mapping[str, Stored], read: Callable[[Stored], bytes]
    ) -> Fp4Weight:
        """Return the weight that tensors make up."""
        del read  # shapes are all in the headers
        packed = held["weight_packed"]
        if len(packed.shape) != 2 or 2 * packed.shape[1] % self._size:
            raise misfit(packed, f"U8 (N, K / 2), in groups of {self._size} inputs")
        rows, columns = packed.shape[0], 2 * packed.shape[1]
        parts = []
        for role, spec in self._specs(name, rows, columns).items():
            tensor = self.require(held, role, name)
            if tensor.dtype is not spec.dtype or (tensor.shape or (1,)) != spec.shape:
                raise misfit(tensor, f"{spec.dtype.value} {spec.shape}")
            parts.append(Part(role, tensor))
        return Fp4Weight(
            name=name, shape=(rows, columns), dtype=Dtype.BF16, parts=tuple(parts), args=self.args
        )

    def encoder(self, name: str, shape: tuple[int, ...], dtype: Dtype) -> Encoder:
        """Return an encoder of a matrix."""
        self.check_encoded(name, shape, dtype)
        weight = Fp4Weight(
            name=name,
            shape=shape,
            dtype=Dtype.BF16,
            parts=tuple(Part(role, spec) for role, spec in self._specs(name, *shape).items()),
            args=self.args,
        )
        return _NvEncoder(weight) if weight.is_nv else _MxEncoder(weight)


CODECS = (Fp4Codec,)


class _NvEncoder(Encoder):
    """Scales need the largest size in the whole weight, found by a pass before."""

    needs_scan = True
    row_step = 1

    def __init__(self, weight: Fp4Weight) -> None:
        self.weight = weight
        self._largest: torch.Tensor | None = None

    def scan(self, begin: int, end: int, tile: torch.Tensor) -> None:
        import torch  # noqa: PLC0415 (planning needs no torch)

        self.check_tile(begin, end, tile)
        largest = tile.abs().amax()
        if self._largest is not None:
            largest = torch.maximum(largest, self._largest)
        self._largest = largest

    def join(self, others: Sequence[Encoder]) -> None:
        import torch  # noqa: PLC0415 (planning needs no torch)

        found = [one._largest for one in (self, *others) if isinstance(one, _NvEncoder)]  # noqa: SLF001 (its own kind)
        self._largest = torch.stack([size for size in found if size is not None]).amax()

    def encode(self, begin: int, end: int, tile: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch  # noqa: PLC0415 (planning needs no torch)

        self.check_tile(begin, end, tile)
        whole = self._global_scale()
        groups = tile.view(len(tile), -1, _NV_GROUP)
        wanted = whole * (groups.abs().amax(dim=-1) / _LARGEST)
        stored = wanted.clamp(-_LARGEST_SCALE, _LARGEST_SCALE).to(torch.float8_e4m3fn)
        scales = stored.float()
        scales = torch.where(scales == 0, _NV_SMALLEST, scales)
        packed = _pack(groups / (scales / whole)[..., None])
        return {"weight_packed": packed, "weight_scale": scales.to(torch.float8_e4m3fn)}

    def finish(self) -> dict[str, torch.Tensor]:
        return {"weight_global_scale": self._global_scale()}

    def _global_scale(self) -> torch.Tensor:
        """Return the (1,) float32 that takes the largest scale to the end of F8_E4M3."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        assert self._largest is not None
        smallest = torch.finfo(self._largest.dtype).tiny
        scale = _LARGEST_SCALE * _LARGEST / self._largest.clamp(min=smallest)
        return torch.nan_to_num(scale, nan=1.0, posinf=1.0, neginf=1.0).float().reshape(1)


class _MxEncoder(Encoder):
    """Each group of 32 by itself."""

    row_step = 1

    def __init__(self, weight: Fp4Weight) -> None:
        self.weight = weight

    def encode(self, begin: int, end: int, tile: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch  # noqa: PLC0415 (planning needs no torch)

        self.check_tile(begin, end, tile)
        groups = tile.view(len(tile), -1, _MX_GROUP)
        # the largest code is 6, between 2^2 and 2^3
        wanted = 125 + torch.log2(_upper_power(groups.abs().amax(dim=-1))).floor()
        exponent = wanted.clamp(0, 255).round()
        scales = torch.exp2(exponent.float() - 127).to(tile.dtype)
        scales = torch.where(scales == 0, _MX_SMALLEST, scales)
        stored = (127 + torch.log2(scales).floor().int()).to(torch.uint8)
        return {"weight_packed": _pack(groups / scales[..., None]), "weight_scale": stored}


def _upper_power(sizes: torch.Tensor) -> torch.Tensor:
    """Return the power of two at or below sizes, after half a step of a code is added to them."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    mantissa = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[sizes.dtype]
    word = torch.int32 if sizes.dtype is torch.float32 else torch.int16
    bits = sizes.view(word).int() + (1 << (mantissa - 2))
    return (bits >> mantissa << mantissa).to(word).view(sizes.dtype)


def _pack(steps: torch.Tensor) -> torch.Tensor:
    """Return the bytes of (N, groups, G) values in units of their scales."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    from streammerge.codecs.tensors import count_below  # noqa: PLC0415

    sizes = steps.abs().float()
    bounds = torch.tensor(_BOUNDS)
    # bucketize leaves a bound with the code below; every other one belongs to the code above
    bounds[1::2] = torch.nextafter(bounds[1::2], torch.zeros(()))
    codes = count_below(sizes, bounds)
    # the sign of what is rounded to 0 is kept, that of 0 is not
    negative = (steps < 0).view(torch.uint8) << 3
    flat = (codes | negative).flatten(1)
    return flat[:, ::2] | (flat[:, 1::2] << 4)
