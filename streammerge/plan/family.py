"""What differs between model families and cannot be read off a checkpoint's header, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["VOCABULARY_MODULES", "Embeddings", "find_embeddings", "is_conv1d", "is_declared_tied"]

# the model types whose projections are transformers' Conv1D, stored (in_features, out_features),
# and the names of those projections; every other layer of theirs is an ordinary Linear
_CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D_LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})

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


def is_declared_tied(config: Mapping[str, Any]) -> bool | None:
    """Return what config.json says of tied embeddings; None if it says nothing."""
    for section in (config, config.get("text_config") or {}):
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
