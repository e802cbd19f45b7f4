"""Vision-language models, whose layers transformers renames between checkpoint and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import streammerge

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3() -> Any:
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=12),
        vision_config=transformers.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION),
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen25_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": 48, "fullatt_block_indexes": [1]},
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def bert() -> Any:
    sizes = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, num_labels=3)
    )


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (gemma3, ["q_proj", "down_proj"]),
        (llava, ["q_proj", "v_proj"]),
        (qwen25_vl, ["q_proj", "qkv"]),
        (bert, ["query", "value"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_names_are_found_and_bits_are_pefts(
    build: Callable[[], Any], targets: list[str], tmp_path: Path, same_bits: Any, load_folder: Any
) -> None:
    torch.manual_seed(0)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = build().bfloat16()
    model.save_pretrained(base)
    task = {"task_type": "SEQ_CLS"} if build is bert else {}
    options = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **task)
    get_peft_model(type(model).from_pretrained(base), options).save_pretrained(adapter)
    merged = PeftModel.from_pretrained(type(model).from_pretrained(base), adapter)
    merged.merge_and_unload().save_pretrained(tmp_path / "peft")
    streammerge.export(
        {
            "model_name_or_path": str(base),
            "adapter_name_or_path": str(adapter),
            "export_dir": str(tmp_path / "merged"),
        }
    )
    same_bits(load_folder(tmp_path / "merged"), load_folder(tmp_path / "peft"))
