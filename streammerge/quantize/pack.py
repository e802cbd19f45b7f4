"""The stored layouts of a quantized linear: what GPTQ and AWQ checkpoints hold for a weight.

Shapes: N out_features, K in_features, G groups of inputs, b bits of a code. A word is an int32 that
holds codes one after the other from its lowest bit on; a code may run over into the next word.

    gptq      qweight  (ceil(K b / 32), N)  codes of neighbouring inputs share a word
              qzeros   (G, ceil(N b / 32))  zeros of neighbouring outputs share a word, each less 1
              scales   (G, N) float16
              g_idx    (K,) int32           the group of each input
    gptq_v2   as gptq, but zeros as they are
    awq       qweight  (K, N / 8)           4 bits; a word's outputs in the order 0 2 4 6 1 3 5 7
              qzeros   (G, N / 8)           likewise
              scales   (G, N) float16

Source: GPTQModel's `TorchLinear` (gptq), and the layout `gemm` of AutoAWQ (awq).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from streammerge.codecs.awq import ORDER, unpack_awq_words
from streammerge.codecs.gptq import BITS
from streammerge.codecs.tensors import WORD_BITS, pack_words, unpack_words
from streammerge.dtypes import Dtype
from streammerge.errors import QuantizationError
from streammerge.quantize.linear import QuantizedLinear, linear_specs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streammerge.checkpoint.header import TensorSpec
    from streammerge.quantize.settings import CheckpointFormat, QuantizeSettings
    from streammerge.quantize.skeleton import QuantizedModule

__all__ = ["PackedLayout", "pack_awq", "pack_gptq", "unpack_awq", "unpack_gptq"]


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """How the linears of one checkpoint are stored."""

    method: Literal["gptq", "awq"]
    bits: int
    group_size: int
    """Inputs per group; -1 for one group per row."""

    @classmethod
    def of(cls, settings: QuantizeSettings) -> PackedLayout:
        """Return the layout that settings lead to; codes of `rtn` are stored as those of `gptq`."""
        method: Literal["gptq", "awq"] = "awq" if settings.method == "awq" else "gptq"
        return cls(method, int(settings.bits), settings.group_size)

    @property
    def ends(self) -> tuple[str, ...]:
        """Ends of the names of what stands in a weight's place."""
        return ".qweight", ".qzeros", ".scales", ".g_idx"

    def groups(self, features: int) -> int:
        """Return the number of groups of a row with K inputs."""
        return 1 if self.group_size == -1 else math.ceil(features / self.group_size)

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
        groups = self.groups(features)
        shapes: list[tuple[str, Dtype, tuple[int, ...]]]
        if self.method == "awq":
            shapes = [
                ("qweight", Dtype.I32, (features, _words(rows, self.bits))),
                ("qzeros", Dtype.I32, (groups, _words(rows, self.bits))),
                ("scales", Dtype.F16, (groups, rows)),
            ]
        else:
            shapes = [
                ("qweight", Dtype.I32, (_words(features, self.bits), rows)),
                ("qzeros", Dtype.I32, (groups, _words(rows, self.bits))),
                ("scales", Dtype.F16, (groups, rows)),
                ("g_idx", Dtype.I32, (features,)),
            ]
        return linear_specs(name, shapes, rows=rows, bias=bias)

    def check(self, rows: int, features: int, *, where: str | None = None) -> None:
        """Make sure that the layout can hold a weight of a shape.

        Raises:
            QuantizationError: It cannot.
        """
        shape = f"{rows} x {features}"
        if self.bits not in BITS:
            raise QuantizationError(
                "codes of this width are not stored",
                where=where,
                expected="2, 3, 4 or 8 bits",
                got=self.bits,
            )
        if self.method == "awq":
            group = features if self.group_size == -1 else self.group_size
            if self.bits != 4:
                raise QuantizationError(
                    "AWQ stores codes of 4 bits only",
                    where=where,
                    got=f"{self.bits} bits",
                    hint="use the method gptq, which has 2, 3, 4 and 8",
                )
            if rows % 8 or features % group:
                raise QuantizationError(
                    "AWQ cannot store a weight of this shape",
                    where=where,
                    expected=f"out_features in eights and in_features in groups of {group}",
                    got=shape,
                    hint="choose a smaller group size, or the method gptq",
                )
        elif self.bits == 3 and (rows % 32 or features % 32):
            # 32 codes fill three words; loaders cut the words into threes
            raise QuantizationError(
                "codes of 3 bits cannot store a weight of this shape",
                where=where,
                expected="out_features and in_features that are multiples of 32",
                got=shape,
                hint="use 4 bits",
            )

    def is_whole(self, rows: int, features: int) -> bool:
        """Tell whether a weight's words and groups are all full.

        vLLM and SGLang load no others: they count words and groups by division without a rest.
        """
        group = features if self.group_size == -1 else self.group_size
        step = WORD_BITS // math.gcd(WORD_BITS, self.bits)
        return not (rows % step or features % step or features % group)

    def loader_note(self, modules: Sequence[QuantizedModule]) -> str | None:
        """Say which linears some loaders do not take, and what they would take."""
        found = [module for module in modules if not self.is_whole(*module.size)]
        if not found:
            return None
        name, (rows, features) = found[0].name, found[0].size
        sizes = [
            size
            for size in (128, 64, 32, -1)
            if all(replace(self, group_size=size).is_whole(*module.size) for module in found)
        ]
        advice = (
            f"export_quantization_group_size: {sizes[0]} would do"
            if sizes
            else "no group size would change that"
        )
        return (
            f"vLLM and SGLang cannot load {len(found)} of the quantized linears, such as '{name}' "
            f"({rows} x {features}), whose words or groups are not all full; {advice}"
        )

    def weights(self, stored: Mapping[str, tuple[int, ...]]) -> int:
        """Return how many weights the tensors of a checkpoint stand for.

        Args:
            stored: Their shapes, by name.
        """
        words = sum(math.prod(s) for name, s in stored.items() if name.endswith(".qweight"))
        return words * WORD_BITS // self.bits


def pack_gptq(
    quantized: QuantizedLinear, checkpoint_format: CheckpointFormat = "gptq"
) -> dict[str, torch.Tensor]:
    """Return the stored tensors of a linear, by the ends of their names.

    Raises:
        QuantizationError: The format cannot hold the shape, a scale, or a zero of 0 (`gptq`).
    """
    rows, features = quantized.codes.shape
    PackedLayout("gptq", quantized.bits, quantized.group_size).check(rows, features)
    _check_values(quantized)
    zeros = quantized.zeros.T
    if checkpoint_format == "gptq":
        if bool((zeros < 1).any()):
            # what is stored is one less, and loaders add the one to whole words: a carry out of one
            # zero would change its neighbour
            raise QuantizationError(
                "a group's zero is 0, which the checkpoint format gptq cannot store",
                hint="use the checkpoint format gptq_v2, or symmetric codes",
            )
        zeros = zeros - 1
    return {
        "qweight": pack_words(quantized.codes, quantized.bits).T.contiguous(),
        "qzeros": pack_words(zeros.to(torch.uint8), quantized.bits),
        "scales": quantized.scales.T.to(torch.float16).contiguous(),
        "g_idx": quantized.g_idx.to(torch.int32).contiguous(),
    }


def unpack_gptq(
    tensors: Mapping[str, torch.Tensor],
    *,
    bits: int,
    group_size: int,
    checkpoint_format: CheckpointFormat = "gptq",
) -> QuantizedLinear:
    """Return the linear that stored tensors hold; the inverse of `pack_gptq`."""
    g_idx, scales = tensors["g_idx"], tensors["scales"]
    features, rows = len(g_idx), scales.shape[1]
    zeros = unpack_words(tensors["qzeros"], bits, rows).to(torch.int32)
    if checkpoint_format == "gptq":
        zeros += 1
    return QuantizedLinear(
        codes=unpack_words(tensors["qweight"].T.contiguous(), bits, features),
        scales=scales.T.to(torch.float32).contiguous(),
        zeros=zeros.T.contiguous(),
        g_idx=g_idx.clone(),
        bits=bits,
        group_size=features if group_size == -1 else group_size,
    )


def pack_awq(quantized: QuantizedLinear) -> dict[str, torch.Tensor]:
    """Return the stored tensors of a linear, by the ends of their names.

    Raises:
        QuantizationError: The layout cannot hold the shape, a scale, or groups out of order.
    """
    rows, features = quantized.codes.shape
    PackedLayout("awq", quantized.bits, quantized.group_size).check(rows, features)
    _check_values(quantized)
    in_order = torch.arange(features) // quantized.group_size
    if not torch.equal(quantized.g_idx.long(), in_order):
        raise QuantizationError("AWQ stores no order of groups, and these are out of order")
    return {
        "qweight": _pack_awq(quantized.codes),
        "qzeros": _pack_awq(quantized.zeros.to(torch.uint8)),
        "scales": quantized.scales.T.to(torch.float16).contiguous(),
    }


def unpack_awq(tensors: Mapping[str, torch.Tensor], *, group_size: int) -> QuantizedLinear:
    """Return the linear that stored tensors hold; the inverse of `pack_awq`."""
    scales = tensors["scales"]
    features = len(tensors["qweight"])
    group_size = features if group_size == -1 else group_size
    return QuantizedLinear(
        codes=unpack_awq_words(tensors["qweight"]).T.contiguous(),
        scales=scales.T.to(torch.float32).contiguous(),
        zeros=unpack_awq_words(tensors["qzeros"]).T.to(torch.int32).contiguous(),
        g_idx=(torch.arange(features) // group_size).to(torch.int32),
        bits=4,
        group_size=group_size,
    )


def _words(codes: int, bits: int) -> int:
    return math.ceil(codes * bits / WORD_BITS)


def _check_values(quantized: QuantizedLinear) -> None:
    """Make sure that nothing is lost or spills into a neighbour."""
    highest = 2**quantized.bits - 1
    if int(quantized.codes.max()) > highest:
        raise QuantizationError("a code has more bits than the format", expected=highest)
    if int(quantized.zeros.min()) < 0 or int(quantized.zeros.max()) > highest:
        raise QuantizationError("a zero is not a code", expected=f"0 to {highest}")
    stored = quantized.scales.to(torch.float16)
    if not bool(torch.isfinite(stored).all()):
        raise QuantizationError(
            "a scale is NaN, Inf or too large for float16",
            hint="does the weight hold such values? then it cannot be quantized",
        )
    if not torch.equal(stored.float(), quantized.scales):
        raise QuantizationError("scales are rounded on storing; codes were chosen for others")


def _pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """Pack (N, M) codes of 4 bits along N into (M, N / 8) int32."""
    return pack_words(codes.view(-1, 8, codes.shape[1])[:, list(ORDER)].flatten(0, 1).T, 4)
