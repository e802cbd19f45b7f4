"""Perplexity of quantized checkpoints of one model, whoever wrote them, by one method.

Not a benchmark itself. The codes are decoded, and transformers runs the model in float32.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from streammerge.quantize.pack import unpack_awq, unpack_gptq

if TYPE_CHECKING:
    from pathlib import Path

Weights = dict[str, torch.Tensor]


class Perplexity:
    """Measures checkpoints of one model on windows spread evenly over a text."""

    def __init__(self, merged: Path, text: Path, *, windows: int, window_tokens: int) -> None:
        """Load the model and the text."""
        ids = AutoTokenizer.from_pretrained(merged)(text.read_text(), verbose=False)["input_ids"]
        whole = torch.tensor(ids[: len(ids) // window_tokens * window_tokens])
        cut = whole.view(-1, window_tokens)
        count = min(windows, len(cut))
        if not count:
            raise SystemExit(f"{text} has {len(ids)} tokens, expected {window_tokens} at least")
        self._windows = cut[[number * len(cut) // count for number in range(count)]]
        self._model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        self._names = set(decoded(merged))

    @torch.no_grad()
    def of(self, folder: Path) -> float:
        """Return the perplexity with the weights of a checkpoint."""
        weights = decoded(folder)
        # a tensor that is not replaced would be that of the checkpoint before
        if differing := self._names ^ set(weights):
            raise SystemExit(f"{folder.name} and the model do not both have {min(differing)}")
        self._model.load_state_dict(weights, strict=False)
        losses = []
        for window in self._windows:
            logits = self._model(window[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
        return math.exp(torch.cat(losses).mean(dtype=torch.float64).item())


def decoded(folder: Path) -> Weights:
    """Return the weights of a checkpoint by name; codes as what they stand for, in float32."""
    stored: Weights = {}
    for path in folder.glob("*.safetensors"):
        stored.update(load_file(path))
    section = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    for codes in [key for key in stored if key.endswith((".qweight", ".weight_packed"))]:
        module, _, name = codes.rpartition(".")
        ends = [key for key in stored if key.rpartition(".")[0] == module]
        part = {key.rpartition(".")[2]: stored.pop(key) for key in ends}
        if "bias" in part:
            stored[f"{module}.bias"] = part.pop("bias")
        if name == "weight_packed":
            weight = _decode_packed(part)
        elif section["quant_method"] == "awq":
            weight = unpack_awq(part, group_size=section["group_size"]).dequantize(torch.float32)
        else:
            weight = unpack_gptq(
                part,
                bits=section["bits"],
                group_size=section["group_size"],
                checkpoint_format=section["checkpoint_format"],
            ).dequantize(torch.float32)
        stored[f"{module}.weight"] = weight
    return stored


def _decode_packed(part: Weights) -> torch.Tensor:
    """Decode 4-bit codes of compressed-tensors, (N, K).

    A word has eight codes of neighbouring inputs, or eight zeros of neighbouring outputs, lowest
    bits first.
    """
    places = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (part["weight_packed"][..., None] >> places & 15).flatten(1)
    zeros = (part["weight_zero_point"].T[..., None] >> places & 15).flatten(1).T
    scales = part["weight_scale"].float()
    grouped = codes.view(*scales.shape, -1)
    steps = grouped - zeros[: len(codes), :, None]
    return (steps * scales[..., None]).flatten(1)
