"""The loss of a model that runs layer by layer is the loss of transformers' own model."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from streammerge.cli.app import app
from streammerge.config import parse_config
from streammerge.engine.evaluate import EvaluateOptions, evaluate
from streammerge.engine.prepare import prepare
from streammerge.errors import (
    CheckpointError,
    InputError,
    MemoryBudgetError,
    UnsupportedError,
)
from streammerge.quantize import evaluate as module
from streammerge.quantize.evaluate import Evaluator
from streammerge.quantize.gptq import Factored, GptqOptions, quantize_gptq
from streammerge.quantize.linear import Grid
from streammerge.quantize.pack import pack_gptq, unpack_gptq
from streammerge.quantize.skeleton import build_skeleton
from streammerge.quantize.source import MergedSource

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = 90
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # large enough for the caps and scales to matter
    "initializer_range": 0.4,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "gemma2-capped": (
        "Gemma2Config",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": 1.5,
        },
    ),
    "cohere-scaled": ("CohereConfig", {"logit_scale": 0.25}),
    "granite-scaled": ("GraniteConfig", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "phi-head-bias": ("PhiConfig", {"num_key_value_heads": 4}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64}),
}


def _save(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """Write a tiny checkpoint with a tokenizer of one token per character; return the model."""
    name, changes = FAMILIES[family]
    torch.manual_seed(3)
    config = getattr(transformers, name)(**{**_SIZES, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for path, parameter in model.named_parameters():
        if path.endswith("bias") or "norm" in path:
            parameter.data += 0.3 * torch.randn_like(parameter)
    # `to` would round the tables of the positions too
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    characters = {chr(33 + number): number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model.eval()


def _text(folder: Path, count: int) -> tuple[Path, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(8))
    path = folder / "text.txt"
    path.write_text("".join(chr(33 + int(number)) for number in ids))
    return path, ids


@torch.no_grad()
def _loss(model: Any, windows: torch.Tensor) -> float:
    losses = [model(input_ids=window[None], labels=window[None]).loss for window in windows]
    return float(torch.stack(losses).mean())


def _evaluator(base: Path, windows: torch.Tensor, **changes: Any) -> Evaluator:
    plan = prepare(parse_config({"model_name_or_path": str(base), "export_dir": str(base / "o")}))
    source = MergedSource(plan)
    skeleton = build_skeleton(
        base,
        config_edits={},
        tensors={n: source.plan(n) for n in source.names},
        is_for_codes=False,
    )
    return Evaluator(skeleton, source, windows, base, **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_transformers_own(tmp_path: Path, family: str) -> None:
    model = _save(tmp_path, family)
    path, ids = _text(tmp_path, 50)
    report = evaluate(str(tmp_path), path, options=EvaluateOptions(length=16))
    expected = _loss(model, ids[:48].view(3, 16))
    assert report.loss == pytest.approx(expected, rel=1e-5)
    assert report.perplexity == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-4)
    assert (report.windows, report.tokens, report.tokens_left_out) == (3, 45, 2)
    assert report.peak_rss_bytes > 10**8
    assert report.quantization is None


def test_16_bit_weights_are_computed_in_32(tmp_path: Path) -> None:
    model = _save(tmp_path, dtype=torch.bfloat16)
    path, ids = _text(tmp_path, 32)
    report = evaluate(str(tmp_path), path, options=EvaluateOptions(length=16))
    assert report.loss == pytest.approx(_loss(model, ids.view(2, 16)), rel=1e-5)


@pytest.mark.parametrize("family", ["gemma2-capped", "phi-head-bias", "qwen2-tied"])
def test_pieces_of_the_vocabulary_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = _save(tmp_path, family)
    _, ids = _text(tmp_path, 48)
    windows = ids.view(3, 16)
    # seven rows of the head, and the embedding's rows of one window, at a time
    monkeypatch.setattr(module, "ROWS_BYTES", 4 * 32 * 17)
    evaluator = _evaluator(tmp_path, windows, logits_bytes=8 * 16 * 7)
    assert len(list(evaluator._spans())) == 3
    found = evaluator.run()
    assert found.loss == pytest.approx(_loss(model, windows), rel=1e-5)
    assert not list(tmp_path.glob("hidden*"))


def test_short_text_is_one_window_and_max_tokens_counts(tmp_path: Path) -> None:
    model = _save(tmp_path)
    path, ids = _text(tmp_path, 50)
    report = evaluate(str(tmp_path), path, options=EvaluateOptions(max_tokens=20))
    assert (report.windows, report.length, report.tokens) == (1, 20, 19)
    assert report.loss == pytest.approx(_loss(model, ids[None, :20]), rel=1e-5)


def test_command_line_prints_the_report(tmp_path: Path) -> None:
    model = _save(tmp_path)
    path, ids = _text(tmp_path, 40)
    arguments = ["eval", str(tmp_path), "--text", str(path), "--length", "10"]
    outcome = CliRunner().invoke(app, [*arguments, "--max-tokens", "30", "--json"])
    assert outcome.exit_code == 0, outcome.output
    report = json.loads(outcome.stdout)
    assert report["loss"] == pytest.approx(_loss(model, ids[:30].view(3, 10)), rel=1e-5)
    assert (report["tokens"], report["windows"]) == (27, 3)
    outcome = CliRunner().invoke(app, arguments)
    assert "36 in 4 x 10" in outcome.stdout
    assert "perplexity" in outcome.stdout
    outcome = CliRunner().invoke(app, [*arguments, "--max-memory", "450MB"])
    assert outcome.exit_code == 4
    assert "max_memory is too small" in outcome.stderr


def test_command_line_compares_and_draws(tmp_path: Path) -> None:
    base, output, adapter = tmp_path / "base", tmp_path / "gptq", tmp_path / "adapter"
    model = _save(base)
    path, ids = _text(tmp_path, 48)
    merged = _adapter(base, adapter)
    _quantize(base, model, output, "gptq")
    plot = tmp_path / "plot.svg"
    arguments = ["eval", str(base), str(output), "--adapter", str(adapter), "--text", str(path)]
    arguments += ["--length", "16"]
    outcome = CliRunner().invoke(app, [*arguments, "--json", "--plot", str(plot)])
    assert outcome.exit_code == 0, outcome.output
    first, second = json.loads(outcome.stdout)
    assert first["loss"] == pytest.approx(_loss(merged, ids.view(3, 16)), rel=1e-5)
    assert second["loss"] == pytest.approx(_loss(model, ids.view(3, 16)), rel=1e-5)
    assert second["quantization"] == "gptq 4 bit"
    assert ET.parse(plot).getroot().tag.endswith("svg")
    outcome = CliRunner().invoke(app, arguments)
    ratio = second["perplexity"] / first["perplexity"]
    assert "base + adapter" in outcome.stdout
    assert f"{ratio:.4f}" in outcome.stdout
    outcome = CliRunner().invoke(app, [*arguments, "--plot", str(tmp_path / "no" / "plot.svg")])
    assert outcome.exit_code == 2
    assert "plot cannot be written" in outcome.stderr


def _quantize(base: Path, model: Any, output: Path, checkpoint_format: str) -> None:
    """Write a GPTQ checkpoint, and put what its codes stand for into the model."""
    tensors = load_file(base / "model.safetensors")
    options = GptqOptions(Grid(4), 16, desc_act=True)
    for path, linear in model.model.layers.named_modules():
        if not isinstance(linear, torch.nn.Linear):
            continue
        inputs = torch.randn(64, linear.in_features)
        factored = Factored(inputs.T @ inputs, options)
        quantized = quantize_gptq(linear.weight.data, factored, options, name=path)
        packed = pack_gptq(quantized, checkpoint_format)  # type: ignore[arg-type]
        del tensors[f"model.layers.{path}.weight"]
        tensors.update({f"model.layers.{path}.{end}": value for end, value in packed.items()})
        back = unpack_gptq(
            packed,
            bits=4,
            group_size=16,
            checkpoint_format=checkpoint_format,  # type: ignore[arg-type]
        )
        # loaders round what codes stand for to the dtype of the scales
        linear.weight.data = back.dequantize().half().float()
    output.mkdir()
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": True,
        "checkpoint_format": checkpoint_format,
    }  # fmt: skip
    (output / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (output / name).write_bytes((base / name).read_bytes())


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_quantized_checkpoint_is_its_dequantized_model(
    tmp_path: Path, checkpoint_format: str
) -> None:
    base, output = tmp_path / "base", tmp_path / "gptq"
    model = _save(base)
    path, ids = _text(tmp_path, 48)
    before = _loss(model, ids.view(3, 16))
    _quantize(base, model, output, checkpoint_format)
    report = evaluate(str(output), path, options=EvaluateOptions(length=16))
    expected = _loss(model, ids.view(3, 16))
    assert report.loss == pytest.approx(expected, rel=1e-5)
    assert report.loss != pytest.approx(before, rel=1e-4)
    assert report.quantization == "gptq 4 bit"


def test_broken_codes_are_refused(tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "gptq"
    model = _save(base)
    path, _ = _text(tmp_path, 48)
    _quantize(base, model, output, "gptq")
    tensors = load_file(output / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.g_idx"
    tensors[name][0] = 99
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"in no group, in model\.layers\.1\.mlp\.up_proj"):
        evaluate(str(output), path)
    del tensors[name.replace("g_idx", "scales")]
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks a tensor"):
        evaluate(str(output), path)


def _adapter(base: Path, folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    tuned.save_pretrained(folder)
    return tuned.merge_and_unload()


def test_adapter_is_merged_on_the_way(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = _save(base)
    merged = _adapter(base, adapter)
    path, ids = _text(tmp_path, 48)
    options = EvaluateOptions(length=16)
    report = evaluate(str(base), path, adapters=[str(adapter)], options=options)
    assert report.loss == pytest.approx(_loss(merged, ids.view(3, 16)), rel=1e-5)
    assert report.loss != pytest.approx(_loss(model, ids.view(3, 16)), rel=1e-3)


def test_adapter_is_merged_onto_what_codes_stand_for(tmp_path: Path) -> None:
    base, output, adapter = tmp_path / "base", tmp_path / "gptq", tmp_path / "adapter"
    model = _save(base)
    path, ids = _text(tmp_path, 48)
    _quantize(base, model, output, "gptq")
    _adapter(base, adapter)
    before = _loss(model, ids.view(3, 16))
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    options = EvaluateOptions(length=16)
    report = evaluate(str(output), path, adapters=[str(adapter)], options=options)
    # the merge is rounded to float16 too
    assert report.loss == pytest.approx(_loss(merged, ids.view(3, 16)), rel=1e-3)
    assert report.loss != pytest.approx(before, rel=1e-2)


def test_too_little_memory_and_text_are_refused(tmp_path: Path) -> None:
    _save(tmp_path)
    path, _ = _text(tmp_path, 48)
    with pytest.raises(MemoryBudgetError):
        evaluate(str(tmp_path), path, options=EvaluateOptions(max_memory=450 * 10**6))
    path.write_text("a")
    with pytest.raises(InputError, match="too short"):
        evaluate(str(tmp_path), path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="UTF-8"):
        evaluate(str(tmp_path), path)


def test_logits_that_depend_on_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(tmp_path)
    _, ids = _text(tmp_path, 16)
    evaluator = _evaluator(tmp_path, ids.view(1, 16))
    model = evaluator.skeleton.model
    forward = model.forward

    def normalized(**keywords: Any) -> Any:
        output = forward(**keywords)
        output.logits = output.logits.log_softmax(-1)
        return output

    monkeypatch.setattr(model, "forward", normalized)
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM .* depend on each other"):
        evaluator.run()


def test_heads_that_are_not_plain_are_refused(tmp_path: Path) -> None:
    _save(tmp_path)
    _, ids = _text(tmp_path, 16)
    evaluator = _evaluator(tmp_path, ids.view(1, 16))

    class Scaled(torch.nn.Linear):
        pass

    evaluator.skeleton.model.lm_head = Scaled(32, VOCABULARY, bias=False, device="meta")
    with pytest.raises(UnsupportedError, match="head is Scaled"):
        evaluator.run()
