"""Weights of a GPTQ checkpoint by name, as if it had them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from streammerge.errors import QuantizationError, UnsupportedError
from streammerge.quantize.pack import BITS, unpack_gptq
from streammerge.quantize.source import MergedSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from streammerge.plan.merge_plan import MergePlan
    from streammerge.plan.ops import TensorPlan
    from streammerge.quantize.settings import CheckpointFormat

__all__ = ["DequantizedSource", "GptqFormat", "weight_names"]

_ENDS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """How a checkpoint's codes are stored."""

    bits: int
    group_size: int
    checkpoint_format: CheckpointFormat = "gptq"

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> GptqFormat:
        """Read the section `quantization_config` of config.json.

        Raises:
            UnsupportedError: The codes are of another kind.
        """
        method = section.get("quant_method")
        if method != "gptq":
            raise _refusal("quant_method", "gptq", method)
        bits, size = section.get("bits"), section.get("group_size", -1)
        if bits not in BITS:
            raise _refusal("bits", f"one of {BITS}", bits)
        if not isinstance(size, int) or (size != -1 and size <= 0):
            raise _refusal("group_size", "-1 or a number of inputs", size)
        checkpoint_format = section.get("checkpoint_format", "gptq")
        if checkpoint_format not in {"gptq", "gptq_v2"}:
            raise _refusal("checkpoint_format", "gptq or gptq_v2", checkpoint_format)
        if section.get("pack_dtype", "int32") != "int32":
            raise _refusal("pack_dtype", "int32", section["pack_dtype"])
        for pattern in section.get("dynamic") or {}:
            if not pattern.startswith("-:"):
                raise _refusal("dynamic", "the same codes for all modules", repr(pattern))
        return cls(bits, size, checkpoint_format)


class DequantizedSource(MergedSource):
    """Reads a GPTQ checkpoint; a linear's weight is what its codes stand for, in float32."""

    def __init__(self, plan: MergePlan, form: GptqFormat) -> None:
        """Know the tensors.

        Args:
            plan: Of the checkpoint, without adapters.
            form: How the codes are stored.
        """
        super().__init__(plan)
        self._form = form

    def __contains__(self, name: str) -> bool:
        return super().__contains__(name) or self._module(name) is not None

    @property
    def names(self) -> list[str]:
        """Names of all tensors, with weights for codes."""
        return weight_names(super().names)

    def plan(self, name: str) -> TensorPlan:
        """Return what is planned for a tensor; for the weight of codes, for their scales."""
        module = self._module(name)
        return super().plan(name if module is None else f"{module}.scales")

    def is_coded(self, name: str) -> bool:
        """Whether a weight is stored as codes, and given as (N, K) whatever the model has."""
        return self._module(name) is not None

    def load(
        self, name: str, dtype: torch.dtype | None = None, *, part: int | None = None
    ) -> torch.Tensor:
        """Return a whole tensor, or one matrix of it.

        Args:
            name: Of the tensor.
            dtype: What its values are converted to; its own by default, float32 for codes.
            part: Which matrix of a tensor (E, rows, columns); codes are of matrices.

        Raises:
            QuantizationError: The tensors of a linear do not fit together.
        """
        module = self._module(name)
        if module is None:
            return super().load(name, dtype, part=part)
        missing = [
            end
            for end in _ENDS
            if not super(DequantizedSource, self).__contains__(f"{module}.{end}")
        ]
        if missing:
            raise QuantizationError("codes lack a tensor", where=module, expected=missing[0])
        stored = {end: super(DequantizedSource, self).load(f"{module}.{end}") for end in _ENDS}
        self._check(module, stored)
        form = self._form
        return unpack_gptq(
            stored,
            bits=form.bits,
            group_size=form.group_size,
            checkpoint_format=form.checkpoint_format,
        ).dequantize(dtype or torch.float32)

    def _module(self, name: str) -> str | None:
        """Return the module whose codes stand for a tensor; None if it is stored as it is."""
        module, _, end = name.rpartition(".")
        is_coded = end == "weight" and super().__contains__(f"{module}.qweight")
        return module if is_coded else None

    def _check(self, module: str, stored: Mapping[str, torch.Tensor]) -> None:
        features, rows = len(stored["g_idx"]), stored["scales"].shape[-1]
        groups, bits = len(stored["scales"]), self._form.bits
        shapes = {
            "qweight": (-(-features * bits // 32), rows),
            "qzeros": (groups, -(-rows * bits // 32)),
        }
        for end, shape in shapes.items():
            if stored[end].shape != shape:
                raise QuantizationError(
                    "tensors of a quantized linear do not fit together",
                    where=f"{module}.{end}",
                    expected=shape,
                    got=tuple(stored[end].shape),
                )
        index = stored["g_idx"]
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < groups:
            raise QuantizationError(
                "an input is in no group",
                where=f"{module}.g_idx",
                expected=f"0 to {groups - 1}",
                got=f"{int(index.min())} to {int(index.max())}",
            )


def weight_names(names: Iterable[str]) -> list[str]:
    """Return the names of a GPTQ checkpoint's tensors with one weight in the place of codes."""
    found = list(names)
    coded = {name.rpartition(".")[0] for name in found if name.endswith(".qweight")}
    kept: dict[str, None] = {}
    for name in found:
        module, _, end = name.rpartition(".")
        kept[f"{module}.weight" if module in coded and end in _ENDS else name] = None
    return list(kept)


def _refusal(key: str, expected: object, got: object) -> UnsupportedError:
    return UnsupportedError(
        "quantized checkpoint is not of a kind that can be evaluated",
        where=f"quantization_config.{key}",
        expected=expected,
        got=got,
    )
