"""One module per family of adapters, found by `peft_type`.

Every module of this package that has `TUNERS` is asked; a new family is a new module.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streammerge.adapters.tuners.base import Tuner

__all__ = ["NOT_MERGEABLE", "all_tuners", "find_tuner", "foreign_factors"]

_PROMPT = "a prompt method: it adds inputs, and changes no weight"
NOT_MERGEABLE = MappingProxyType(
    {
        "ADAPTION_PROMPT": "it adds inputs to attention, and changes no weight",
        "ADAMSS": "its rows are found again only by clustering the base with a library of its own",
        "CARTRIDGE": _PROMPT,
        "CPT": _PROMPT,
        "LILY": "its routers choose per token",
        "MULTITASK_PROMPT_TUNING": _PROMPT,
        "POLY": "its mix of adapters depends on the task of each input",
        "PREFIX_TUNING": "it adds keys and values to attention, and changes no weight",
        "PROMPT_TUNING": _PROMPT,
        "P_TUNING": _PROMPT,
        "SHADOW": "its delta depends on the input",
        "XLORA": "its mix of adapters depends on each token",
    }
)
"""Kinds that have no merged form at all, by `peft_type`, with the reason."""


@functools.cache
def all_tuners() -> Mapping[str, Tuner]:
    """Return every kind that can be merged, by `peft_type`."""
    tuners: dict[str, Tuner] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        tuners.update((tuner.peft_type, tuner) for tuner in getattr(module, "TUNERS", ()))
    return MappingProxyType(dict(sorted(tuners.items())))


def find_tuner(peft_type: str) -> Tuner | None:
    """Return one kind, or None.

    The module of its own name is asked first: to import all of them takes 0.1 s.
    """
    if importlib.util.find_spec(f"{__name__}.{peft_type.lower()}") is not None:
        module = importlib.import_module(f"{__name__}.{peft_type.lower()}")
        for tuner in getattr(module, "TUNERS", ()):
            if tuner.peft_type == peft_type:
                found: Tuner = tuner
                return found
    return all_tuners().get(peft_type)


@functools.cache
def foreign_factors(peft_type: str) -> frozenset[str]:
    """Return the names of factors that other kinds have, and this one has not."""
    tuners = all_tuners()
    own = tuners[peft_type].factors | tuners[peft_type].shared | tuners[peft_type].replaces
    every = [tuner.factors | tuner.shared | tuner.replaces for tuner in tuners.values()]
    return frozenset().union(*every) - own
