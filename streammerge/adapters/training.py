"""Whether an adapter was trained on a 4-bit base, as far as what lies beside it says so.

adapter_config.json has no word for it. Three signs are taken, none of which anyone guesses at:

    README.md            PEFT lists `quantization_config` in the model card that it writes, line by
                         line; Axolotl puts its own configuration there (`load_in_4bit: true`)
    training_args.yaml   what LLaMA-Factory's web UI was told (`quantization_bit: 4`)
    base_model_name_or_path
                         ends in `-bnb-4bit`, which is what Unsloth calls its 4-bit bases
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.adapters.adapter import Adapter

__all__ = ["TrainedInFourBits", "trained_in_four_bits"]

# a model card with a long table of results is below it
MAX_BYTES = 1 << 20
_HUB_NAME = re.compile(r"-bnb-4bit/?$", re.IGNORECASE)
_FIELD = re.compile(r"^\s*(?:- )?(?P<key>\w+): *(?P<value>.*?)\s*$", re.MULTILINE)
_ON = frozenset({"true", "yes", "on"})
_SKIPPED_NAME = re.compile(r"[\w.]+")


@dataclass(frozen=True, slots=True)
class TrainedInFourBits:
    """What is known of the base that an adapter was trained on."""

    sign: str
    """What says that it had 4 bits."""
    checkpoint: str | None = None
    """The 4-bit checkpoint, if it is one and not a base that was quantized as it was loaded."""
    quant_type: str | None = None
    """`nf4` or `fp4`; None if nothing says."""
    is_nested: bool | None = None
    """Whether double quantization was used; None if nothing says."""
    skipped: tuple[str, ...] = ()
    """Modules that were kept in 16 bits (`llm_int8_skip_modules`)."""


def trained_in_four_bits(adapter: Adapter) -> TrainedInFourBits | None:
    """Return what lies beside an adapter of the 4-bit base that it was trained on.

    Returns:
        None if nothing says that it had 4 bits.
    """
    name = adapter.config.base_model
    checkpoint = name if name and _HUB_NAME.search(name) else None
    card = _fields(adapter.path / "README.md")
    if card.get("load_in_4bit", "").lower() in _ON:
        return TrainedInFourBits(
            f"README.md of {adapter.path} says load_in_4bit",
            checkpoint,
            card.get("bnb_4bit_quant_type"),
            _flag(card.get("bnb_4bit_use_double_quant")),
            tuple(_SKIPPED_NAME.findall(_list(card.get("llm_int8_skip_modules")))),
        )
    arguments = _fields(adapter.path / "training_args.yaml")
    method = arguments.get("quantization_method", "bnb")
    if arguments.get("quantization_bit") == "4" and method in {"bnb", "bitsandbytes"}:
        return TrainedInFourBits(
            f"training_args.yaml of {adapter.path} says quantization_bit: 4",
            checkpoint,
            arguments.get("quantization_type"),
            _flag(arguments.get("double_quantization")),
        )
    if checkpoint is not None:
        return TrainedInFourBits(f"{adapter.path} was trained on {checkpoint}", checkpoint)
    return None


def _fields(path: Path) -> dict[str, str]:
    """Return the lines `key: value` of a text file, the first of each key; none if it is no text.

    It is there for people: whatever cannot be read says nothing.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return {}
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    found: dict[str, str] = {}
    for match in _FIELD.finditer(text):
        found.setdefault(match["key"], match["value"].strip("'\""))
    return found


def _flag(text: str | None) -> bool | None:
    return None if text is None else text.lower() in _ON


def _list(text: str | None) -> str:
    """Return the inside of a list as Python writes it; nothing of what is none."""
    return text[1:-1] if text is not None and text.startswith("[") else ""
