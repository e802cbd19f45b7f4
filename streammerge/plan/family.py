"""What differs between model families and cannot be read off a checkpoint's header, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = [
    "VOCABULARY_MODULES",
    "Embeddings",
    "are_experts_fused_in_memory",
    "are_experts_in_out_on_disk",
    "are_experts_interleaved",
    "are_experts_transposed_in_memory",
    "are_experts_transposed_on_disk",
    "find_embeddings",
    "is_conv1d",
    "is_declared_tied",
]

# the model types whose projections are transformers' Conv1D, stored (in_features, out_features),
# and the names of those projections; every other layer of theirs is an ordinary Linear
_CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D_LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})

# fused experts whose matrices are (in, out) in memory, which their modules declare
_EXPERTS_IN_OUT = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
# the same of modules that do not declare it
_EXPERTS_IN_OUT_SILENTLY = frozenset({"llama4", "llama4_text"})
# fused experts that are stored the other way round than they are in memory
_EXPERTS_TURNED_ON_DISK = frozenset({"qwen3_vl_moe", "qwen3_vl_moe_text"})
# fused experts where the columns of gate and up take turns
_EXPERTS_INTERLEAVED = frozenset({"gpt_oss"})
# families that store one tensor per expert, which transformers 5 fuses when it loads them, and for
# which PEFT converts adapters on single experts (peft.utils.transformers_weight_conversion)
_EXPERTS_FUSED = frozenset(
    """
    afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe
    flex_olmo glm4_moe glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum
    minimax minimax_m2 mixtral olmoe qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_text
    qwen3_omni_moe_thinker solar_open
    """.split()
)

# module names of the input embedding, and of the output head that may share its tensor
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
_OUTPUT_HEADS = ("lm_head", "embed_out", "output_layer")
VOCABULARY_MODULES = frozenset({*_INPUT_EMBEDDINGS, *_OUTPUT_HEADS})
# classes that have no head over the vocabulary, and so nothing that the embedding could be tied to;
# a bare model may be loaded with one later
_HEADLESS = re.compile(r"Classification$|QuestionAnswering$|MultipleChoice$|Reward")
# families whose tied head is called otherwise, so that a head written as lm_head would be ignored
_OTHER_HEADS = frozenset({"biogpt", "modernbert", "modernbert-decoder", "trocr", "blip_2"})
# not the language model's: what other towers bring, and what BERT-like encoders have, whose head is
# tied under other names
_OTHER_TOWERS = (
    "embeddings.word",
    "vision",
    "visual",
    "audio",
    "encoder.",
    "talker",
    "mtp.",
    "speech",
)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The input embedding and the output head of the language model, by tensor name."""

    input: str | None
    output: str
    """Name that the head has, or would have if it were stored."""
    is_tied: bool
    """Whether the base has one tensor for both."""
    is_known: bool
    """Whether it is certain which tensors share storage; if not, none of them may be changed."""


def is_conv1d(module: str, *, config: Mapping[str, Any]) -> bool:
    """Whether a module is a Conv1D, so that its weight is stored transposed."""
    return (
        config.get("model_type") in _CONV1D_MODEL_TYPES
        and module.rpartition(".")[2] in _CONV1D_LAYERS
    )


def are_experts_transposed_in_memory(config: Mapping[str, Any]) -> bool:
    """Whether a family's fused experts are (in, out) in memory, by its own declaration."""
    return not _model_types(config).isdisjoint(_EXPERTS_IN_OUT)


def are_experts_transposed_on_disk(
    config: Mapping[str, Any], name: str, shape: tuple[int, ...]
) -> bool:
    """Whether a family's fused experts are stored the other way round than they are in memory.

    Args:
        config: The model's config.json.
        name: Of the parameter in memory.
        shape: (E, rows, columns) as stored. transformers leaves what has the shape of its
            parameter as it is, which is what it wrote itself.
    """
    if _model_types(config).isdisjoint(_EXPERTS_TURNED_ON_DISK):
        return False
    nested = config.get("text_config")
    hidden = (nested if isinstance(nested, dict) else config).get("hidden_size")
    return shape[1 if name == "down_proj" else 2] != hidden


def are_experts_in_out_on_disk(config: Mapping[str, Any]) -> bool:
    """Whether a family's fused experts are stored (in, out)."""
    kinds = _EXPERTS_IN_OUT | _EXPERTS_IN_OUT_SILENTLY | _EXPERTS_TURNED_ON_DISK
    return not _model_types(config).isdisjoint(kinds)


def are_experts_interleaved(config: Mapping[str, Any]) -> bool:
    """Whether gate and up take turns in a family's fused experts."""
    return not _model_types(config).isdisjoint(_EXPERTS_INTERLEAVED)


def are_experts_fused_in_memory(config: Mapping[str, Any]) -> bool:
    """Whether transformers 5 fuses a family's experts, and PEFT merges adapters on each of them.

    PEFT looks at the whole model's type, not at that of a language model inside it.
    """
    return config.get("model_type") in _EXPERTS_FUSED


def _model_types(config: Mapping[str, Any]) -> set[str]:
    nested = config.get("text_config")
    sections = (config, nested if isinstance(nested, dict) else {})
    return {str(section.get("model_type")) for section in sections}


def is_declared_tied(config: Mapping[str, Any]) -> bool | None:
    """Return what config.json says of tied embeddings; None if it says nothing."""
    nested = config.get("text_config")
    for section in (config, nested if isinstance(nested, dict) else {}):
        value = section.get("tie_word_embeddings")
        if value is not None:
            return bool(value)
    return None


def find_embeddings(names: Collection[str], *, config: Mapping[str, Any]) -> Embeddings:
    """Find the input embedding and the output head among a base's tensors.

    Without a word in config.json, a model that stores no head of its own is tied: transformers
    leaves the key out where it equals the family's default.
    """
    source = _find(names, _INPUT_EMBEDDINGS)
    head = _find(names, _OUTPUT_HEADS)
    if not config:
        # not a language model as far as anyone can tell: a module's tensors are what they are
        return Embeddings(source, head or _head_name(source), is_tied=False, is_known=True)
    declared = is_declared_tied(config)
    is_tied = source is not None and (declared is True or (declared is None and head is None))
    has_head = _has_head(config)
    is_known = not _is_encoder_decoder(config) and (
        not has_head
        or declared is False
        or (source is not None and config.get("model_type") not in _OTHER_HEADS)
    )
    return Embeddings(source, head or _head_name(source), is_tied and has_head, is_known)


def _is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    return bool(config.get("is_encoder_decoder"))


def _has_head(config: Mapping[str, Any]) -> bool:
    """Whether the model's class has an output head; assumed where none is known to be without."""
    return not any(_HEADLESS.search(str(name)) for name in config.get("architectures") or [])


def _find(names: Collection[str], modules: tuple[str, ...]) -> str | None:
    for module in modules:
        found = [
            name
            for name in names
            if f".{name}".endswith(f".{module}.weight")
            and not any(tower in name for tower in _OTHER_TOWERS)
        ]
        if found:
            return min(found, key=lambda name: (name.count("."), name))
    return None


def _head_name(embedding: str | None) -> str:
    # nested language models keep their head inside: language_model.model.embed_tokens ->
    # language_model.lm_head
    if embedding is not None and embedding.startswith("language_model.model."):
        return "language_model.lm_head.weight"
    return "lm_head.weight"
