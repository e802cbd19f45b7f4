"""MXFP4 as gpt-oss stores its experts.

    gate_up_proj_blocks, down_proj_blocks  uint8 (E, C, K / 32, 16)  two codes a byte, low one first
    gate_up_proj_scales, down_proj_scales  uint8 (E, C, K / 32)      exponents of two, 127 for 1

The parameter that transformers makes of it, `gate_up_proj`, is (E, K, C): what is a row here is a
column there. A value is `code * 2^(scale - 127)`, rounded to the model's dtype. A scale of 255 is
2^128, as in transformers, and not the NaN that the OCP specification calls it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from streammerge.codecs.base import (
    Codec,
    CodedWeight,
    Extent,
    Found,
    Part,
    misfit,
    missing,
    sort_out,
)
from streammerge.dtypes import Dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from streammerge.codecs.base import Stored

__all__ = ["CODECS", "Mxfp4Codec", "Mxfp4Weight"]

GROUP = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Weight(CodedWeight):
    """The experts of one projection; `shape` is (E, K, C)."""

    @property
    def row_step(self) -> int:
        """The inputs that share a scale."""
        return GROUP

    def extents(self, begin: int, end: int) -> tuple[Extent, ...]:
        """Return the bytes that rows are decoded from."""
        self.check_tile(begin, end)
        expert, first, last = self.in_matrix(begin, end)
        lines, groups = self.columns, self.matrix_rows // GROUP
        group, after = first // GROUP, last // GROUP
        start = expert * lines * groups + group
        count = after - group
        return (
            Extent("blocks", start * 16, count * 16, lines, groups * 16),
            Extent("scales", start, count, lines, groups),
        )

    def values(self, begin: int, end: int, data: Mapping[str, memoryview]) -> torch.Tensor:
        """Return (end - begin, C) float32."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        from streammerge.codecs.tensors import as_tensor, decode_e2m1  # noqa: PLC0415

        groups = (end - begin) // GROUP
        packed = as_tensor(data, "blocks", Dtype.U8, (self.columns, groups, 16))
        scales = as_tensor(data, "scales", Dtype.U8, (self.columns, groups, 1))
        # not a product: 2^128 is no float32, though half of it is
        return torch.ldexp(decode_e2m1(packed), scales.int() - 127).flatten(1).T


@dataclass(frozen=True, slots=True)
class Mxfp4Codec(Codec):
    """gpt-oss's experts."""

    title: ClassVar[str] = "MXFP4, gpt-oss's experts"
    selector: ClassVar[str] = "quant_method: mxfp4"
    stored: ClassVar[str] = "blocks, scales"
    reference: ClassVar[str] = "transformers"
    remarks: ClassVar[str] = "rows are those of transformers' parameter (E, K, C)"

    dtype: Dtype

    @classmethod
    def of(cls, section: Mapping[str, Any], dtype: Dtype) -> Mxfp4Codec | None:
        """Return the codec if the section selects it."""
        return cls(dtype) if section.get("quant_method") == "mxfp4" else None

    def find(self, tensors: Iterable[Stored], read: Callable[[Stored], bytes]) -> Found:
        """Group blocks with their scales."""
        del read  # shapes are all in the headers
        by_name = {tensor.name: tensor for tensor in tensors}
        weights = []
        for name, blocks in by_name.items():
            base = name.removesuffix("_blocks")
            if base == name:
                continue
            scales = by_name.get(f"{base}_scales")
            if scales is None:
                raise missing(base, f"{base}_scales")
            weights.append(self._weight(base, blocks, scales))
        return sort_out(by_name, weights, marks=("_scales",))

    def _weight(self, name: str, blocks: Stored, scales: Stored) -> Mxfp4Weight:
        shape = blocks.shape
        if blocks.dtype is not Dtype.U8 or len(shape) != 4 or shape[3] != GROUP // 2:
            raise misfit(blocks, "U8 (E, C, K / 32, 16)")
        if scales.dtype is not Dtype.U8 or scales.shape != shape[:3]:
            raise misfit(scales, f"U8 {shape[:3]}")
        return Mxfp4Weight(
            name=name,
            shape=(shape[0], GROUP * shape[2], shape[1]),
            dtype=self.dtype,
            parts=(Part("blocks", blocks), Part("scales", scales)),
        )


CODECS = (Mxfp4Codec,)
