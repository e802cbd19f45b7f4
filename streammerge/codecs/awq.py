"""AWQ, layout `gemm`: eight neighbouring outputs share a word, in an order of their own.

    qweight  int32 (K, N / 8)    4 bits; the outputs of a word in the order 0 2 4 6 1 3 5 7
    qzeros   int32 (G, N / 8)    likewise
    scales   float16 (G, N)

A value is `scale * (code - zero)`, rounded once to the dtype of the scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from streammerge.codecs.base import Codec, CodedWeight, Extent, Found, Part, misfit, missing
from streammerge.codecs.gptq import check_parts, find_by_module
from streammerge.dtypes import Dtype
from streammerge.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from streammerge.codecs.base import Stored

__all__ = ["CODECS", "AwqCodec", "AwqWeight"]

# which of eight neighbouring outputs each place of a word has, lowest bits first
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqWeight(CodedWeight):
    """One weight of AWQ codes."""

    group_size: int

    @property
    def row_step(self) -> int:
        """The rows of a word."""
        return 8

    def extents(self, begin: int, end: int) -> tuple[Extent, ...]:
        """Return the bytes that rows are decoded from."""
        self.check_tile(begin, end)
        return (
            self.by_columns("qweight", begin, end, item_bits=4),
            self.by_columns("qzeros", begin, end, item_bits=4),
            self.by_columns("scales", begin, end, item_bits=self.part("scales").dtype.bits),
        )

    def values(self, begin: int, end: int, data: Mapping[str, memoryview]) -> torch.Tensor:
        """Return (end - begin, K) float32."""
        from streammerge.codecs.tensors import as_tensor  # noqa: PLC0415 (it imports torch)

        count, groups = end - begin, self.part("scales").shape[0]
        packed = as_tensor(data, "qweight", Dtype.I32, (self.columns, count // 8))
        zero_words = as_tensor(data, "qzeros", Dtype.I32, (groups, count // 8))
        scales = as_tensor(data, "scales", self.part("scales").dtype, (groups, count)).float().T
        steps = unpack_awq_words(packed).float().T.contiguous()
        zeros = unpack_awq_words(zero_words).float().T
        by_group = steps.view(count, groups, self.group_size)
        by_group.sub_(zeros[..., None]).mul_(scales[..., None])
        return steps


@dataclass(frozen=True, slots=True)
class AwqCodec(Codec):
    """AWQ's layout `gemm`."""

    title: ClassVar[str] = "AWQ gemm, 4 bits"
    selector: ClassVar[str] = "quant_method: awq"
    stored: ClassVar[str] = "qweight, qzeros, scales"
    reference: ClassVar[str] = "GPTQModel and AutoAWQ"
    remarks: ClassVar[str] = "written by a quantizing export"

    group_size: int

    @classmethod
    def of(cls, section: Mapping[str, Any], dtype: Dtype) -> AwqCodec | None:
        """Return the codec if the section selects it."""
        del dtype  # values are rounded to the dtype of the scales
        if section.get("quant_method") != "awq":
            return None
        # AutoAWQ wrote `w_bit`, `q_group_size`; transformers writes `bits`, `group_size`
        bits = section.get("bits", section.get("w_bit", 4))
        size = section.get("group_size", section.get("q_group_size", 128))
        version = str(section.get("version", "gemm")).lower()
        for key, expected, got in (
            ("bits", 4, bits),
            ("version", "gemm", version),
            ("zero_point", True, section.get("zero_point", True)),
        ):
            if got != expected:
                raise _refusal(key, expected, got)
        if type(size) is not int or (size != -1 and size <= 0):
            raise _refusal("group_size", "-1 or a number of inputs", size)
        return cls(size)

    def find(self, tensors: Iterable[Stored], read: Callable[[Stored], bytes]) -> Found:
        """Group tensors by their module."""
        del read  # shapes are all in the headers
        return find_by_module(tensors, self._weight)

    def _weight(self, module: str, parts: Mapping[str, Stored]) -> AwqWeight:
        for role in ("qweight", "qzeros", "scales"):
            if role not in parts:
                raise missing(module, f"{module}.{role}")
        qweight, scales = parts["qweight"], parts["scales"]
        if len(qweight.shape) != 2:
            raise misfit(qweight, "(K, N / 8)")
        features, rows = qweight.shape[0], 8 * qweight.shape[1]
        size = features if self.group_size == -1 else self.group_size
        if features % size:
            raise misfit(qweight, f"groups of {size} inputs")
        groups = features // size
        if scales.dtype not in (Dtype.F16, Dtype.BF16):
            raise misfit(scales, "F16 or BF16")
        expected = {
            "qweight": (Dtype.I32, (features, rows // 8)),
            "qzeros": (Dtype.I32, (groups, rows // 8)),
            "scales": (scales.dtype, (groups, rows)),
        }
        check_parts(parts, expected)
        return AwqWeight(
            name=f"{module}.weight",
            shape=(rows, features),
            dtype=scales.dtype,
            parts=tuple(Part(role, parts[role]) for role in expected),
            group_size=size,
        )


CODECS = (AwqCodec,)


def unpack_awq_words(words: torch.Tensor) -> torch.Tensor:
    """Return the (M, 8 L) uint8 codes of (M, L) int32."""
    from streammerge.codecs.tensors import unpack_words  # noqa: PLC0415 (it imports torch)

    codes = unpack_words(words, 4, 8 * words.shape[1]).view(len(words), -1, 8)
    places = [ORDER.index(output) for output in range(8)]
    return codes[..., places].flatten(1)


def _refusal(key: str, expected: object, got: object) -> UnsupportedError:
    return UnsupportedError(
        "AWQ codes of this variety are not decoded",
        where=f"quantization_config.{key}",
        expected=expected,
        got=got,
    )
