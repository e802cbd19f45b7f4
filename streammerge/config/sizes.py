"""Byte sizes as users write them: `5GB` is 5 * 10^9 bytes, `5GiB` is 5 * 2^30."""

from __future__ import annotations

import math
import re

__all__ = ["parse_bytes"]

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(value: object, *, number_unit: int = 1) -> int:
    """Parse a size to bytes.

    Args:
        value: A number, or a string such as `5GB`, `512MB` or `1.5GiB`.
        number_unit: Bytes that a bare number counts.

    Raises:
        ValueError: It is not a size above zero.
    """
    size = 0.0
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        size = value * number_unit
    elif isinstance(value, str):
        match = _SIZE.fullmatch(value)
        unit = _UNITS.get(match[2].upper(), 0) if match else 0
        # a quoted number means what a bare one does
        size = float(match[1]) * (unit if match[2] else number_unit) if match else 0.0
    if not 1 <= size < math.inf:
        msg = "a size of a byte or more, such as 5GB, 512MB or 1.5GiB"
        raise ValueError(msg)
    return round(size)
