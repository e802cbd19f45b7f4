"""GPTQ: codes of neighbouring inputs share a word, and rows are stored as columns.

N out_features, K in_features, G groups of inputs, b bits of a code.

    qweight  int32 (ceil(K b / 32), N)
    qzeros   int32 (G, ceil(N b / 32))    zeros of neighbouring outputs share a word
    scales   float16 or bfloat16 (G, N)
    g_idx    int32 (K,)                   the group of each input, in any order; may be missing

A value is `scale * (code - zero)`, rounded once to the dtype of the scales. The checkpoint format
`gptq_v2` stores zeros as they are, and `gptq` each less 1. GPTQModel adds the 1 to whole words, so
that a stored zero of all ones carries into its neighbour, except with 3 bits; so does this.
"""

from __future__ import annotations

import math
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
from streammerge.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from streammerge.codecs.base import Stored

__all__ = ["CODECS", "GptqCodec", "GptqWeight"]

BITS = (2, 3, 4, 8)
ROLES = ("qweight", "qzeros", "scales", "g_idx")
# words of ones, by the bits of a code
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
_SECTION = "quantization_config"


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqWeight(CodedWeight):
    """One weight of GPTQ codes."""

    bits: int
    group_size: int
    """Inputs per group, where no `g_idx` says which is in which."""
    are_zeros_less_one: bool
    """Whether 1 is added to each stored zero."""

    @property
    def row_step(self) -> int:
        """Rows whose zeros fill whole words."""
        return 32 // math.gcd(32, self.bits)

    def extents(self, begin: int, end: int) -> tuple[Extent, ...]:
        """Return the bytes that rows are decoded from."""
        self.check_tile(begin, end)
        scale_bits = self.part("scales").dtype.bits
        found = [
            self.by_columns("qweight", begin, end, item_bits=32),
            self.by_columns("qzeros", begin, end, item_bits=self.bits),
            self.by_columns("scales", begin, end, item_bits=scale_bits),
        ]
        if self.has("g_idx"):
            found.append(self.whole("g_idx"))
        return tuple(found)

    def values(self, begin: int, end: int, data: Mapping[str, memoryview]) -> torch.Tensor:
        """Return (end - begin, K) float32."""
        from streammerge.codecs.tensors import as_tensor, unpack_words  # noqa: PLC0415

        count = end - begin
        groups = self.part("scales").shape[0]
        words = self.part("qweight").shape[0]
        zero_words = -(-count * self.bits // 32)
        packed = as_tensor(data, "qweight", Dtype.I32, (words, count))
        codes = unpack_words(packed.T.contiguous(), self.bits, self.columns).float()
        stored = as_tensor(data, "qzeros", Dtype.I32, (groups, zero_words))
        if self.are_zeros_less_one and self.bits != 3:
            stored = stored + _ONES[self.bits]
        zeros = unpack_words(stored, self.bits, count).float().T
        if self.are_zeros_less_one and self.bits == 3:
            zeros = (zeros + 1) % 8
        scales = as_tensor(data, "scales", self.part("scales").dtype, (groups, count)).float().T
        index = self._groups(data, groups)
        return codes.sub_(zeros[:, index]).mul_(scales[:, index])

    def _groups(self, data: Mapping[str, memoryview], groups: int) -> torch.Tensor:
        """Return the group of each input."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        from streammerge.codecs.tensors import as_tensor  # noqa: PLC0415

        if not self.has("g_idx"):
            return torch.arange(self.columns) // self.group_size
        index = as_tensor(data, "g_idx", Dtype.I32, (self.columns,)).long()
        low, high = int(index.min()), int(index.max())
        # GPTQModel indexes with negative numbers from the end; no writer stores any
        if low < 0 or high >= groups:
            raise CheckpointError(
                "an input is in no group",
                where=self.part("g_idx").name,
                expected=f"0 to {groups - 1}",
                got=f"{low} to {high}",
            )
        return index


@dataclass(frozen=True, slots=True)
class GptqCodec(Codec):
    """GPTQ and its successor."""

    title: ClassVar[str] = "GPTQ, 2, 3, 4 and 8 bits"
    selector: ClassVar[str] = "quant_method: gptq"
    stored: ClassVar[str] = "qweight, qzeros, scales, g_idx"
    reference: ClassVar[str] = "GPTQModel"
    remarks: ClassVar[str] = "groups in any order; written by a quantizing export"

    bits: int
    group_size: int
    checkpoint_format: str = "gptq"

    @classmethod
    def of(cls, section: Mapping[str, Any], dtype: Dtype) -> GptqCodec | None:
        """Return the codec if the section selects it."""
        del dtype  # values are rounded to the dtype of the scales
        if section.get("quant_method") != "gptq":
            return None
        bits, size = section.get("bits"), section.get("group_size", -1)
        if bits not in BITS:
            raise _refusal("bits", f"one of {BITS}", bits)
        if type(size) is not int or (size != -1 and size <= 0):
            raise _refusal("group_size", "-1 or a number of inputs", size)
        checkpoint_format = section.get("checkpoint_format", "gptq")
        if checkpoint_format not in ("gptq", "gptq_v2"):
            raise _refusal("checkpoint_format", "gptq or gptq_v2", checkpoint_format)
        if section.get("pack_dtype", "int32") != "int32":
            raise _refusal("pack_dtype", "int32", section["pack_dtype"])
        for pattern in section.get("dynamic") or {}:
            if not pattern.startswith("-:"):
                raise _refusal("dynamic", "the same codes for all modules", repr(pattern))
        return cls(bits, size, checkpoint_format)

    def find(self, tensors: Iterable[Stored], read: Callable[[Stored], bytes]) -> Found:
        """Group tensors by their module."""
        del read  # shapes are all in the headers
        return find_by_module(tensors, self._weight)

    def _weight(self, module: str, parts: Mapping[str, Stored]) -> GptqWeight:
        for role in ("qweight", "qzeros", "scales"):
            if role not in parts:
                raise missing(module, f"{module}.{role}")
        qweight, qzeros, scales = (parts[role] for role in ("qweight", "qzeros", "scales"))
        rows = qweight.shape[-1] if len(qweight.shape) == 2 else 0
        features = self._features(parts)
        groups = 1 if self.group_size == -1 else -(-features // self.group_size)
        if scales.dtype not in (Dtype.F16, Dtype.BF16, Dtype.F32) or len(scales.shape) != 2:
            raise misfit(scales, f"F16 ({groups}, {rows})")
        expected = {
            "qweight": (Dtype.I32, (-(-features * self.bits // 32), rows)),
            "scales": (scales.dtype, (groups, rows)),
            "qzeros": (Dtype.I32, (groups, -(-rows * self.bits // 32))),
            "g_idx": (Dtype.I32, (features,)),
        }
        check_parts(parts, expected)
        if self.bits == 3 and (rows % 32 or features % 32):
            raise misfit(qzeros, "rows and columns in multiples of 32, for codes of 3 bits")
        return GptqWeight(
            name=f"{module}.weight",
            shape=(rows, features),
            dtype=scales.dtype,
            parts=tuple(Part(role, parts[role]) for role in expected if role in parts),
            bits=self.bits,
            group_size=features if self.group_size == -1 else self.group_size,
            are_zeros_less_one=self.checkpoint_format == "gptq",
        )

    def _features(self, parts: Mapping[str, Stored]) -> int:
        """Return K: from `g_idx`, or from words, which it fills where there is no `g_idx`."""
        if "g_idx" in parts:
            return math.prod(parts["g_idx"].shape)
        return parts["qweight"].shape[0] * 32 // self.bits


CODECS = (GptqCodec,)


def find_by_module(
    tensors: Iterable[Stored], make: Callable[[str, Mapping[str, Stored]], CodedWeight]
) -> Found:
    """Group `qweight`, `qzeros`, `scales` and `g_idx` of modules that have a `qweight`."""
    by_name = {tensor.name: tensor for tensor in tensors}
    weights = []
    for name in by_name:
        module, _, role = name.rpartition(".")
        if role == "qweight":
            parts = {end: by_name.get(f"{module}.{end}") for end in ROLES}
            held = {end: tensor for end, tensor in parts.items() if tensor is not None}
            weights.append(make(module, held))
    return sort_out(by_name, weights, marks=(".qzeros", ".g_idx"))


def check_parts(
    parts: Mapping[str, Stored], expected: Mapping[str, tuple[Dtype, tuple[int, ...]]]
) -> None:
    """Make sure that parts have the dtypes and shapes that follow from one another.

    Raises:
        CheckpointError: One has others.
    """
    for role, (dtype, shape) in expected.items():
        if role in parts and (parts[role].dtype is not dtype or parts[role].shape != shape):
            raise misfit(parts[role], f"{dtype.value} {shape}")


def _refusal(key: str, expected: object, got: object) -> UnsupportedError:
    return UnsupportedError(
        "GPTQ codes of this variety are not decoded",
        where=f"{_SECTION}.{key}",
        expected=expected,
        got=got,
    )
