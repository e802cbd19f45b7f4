"""A linear of codebook entries, and how AQLM checkpoints hold one.

C codebooks of V = 2^b entries, each for a group of G inputs of one output:

    W[n, group] ~ scales[n] * sum_c books[c, codes[n, group, c]]

    codes      (N, K / G, C) int8, or int16 above 8 bits: unsigned numbers in signed words
    codebooks  (C, V, 1, G) float16
    scales     (N, 1, 1, 1) float16

Source: the package `aqlm`, its `QuantizedLinear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from streammerge.dtypes import Dtype
from streammerge.errors import QuantizationError
from streammerge.quantize.linear import linear_specs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streammerge.checkpoint.header import TensorSpec
    from streammerge.config.codebooks import Codebooks
    from streammerge.quantize.skeleton import QuantizedModule

__all__ = ["LEAST_SCALE", "CodebookLayout", "CodebookLinear", "pack_codebooks", "sums_of"]

# of float16's normal numbers: smaller scales lose bits
LEAST_SCALE = 2.0**-14


def sums_of(codes: torch.Tensor, books: torch.Tensor) -> torch.Tensor:
    """Return the sums of entries, (n, K), of codes (n, K / G, C)."""
    total = books[0][codes[:, :, 0].long()]
    for number in range(1, len(books)):
        total += books[number][codes[:, :, number].long()]
    return total.flatten(1)


@dataclass(slots=True)
class CodebookLinear:
    """One layer's weight."""

    codes: torch.Tensor
    """(N, K / G, C) int32."""
    books: torch.Tensor
    """(C, V, G) float32."""
    scales: torch.Tensor
    """(N,) float32."""
    relative_error: float = 0.0
    """`||X (W - W_q)||^2 / ||X W||^2` on the calibration inputs X."""

    def dequantize(
        self, dtype: torch.dtype = torch.float32, *, rows: slice = slice(None)
    ) -> torch.Tensor:
        """Return (N, K), or some rows of it: what the codes stand for."""
        return sums_of(self.codes[rows], self.books).mul_(self.scales[rows, None]).to(dtype)


@dataclass(frozen=True, slots=True)
class CodebookLayout:
    """How the linears of one checkpoint are stored."""

    codebooks: Codebooks

    @property
    def ends(self) -> tuple[str, ...]:
        """Ends of the names of what stands in a weight's place."""
        return ".codes", ".codebooks", ".scales"

    def tensors(
        self, name: str, *, rows: int, features: int, bias: Dtype | None = None
    ) -> tuple[TensorSpec, ...]:
        """Return what is stored for a linear, in the order of the file.

        Args:
            name: Path of the module, without `.weight`.
            rows: N.
            features: K.
            bias: Dtype of the bias, which is stored as it is; None without one.

        Raises:
            QuantizationError: The layout cannot hold a weight of this shape.
        """
        self.check(rows, features, where=name)
        books = self.codebooks
        groups, dtype = features // books.group_size, Dtype.I8 if books.bits <= 8 else Dtype.I16
        shapes: list[tuple[str, Dtype, tuple[int, ...]]] = [
            ("codes", dtype, (rows, groups, books.count)),
            ("codebooks", Dtype.F16, (books.count, books.entries, 1, books.group_size)),
            ("scales", Dtype.F16, (rows, 1, 1, 1)),
        ]
        return linear_specs(name, shapes, rows=rows, bias=bias)

    def check(self, rows: int, features: int, *, where: str | None = None) -> None:
        """Make sure that the layout can hold a weight of a shape, and has a use for its entries.

        Raises:
            QuantizationError: It cannot.
        """
        size, entries = self.codebooks.group_size, self.codebooks.entries
        if features % size:
            raise QuantizationError(
                "AQLM cannot store a weight of this shape",
                where=where,
                expected=f"in_features in groups of {size}",
                got=f"{rows} x {features}",
                hint="choose an export_quantization_in_group_size that divides it",
            )
        groups = rows * (features // size)
        if groups < entries:
            raise QuantizationError(
                "codebooks have more entries than the weight has groups",
                where=where,
                expected=f"{entries} groups of {size} inputs or more",
                got=f"{groups} ({rows} x {features})",
                hint="choose an export_quantization_scheme with fewer bits per codebook, "
                "such as 2x8",
            )

    def loader_note(self, modules: Sequence[QuantizedModule]) -> str | None:
        """Say which linears some loaders do not take."""
        experts = [module.name for module in modules if ".experts." in f".{module.name}."]
        if not experts:
            return None
        return (
            f"transformers 5 has the experts of a layer in one tensor and cannot load the codes "
            f"of {len(experts)} linears, such as '{experts[0]}'; method gptq would do"
        )

    def weights(self, stored: Mapping[str, tuple[int, ...]]) -> int:
        """Return how many weights the tensors of a checkpoint stand for.

        Args:
            stored: Their shapes, by name.
        """
        codes = [shape for name, shape in stored.items() if name.endswith(".codes")]
        return sum(rows * groups * self.codebooks.group_size for rows, groups, _ in codes)


def pack_codebooks(linear: CodebookLinear) -> dict[str, torch.Tensor]:
    """Return the stored tensors of a linear, by the ends of their names.

    Raises:
        QuantizationError: A codebook or scale is not what float16 holds.
    """
    entries = linear.books.shape[1]
    books, scales = linear.books.half(), linear.scales.half()
    if not (
        torch.equal(books.float(), linear.books) and torch.equal(scales.float(), linear.scales)
    ):
        raise QuantizationError("codebooks are rounded on storing; codes were chosen for others")
    # numbers above the highest of a signed word wrap around to its negative ones
    words = torch.where(linear.codes >= entries // 2, linear.codes - entries, linear.codes)
    return {
        "codes": words.to(torch.int8 if entries <= 1 << 8 else torch.int16).contiguous(),
        "codebooks": books[:, :, None].contiguous(),
        "scales": scales[:, None, None, None].contiguous(),
    }
