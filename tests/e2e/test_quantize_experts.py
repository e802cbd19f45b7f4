"""Experts, and linears that are stored transposed, are quantized as any other linear is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedTokenizerFast,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
)

import streammerge
from streammerge.engine.evaluate import EvaluateOptions, evaluate
from streammerge.engine.export import Progress
from streammerge.quantize.linear import Grid
from streammerge.quantize.pack import unpack_awq, unpack_gptq
from streammerge.quantize.rtn import quantize_rtn

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

CHARACTERS = {chr(code): code - 32 for code in range(33, 125)}
_SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "apart": lambda: Qwen3MoeConfig(**_SIZES, intermediate_size=96),
    "fused": lambda: Qwen3_5MoeTextConfig(
        **_SIZES, shared_expert_intermediate_size=32, layer_types=["full_attention"] * 2
    ),
    "conv1d": lambda: GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64),
}
TARGETS: dict[str, dict[str, Any]] = {
    "apart": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    "fused": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "conv1d": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
}


class Stop(Exception):  # noqa: N818 (what stops a run)
    pass


class StopBehindTheFirst(Progress):
    """Stops a run when its first layer is done."""

    def advance_layer(self) -> None:
        raise Stop


class Case:
    """A base with an adapter, and texts."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.base, self.adapter, self.text = folder / "base", folder / "adapter", folder / "t.txt"
        torch.manual_seed(3)
        model: Any = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
        model.to(torch.bfloat16).save_pretrained(self.base)
        # bytes: some families' own classes of tokenizers know nothing else
        tokenizer = Tokenizer(models.BPE({"<unk>": 0, **CHARACTERS}, [], unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
        fast.save_pretrained(self.base)
        peft = get_peft_model(model.float(), LoraConfig(r=4, **TARGETS[kind]))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.2)
        peft.save_pretrained(self.adapter)
        generator = torch.Generator().manual_seed(5)
        numbers = torch.randint(0, len(CHARACTERS), (1500,), generator=generator)
        self.text.write_text("".join(list(CHARACTERS)[number] for number in numbers.tolist()))

    def export(self, name: str, progress: Progress | None = None, **edits: Any) -> Any:
        settings = {
            "model_name_or_path": str(self.base),
            "adapter_name_or_path": str(self.adapter),
            "export_dir": str(self.folder / name),
            "threads": 1,
            **edits,
        }
        return streammerge.export(settings, progress=progress)

    def quantize(self, name: str, progress: Progress | None = None, **edits: Any) -> Any:
        settings = {
            "export_quantization_bit": 4,
            "export_quantization_dataset": str(self.text),
            "export_quantization_group_size": 32,
            "export_quantization_nsamples": 12,
            "export_quantization_maxlen": 40,
        }
        return self.export(name, progress, **{**settings, **edits})

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "model.safetensors")

    def merged_linears(self) -> dict[str, torch.Tensor]:
        """Return the merged weights, each (N, K), by the module that it is to be."""
        if not (self.folder / "merged").exists():
            self.export("merged")
        found = {}
        for name, values in self.tensors("merged").items():
            path, _, last = name.removesuffix(".weight").rpartition(".")
            if not any(part.isdecimal() for part in path.split(".")) or values.ndim < 2:
                continue
            if values.ndim == 2 and last not in {"gate", "shared_expert_gate"}:
                found[f"{path}.{last}"] = values.T if self.kind == "conv1d" else values
            for number, matrix in enumerate(values if values.ndim == 3 else ()):
                parts = matrix.chunk(2) if last == "gate_up_proj" else (matrix,)
                names = ["gate_proj", "up_proj"] if last == "gate_up_proj" else [last]
                found |= {f"{path}.{number}.{n}": p for n, p in zip(names, parts, strict=True)}
        return found


@pytest.fixture(params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(request.param, tmp_path)


def decoded(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    ends = ("qweight", "qzeros", "scales", "g_idx")
    stored = {end: tensors[f"{module}.{end}"] for end in ends}
    return unpack_gptq(stored, bits=4, group_size=32, checkpoint_format="gptq").dequantize()


def test_rounding_gives_the_codes_of_each_merged_matrix(case: Case) -> None:
    case.quantize("out", export_quantization_method="rtn")
    tensors, merged = case.tensors("out"), case.merged_linears()
    coded = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    assert coded == merged.keys()
    for module, weight in merged.items():
        expected = quantize_rtn(weight, Grid(4, is_symmetric=True), 32).dequantize()
        assert torch.equal(decoded(tensors, module), expected), module
    assert not [name for name in tensors if "experts.gate_up_proj" in name]


def test_calibration_loses_less_than_rounding_on_every_expert(case: Case) -> None:
    rounded = case.quantize("rtn", export_quantization_method="rtn").to_dict()["quantization"]
    solved = case.quantize("gptq").to_dict()["quantization"]
    assert solved["relative_errors"].keys() == rounded["relative_errors"].keys()
    for name, error in solved["relative_errors"].items():
        assert 0 < error < rounded["relative_errors"][name], name


def test_experts_with_few_tokens_are_reported(tmp_path: Path) -> None:
    case = Case("apart", tmp_path)
    report = case.quantize("out", export_quantization_nsamples=1).to_dict()
    # 40 tokens go to 2 of 5 experts each, which have 64 inputs
    few = report["quantization"]["few_tokens"]
    assert len(few) >= 8
    assert all(count < 64 for count in few.values())
    assert sum(few.values()) <= 2 * 2 * 40
    assert any("experts got fewer tokens" in note for note in report["notes"])
    assert all(error < 1 for error in report["quantization"]["relative_errors"].values())


def test_a_stopped_run_goes_on_with_the_same_bytes(case: Case) -> None:
    case.quantize("whole")
    with pytest.raises(Stop):
        case.quantize("out", StopBehindTheFirst())
    case.quantize("out")
    whole, out = (case.folder / name / "model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == out.read_bytes()
    assert sorted(path.name for path in case.folder.iterdir() if "layers" in path.name) == []


def test_awq_scales_experts_and_keeps_what_the_model_computes(case: Case) -> None:
    report = case.quantize("out", export_quantization_method="awq").to_dict()["quantization"]
    unscaled = {name.rpartition(".")[2] for name in report["unscaled"]}
    if case.kind == "conv1d":
        assert unscaled == {"c_proj"}
    else:
        # the norm before them feeds the router too
        assert {"gate_proj", "up_proj"} <= unscaled
        assert not {"q_proj", "down_proj"} & unscaled
    rounded = case.quantize("rtn", export_quantization_method="rtn").to_dict()["quantization"]
    assert report["mean_relative_error"] < rounded["mean_relative_error"]
    tensors = case.tensors("out")
    module = next(name for name in tensors if name.endswith(".qweight")).removesuffix(".qweight")
    stored = {end: tensors[f"{module}.{end}"] for end in ("qweight", "qzeros", "scales")}
    assert unpack_awq(stored, group_size=32).dequantize().isfinite().all()


def test_loaders_are_told_that_routers_are_not_quantized(tmp_path: Path) -> None:
    case = Case("apart", tmp_path)
    case.quantize("out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    section = config["quantization_config"]
    assert any("gate" in pattern and "gate_proj" not in pattern for pattern in section["dynamic"])
    assert not any("mlp.gate.qweight" in name for name in case.tensors("out"))


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_evaluation_of_codes_is_that_of_what_they_stand_for(case: Case, method: str) -> None:
    case.quantize("out", export_quantization_method=method)
    found = evaluate(str(case.folder / "out"), case.text, options=EvaluateOptions(length=50))
    model: Any = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
    tensors = case.tensors("out")
    state = case.tensors("merged") if (case.folder / "merged").exists() else None
    merged = case.merged_linears()
    state = state or case.tensors("merged")
    values = {name: tensors.get(name, value).float() for name, value in state.items()}
    for module in merged:
        put(values, case.kind, module, decoded(tensors, module))
    case.folder.joinpath("plain").mkdir()
    model.save_pretrained(case.folder / "plain")
    assert found.perplexity == pytest.approx(
        perplexity_of(model, values, case, found.windows), rel=1e-3
    )


def put(values: dict[str, torch.Tensor], kind: str, module: str, weight: torch.Tensor) -> None:
    """Put a linear's weight into the merged checkpoint's tensors."""
    if f"{module}.weight" in values:
        values[f"{module}.weight"] = weight.T if kind == "conv1d" else weight
        return
    experts, number, name = module.rsplit(".", 2)
    if name == "down_proj":
        values[f"{experts}.down_proj"][int(number)] = weight
        return
    half = len(weight) if name == "up_proj" else 0
    values[f"{experts}.gate_up_proj"][int(number), half : half + len(weight)] = weight


def perplexity_of(model: Any, values: dict[str, torch.Tensor], case: Case, windows: int) -> float:
    from safetensors.torch import save_file  # noqa: PLC0415 (beside its use)

    folder = case.folder / "plain"
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file({k: v.contiguous() for k, v in values.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    fast = PreTrainedTokenizerFast.from_pretrained(case.base)
    ids = torch.tensor(fast(case.text.read_text())["input_ids"])[: windows * 50].view(windows, 50)
    losses = []
    with torch.no_grad():
        for window in ids:
            logits = loaded(input_ids=window[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]))
    return float(torch.stack(losses).mean().exp())
