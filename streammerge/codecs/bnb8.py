"""bitsandbytes, 8 bits (LLM.int8): a scale for each row.

    weight          int8 (N, K)
    SCB             float32 (N,)    the largest size in the row
    weight_format   uint8 ()        0: as here; the layouts of old GPU kernels are not decoded

A value is `code * SCB * (1 / 127)` in float32, in this order. What is encoded is first rounded to
float16, as bitsandbytes does.
"""

from __future__ import annotations

from dataclasses import dataclass
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

__all__ = ["CODECS", "Bnb8Codec", "Bnb8Weight"]

_ROW_MAJOR = b"\0"
# the float32 nearest to 1 / 127, which bitsandbytes multiplies by
_INVERSE = 7.874015718698502e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Bnb8Weight(CodedWeight):
    """One weight of 8-bit codes."""

    @property
    def row_step(self) -> int:
        """Any row can be decoded by itself."""
        return 1

    def extents(self, begin: int, end: int) -> tuple[Extent, ...]:
        """Return the bytes that rows are decoded from."""
        self.check_tile(begin, end)
        return (self.by_rows("weight", begin, end), self.by_rows("SCB", begin, end))

    def values(self, begin: int, end: int, data: Mapping[str, memoryview]) -> torch.Tensor:
        """Return (end - begin, K) float32."""
        from streammerge.codecs.tensors import as_tensor  # noqa: PLC0415 (it imports torch)

        codes = as_tensor(data, "weight", Dtype.I8, (end - begin, self.columns))
        largest = as_tensor(data, "SCB", Dtype.F32, (end - begin, 1))
        return (codes * largest).mul_(_INVERSE)


@dataclass(frozen=True, slots=True)
class Bnb8Codec(Codec):
    """bitsandbytes with 8 bits."""

    title: ClassVar[str] = "bitsandbytes LLM.int8"
    selector: ClassVar[str] = "quant_method: bitsandbytes, load_in_8bit"
    stored: ClassVar[str] = "weight, SCB, weight_format"
    reference: ClassVar[str] = "bitsandbytes on a CPU"
    encodes: ClassVar[bool] = True
    remarks: ClassVar[str] = "decoded to float32"

    @classmethod
    def of(cls, section: Mapping[str, Any], dtype: Dtype) -> Bnb8Codec | None:
        """Return the codec if the section selects 8 bits of bitsandbytes."""
        del dtype  # values are float32
        if section.get("quant_method") != "bitsandbytes":
            return None
        return cls() if section.get("load_in_8bit") or section.get("_load_in_8bit") else None

    def find(self, tensors: Iterable[Stored], read: Callable[[Stored], bytes]) -> Found:
        """Group codes with their scales."""
        by_name = {tensor.name: tensor for tensor in tensors}
        weights = []
        for name, codes in by_name.items():
            module = name.removesuffix(".weight")
            if codes.dtype is not Dtype.I8 or module == name:
                continue
            scales, form = by_name.get(f"{module}.SCB"), by_name.get(f"{module}.weight_format")
            if scales is None:
                raise missing(name, f"{module}.SCB")
            if form is not None and (form.nbytes > 1 or read(form) != _ROW_MAJOR):
                raise UnsupportedError(
                    "codes are in the layout of an old GPU kernel",
                    where=form.name,
                    expected=0,
                    hint="load and save the model with a current bitsandbytes",
                )
            weights.append(_weight(codes, scales, form))
        return sort_out(by_name, weights, marks=(".SCB", ".weight_format"))

    def encoder(self, name: str, shape: tuple[int, ...], dtype: Dtype) -> Encoder:
        """Return an encoder of a matrix."""
        if len(shape) != 2 or not dtype.is_mergeable or not name.endswith(".weight"):
            raise UnsupportedError(
                "8-bit codes are made of matrices of floats called `.weight`",
                where=name,
                got=f"{dtype.value} {shape}",
            )
        module = name.removesuffix(".weight")
        return _Bnb8Encoder(
            _weight(
                TensorSpec(name, Dtype.I8, shape),
                TensorSpec(f"{module}.SCB", Dtype.F32, shape[:1]),
                TensorSpec(f"{module}.weight_format", Dtype.U8, ()),
            )
        )


CODECS = (Bnb8Codec,)


class _Bnb8Encoder(Encoder):
    """Each row by itself."""

    row_step = 1

    def __init__(self, weight: Bnb8Weight) -> None:
        self.weight = weight

    def encode(self, begin: int, end: int, tile: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch  # noqa: PLC0415 (planning needs no torch)

        self.check_tile(begin, end, tile)
        half = tile.to(torch.float16)
        largest = half.abs().amax(dim=1).float()
        # a row of zeros: 0 * inf is NaN, and NaN as int8 is 0
        scaled = torch.nan_to_num(half * (127.0 / largest[:, None]), nan=0.0)
        return {"weight": scaled.round_().to(torch.int8), "SCB": largest}

    def finish(self) -> dict[str, torch.Tensor]:
        import torch  # noqa: PLC0415 (planning needs no torch)

        return {"weight_format": torch.zeros((), dtype=torch.uint8)}


def _weight(codes: Stored, scales: Stored, form: Stored | None) -> Bnb8Weight:
    if len(codes.shape) != 2:
        raise misfit(codes, "I8 (N, K)")
    if scales.dtype is not Dtype.F32 or scales.shape != codes.shape[:1]:
        raise misfit(scales, f"F32 {codes.shape[:1]}")
    parts = [Part("weight", codes), Part("SCB", scales)]
    if form is not None:
        parts.append(Part("weight_format", form))
    return Bnb8Weight(name=codes.name, shape=codes.shape, dtype=Dtype.F32, parts=tuple(parts))
