"""What makes a merge impossible whatever the tensors are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streammerge.adapters.adapter import Adapter
    from streammerge.checkpoint.index import Checkpoint
    from streammerge.dtypes import Dtype

__all__ = ["check_quantized", "check_weights"]


def check_quantized(
    base: Checkpoint, adapters: Sequence[Adapter], *, output_dtype: Dtype | None
) -> None:
    """Refuse to do arithmetic on codes.

    Raises:
        PlanError: The base is quantized, and an adapter or a cast would change it.
    """
    quantized = base.config.get("quantization_config")
    if quantized and (adapters or output_dtype is not None):
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else "?"
        raise PlanError(
            "base is quantized: a delta cannot be added to its codes",
            where=base.path,
            expected="the unquantized base (16 or 32 bit)",
            got=f"quantization_config of {method}",
            hint="set model_name_or_path to the model that was quantized",
        )


def check_weights(adapters: Sequence[Adapter], weights: tuple[float, ...]) -> None:
    """Refuse weights that do not mean a sum.

    Raises:
        ConfigError: There are not as many as adapters.
        PlanError: An adapter's change is not something to be added.
    """
    if not weights:
        return
    if len(weights) != len(adapters):
        raise ConfigError(
            "adapter_weights and adapter_name_or_path differ in length",
            expected=f"{len(adapters)} weights",
            got=len(weights),
        )
    replacing = [any(not r.is_base_copy for r in a.replacements) or a.rows for a in adapters]
    if sum(map(bool, replacing)) > 1:
        raise PlanError(
            "adapter_weights cannot be used where several adapters replace whole tensors",
            hint="leave adapter_weights out to merge one adapter after the other",
        )
