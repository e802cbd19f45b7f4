"""Merge and quantize in one run: the same bytes however it comes about, and nothing half done."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.quantizers.auto import AutoQuantizationConfig

import streammerge
from streammerge.engine.export import Progress
from streammerge.errors import (
    ConfigError,
    MemoryBudgetError,
    QuantizationError,
    UnsupportedError,
)
from streammerge.quantize.pack import unpack_gptq

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

LAYERS = 3
LINEARS = 7
WORDS = [f"w{number}" for number in range(90)]


class Stop(Exception):  # noqa: N818 (what stops a run)
    pass


class Counting(Progress):
    """Counts layers; stops behind one of them if asked to."""

    def __init__(self, last: int | None = None) -> None:
        self.layers, self.last = 0, last

    def advance_layer(self) -> None:
        self.layers += 1
        if self.layers == self.last:
            raise Stop


class Case:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.adapter, self.data = folder / "base", folder / "adapter", folder / "d.jsonl"
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(self.base)
        write_tokenizer(self.base)
        peft = get_peft_model(model.float(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.2)
        peft.save_pretrained(self.adapter)
        generator = torch.Generator().manual_seed(5)
        rows = torch.randint(0, 90, (40, 30), generator=generator).tolist()
        self.data.write_text(
            "".join(json.dumps({"text": " ".join(WORDS[n] for n in row)}) + "\n" for row in rows)
        )

    def config(self, output: str = "out", **edits: Any) -> dict[str, Any]:
        return {
            "model_name_or_path": str(self.base),
            "adapter_name_or_path": str(self.adapter),
            "export_dir": str(self.folder / "outputs" / output),
            "export_quantization_bit": 4,
            "export_quantization_dataset": str(self.data),
            "export_quantization_group_size": 32,
            "export_quantization_nsamples": 8,
            "export_quantization_maxlen": 24,
            "threads": 1,
            **edits,
        }

    def export(self, output: str = "out", progress: Progress | None = None, **edits: Any) -> Any:
        return streammerge.export(self.config(output, **edits), progress=progress)

    def tensors(self, output: str = "out") -> dict[str, torch.Tensor]:
        return load_file(self.folder / "outputs" / output / "model.safetensors")

    def bytes(self, output: str = "out") -> bytes:
        return (self.folder / "outputs" / output / "model.safetensors").read_bytes()

    def outputs(self) -> list[str]:
        folder = self.folder / "outputs"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def write_tokenizer(folder: Path) -> None:
    words = {word: number for number, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_one_run_gives_what_quantizing_the_merged_checkpoint_gives(case: Case) -> None:
    merged = {f"export_quantization_{key}": None for key in ("bit", "dataset")}
    case.export("merged", **merged)
    report = case.export("once")
    again = case.folder / "outputs" / "merged"
    case.export("twice", model_name_or_path=str(again), adapter_name_or_path=None)
    assert same(case.tensors("once"), case.tensors("twice"))
    assert len(report.quantization["relative_errors"]) == LAYERS * LINEARS
    case.export("base", adapter_name_or_path=None)
    assert not same(case.tensors("once"), case.tensors("base"))
    # what is not quantized is the merge's
    whole = load_file(again / "model.safetensors")
    for name, tensor in case.tensors("once").items():
        if name in whole:
            assert torch.equal(tensor, whole[name])


def test_nothing_is_left_behind_and_loaders_know_what_is_stored(case: Case) -> None:
    case.export(export_quantization_desc_act=True)
    assert case.outputs() == ["out"]
    read = AutoConfig.from_pretrained(case.folder / "outputs" / "out")
    parsed = AutoQuantizationConfig.from_dict(read.quantization_config)
    assert (parsed.bits, parsed.group_size, parsed.desc_act, parsed.sym) == (4, 32, True, True)
    ends = {name.rpartition(".")[2] for name in case.tensors() if ".layers.0.mlp.up" in name}
    assert ends == {"qweight", "qzeros", "scales", "g_idx"}


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_stand_for_the_weights(case: Case, method: str, bits: int) -> None:
    report = case.export(
        adapter_name_or_path=None,
        export_quantization_bit=bits,
        export_quantization_method=method,
    )
    base, got = load_file(case.base / "model.safetensors"), case.tensors()
    errors = report.quantization["relative_errors"]
    for name, error in errors.items():
        parts = {end: got[f"{name}.{end}"] for end in ("qweight", "qzeros", "scales", "g_idx")}
        found = unpack_gptq(parts, bits=bits, group_size=32).dequantize()
        weight = base[f"{name}.weight"].float()
        lost = float((found - weight).square().sum() / weight.square().sum())
        # inputs are nearly white: the error of the outputs is about that of the weights
        assert 0 < error < 3 * lost
        assert lost < {2: 0.8, 3: 0.15, 4: 0.03, 8: 1e-4}[bits]


def test_linears_that_some_loaders_do_not_take_are_named(case: Case) -> None:
    assert not any("vLLM" in note for note in case.export("whole").notes)
    notes = case.export("part", export_quantization_group_size=64).notes
    (note,) = [note for note in notes if "vLLM" in note]
    assert f"{LAYERS} of the quantized linears" in note
    assert "down_proj' (64 x 96)" in note
    assert "export_quantization_group_size: 32 would do" in note


def test_that_layers_run_on_the_cpu_is_said_where_a_gpu_may_be_expected(case: Case) -> None:
    said = [
        any(
            "quantized on the CPU" in note
            for note in case.export(device, export_device=device).notes
        )
        for device in ("cpu", "auto")
    ]
    assert said == [False, True]


def test_gptq_loses_less_than_rounding(case: Case) -> None:
    means = {
        method: case.export(method, export_quantization_method=method).quantization[
            "mean_relative_error"
        ]
        for method in ("gptq", "rtn")
    }
    assert means["gptq"] < means["rtn"]


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_stopped_run_goes_on_from_its_layers(case: Case, last: int) -> None:
    case.export("whole")
    with pytest.raises(Stop):
        case.export(progress=Counting(last))
    assert not (case.folder / "outputs" / "out").exists()
    work = next(p for p in (case.folder / "outputs").iterdir() if ".layers" in p.name)
    done = {path.name: path.stat().st_mtime_ns for path in work.glob("layer-*.safetensors")}
    assert len(done) == last
    seen: dict[str, int] = {}

    class Watching(Progress):
        def start(self, *_: object, **__: object) -> None:
            for path in work.glob("layer-*.safetensors"):
                seen[path.name] = path.stat().st_mtime_ns

    case.export(progress=Watching())
    assert {name: seen[name] for name in done} == done
    assert len(seen) == LAYERS
    assert case.bytes() == case.bytes("whole")
    assert case.outputs() == ["out", "whole"]


def test_a_killed_run_goes_on_with_the_same_bytes(case: Case) -> None:
    case.export("whole")
    config = case.folder / "killed.json"
    config.write_text(json.dumps(case.config()))
    command = [sys.executable, "-m", "streammerge", "export", str(config)]
    outputs = case.folder / "outputs"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + 200
        while not list(outputs.glob("*.layers*/layer-*.safetensors")):
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        run.kill()
    assert run.returncode == -signal.SIGKILL
    assert case.outputs() != ["whole"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert case.outputs() == ["out", "whole"]
    # a process of its own computes in the same number of threads
    assert case.bytes() == case.bytes("whole")


def test_a_lost_layer_starts_over_with_the_same_bytes(case: Case) -> None:
    case.export("whole")
    with pytest.raises(Stop):
        case.export(progress=Counting(2))
    work = next(p for p in (case.folder / "outputs").iterdir() if ".layers" in p.name)
    (work / "layer-00000.safetensors").unlink()
    case.export()
    assert case.bytes() == case.bytes("whole")


def test_another_setting_starts_over(case: Case) -> None:
    case.export("whole", export_quantization_damp=0.2)
    with pytest.raises(Stop):
        case.export(progress=Counting(2))
    counting = Counting()
    case.export(progress=counting, export_quantization_damp=0.2)
    assert counting.layers == LAYERS
    assert case.bytes() == case.bytes("whole")


@pytest.mark.parametrize(
    ("edits", "error", "match"),
    [
        ({"export_quantization_bit": 5}, ConfigError, "export_quantization_bit"),
        ({"export_quantization_dataset": None}, ConfigError, "needs export_quantization_dataset"),
        ({"export_quantization_dataset": "/no/such.jsonl"}, QuantizationError, "does not exist"),
        ({"export_legacy_format": True}, ConfigError, "export_legacy_format"),
        ({"max_memory": "400MB"}, MemoryBudgetError, r"at least \d+MB"),
    ],
)
def test_refusals(case: Case, edits: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        case.export(**edits)
    assert "\n" not in str(caught.value)
    assert case.outputs() == []


def test_codes_without_symmetry_are_stored_as_the_newer_format(case: Case) -> None:
    both = {}
    for is_symmetric in (True, False):
        name = f"symmetric-{is_symmetric}"
        report = case.export(name, export_quantization_sym=is_symmetric).to_dict()
        both[is_symmetric] = report["quantization"]["mean_relative_error"]
        # codes; 16 bits of scale and 4 of zero for 32 weights; 32 bits of group for each input
        assert 4 + 20 / 32 < report["quantization"]["bits_per_weight"] < 4 + 20 / 32 + 1
        config = json.loads((case.folder / "outputs" / name / "config.json").read_text())
        section = config["quantization_config"]
        assert section["checkpoint_format"] == ("gptq" if is_symmetric else "gptq_v2")
        assert section["sym"] is is_symmetric
    tensors = case.tensors("symmetric-False")
    module = "model.layers.0.self_attn.q_proj"
    stored = {end: tensors[f"{module}.{end}"] for end in ("qweight", "qzeros", "scales", "g_idx")}
    codes = unpack_gptq(stored, bits=4, group_size=32, checkpoint_format="gptq_v2")
    assert len(codes.zeros.unique()) > 1
    # the grid of each group reaches from its least to its greatest value
    assert both[False] < both[True]


def test_a_plan_says_what_is_written_in_the_end(case: Case) -> None:
    plan = streammerge.build_plan(case.config())
    (note,) = [note for note in plan.notes if "quantized as they are merged" in note]
    case.export()
    size = sum(path.stat().st_size for path in (case.folder / "outputs" / "out").glob("*.saf*"))
    assert f"gptq, 4 bit, groups of 32), so that about {size / 1e9:.2f} GB" in note


@pytest.mark.parametrize("text", ["", '{"text": ""}\n', '{"other": 3}\n'])
def test_data_without_text_is_refused(case: Case, text: str) -> None:
    case.data.write_text(text)
    with pytest.raises(QuantizationError):
        case.export()
    assert case.outputs() == []


def test_a_quantized_base_is_refused(case: Case) -> None:
    case.export("first")
    with pytest.raises(UnsupportedError, match="quantized already"):
        case.export(
            model_name_or_path=str(case.folder / "outputs" / "first"), adapter_name_or_path=None
        )
    assert case.outputs() == ["first"]


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: T5ForConditionalGeneration(T5Config(
            vocab_size=96, d_model=32, d_ff=32, num_layers=2, num_heads=2)), "encoders with"),
        (lambda: GptOssForCausalLM(GptOssConfig(
            vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=16,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)),
         "experts with biases"),
        (lambda: Llama4ForCausalLM(Llama4TextConfig(
            vocab_size=96, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
            num_local_experts=2, num_experts_per_tok=1)), "experts that transformers does not"),
    ],
)  # fmt: skip
def test_models_that_are_not_quantized(case: Case, model: Any, match: str) -> None:
    other = case.folder / "other"
    model().save_pretrained(other)
    write_tokenizer(other)
    with pytest.raises(UnsupportedError, match=match):
        case.export(model_name_or_path=str(other), adapter_name_or_path=None)
    assert case.outputs() == []
