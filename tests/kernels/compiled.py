"""Every kernel with every configuration of its table, as a launch compiles it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton.language as tl

from streammerge_kernels import dora, fp8, grouped, merge, merge_tma, mxfp4, nf4

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streammerge_kernels.tile import TileConfig

WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}
TRITON_DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
SIZES = ("n", "k")


@dataclass(frozen=True, slots=True)
class Build:
    """One compilation."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    config: TileConfig
    factor_dtype: str
    stored_bytes: int
    """Of one element of the result; 0 if it is not a tile."""
    dense_bytes: int
    """Of one element of a dense weight; 0 if it is quantized."""
    min_sm: int = 80

    def applies_to(self, target: str) -> bool:
        if not target.startswith("sm_"):
            return self.min_sm == 80
        return int(target[3:]) >= self.min_sm


def _types(pointers: dict[str, str], strides: tuple[str, ...], *, is_multi: bool) -> dict[str, str]:
    types = {name: f"*{dtype}" for name, dtype in pointers.items()}
    types |= dict.fromkeys((*SIZES, *(f"stride_{name}" for name in strides)), "i32")
    types["scaling"] = "fp32"
    if is_multi:
        types["scalings"] = "*fp32"
    return types


def _build(
    kernel: Any,
    label: str,
    dtypes: tuple[str, str, str],
    rank: int,
    config: TileConfig,
    types: dict[str, str],
    **constants: Any,
) -> Build:
    weight, factor, out = dtypes
    constants = {**config.options(), "RANK": rank, "PRECISION": "ieee", **constants}
    return Build(
        f"{label} {weight}-{factor}-{out} rank {rank}",
        kernel,
        types,
        constants,
        config,
        factor,
        WIDTH.get(out, 1 if out == "u8" else 0),
        WIDTH.get(weight, 0),
        min_sm=90 if kernel is merge_tma.merge_tma_kernel else 80,
    )


def _tables(module: Any, factor: str) -> list[tuple[int, TileConfig]]:
    # `grouped` has the table of `merge` for 16-bit factors
    half = getattr(module, "HALF_CONFIGS", merge.HALF_CONFIGS)
    table = module.FP32_CONFIGS if factor == "fp32" else half
    return list(table.items())


# The first of each is the common case, the second the one that needs most registers.
HALF = ("bf16", "bf16"), ("fp32", "bf16")
FULL = ("bf16", "fp32"), ("fp32", "fp32")


def merge_builds() -> Iterator[Build]:
    for common, largest in (HALF, FULL):
        for rank, config in _tables(merge, common[1]):
            for weight, factor in (common, largest):
                is_largest = weight == "fp32"
                pointers = {"weight": weight, "a": factor, "b": factor, "out": weight}
                pointers |= {"gain": "fp32"} if is_largest else {}
                types = _types(pointers, ("w", "a", "b", "out"), is_multi=is_largest)
                dtypes = (weight, factor, weight)
                yield _build(merge.merge_kernel, "merge", dtypes, rank, config, types)


def tma_builds() -> Iterator[Build]:
    for weight, factor in (HALF[0], FULL[1]):
        for rank, config in _tables(merge, factor):
            n, k, r = config.block_n, config.block_k, config.block_r
            types = {
                "weight": f"tensordesc<{weight}[{n}, {k}]>",
                "a": f"tensordesc<{factor}[{r}, {k}]>",
                "b": f"tensordesc<{factor}[{n}, {r}]>",
                "out": f"tensordesc<{weight}[{n}, {k}]>",
                "n": "i32",
                "k": "i32",
                "scaling": "fp32",
            }
            dtypes = (weight, factor, weight)
            yield _build(merge_tma.merge_tma_kernel, "tma", dtypes, rank, config, types)


def dora_builds() -> Iterator[Build]:
    for weight, factor in (HALF[0], FULL[1]):
        for rank, config in _tables(dora, factor):
            pointers = {"weight": weight, "a": factor, "b": factor, "partial": "fp32"}
            types = _types(pointers, ("w", "a", "b"), is_multi=False)
            constants = {"COLUMNS": dora.COLUMNS_PER_SPLIT}
            dtypes, kernel = (weight, factor, ""), dora.square_sum_kernel
            yield _build(kernel, "dora", dtypes, rank, config, types, **constants)


def grouped_builds() -> Iterator[Build]:
    for weight, factor in (HALF[0], FULL[1]):
        for rank, config in _tables(grouped, factor):
            types = {"table": "*i64", "first_tiles": "*i32", "scalings": "*fp32", "experts": "i32"}
            constants = {
                "WEIGHT_DTYPE": TRITON_DTYPES[weight],
                "FACTOR_DTYPE": TRITON_DTYPES[factor],
                "OUT_DTYPE": TRITON_DTYPES[weight],
                "STEPS": 8,
                "IS_ALIGNED": True,
            }
            dtypes, kernel = (weight, factor, weight), grouped.grouped_merge_kernel
            yield _build(kernel, "grouped", dtypes, rank, config, types, **constants)


def quantized_builds() -> Iterator[Build]:
    for granularity, factor in (("block", "bf16"), ("row", "fp32")):
        for rank, config in _tables(merge, factor):
            ab, dtypes = {"a": factor, "b": factor, "out": "bf16"}, ("", factor, "bf16")
            pointers = {"packed": "u8", "absmax": "fp32", "values": "fp32", **ab}
            types = _types(pointers, ("a", "b", "out"), is_multi=False)
            constants = {"BLOCK_SIZE": 64, "HAS_WHOLE_BLOCKS": True}
            yield _build(nf4.nf4_merge_kernel, "nf4", dtypes, rank, config, types, **constants)
            pointers = {"packed": "u8", "exponents": "u8", **ab}
            types = _types(pointers, ("packed", "exponents", "a", "b", "out"), is_multi=False)
            yield _build(mxfp4.mxfp4_merge_kernel, "mxfp4", dtypes, rank, config, types)
            pointers = {"quantized": "u8", "scale": "fp32", **ab}
            types = _types(pointers, ("q", "scale", "a", "b", "out"), is_multi=False)
            label, constants = f"fp8 {granularity}", _fp8_constants(granularity)
            yield _build(fp8.fp8_merge_kernel, label, dtypes, rank, config, types, **constants)


def requantize_builds() -> Iterator[Build]:
    for factor in ("bf16", "fp32"):
        pointers = {"quantized": "u8", "scale": "fp32", "a": factor, "b": factor}
        to_fp8 = {**pointers, "out": "u8", "out_scale": "fp32"}
        types = _types(to_fp8, ("q", "scale", "a", "b", "out"), is_multi=False)
        is_wide = factor == "fp32"
        blocks = fp8.FP32_BLOCK_CONFIGS if is_wide else fp8.HALF_BLOCK_CONFIGS
        # the larger of the table, as tiles of `merge` are those of a merge to a dense dtype
        tables = {"block": list(blocks.items()), "row": _tables(merge, factor)[-1:]}
        for granularity, table in tables.items():
            for rank, config in table:
                label, constants = f"requantize {granularity}", _fp8_constants(granularity)
                dtypes, kernel = ("", factor, "u8"), fp8.fp8_merge_kernel
                yield _build(kernel, label, dtypes, rank, config, types, **constants)
        types = _types({**pointers, "maxima": "fp32"}, ("q", "scale", "a", "b"), is_multi=False)
        for rank, config in _tables(merge, factor)[-1:]:
            dtypes, kernel = ("", factor, ""), fp8.fp8_maximum_kernel
            constants = _fp8_constants("row")
            yield _build(kernel, "fp8 maximum", dtypes, rank, config, types, **constants)


def _fp8_constants(granularity: str) -> dict[str, Any]:
    return {"GRANULARITY": granularity, "SIZE": fp8.FP8_BLOCK}


BUILDS = [
    *merge_builds(),
    *tma_builds(),
    *dora_builds(),
    *grouped_builds(),
    *quantized_builds(),
    *requantize_builds(),
]
