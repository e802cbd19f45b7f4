"""Adapters for layers that are in the model several times (`layer_replication`)."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from streammerge.errors import PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

RANGES = [[0, 2], [1, 2], [0, 1]]
ORDER = [0, 1, 1, 0]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "dora": {"target_modules": ["v_proj"], "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {r"layers\.2\.self_attn\.q_proj": 7, "up_proj": 2},
        "alpha_pattern": {r"layers\.3\..*": 3},
        "use_rslora": True,
    },
    "mica": {"target_modules": ["o_proj"], "init_lora_weights": "mica"},
}
CLOSE = {"atol": 2e-6, "rtol": 0.0}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 27).view(2, 12)).logits.float()


def with_own_layers(base: Path, load_folder: Any) -> Path:
    """Write the model that training saw, each copy with tensors of its own."""
    path = base.with_name("replicated")
    path.mkdir()
    tensors = {}
    for name, tensor in load_folder(base).items():
        before, found, rest = name.partition("model.layers.")
        if not found:
            tensors[name] = tensor
            continue
        number, _, rest = rest.partition(".")
        for new, old in enumerate(ORDER):
            if str(old) == number:
                tensors[f"{before}{found}{new}.{rest}"] = tensor.clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["num_hidden_layers"] = len(ORDER)
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_copies_are_layers_of_their_own(
    options: str, dtype: torch.dtype, workshop: Any, same_bits: Any, load_folder: Any,
    edit_config: Any,
) -> None:  # fmt: skip
    base = workshop.base("llama", dtype)
    adapter = workshop.adapter(base, layer_replication=RANGES, **OPTIONS[options])
    merged = workshop.export(base, adapter)
    config = json.loads((workshop.folder / "merged" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(ORDER)
    # what PEFT makes of a base that has the copies
    plain = workshop.folder / "plain"
    shutil.copytree(adapter, plain)
    edit_config(plain, layer_replication=None)
    expected, theirs = workshop.peft(with_own_layers(base, load_folder), plain)
    same_bits(merged, expected)
    assert torch.equal(workshop.merged_logits(), theirs)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-bias", "mistral"])
def test_logits_are_those_of_the_unmerged_model(family: str, workshop: Any) -> None:
    base = workshop.base(family, torch.float32)
    options: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 40}
    adapter = workshop.adapter(base, layer_replication=RANGES, **options)
    workshop.export(base, adapter)
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    wanted = logits(model)
    torch.testing.assert_close(workshop.merged_logits(), wanted, **CLOSE)
    # PEFT adds the deltas of all copies to the one tensor that they share
    assert (logits(model.merge_and_unload()) - wanted).abs().max() > 1e-3


def test_an_adapter_after_it_is_for_the_copies(workshop: Any, load_folder: Any) -> None:
    base = workshop.base("llama", torch.float32)
    first = workshop.adapter(base, "first", target_modules=["q_proj"], layer_replication=RANGES)
    own = with_own_layers(base, load_folder)
    second = workshop.adapter(own, "second", target_modules=["q_proj"])
    merged = workshop.export(base, first, second)
    assert merged.keys() == load_folder(own).keys()
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(own), second)
    model = model.merge_and_unload()
    only = workshop.export(base, first, name="only")
    before = load_folder(own)
    for number in range(len(ORDER)):
        name = f"model.layers.{number}.self_attn.q_proj.weight"
        total = only[name].double() + (model.state_dict()[name] - before[name]).double()
        torch.testing.assert_close(merged[name].double(), total, atol=1e-6, rtol=0)


def test_other_names_of_layers(workshop: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 (used here alone)

    torch.manual_seed(5)
    sizes: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 40, "max_position_embeddings": 64,
    }  # fmt: skip
    model: Any = BertForMaskedLM(BertConfig(**sizes)).eval()
    base = tmp_path / "bert"
    model.save_pretrained(base)
    config = LoraConfig(target_modules=["query", "dense"], layer_replication=RANGES, r=3)
    trained = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trained.save_pretrained(tmp_path / "adapter")
    workshop.export(base, tmp_path / "adapter")
    merged = BertForMaskedLM.from_pretrained(workshop.folder / "merged")
    assert len(merged.bert.encoder.layer) == len(ORDER)
    torch.testing.assert_close(logits(merged), logits(trained), **CLOSE)


@pytest.mark.parametrize(
    ("ranges", "match"),
    [
        ([[0, 3]], "names a layer that the base does not have"),
        ([[1, 1]], "bad layer_replication"),
        ([0, 2], "bad layer_replication"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(
    ranges: Any, match: str, workshop: Any, edit_config: Any
) -> None:
    base = workshop.base("llama", torch.bfloat16)
    adapter = workshop.adapter(base, target_modules=["q_proj"], layer_replication=RANGES)
    edit_config(adapter, layer_replication=ranges)
    with pytest.raises(Exception, match=match):
        workshop.export(base, adapter)


def test_a_second_replication_is_refused(workshop: Any) -> None:
    base = workshop.base("llama", torch.bfloat16)
    first = workshop.adapter(base, "first", target_modules=["q_proj"], layer_replication=RANGES)
    with pytest.raises(PlanError, match="merged as the first adapter only"):
        workshop.export(base, first, first)
