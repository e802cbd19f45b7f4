"""Heads and embeddings under other names: right, or refused, and never a wrong model in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import streammerge

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CAUSAL, CLASSIFIER = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForSequenceClassification,
)


def build(kind: str) -> Any:
    if kind == "t5":
        sizes = {"d_model": 48, "d_ff": 80, "num_layers": 2, "num_heads": 4, "d_kv": 12}
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=96, **sizes)
        )
    model, config, tied = {
        "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", False),
        "neox-tied": ("GPTNeoXForCausalLM", "GPTNeoXConfig", True),
        "phi": ("PhiForCausalLM", "PhiConfig", False),
        "phi-tied": ("PhiForCausalLM", "PhiConfig", True),
        "bert-mlm": ("BertForMaskedLM", "BertConfig", True),
        "biogpt": ("BioGptForCausalLM", "BioGptConfig", True),
    }[kind]
    made = getattr(transformers, config)(**SIZES, tie_word_embeddings=tied)
    return getattr(transformers, model)(made)


def make_adapter(base: Path, loader: Any, *, rows: int | None, **options: Any) -> Path:
    torch.manual_seed(1)
    model = loader.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    trained = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    trained.save_pretrained(base.parent / "adapter")
    return base.parent / "adapter"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 27).view(2, 12)).logits


@pytest.mark.parametrize(
    ("kind", "loader", "rows", "options"),
    [
        ("neox", CAUSAL, None, {"target_modules": ["lm_head", "query_key_value"]}),
        ("neox", CAUSAL, None, {"target_modules": ["dense"], "modules_to_save": ["lm_head"]}),
        ("neox-tied", CAUSAL, None, {"target_modules": ["embed_in"]}),
        (
            "phi",
            CAUSAL,
            104,
            {"target_modules": ["dense"], "modules_to_save": ["embed_tokens", "lm_head"]},
        ),
        (
            "bert-mlm",
            CLASSIFIER,
            None,
            {
                "target_modules": ["query"],
                "modules_to_save": ["classifier", "pooler"],
                "task_type": "SEQ_CLS",
            },
        ),
    ],
)
def test_merged_model_computes_what_the_trained_one_does(
    kind: str, loader: Any, rows: int | None, options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base, output = tmp_path / "base", tmp_path / "merged"
    build(kind).save_pretrained(base)
    adapter = make_adapter(base, loader, rows=rows, **options)
    model = loader.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    expected = logits(PeftModel.from_pretrained(model, adapter))
    streammerge.export(
        {
            "model_name_or_path": str(base),
            "adapter_name_or_path": str(adapter),
            "export_dir": str(output),
        }
    )
    torch.testing.assert_close(
        logits(loader.from_pretrained(output)), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("kind", "loader", "rows", "options", "said"),
    [
        (
            "t5",
            transformers.AutoModelForSeq2SeqLM,
            None,
            {"target_modules": ["q"], "modules_to_save": ["shared"]},
            "may share",
        ),
        ("biogpt", CAUSAL, None, {"target_modules": ["embed_tokens"]}, "may share"),
        (
            "bert-mlm",
            transformers.AutoModelForMaskedLM,
            None,
            {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]},
            "may share",
        ),
        ("phi-tied", CAUSAL, 104, {"target_modules": ["embed_tokens"]}, "but not all"),
    ],
)
def test_what_is_not_certain_is_refused(
    kind: str, loader: Any, rows: int | None, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base, output = tmp_path / "base", tmp_path / "merged"
    build(kind).save_pretrained(base)
    adapter = make_adapter(base, loader, rows=rows, **options)
    with pytest.raises(streammerge.PlanError, match=said):
        streammerge.export(
            {
                "model_name_or_path": str(base),
                "adapter_name_or_path": str(adapter),
                "export_dir": str(output),
            }
        )
    assert not output.exists()
