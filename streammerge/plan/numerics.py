"""Where PEFT rounds, and where it is wrong: what depends on how a model sits in its memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import BiasTerm, LoraTerm, Term
from streammerge.adapters.tuners.lora_settings import LoraSettings, is_wrapped_parameter
from streammerge.plan.family import are_experts_fused_in_memory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streammerge.adapters.adapter import Adapter
    from streammerge.adapters.tuners.base import AdapterModule

__all__ = ["as_peft_merges"]

_GATE_AND_UP = frozenset({"gate_proj", "up_proj", "w1", "w3"})


def as_peft_merges(
    term: Term,
    *,
    module: AdapterModule,
    target: str,
    adapter: Adapter,
    config: Mapping[str, Any],
    reproduces_bugs: bool,
) -> Term:
    """Return a term that rounds where PEFT rounds.

    PEFT turns adapters on single experts, and on their router, into adapters on parameters, for the
    families of which it knows that they are fused in memory.

    Args:
        term: As the adapter's tuner made it.
        module: The module that it comes from.
        target: The tensor that it is for.
        adapter: The adapter.
        config: The base's config.json.
        reproduces_bugs: Whether PEFT's known faults are wanted.
    """
    if isinstance(term, BiasTerm) and reproduces_bugs and adapter.config.is_older_than(0, 16):
        # PEFT before 0.16 merged the bias of B without the scaling with which it was trained
        return replace(term, scaling=1.0)
    if not isinstance(term, LoraTerm):
        return term
    last = module.module.rpartition(".")[2]
    is_parameter = is_wrapped_parameter(f"{module.module}.weight", adapter.config.target_parameters)
    settings = adapter.config.settings
    is_expert = ".experts." in target
    becomes_parameter = (
        isinstance(settings, LoraSettings)
        and are_experts_fused_in_memory(config)
        and (is_expert or last == "gate")
    )
    if (is_parameter or becomes_parameter) and not term.rounds_delta:
        # the delta of a whole parameter is rounded before it is added
        term = replace(term, rounds_delta=True)
    is_half = becomes_parameter and is_expert and last in _GATE_AND_UP
    if reproduces_bugs and is_half and settings.use_rslora:
        # PEFT fuses gate and up into one adapter of twice the rank and alpha, and divides by the
        # root of that rank
        doubled = 2 * settings.scaling_of(module.module, rank=2 * term.rank)
        return replace(term, scaling=doubled)
    return term
