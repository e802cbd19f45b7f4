"""Codes of single weights, as the formats' own libraries make and read them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Int8Params
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

State = dict[str, torch.Tensor]

PRESETS = {
    "fp8": "FP8_DYNAMIC",
    "nvfp4": "NVFP4A16",
    "mxfp4": "MXFP4A16",
    "w4a16": "W4A16",
    "w8a16": "W8A16",
}
FORMATS = {
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "w4a16": "pack-quantized",
    "w8a16": "pack-quantized",
}


def scheme(form: str, group_size: int = 128) -> QuantizationScheme:
    """Return what compressed-tensors calls by the format's name, with other groups if asked."""
    found = preset_name_to_scheme(PRESETS[form], ["Linear"])
    if form in ("w4a16", "w8a16"):
        assert found.weights is not None
        is_row = group_size == -1
        edits = {
            "strategy": "channel" if is_row else "group",
            "group_size": None if is_row else group_size,
        }
        found.weights = type(found.weights)(**{**found.weights.model_dump(), **edits})
    return found


def encode(form: str, name: str, weight: torch.Tensor, **options: Any) -> State:
    """Return the stored tensors of a weight, by their full names."""
    module = name.removesuffix(".weight")
    if form in ("nf4", "fp4"):
        codes, state = bnb.quantize_4bit(
            weight, quant_type=form, compress_statistics=options.get("is_nested", True)
        )
        described = state.as_dict(packed=True)
        return {name: codes, **{f"{name}.{key}": value for key, value in described.items()}}
    if form == "int8":
        made: Any = Int8Params(weight, requires_grad=False)
        made = made._quantize("cpu")
        return {
            name: made.data,
            f"{module}.SCB": made.SCB,
            f"{module}.weight_format": torch.zeros((), dtype=torch.uint8),
        }
    if form == "fp8-block":
        config = FineGrainedFP8Config(weight_block_size=[128, 128])
        quantizer: Any = SimpleNamespace(quantization_config=config)
        return Fp8Quantize(quantizer).convert({name: weight})
    kind = scheme(form, options.get("group_size", 128))
    found = _compress(form, weight, kind, options.get("joined", [weight]))
    return {f"{module}.{role}": tensor for role, tensor in found.items()}


def joined(name: str) -> list[str]:
    """Return the names of the weights of which engines make one, as llm-compressor has them."""
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for member in group:
            if f".{member}." in name:
                return [name.replace(f".{member}.", f".{other}.") for other in group]
    return [name]


def _compress(
    form: str, weight: torch.Tensor, kind: QuantizationScheme, together: list[torch.Tensor]
) -> State:
    """Encode as a run of llm-compressor without data does: extremes, scales, compress."""
    weights = kind.weights
    assert weights is not None
    groups = weight.unflatten(1, (-1, weights.group_size or weight.shape[1]))
    state = {"weight": weight}
    if form == "nvfp4":
        # `update_fused_layer_weight_global_scales` takes the least
        found = [generate_gparam(one.min(), one.max()) for one in together]
        state["weight_global_scale"] = torch.stack(found).amin(dim=0)
    scales, _ = calculate_qparams(
        groups.amin(dim=-1), groups.amax(dim=-1), weights, state.get("weight_global_scale")
    )
    state["weight_scale"] = scales
    codes: State = BaseCompressor.get_value_from_registry(FORMATS[form]).compress(state, kind)
    return codes


def decode(form: str, name: str, stored: State, dtype: torch.dtype, **options: Any) -> torch.Tensor:
    """Return what the stored tensors of a weight stand for."""
    module = name.removesuffix(".weight")
    found: torch.Tensor
    if form in ("nf4", "fp4"):
        parts = {key: t for key, t in stored.items() if key.startswith(f"{name}.")}
        state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
        found = bnb.dequantize_4bit(stored[name], state)
    elif form == "int8":
        found = bnb.int8_vectorwise_dequant(stored[name], stored[f"{module}.SCB"])
    elif form == "fp8-block":
        operation: Any = Fp8Dequantize(SimpleNamespace())
        found = operation._dequantize_one(stored[name], stored[f"{name}_scale_inv"], dtype)
    else:
        roles = ("weight", "weight_packed", "weight_scale", "weight_global_scale", "weight_shape")
        held = {r: stored[f"{module}.{r}"] for r in roles if f"{module}.{r}" in stored}
        kind = scheme(form, options.get("group_size", 128))
        found = BaseCompressor.get_value_from_registry(FORMATS[form]).decompress(held, kind)[
            "weight"
        ]
    return found


def encode_all(form: str, tensors: State, names: list[str], **options: Any) -> State:
    """Return a checkpoint in which some weights are codes."""
    stored: State = {}
    for name, tensor in tensors.items():
        if name in names:
            together = [tensors[other] for other in joined(name) if other in names]
            stored.update(encode(form, name, tensor, joined=together, **options))
        else:
            stored[name] = tensor
    return stored
