"""Kernels of the merge, one operation to a file, and the reference that all of them are held to.

`reference` needs torch alone. Kernels need triton, which comes with the extra `gpu`. Importing this
package needs neither, and looks at no device: an operation is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streammerge_kernels.dora import dora_merge_, dora_row_norm
    from streammerge_kernels.fp8 import fp8_lora_merge, fp8_lora_requantize
    from streammerge_kernels.grouped import grouped_lora_merge_
    from streammerge_kernels.merge import lora_merge_
    from streammerge_kernels.merge_tma import lora_merge_tma_
    from streammerge_kernels.mxfp4 import mxfp4_lora_merge
    from streammerge_kernels.nf4 import Nf4Weight, nf4_lora_merge

__all__ = [
    "Nf4Weight",
    "dora_merge_",
    "dora_row_norm",
    "fp8_lora_merge",
    "fp8_lora_requantize",
    "grouped_lora_merge_",
    "lora_merge_",
    "lora_merge_tma_",
    "mxfp4_lora_merge",
    "nf4_lora_merge",
]

_MODULES = {
    "Nf4Weight": "nf4",
    "dora_merge_": "dora",
    "dora_row_norm": "dora",
    "fp8_lora_merge": "fp8",
    "fp8_lora_requantize": "fp8",
    "grouped_lora_merge_": "grouped",
    "lora_merge_": "merge",
    "lora_merge_tma_": "merge_tma",
    "mxfp4_lora_merge": "mxfp4",
    "nf4_lora_merge": "nf4",
}


def __getattr__(name: str) -> object:
    """Load an operation; ModuleNotFoundError names triton where it is not installed."""
    if name not in _MODULES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"streammerge_kernels.{_MODULES[name]}"), name)
