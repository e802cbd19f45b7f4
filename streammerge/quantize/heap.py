"""Have the C library give large blocks back to the system as soon as they are free."""

from __future__ import annotations

import ctypes

__all__ = ["return_freed_memory"]

# of glibc's malloc.h
_M_MMAP_THRESHOLD = -3
_THRESHOLD_BYTES = 1 << 20


def return_freed_memory() -> None:
    """Fix the size from which on glibc takes a block from the system, and not from its heap.

    Left alone, glibc raises it to the largest block that was freed. Layers' activations then come
    from the heap, where weights that live longer fragment it: resident memory grows with every
    layer by a block as large as its widest activation. Without glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(ctypes.c_int(_M_MMAP_THRESHOLD), ctypes.c_int(_THRESHOLD_BYTES))
