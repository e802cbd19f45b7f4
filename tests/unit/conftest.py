"""A tiny checkpoint and a LoRA for it, written with numpy."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from pathlib import Path

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base of 16 x 8 weights, and an adapter on its only layer."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    random = np.random.default_rng(5)

    def values(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return random.standard_normal(shape, dtype=np.float32)

    weights = {
        "model.embed_tokens.weight": values(16, 8),
        f"{Q}.weight": values(8, 8),
        "model.norm.weight": values(8).astype(np.float16),
        "lm_head.weight": values(16, 8),
    }
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(
        json.dumps({"model_type": "llama", "tie_word_embeddings": False})
    )
    key = f"base_model.model.{Q}"
    factors = {
        f"{key}.lora_A.weight": values(2, 8),
        f"{key}.lora_B.weight": values(8, 2),
        "base_model.model.model.norm.weight": values(8),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM"})
    )
    return base, adapter
