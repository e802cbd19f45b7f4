"""What config.json must say differently because of what happens to the tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streammerge.plan.ops import ApplyTerms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streammerge.dtypes import Dtype
    from streammerge.plan.ops import TensorPlan

__all__ = ["edit_config"]

# the last layer of the heads that transformers puts on classifiers
_CLASSIFIERS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
_SECTIONS = ("text_config", "vision_config", "audio_config")
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def edit_config(
    config: Mapping[str, Any],
    tensors: Sequence[TensorPlan],
    *,
    vocabulary_rows: int | None,
    unties: bool,
    output_dtype: Dtype | None,
) -> dict[str, Any]:
    """Derive the keys to set; a nested map holds the keys of a nested section.

    Args:
        config: The base's config.json.
        tensors: Every output tensor.
        vocabulary_rows: Rows of a resized vocabulary.
        unties: Whether embedding and head have become different tensors.
        output_dtype: What floating-point tensors are cast to, if anything.
    """
    edits: dict[str, Any] = {}
    if vocabulary_rows is not None:
        _set_in_sections(edits, config, "vocab_size", value=vocabulary_rows)
    if unties:
        _set_in_sections(edits, config, "tie_word_embeddings", value=False)
    edits.update(_label_edits(config, tensors))
    if output_dtype is not None and any(_is_cast(tensor) for tensor in tensors):
        _set_dtype(edits, config, output_dtype)
    return edits


def _is_cast(tensor: TensorPlan) -> bool:
    return isinstance(tensor.op, ApplyTerms) and tensor.op.work_dtype is not tensor.dtype


def _label_edits(config: Mapping[str, Any], tensors: Sequence[TensorPlan]) -> dict[str, Any]:
    """Name the labels of a classifier that an adapter brought, so that its class can be built."""
    for tensor in tensors:
        is_new_matrix = tensor.change == "added" and len(tensor.shape) == 2
        if not is_new_matrix or not tensor.name.endswith(_CLASSIFIERS):
            continue
        count = tensor.shape[0]
        # without names transformers takes two labels
        if len(config.get("id2label") or range(2)) == count:
            return {}
        labels = [f"LABEL_{number}" for number in range(count)]
        return {
            "id2label": {str(number): label for number, label in enumerate(labels)},
            "label2id": {label: number for number, label in enumerate(labels)},
        }
    return {}


def _set_in_sections(
    edits: dict[str, Any], config: Mapping[str, Any], key: str, *, value: object
) -> None:
    """Set a key where a config keeps it: at the root, and in the language model's own section."""
    section = config.get("text_config")
    if isinstance(section, dict):
        edits.setdefault("text_config", {})[key] = value
    if key in config or not isinstance(section, dict) or key == "tie_word_embeddings":
        edits[key] = value


def _set_dtype(edits: dict[str, Any], config: Mapping[str, Any], dtype: Dtype) -> None:
    """Set the dtype under each of its two names that the config uses, in every section."""
    name = _TORCH_NAMES[dtype.value]
    present = [key for key in ("dtype", "torch_dtype") if key in config]
    edits.update(dict.fromkeys(present or ["torch_dtype"], name))
    for section in _SECTIONS:
        nested = config.get(section)
        if isinstance(nested, dict):
            changed = {key: name for key in ("dtype", "torch_dtype") if key in nested}
            if changed:
                edits.setdefault(section, {}).update(changed)
