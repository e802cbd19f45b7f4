"""The most memory that a quantization or an evaluation takes, foreseen before the first layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from streammerge.errors import MemoryBudgetError
from streammerge.quantize.experts import CHUNK_TOKENS
from streammerge.quantize.methods import method_of
from streammerge.quantize.source import PIECE_BYTES

if TYPE_CHECKING:
    from streammerge.quantize.settings import QuantizeSettings
    from streammerge.quantize.skeleton import Skeleton

__all__ = ["BASELINE_BYTES", "check_memory", "layer_bytes", "states_bytes"]

# interpreter, torch and transformers after a model was built on the meta device: 430 MB seen
BASELINE_BYTES = 480 * 10**6


def check_memory(
    skeleton: Skeleton,
    settings: QuantizeSettings,
    *,
    samples: torch.Tensor,
    dtype: torch.dtype,
    max_memory: int,
) -> int:
    """Make sure that every layer can be quantized within a ceiling; return what it will take.

    Args:
        skeleton: The model.
        settings: How it is quantized.
        samples: (samples, tokens): token ids.
        dtype: What layers compute in.
        max_memory: The ceiling, in bytes.

    Raises:
        MemoryBudgetError: It is too low.
    """
    tokens = samples.shape[1]
    states = states_bytes(skeleton, tokens=tokens, dtype=dtype)
    rows = dtype.itemsize * len(torch.unique(samples)) * skeleton.hidden_size
    layer = layer_bytes(skeleton, dtype=dtype)
    # an expert's tokens come in chunks, through its two widths and back
    expert = max(
        (
            sum(dtype.itemsize * n * k for n, k in sizes)
            + CHUNK_TOKENS * (dtype.itemsize + 8) * max(map(sum, sizes))
            for sizes in _expert_sizes(skeleton)
        ),
        default=0,
    )
    work_bytes = method_of(settings).work_bytes
    group = max(work_bytes(settings, *module.size) for module in skeleton.all_linears())
    needed = BASELINE_BYTES + max(layer + states + expert + group, rows + states + PIECE_BYTES)
    if needed > max_memory:
        raise MemoryBudgetError(
            "max_memory is too small to quantize a layer of this model",
            expected=f"at least {-(-needed // 10**6)}MB",
            got=f"{max_memory // 10**6}MB",
            hint=f"set max_memory: {-(-needed // 10**6)}MB or more",
        )
    return needed


def layer_bytes(skeleton: Skeleton, *, dtype: torch.dtype) -> int:
    """Return what the weights of the largest layer take, experts apart."""
    return dtype.itemsize * max(
        sum(parameter.numel() for parameter in layer.parameters()) for layer in skeleton.layers
    )


def states_bytes(skeleton: Skeleton, *, tokens: int, dtype: torch.dtype) -> int:
    """Return what one sample takes on its way through a layer."""
    widest = max(max(p.shape) for layer in skeleton.layers for p in layer.parameters())
    states = dtype.itemsize * tokens * (8 * skeleton.hidden_size + 4 * widest)
    if skeleton.model.config._attn_implementation == "eager":  # noqa: SLF001
        text = skeleton.model.config.get_text_config()
        # scores, their softmax in float32, and the mask
        states += 10 * tokens * tokens * int(text.num_attention_heads)
    return states


def _expert_sizes(skeleton: Skeleton) -> list[list[tuple[int, int]]]:
    return [
        [projection.size for projection in block.projections[0].values()]
        for blocks in skeleton.blocks
        for block in blocks
    ]
