"""The formats that an export can write without calibration: what config.json says of them.

The sections are those of transformers' BitsAndBytesConfig and FineGrainedFP8Config, and of the
presets of compressed-tensors; the codec follows from the section, as it does when it is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streammerge.dtypes import Dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streammerge.config import FormatName

__all__ = ["section_of", "with_kept"]

_TORCH_NAMES = {Dtype.F16: "float16", Dtype.BF16: "bfloat16", Dtype.F32: "float32"}
# under which key the loaders of a method want the modules that are not quantized
_KEPT_KEYS = {
    "bitsandbytes": "llm_int8_skip_modules",
    "fp8": "modules_to_not_convert",
    "compressed-tensors": "ignore",
}


def section_of(
    name: FormatName, *, group_size: int, is_nested: bool, dtype: Dtype
) -> dict[str, Any]:
    """Return `quantization_config` of a format, for a model of which every linear is quantized.

    Args:
        name: As `export_quantization_method` has it.
        group_size: Inputs per scale of packed integers; -1 for one scale per row.
        is_nested: Whether the scales of NF4 and FP4 are quantized too.
        dtype: Of the model, in which bitsandbytes computes.
    """
    if name in ("nf4", "fp4"):
        return _bitsandbytes(4, name, is_nested=is_nested, compute=_TORCH_NAMES[dtype])
    if name == "int8":
        # what BitsAndBytesConfig says of 4 bits where they are not used
        return _bitsandbytes(8, "fp4", is_nested=False, compute="float32")
    if name == "fp8-block":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    return _compressed(name, group_size)


def with_kept(section: dict[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """Return a section that names the modules which loaders must leave as they are."""
    key = _KEPT_KEYS[section["quant_method"]]
    # without a list transformers leaves the head out by itself; compressed-tensors wants one
    nothing: list[str] | None = [] if key == "ignore" else None
    return {**section, key: list(kept) or nothing}


def _bitsandbytes(bits: int, quant_type: str, *, is_nested: bool, compute: str) -> dict[str, Any]:
    is_4bit = bits == 4
    return {
        "quant_method": "bitsandbytes",
        "_load_in_8bit": not is_4bit,
        "_load_in_4bit": is_4bit,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": None,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": is_nested,
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": "uint8",
        "load_in_4bit": is_4bit,
        "load_in_8bit": not is_4bit,
    }


def _compressed(name: FormatName, group_size: int) -> dict[str, Any]:
    """Return the preset FP8_DYNAMIC, NVFP4A16, MXFP4A16, W4A16 or W8A16."""
    table: dict[str, tuple[int, str, dict[str, Any], str]]
    groups: dict[str, Any] = {"strategy": "group", "group_size": group_size}
    if group_size == -1:
        groups = {"strategy": "channel", "group_size": None}
    table = {
        "fp8": (8, "float", {"strategy": "channel", "group_size": None}, "float-quantized"),
        "nvfp4": (
            4,
            "float",
            {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
            "nvfp4-pack-quantized",
        ),
        "mxfp4": (
            4,
            "float",
            {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
            "mxfp4-pack-quantized",
        ),
        "w4a16": (4, "int", groups, "pack-quantized"),
        "w8a16": (8, "int", groups, "pack-quantized"),
    }
    bits, kind, more, form = table[name]
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **more}
    # FP8 is multiplied by FP8: inputs get a scale per token as they come
    inputs = {**weights, "strategy": "token", "dynamic": True} if name == "fp8" else None
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "moe_sparsity_config": None,
    }
