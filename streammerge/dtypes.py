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
    """One stored element type; the value is its name in a header."""

    BOOL = "BOOL"
    U8 = "U8"
    I8 = "I8"
    U16 = "U16"
    I16 = "I16"
    U32 = "U32"
    I32 = "I32"
    U64 = "U64"
    I64 = "I64"
    F16 = "F16"
    BF16 = "BF16"
    F32 = "F32"
    F64 = "F64"
    C64 = "C64"
    F4 = "F4"
    F6_E2M3 = "F6_E2M3"
    F6_E3M2 = "F6_E3M2"
    F8_E4M3 = "F8_E4M3"
    F8_E5M2 = "F8_E5M2"
    F8_E4M3FNUZ = "F8_E4M3FNUZ"
    F8_E5M2FNUZ = "F8_E5M2FNUZ"
    F8_E8M0 = "F8_E8M0"

    @property
    def bits(self) -> int:
        """Width of an element."""
        return _FACTS[self][0]

    @property
    def kind(self) -> DtypeKind:
        """What an element holds."""
        return _FACTS[self][1]

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


_FACTS: dict[Dtype, tuple[int, DtypeKind]] = {
    Dtype.BOOL: (8, "bool"),
    Dtype.U8: (8, "int"),
    Dtype.I8: (8, "int"),
    Dtype.U16: (16, "int"),
    Dtype.I16: (16, "int"),
    Dtype.U32: (32, "int"),
    Dtype.I32: (32, "int"),
    Dtype.U64: (64, "int"),
    Dtype.I64: (64, "int"),
    Dtype.F16: (16, "float"),
    Dtype.BF16: (16, "float"),
    Dtype.F32: (32, "float"),
    Dtype.F64: (64, "float"),
    Dtype.C64: (64, "complex"),
    Dtype.F4: (4, "float"),
    Dtype.F6_E2M3: (6, "float"),
    Dtype.F6_E3M2: (6, "float"),
    Dtype.F8_E4M3: (8, "float"),
    Dtype.F8_E5M2: (8, "float"),
    Dtype.F8_E4M3FNUZ: (8, "float"),
    Dtype.F8_E5M2FNUZ: (8, "float"),
    Dtype.F8_E8M0: (8, "scale"),
}
