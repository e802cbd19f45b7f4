"""Every codec, and which one a checkpoint uses.

Every module of this package that has `CODECS` is asked; a new format is a new module.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

import streammerge.codecs
from streammerge.dtypes import Dtype
from streammerge.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streammerge.codecs.base import Codec

__all__ = ["all_codecs", "find_codec"]

# these import torch, or ask this module
_NO_FORMATS = frozenset(
    {"base", "bnb4_codes", "decoded", "registry", "rounded", "support", "tensors", "turned"}
)


@functools.cache
def all_codecs() -> tuple[type[Codec], ...]:
    """Return every codec, by title."""
    found: list[type[Codec]] = []
    for info in pkgutil.iter_modules(streammerge.codecs.__path__):
        if info.name not in _NO_FORMATS:
            module = importlib.import_module(f"streammerge.codecs.{info.name}")
            found.extend(getattr(module, "CODECS", ()))
    return tuple(sorted(found, key=lambda codec: codec.title))


def find_codec(section: Mapping[str, Any], dtype: Dtype = Dtype.BF16) -> Codec:
    """Return the codec of a checkpoint.

    Args:
        section: `quantization_config` of config.json.
        dtype: The model's dtype, for formats that leave it open what they decode to.

    Raises:
        UnsupportedError: No codec decodes such a checkpoint.
    """
    for codec in all_codecs():
        found = codec.of(section, dtype)
        if found is not None:
            return found
    method = section.get("quant_method")
    form = section.get("format")
    raise UnsupportedError(
        "checkpoint is quantized in a way that is not decoded",
        where="quantization_config",
        expected="; ".join(codec.selector for codec in all_codecs()),
        got=f"quant_method: {method}" + ("" if form is None else f", format: {form}"),
    )
