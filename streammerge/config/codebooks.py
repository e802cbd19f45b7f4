"""How many codebooks a weight has, of how many entries: the scheme of a quantization by AQLM."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["SCHEME", "Codebooks"]

SCHEME = re.compile(r"([1-8])x([1-9]|1[0-6])")
"""Codebooks, and the bits of each."""


@dataclass(frozen=True, slots=True)
class Codebooks:
    """Sums of codebook entries in the place of codes for single weights."""

    count: int
    """C."""
    bits: int
    """Of a code: the codebook has as many entries as it has values."""
    group_size: int
    """G: the inputs of an entry."""

    @classmethod
    def of(cls, scheme: str, group_size: int) -> Codebooks:
        """Read a scheme such as `2x8`.

        Raises:
            ValueError: It is none.
        """
        found = SCHEME.fullmatch(scheme)
        if found is None:
            msg = (
                f"codebooks x bits of each, 1 to 8 and 1 to 16, such as 2x8 or 1x16, not '{scheme}'"
            )
            raise ValueError(msg)
        return cls(int(found[1]), int(found[2]), group_size)

    @property
    def entries(self) -> int:
        """V, of each codebook."""
        return 1 << self.bits

    @property
    def weight_bits(self) -> float:
        """The share of codes that a weight has, in bits; whole numbers as such."""
        bits = self.count * self.bits
        return bits // self.group_size if bits % self.group_size == 0 else bits / self.group_size

    @property
    def table_bytes(self) -> int:
        """The bytes of a linear's codebooks, in float16."""
        return 2 * self.count * self.entries * self.group_size
