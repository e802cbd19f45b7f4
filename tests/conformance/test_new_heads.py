"""A classifier trained on a language model: its head is new, and must be there afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("labels", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_classifier_head_is_added(labels: int, dtype: torch.dtype, workshop: Any) -> None:
    base = workshop.base("llama", dtype)

    def load(path: Any, **options: Any) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(path, pad_token_id=0, **options)

    torch.manual_seed(5)
    model = get_peft_model(
        load(base, num_labels=labels),
        LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False),
    )
    adapter = workshop.folder / "classifier"
    model.save_pretrained(adapter)
    ids = torch.arange(3, 27).view(2, 12)
    expected = PeftModel.from_pretrained(load(base, num_labels=labels), adapter)
    expected = expected.merge_and_unload().eval()
    tensors = workshop.export(base, adapter)
    assert tensors["score.weight"].shape == (labels, 48)
    merged = load(workshop.folder / "merged").eval()
    assert merged.config.num_labels == labels
    with torch.no_grad():
        assert torch.equal(merged(input_ids=ids).logits, expected(input_ids=ids).logits)
