"""Trained rows of embeddings, inside LoRA and alone, against PEFT."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# what a merged F32 model may differ by from the unmerged one, which adds up in another order
CLOSE = {"atol": 2e-6, "rtol": 0.0}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 27).view(2, 12)).logits.float()


def unmerged(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    return logits(PeftModel.from_pretrained(model, adapter))


def alone(workshop: Any, base: Path, **options: Any) -> Path:
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, TrainableTokensConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    path: Path = workshop.folder / "alone"
    model.save_pretrained(path)
    return path


def is_tied(workshop: Any) -> Any:
    return json.loads((workshop.folder / "merged" / "config.json").read_text())[
        "tie_word_embeddings"
    ]


# in any order; the last row of the vocabulary among them
SAME: dict[str, Any] = {
    "list": [95, 1, 5],
    "by name": {"embed_tokens": [95, 1, 5]},
    "both ends": {"embed_tokens": [95, 1], "lm_head": [95, 1]},
}
OTHERS: dict[str, Any] = {
    "different rows": {"embed_tokens": [95, 1, 5], "lm_head": [7, 1]},
    "the head alone": {"lm_head": [20, 7]},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [*SAME, *OTHERS])
def test_rows_of_an_untied_model(
    rows: str, dtype: torch.dtype, workshop: Any, same_bits: Any
) -> None:
    base = workshop.base("llama", dtype)
    indices = {**SAME, **OTHERS}[rows]
    adapter = workshop.adapter(base, target_modules=["q_proj"], trainable_token_indices=indices)
    expected, theirs = workshop.peft(base, adapter)
    merged = workshop.export(base, adapter)
    same_bits(merged, expected)
    assert torch.equal(workshop.merged_logits(), theirs)
    before = workshop.export(base, name="copy")
    for name in (EMBED, HEAD):
        named = indices if isinstance(indices, dict) else {"embed_tokens": indices}
        wanted = next((named[end] for end in named if f".{end}." in f".{name}"), [])
        changed = (merged[name] != before[name]).any(dim=1).nonzero().flatten().tolist()
        assert changed == sorted(wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", SAME)
def test_the_same_rows_of_a_tied_model_keep_it_tied(
    rows: str, dtype: torch.dtype, workshop: Any, same_bits: Any
) -> None:
    base = workshop.base("llama-tied", dtype)
    adapter = workshop.adapter(base, target_modules=["q_proj"], trainable_token_indices=SAME[rows])
    expected, theirs = workshop.peft(base, adapter)
    merged = workshop.export(base, adapter)
    same_bits(merged, expected)
    assert HEAD not in merged
    assert is_tied(workshop)
    assert torch.equal(workshop.merged_logits(), theirs)


@pytest.mark.parametrize("rows", OTHERS)
def test_other_rows_of_a_tied_model_untie_it(rows: str, workshop: Any, same_bits: Any) -> None:
    base = workshop.base("llama-tied", torch.float32)
    options: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "trainable_token_indices": OTHERS[rows],
    }
    adapter = workshop.adapter(base, **options)
    merged = workshop.export(base, adapter)
    assert HEAD in merged
    assert not is_tied(workshop)
    wanted = unmerged(base, adapter)
    torch.testing.assert_close(workshop.merged_logits(), wanted, **CLOSE)
    # PEFT puts all rows into the one tensor
    expected, theirs = workshop.peft(base, adapter)
    assert (theirs - wanted).abs().max() > 0.1
    same_bits(workshop.export(base, adapter, peft_bugs="reproduce"), expected)
    # each end has its own rows, in the base's dtype
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, end in ((EMBED, "embed_tokens"), (HEAD, "lm_head")):
        for number, row in enumerate(OTHERS[rows].get(end, [])):
            path = name.removesuffix(".weight")
            key = f"base_model.model.{path}.token_adapter.trainable_tokens_delta"
            assert torch.equal(merged[name][row], tensors[key][number])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_rows_alone(family: str, dtype: torch.dtype, workshop: Any, same_bits: Any) -> None:
    base = workshop.base(family, dtype)
    adapter = alone(workshop, base, token_indices=[7, 95, 3])
    expected, theirs = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter), expected)
    assert torch.equal(workshop.merged_logits(), theirs)
    assert torch.equal(workshop.merged_logits(), unmerged(base, adapter))


def test_rows_of_a_tied_head_alone_untie_the_model(workshop: Any) -> None:
    base = workshop.base("llama-tied", torch.float32)
    adapter = alone(workshop, base, token_indices=[7, 2], target_modules=["lm_head"])
    merged = workshop.export(base, adapter)
    assert HEAD in merged
    assert not is_tied(workshop)
    torch.testing.assert_close(workshop.merged_logits(), unmerged(base, adapter), **CLOSE)


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(103, 18)
        self.lin0 = nn.Linear(18, 9)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_tiles_of_four_rows(dtype: torch.dtype, mill: Any) -> None:
    rows = [102, 0, 50, 3, 4, 101, 7]
    config = LoraConfig(target_modules=["lin0"], trainable_token_indices={"emb": rows})
    mill.check(Tables, config, dtype, threads=3)
    alone = TrainableTokensConfig(target_modules=["emb"], token_indices=rows)
    mill.check(Tables, alone, dtype, threads=3)


def test_rows_in_turn(mill: Any) -> None:
    first = TrainableTokensConfig(target_modules=["emb"], token_indices=[5, 3])
    second = TrainableTokensConfig(target_modules=["emb"], token_indices=[3, 102])
    lora = LoraConfig(target_modules=["emb"], lora_alpha=3)
    mill.check_in_turn(Tables, torch.bfloat16, first, second, lora)
    mill.check_in_turn(Tables, torch.bfloat16, lora, first)


# refusals


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([103, 1], "trained token rows do not fit.*the highest of row 103"),
        ([1, 1], "token indices name a row twice"),
        ([1], "token rows and the indices in adapter_config.json disagree"),
        ([-1, 1], "bad trainable_token_indices"),
        ({"other": [1, 2]}, None),
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_refused(
    rows: Any, match: str | None, mill: Any, edit_config: Any
) -> None:
    base = mill.base(Tables, torch.bfloat16)
    config = LoraConfig(target_modules=["lin0"], trainable_token_indices={"emb": [1, 2]})
    adapter = mill.adapter(Tables, config, dtype=torch.bfloat16)
    edit_config(adapter, trainable_token_indices=rows)
    if match is None:
        # rows for one name are those of the only tensor that there is
        mill.export(base, adapter)
        return
    with pytest.raises((AdapterError, PlanError), match=match):
        mill.export(base, adapter)


def test_rows_of_another_width_are_refused(mill: Any) -> None:
    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(103, 19)

    config = TrainableTokensConfig(target_modules=["emb"], token_indices=[5, 3])
    adapter = mill.adapter(Tables, config)
    with pytest.raises(PlanError, match="trained token rows do not fit"):
        mill.export(mill.base(Wider, torch.bfloat16), adapter)
