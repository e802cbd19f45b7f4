"""Tied models: the merge gives what the trained, unmerged model computes, where PEFT's own does
not.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

EMBEDDINGS = {"llama-tied": "embed_tokens", "gemma2": "embed_tokens", "gpt2": "wte"}
FAMILIES = list(EMBEDDINGS)


def unmerged_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 27).view(2, 12)).logits.float()


def merged_config(workshop: Any) -> dict[str, Any]:
    return json.loads((workshop.folder / "merged" / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["target-embedding", "target-head", "save-embedding", "save-both"])
def test_merged_logits_are_those_of_the_trained_model(
    family: str, kind: str, workshop: Any
) -> None:
    embedding = EMBEDDINGS[family]
    options: dict[str, Any] = {
        "target-embedding": {"target_modules": [embedding]},
        "target-head": {"target_modules": ["lm_head"]},
        "save-embedding": {"target_modules": ["lm_head"], "modules_to_save": [embedding]},
        "save-both": {"target_modules": "all-linear", "modules_to_save": [embedding, "lm_head"]},
    }[kind]
    base = workshop.base(family, torch.float32)
    adapter = workshop.adapter(base, **options)
    tensors = workshop.export(base, adapter)
    assert "lm_head.weight" in tensors
    assert merged_config(workshop)["tie_word_embeddings"] is False
    expected = unmerged_logits(base, adapter)
    torch.testing.assert_close(workshop.merged_logits(), expected, rtol=1e-4, atol=1e-4)


def test_shared_training_stays_one_tensor(workshop: Any) -> None:
    base = workshop.base("llama-tied", torch.float32)
    adapter = workshop.adapter(
        base, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    tensors = workshop.export(base, adapter)
    assert "lm_head.weight" not in tensors
    assert merged_config(workshop)["tie_word_embeddings"] is True


def test_layers_alone_leave_the_tie_and_config_as_they_are(workshop: Any) -> None:
    base = workshop.base("gemma2", torch.bfloat16)
    adapter = workshop.adapter(base, target_modules=["q_proj"])
    assert "lm_head.weight" not in workshop.export(base, adapter)
    merged = (workshop.folder / "merged" / "config.json").read_bytes()
    assert merged == (base / "config.json").read_bytes()
