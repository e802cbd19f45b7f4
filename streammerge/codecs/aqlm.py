"""AQLM: sums of codebook entries.

o out_group_size, i in_group_size, C codebooks of b bits.

    codes      int8, int16 or int32 (N / o, K / i, C)   unsigned numbers in signed words
    codebooks  float16 (C, 2^b, o, i)
    scales     float16 (N / o, 1, 1, 1)

A group of o x i values is the sum of one entry of each codebook, rounded, times the scale of its
rows, rounded again: both in the dtype of the codebooks.
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
from streammerge.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from streammerge.codecs.base import Stored

__all__ = ["CODECS", "AqlmCodec", "AqlmWeight"]

_ROLES = ("codes", "codebooks", "scales")


@dataclass(frozen=True, slots=True, kw_only=True)
class AqlmWeight(CodedWeight):
    """One weight of codebook entries."""

    @property
    def row_step(self) -> int:
        """The rows of a codebook entry."""
        return self.part("codebooks").shape[2]

    def extents(self, begin: int, end: int) -> tuple[Extent, ...]:
        """Return the bytes that rows are decoded from."""
        self.check_tile(begin, end)
        return (
            self.by_rows("codes", begin, end, step=self.row_step),
            self.whole("codebooks"),
            self.by_rows("scales", begin, end, step=self.row_step),
        )

    def values(self, begin: int, end: int, data: Mapping[str, memoryview]) -> torch.Tensor:
        """Return (end - begin, K) float32."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        from streammerge.codecs.tensors import as_tensor  # noqa: PLC0415

        stored, books = self.part("codes"), self.part("codebooks")
        number, entries, high, wide = books.shape
        lines, groups = (end - begin) // high, self.columns // wide
        codes = as_tensor(data, "codes", stored.dtype, (lines, groups, number)).long() % entries
        tables = as_tensor(data, "codebooks", books.dtype, books.shape)
        scales = as_tensor(data, "scales", books.dtype, (lines, 1, 1, 1))
        # aqlm sums with this operation too, which has a rounding of its own for bfloat16
        total = torch.nn.functional.embedding_bag(
            (codes + torch.arange(number) * entries).flatten(0, 1),
            tables.reshape(number * entries, high * wide),
            mode="sum",
        )
        scaled = total.view(lines, groups, high, wide).mul_(scales)
        return scaled.swapaxes(1, 2).reshape(end - begin, self.columns).float()


@dataclass(frozen=True, slots=True)
class AqlmCodec(Codec):
    """AQLM."""

    title: ClassVar[str] = "AQLM"
    selector: ClassVar[str] = "quant_method: aqlm"
    stored: ClassVar[str] = "codes, codebooks, scales"
    reference: ClassVar[str] = "aqlm on a CPU"

    bits: int
    codebooks: int
    group: tuple[int, int]
    """Outputs and inputs of an entry."""

    @classmethod
    def of(cls, section: Mapping[str, Any], dtype: Dtype) -> AqlmCodec | None:
        """Return the codec if the section selects it."""
        del dtype  # values have the dtype of the codebooks
        if section.get("quant_method") != "aqlm":
            return None
        defaults = {
            "nbits_per_codebook": 16,
            "num_codebooks": 1,
            "out_group_size": 1,
            "in_group_size": 8,
        }
        sizes = {key: section.get(key, default) for key, default in defaults.items()}
        for key, size in sizes.items():
            if type(size) is not int or not 0 < size <= 1 << 16:
                raise UnsupportedError(
                    "AQLM codes of this variety are not decoded",
                    where=f"quantization_config.{key}",
                    expected="a positive number",
                    got=repr(size)[:80],
                )
        if sizes["nbits_per_codebook"] > 16:
            raise UnsupportedError(
                "AQLM codes of this variety are not decoded",
                where="quantization_config.nbits_per_codebook",
                expected="at most 16",
                got=sizes["nbits_per_codebook"],
            )
        bits, number, high, wide = sizes.values()
        return cls(bits, number, (high, wide))

    def find(self, tensors: Iterable[Stored], read: Callable[[Stored], bytes]) -> Found:
        """Group tensors by their module."""
        del read  # shapes are all in the headers
        by_name = {tensor.name: tensor for tensor in tensors}
        weights = []
        for name in by_name:
            module = name.removesuffix(".codes")
            if module != name:
                weights.append(self._weight(module, by_name))
        return sort_out(by_name, weights, marks=(".codebooks",))

    def _weight(self, module: str, by_name: Mapping[str, Stored]) -> AqlmWeight:
        for role in _ROLES:
            if f"{module}.{role}" not in by_name:
                raise missing(module, f"{module}.{role}")
        codes, books, scales = (by_name[f"{module}.{role}"] for role in _ROLES)
        high, wide = self.group
        dtype = Dtype.I8 if self.bits <= 8 else Dtype.I16
        if codes.dtype is not dtype or len(codes.shape) != 3 or codes.shape[2] != self.codebooks:
            raise misfit(codes, f"{dtype.value} (N / {high}, K / {wide}, {self.codebooks})")
        shape = (self.codebooks, 1 << self.bits, high, wide)
        if books.dtype not in (Dtype.F16, Dtype.BF16, Dtype.F32) or books.shape != shape:
            raise misfit(books, f"F16 {shape}")
        if scales.dtype is not books.dtype or scales.shape != (codes.shape[0], 1, 1, 1):
            raise misfit(scales, f"{books.dtype.value} {(codes.shape[0], 1, 1, 1)}")
        return AqlmWeight(
            name=f"{module}.weight",
            shape=(codes.shape[0] * high, codes.shape[1] * wide),
            dtype=books.dtype,
            parts=tuple(Part(role, by_name[f"{module}.{role}"]) for role in _ROLES),
        )


CODECS = (AqlmCodec,)
