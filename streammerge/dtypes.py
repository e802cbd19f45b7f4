"""The dtypes of the safetensors format: the only dtype table of the project.

Names are those of the format (`BF16`, `F8_E4M3`). The mapping to torch lives in `backends`, so that
nothing above it needs torch to read a header.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

__all__ = ["Dtype", "DtypeKind"]

DtypeKind = Literal["float", "int", "bool", "complex", "scale"]


class Dtype(Enum):
    """One stored element type: its name in a header, its width in bits, and what it holds."""

    BOOL = ("BOOL", 8, "bool")
    U8 = ("U8", 8, "int")
    I8 = ("I8", 8, "int")
    U16 = ("U16", 16, "int")
    I16 = ("I16", 16, "int")
    U32 = ("U32", 32, "int")
    I32 = ("I32", 32, "int")
    U64 = ("U64", 64, "int")
    I64 = ("I64", 64, "int")
    F16 = ("F16", 16, "float")
    BF16 = ("BF16", 16, "float")
    F32 = ("F32", 32, "float")
    F64 = ("F64", 64, "float")
    C64 = ("C64", 64, "complex")
    F4 = ("F4", 4, "float")
    F6_E2M3 = ("F6_E2M3", 6, "float")
    F6_E3M2 = ("F6_E3M2", 6, "float")
    F8_E4M3 = ("F8_E4M3", 8, "float")
    F8_E5M2 = ("F8_E5M2", 8, "float")
    F8_E4M3FNUZ = ("F8_E4M3FNUZ", 8, "float")
    F8_E5M2FNUZ = ("F8_E5M2FNUZ", 8, "float")
    F8_E8M0 = ("F8_E8M0", 8, "scale")

    bits: int
    kind: DtypeKind

    def __new__(cls, name: str, bits: int, kind: DtypeKind) -> Dtype:
        member = object.__new__(cls)
        member._value_ = name
        member.bits = bits
        member.kind = kind
        return member

    @property
    def item_bytes(self) -> int:
        """Bytes of one element; 1 for the packed types below a byte."""
        return max(1, self.bits // 8)

    @property
    def is_mergeable(self) -> bool:
        """Whether a delta can be added to a tensor stored so: F16, BF16, F32 and F64."""
        return self.kind == "float" and self.bits >= 16

    def nbytes(self, numel: int) -> int:
        """Bytes of `numel` packed elements.

        Raises:
            ValueError: The elements of a type below a byte do not fill whole bytes.
        """
        bits = numel * self.bits
        if bits % 8:
            msg = f"{numel} elements of {self.value} do not fill whole bytes"
            raise ValueError(msg)
        return bits // 8
