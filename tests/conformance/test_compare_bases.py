"""What `compare-bases` says, against bitsandbytes, PEFT and float64."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import bitsandbytes
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import streammerge
from streammerge.cli.app import app
from streammerge.config import parse_config
from streammerge.engine import fidelity
from streammerge.engine.compare import compare_bases
from streammerge.engine.evaluate import EvaluateOptions, evaluate
from streammerge.errors import PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

VOCABULARY = 90
TARGETS = ("q_proj", "down_proj")
RANK, ALPHA = 4, 8
ROWS = 64


class Case:
    """A tiny llama with a tokenizer of one token per character, and a LoRA for it."""

    def __init__(self, folder: Path, targets: tuple[str, ...] = TARGETS) -> None:
        self.base, self.adapter, self.out = (folder / n for n in ("base", "adapter", "out"))
        torch.manual_seed(6)
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
        model.save_pretrained(self.base)
        characters = {chr(33 + number): number for number in range(VOCABULARY)}
        tokenizer = Tokenizer(models.WordLevel(characters, unk_token="!"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(self.base)
        tuned: Any = get_peft_model(
            model.float(),
            LoraConfig(
                r=RANK, lora_alpha=ALPHA, target_modules=list(targets), init_lora_weights=False
            ),
        )
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(0.02)
        tuned.save_pretrained(self.adapter)
        self.text = folder / "text.txt"
        ids = torch.randint(3, VOCABULARY, (64,), generator=torch.Generator().manual_seed(8))
        self.text.write_text("".join(chr(33 + int(number)) for number in ids))

    def values(self, **more: Any) -> dict[str, Any]:
        return {"model_name_or_path": str(self.base), "adapter_name_or_path": str(self.adapter),
                "export_dir": str(self.out), **more}  # fmt: skip

    def compare(self, *, text: Path | None = None, **more: Any) -> Any:
        config = parse_config(self.values(**more))
        return compare_bases(config, text=text, options=EvaluateOptions(length=16))

    def merged(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Let PEFT merge onto a base's values."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.bfloat16)
        model.load_state_dict(base)
        merged: Any = PeftModel.from_pretrained(model, self.adapter).merge_and_unload()
        return merged.state_dict()

    def deltas(self) -> dict[str, torch.Tensor]:
        """Compute B A in float64."""
        factors = load_file(self.adapter / "adapter_model.safetensors")
        found = {}
        for key, a in factors.items():
            if ".lora_A." in key:
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = factors[key.replace("lora_A", "lora_B")]
                found[f"{module}.weight"] = b.double() @ a.double() * (ALPHA / RANK)
        return found


def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True
    )
    return bitsandbytes.functional.dequantize_4bit(codes, state)


def middle(weight: torch.Tensor) -> torch.Tensor:
    begin = max(0, (len(weight) - ROWS) // 2)
    return weight[begin : begin + ROWS].double()


def test_it_measures_what_it_says(tmp_path: Path) -> None:
    case = Case(tmp_path)
    report = case.compare()
    base = load_file(case.base / "model.safetensors")
    linear = [name for name in base if name.endswith("_proj.weight")]
    rounded = {n: round_to_nf4(v) if n in linear else v for n, v in base.items()}
    deltas = case.deltas()
    merges = {"original": (base, case.merged(base)), "dequantized": (rounded, case.merged(rounded))}
    assert set(report.kinds) == set(TARGETS)
    for kind, found in report.kinds.items():
        names = [name for name in deltas if f".{kind}." in name]
        assert found.weights == len(names) == 3
        square = sum(float(middle(deltas[name]).square().sum()) for name in names)
        error = sum(float((middle(rounded[n]) - middle(base[n])).square().sum()) for n in names)
        # deltas are found as differences in float32 of a sum with a weight some 10 times as large
        assert found.base_error == pytest.approx((error / square) ** 0.5, rel=1e-4)
        for label, (start, end) in merges.items():
            changes = [(middle(end[n]) - middle(start[n]), middle(deltas[n])) for n in names]
            kept = sum(float((change * delta).sum()) for change, delta in changes) / square
            noise = sum(float((change - delta).square().sum()) for change, delta in changes)
            assert getattr(found, f"kept_{label}") == pytest.approx(kept, rel=1e-4)
            assert getattr(found, f"noise_{label}") == pytest.approx(
                (noise / square) ** 0.5, rel=1e-3
            )
    assert report.all_kinds.weights == 6
    errors = [found.base_error for found in report.kinds.values()]
    assert min(errors) <= report.all_kinds.base_error <= max(errors)
    assert report.original is report.dequantized is None
    assert not case.out.exists()


def test_perplexities_are_those_of_the_two_exports(tmp_path: Path) -> None:
    case = Case(tmp_path)
    report = case.compare(text=case.text)
    for base, found in (("original", report.original), ("dequantized-nf4", report.dequantized)):
        out = tmp_path / base
        streammerge.export(case.values(qlora_base=base, export_dir=str(out)))
        wanted = evaluate(str(out), case.text, options=EvaluateOptions(length=16))
        assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
        assert found.tokens == wanted.tokens == 60
    assert report.original.loss != report.dequantized.loss


def test_a_sample_of_many_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "SAMPLE_WEIGHTS", 2)
    report = Case(tmp_path).compare()
    assert report.kinds["q_proj"].weights == 2


def test_a_quantization_and_a_choice_of_base_are_not_looked_at(tmp_path: Path) -> None:
    case = Case(tmp_path)
    plain = case.compare().to_dict()
    nf4 = case.compare(qlora_base="original", export_quantization_method="nf4").to_dict()
    assert nf4 == plain


def test_a_merge_that_no_codes_would_change(tmp_path: Path) -> None:
    case = Case(tmp_path, ("embed_tokens",))
    with pytest.raises(PlanError, match="no adapter changes a weight that a 4-bit training"):
        case.compare()


def test_on_the_command_line(tmp_path: Path) -> None:
    case = Case(tmp_path)
    arguments = [f"{key}={value}" for key, value in case.values().items()]
    runner = CliRunner()
    shown = runner.invoke(
        app, ["compare-bases", *arguments, "--text", str(case.text), "--length", "16"]
    )
    assert shown.exit_code == 0, shown.output
    for word in ("base error", "q_proj", "down_proj", "perplexity onto dequantized-nf4"):
        assert word in shown.stdout
    result = runner.invoke(app, ["compare-bases", *arguments, "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads(json.dumps(case.compare().to_dict()))
    without = [argument for argument in arguments if "adapter" not in argument]
    refused = runner.invoke(app, ["compare-bases", *without])
    assert refused.exit_code != 0
