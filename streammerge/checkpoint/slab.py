"""Buffers in which weights travel, aligned so that a device can read and write them directly."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

__all__ = ["FRONT_BYTES", "PAGE", "Slab", "address_of"]

# direct transfers need addresses, offsets and lengths that are multiples of the device's block; a
# page satisfies every device with blocks of 512 or 4096 bytes
PAGE = 4096
# a run is read from the page that it begins in, to the page before its place: two pages of room
FRONT_BYTES = 2 * PAGE
_BACK_BYTES = PAGE


class Slab:
    """Page-aligned memory with room around the data for whole pages.

    The data begins in `[FRONT_BYTES, FRONT_BYTES + PAGE)`, as far into a page as it will be in the
    output file, so that its whole pages can be written from where they are.
    """

    def __init__(self, nbytes: int) -> None:
        # anonymous mappings: page-aligned, and given back to the system when they are dropped
        self._map = mmap.mmap(-1, FRONT_BYTES + PAGE + nbytes + _BACK_BYTES)
        self.view = memoryview(self._map)
        self._address = address_of(self.view)

    @staticmethod
    def place(offset: int) -> int:
        """Return where data for that offset of a file begins."""
        return FRONT_BYTES + offset % PAGE

    def move(self, source: int, target: int, nbytes: int) -> None:
        """Move bytes inside the slab; the ranges may overlap."""
        # without the interpreter lock, and in place, which numpy's copy is not when ranges overlap
        ctypes.memmove(self._address + target, self._address + source, nbytes)


def address_of(buffer: memoryview) -> int:
    """Return the address of a buffer's first byte."""
    return int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)
