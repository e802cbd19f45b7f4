"""Layers that the trained model has several times, as layers of their own.

With `layer_replication` PEFT repeats base layers by reference and gives each copy its own adapter;
a merged checkpoint needs each copy's weights.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

from streammerge.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["replicate_layers", "replication_edits"]

_LAYER = re.compile(
    r"(?P<before>(?:.*?\.)??(?:layers|h|blocks|layer))\.(?P<number>\d+)\.(?P<rest>.+)"
)
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# lists of layers' numbers, which are others now
_NUMBERS = ("mlp_only_layers", "moe_layers", "cross_attention_layers")
# rules that tell a layer's kind by its number, which would tell copies apart; each with the list
# that says it for every layer and has precedence
_RULES = {
    "first_k_dense_replace": "mlp_layer_types",
    "decoder_sparse_step": "mlp_layer_types",
    "moe_layer_freq": "mlp_layer_types",
    "interleave_moe_layer_step": "moe_layers",
    "no_rope_layer_interval": "no_rope_layers",
    "sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "attn_layer_period": "layer_types",
    "use_sliding_window": "layer_types",
}
_STEPS = ("_step", "_freq", "_interval", "_pattern", "_layers", "_period")
# families that alternate by number without saying so
_ALTERNATING = frozenset(
    {"gemma2", "gemma3_text", "gemma3n_text", "cohere2", "gpt_oss", "olmo3", "vaultgemma"}
)
_T = TypeVar("_T")


def replicate_layers(
    tensors: Mapping[str, _T], ranges: Sequence[tuple[int, int]], *, where: Path
) -> dict[str, _T]:
    """Return the tensors of the model whose layers are ranges of the base's, one after the other.

    Args:
        tensors: What the base has, by name; the same value may be returned under several names.
        ranges: First layer, and the layer after the last, of each range.
        where: The base, for messages.

    Raises:
        PlanError: The base has no such layers.
    """
    stacks: dict[str, dict[int, dict[str, _T]]] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match:
            layers = stacks.setdefault(match["before"], {})
            layers.setdefault(int(match["number"]), {})[match["rest"]] = tensor
    if len(stacks) != 1:
        raise PlanError(
            "layer_replication needs a base with one stack of layers",
            where=where,
            got=", ".join(stacks) or "none",
        )
    ((before, layers),) = stacks.items()
    order = [layer for begin, end in ranges for layer in range(begin, end)]
    missing = [layer for layer in order if layer not in layers]
    if missing:
        raise PlanError(
            "layer_replication names a layer that the base does not have",
            where=where,
            expected=f"0 to {max(layers)}",
            got=missing[0],
        )
    replicated: dict[str, _T] = {}
    is_done = False
    for name, tensor in tensors.items():
        if not _LAYER.fullmatch(name):
            replicated[name] = tensor
        elif not is_done:
            is_done = True
            for number, layer in enumerate(order):
                for rest, value in layers[layer].items():
                    replicated[f"{before}.{number}.{rest}"] = value
    return replicated


def replication_edits(
    config: Mapping[str, Any], ranges: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Return what config.json must say: the number of layers, and its lists with one entry each.

    Raises:
        PlanError: It does not count the layers, or tells their kinds by their numbers.
    """
    if not config:
        return {}
    order = [layer for begin, end in ranges for layer in range(begin, end)]
    counts = [key for key in _COUNTS if type(config.get(key)) is int]
    rule = _rule_by_number(config)
    if not counts or rule is not None:
        raise PlanError(
            "layer_replication cannot be written into this base's config.json",
            where="config.json",
            expected="the number of layers" if not counts else "a list with each layer's kind",
            got=rule or f"no {', no '.join(_COUNTS)}",
            hint="save the base once more with a recent transformers, which writes such lists",
        )
    edits: dict[str, Any] = dict.fromkeys(counts, len(order))
    for key, value in config.items():
        if key in _NUMBERS and isinstance(value, list):
            edits[key] = [new for new, layer in enumerate(order) if layer in value]
        elif isinstance(value, list) and len(value) == config[counts[0]] and "layer" in key:
            edits[key] = [value[layer] for layer in order]
    return edits


def _rule_by_number(config: Mapping[str, Any]) -> str | None:
    """Return what tells the kind of a layer by its number alone."""
    for rule, lists in _RULES.items():
        value = config.get(rule)
        # a step of one is a rule for all layers
        is_for_all = value is None or value is False or (value == 1 and rule.endswith(_STEPS))
        if not (is_for_all or value == 0 or config.get(lists) or isinstance(value, list)):
            return f"{rule}: {value!r}"
    if config.get("model_type") in _ALTERNATING and not config.get("layer_types"):
        return f"model_type: {config['model_type']}"
    return None
