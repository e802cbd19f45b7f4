"""Convert between fp32 and e4m3fn with integers.

Not every GPU that merges has instructions for it (sm_80 and gfx942 have none, and `tl.float8e4nv`
does not compile for sm_80). The same code everywhere gives the same bytes everywhere.

Source of the format: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, table 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["E4M3_MAX", "e4m3_to_fp32", "fp32_to_e4m3"]

E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def e4m3_to_fp32(codes: tl.tensor) -> tl.tensor:
    """Decode uint8 codes: their bits in the places of fp16's, whose bias is greater by 8.

    By way of fp16, so that subnormals survive on GPUs that take those of fp32 as zero.
    """
    bits = codes.to(tl.uint16)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def fp32_to_e4m3(values: tl.tensor) -> tl.tensor:
    """Encode in uint8, to nearest, ties to even; what is larger than 448 becomes 448."""
    bits = values.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 20 bits of the mantissa go; the carry moves into the exponent, as it should
    is_odd = (magnitude >> 20) & 1
    normal = ((magnitude + 0x7FFFF + is_odd) >> 20) - ((127 - 7) << 3)
    # below 2^-6 codes are 2^-9 apart, and so are numbers of fp32 from 2^14: the sum rounds
    shifted = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True)
    codes = tl.where(magnitude < 0x3C800000, shifted - 0x46800000, normal)
    codes = tl.where(magnitude > 0x43E00000, 0x7E, codes)
    codes = tl.where(magnitude > 0x7F800000, 0x7F, codes)
    return codes.to(tl.uint8) | ((bits >> 24) & 0x80).to(tl.uint8)
