"""Kernels of the merge, one operation to a file, and the reference that all of them are held to.

`reference` needs torch alone. Kernels need triton, which comes with the extra `gpu`, so nothing
here imports one: name the module that is wanted.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streammerge_kernels.reference import dora_merge, dora_row_norm, lora_merge

__all__ = ["dora_merge", "dora_row_norm", "lora_merge"]


def __getattr__(name: str) -> object:
    """Load the reference when one of its operations is first asked for, since it imports torch."""
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module("streammerge_kernels.reference"), name)
