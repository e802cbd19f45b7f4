"""Tiny models of several families, adapters with random factors, and PEFT as the oracle."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import streammerge
from streammerge.backends.torch_cpu import TorchCpuBackend
from streammerge.config.tuning import ComputeTuning
from streammerge.engine import machine
from streammerge.report.export_report import peak_rss_bytes, rss_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "llama-tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama-bias": lambda: LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=12),
    "gemma2": lambda: Gemma2Config(**_SIZES, head_dim=12),
    "mistral": lambda: MistralConfig(**_SIZES, head_dim=12),
    "gpt2": lambda: GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64),
    "phi": lambda: PhiConfig(**{**_SIZES, "num_key_value_heads": 4}),
}
# width and height of an expert's matrices differ, and neither is a multiple of the other
_MOE_SIZES: dict[str, Any] = {
    **_SIZES, "vocab_size": 40, "hidden_size": 32, "intermediate_size": 20,
    "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
MOE_CONFIGS = {
    "mixtral": lambda: MixtralConfig(**_MOE_SIZES, num_local_experts=3),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_MOE_SIZES, num_experts=3, moe_intermediate_size=20, shared_expert_intermediate_size=28
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_MOE_SIZES, num_experts=3, moe_intermediate_size=20, head_dim=8
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**_MOE_SIZES, "num_key_value_heads": 4}, n_routed_experts=4, moe_intermediate_size=20,
        n_shared_experts=1, first_k_dense_replace=1, n_group=2, topk_group=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **_MOE_SIZES, num_local_experts=3, head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "llama4_text": lambda: Llama4TextConfig(
        **{**_MOE_SIZES, "num_experts_per_tok": 1}, num_local_experts=3, head_dim=8,
        intermediate_size_mlp=28, interleave_moe_layer_step=1,
    ),
    "olmoe": lambda: OlmoeConfig(**_MOE_SIZES, num_experts=3),
    "granitemoe": lambda: GraniteMoeConfig(**_MOE_SIZES, num_local_experts=3),
}  # fmt: skip
ATTENTION = {"gpt2": ["c_attn"]}
ALL_LINEAR = {"gpt2": ["c_attn", "c_proj", "c_fc"]}


class Workshop:
    """Builds bases and adapters below a folder, and merges them both ways."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def base(self, family: str, dtype: torch.dtype, **edits: Any) -> Path:
        torch.manual_seed(7)
        config = CONFIGS[family]()
        for key, value in edits.items():
            setattr(config, key, value)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
        path = self.folder / f"base-{family}-{str(dtype).removeprefix('torch.')}"
        model.save_pretrained(path, max_shard_size="60KB")
        return path

    def adapter(
        self,
        base: Path,
        name: str = "adapter",
        *,
        prepare: Callable[[Any], None] | None = None,
        save: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Path:
        torch.manual_seed(sum(map(ord, name)))
        model = AutoModelForCausalLM.from_pretrained(base)
        if prepare is not None:
            prepare(model)
        is_conv1d = model.config.model_type == "gpt2"
        options = {"r": 4, "lora_alpha": 10, "fan_in_fan_out": is_conv1d, **options}
        peft_model = get_peft_model(model, LoraConfig(**options))
        with torch.no_grad():
            for key, parameter in peft_model.named_parameters():
                if "magnitude" in key:
                    parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
                elif parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
                if "lora_" in key and "magnitude" not in key:
                    parameter.data = parameter.data.to(dtype).to(parameter.dtype)
        path = self.folder / name
        peft_model.save_pretrained(path, **(save or {}))
        return path

    def export(self, base: Path, *adapters: Path, **options: Any) -> dict[str, torch.Tensor]:
        output = self.folder / options.pop("name", "merged")
        report = streammerge.export(
            {
                "model_name_or_path": str(base),
                "adapter_name_or_path": [str(path) for path in adapters],
                "export_dir": str(output),
                "overwrite": True,
                "threads": 1,
                **options,
            }
        )
        assert report.peak_rss_bytes > 0
        return load_tensors(output)

    def peft(
        self,
        base: Path,
        *adapters: Path,
        prepare: Callable[[Any], None] | None = None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Merge as LLaMA-Factory does: one adapter after the other; return tensors and logits."""
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        if prepare is not None:
            prepare(model)
        for path in adapters:
            model = PeftModel.from_pretrained(model, path).merge_and_unload()
        folder = self.folder / "peft"
        model.save_pretrained(folder)
        return load_tensors(folder), logits(model)

    def merged_logits(self, name: str = "merged") -> torch.Tensor:
        return logits(AutoModelForCausalLM.from_pretrained(self.folder / name))


class Mill:
    """Merges adapters of any kind on models that are just modules, with no config.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def base(self, build: Callable[[], torch.nn.Module], dtype: torch.dtype) -> Path:
        """Save the seeded model that `build` returns, with weights of `dtype`."""
        path = self.folder / "base"
        path.mkdir(exist_ok=True)
        save_file(_tensors(self.model(build, dtype)), path / "model.safetensors")
        return path

    def model(self, build: Callable[[], torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
        torch.manual_seed(11)
        return build().to(dtype).eval()

    def adapter(
        self,
        build: Callable[[], torch.nn.Module],
        config: Any,
        *,
        dtype: torch.dtype = torch.float32,
        name: str = "adapter",
        change: Callable[[str, torch.nn.Parameter], None] | None = None,
    ) -> Path:
        """Save an adapter as PEFT does, its trainable tensors away from where they start.

        Args:
            build: Makes the model.
            config: The adapter's PEFT configuration.
            dtype: Of the base that it is trained on.
            name: Of the adapter's folder.
            change: Changes a trainable tensor in place; by default a little noise is added.
        """
        peft_model = get_peft_model(self.model(build, dtype), config)
        torch.manual_seed(sum(map(ord, name)))
        with torch.no_grad():
            for key, parameter in peft_model.named_parameters():
                if not parameter.requires_grad:
                    continue
                if change is not None:
                    change(key, parameter)
                else:
                    parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
        path = self.folder / name
        peft_model.save_pretrained(path)
        return path

    def peft(
        self, build: Callable[[], torch.nn.Module], dtype: torch.dtype, *adapters: Path
    ) -> dict[str, torch.Tensor]:
        """Merge with PEFT, one adapter after the other."""
        model: Any = self.model(build, dtype)
        for path in adapters:
            model = PeftModel.from_pretrained(model, path).merge_and_unload()
        return _tensors(model)

    def export(self, base: Path, *adapters: Path, **options: Any) -> dict[str, torch.Tensor]:
        """Merge with streammerge."""
        return Workshop(self.folder).export(base, *adapters, **options)

    @staticmethod
    def rewrite(adapter: Path, end: str, change: Callable[[torch.Tensor], Any] | None) -> None:
        """Change the tensors of an adapter whose names end so; None takes them away."""
        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        found = [name for name in tensors if name.endswith(end)]
        assert found
        for name in found:
            tensor = tensors.pop(name)
            if change is not None:
                tensors[name] = change(tensor).contiguous()
        save_file(tensors, path)

    def check(
        self,
        build: Callable[[], torch.nn.Module],
        config: Any,
        dtype: torch.dtype,
        *,
        change: Callable[[str, torch.nn.Parameter], None] | None = None,
        **options: Any,
    ) -> dict[str, torch.Tensor]:
        """Merge both ways, demand the same bits, and that something changed; return the merge."""
        base = self.base(build, dtype)
        adapter = self.adapter(build, config, dtype=dtype, change=change)
        expected = self.peft(build, dtype, adapter)
        merged = self.export(base, adapter, **options)
        assert_same_bits(merged, expected)
        before = load_tensors(base)
        assert any(not torch.equal(before[name], merged[name]) for name in before)
        return merged

    def check_in_turn(
        self,
        build: Callable[[], torch.nn.Module],
        dtype: torch.dtype,
        *configs: Any,
        **options: Any,
    ) -> dict[str, torch.Tensor]:
        """Merge adapters one after the other both ways and demand the same bits."""
        base = self.base(build, dtype)
        adapters = [
            self.adapter(build, config, dtype=dtype, name=f"adapter{number}")
            for number, config in enumerate(configs)
        ]
        merged = self.export(base, *adapters, **options)
        assert_same_bits(merged, self.peft(build, dtype, *adapters))
        return merged


class Foundry(Workshop):
    """Builds tiny mixtures of experts, and adapters for them by hand where PEFT makes none."""

    def base(self, family: str, dtype: torch.dtype, **edits: Any) -> Path:
        """Save a model as hubs have it, the experts of a layer spread over shards."""
        torch.manual_seed(7)
        config = MOE_CONFIGS[family]()
        for key, value in edits.items():
            setattr(config, key, value)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        path = self.folder / f"base-{family}"
        model.save_pretrained(path)
        # once more, with the dtypes that single tensors have when it is loaded
        AutoModelForCausalLM.from_pretrained(path).save_pretrained(path, max_shard_size="6KB")
        (path / "model.safetensors").unlink()
        return path

    def fused(self, base: Path) -> Path:
        """Save a base with the names and shapes that it has in memory."""
        model = AutoModelForCausalLM.from_pretrained(base)
        path = base.with_name(f"{base.name}-fused")
        model.config.save_pretrained(path)
        save_file(_tensors(model), path / "model.safetensors")
        return path

    def by_hand(
        self,
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
        name: str = "adapter",
        *,
        dtype: torch.dtype = torch.float32,
        more: dict[str, torch.Tensor] | None = None,
        **config: Any,
    ) -> Path:
        """Write an adapter file.

        Args:
            shapes: Shapes of A and B by the path of the module, `base_layer.` included.
            name: Of the folder.
            dtype: Of the tensors.
            more: Further tensors, by their keys without the prefix.
            **config: What adapter_config.json says beyond rank and alpha.
        """
        path = self.folder / name
        path.mkdir(exist_ok=True)
        torch.manual_seed(sum(map(ord, name)))
        tensors = dict(more or {})
        for module, pair in shapes.items():
            for letter, shape in zip("AB", pair, strict=True):
                tensors[f"{module}.lora_{letter}.weight"] = 0.3 * torch.randn(shape)
        prefixed = {f"base_model.model.{key}": t.to(dtype) for key, t in tensors.items()}
        save_file(prefixed, path / "adapter_model.safetensors")
        options = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM", **config}
        (path / "adapter_config.json").write_text(json.dumps(options))
        return path

    @staticmethod
    def rewrite(adapter: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Give an adapter other tensors."""
        save_file(tensors, adapter / "adapter_model.safetensors")

    @staticmethod
    def save(tensors: dict[str, torch.Tensor], base: Path) -> None:
        """Save a base that is no model."""
        save_file(tensors, base / "model.safetensors")

    def merged_by_peft(
        self, base: Path, *adapters: Path, fuses: bool = False
    ) -> dict[str, torch.Tensor]:
        """Merge with PEFT; return the tensors as they are saved, or as they are in memory."""
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        for path in adapters:
            model = PeftModel.from_pretrained(model, path).merge_and_unload()
        if fuses:
            return _tensors(model)
        folder = self.folder / "peft"
        model.save_pretrained(folder)
        return load_tensors(folder)


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()
    }


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Leave torch its threads: bits of PEFT's own depend on them."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def mill(tmp_path: Path) -> Mill:
    return Mill(tmp_path)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture
def foundry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Foundry:
    # in this process, which has imported transformers already: seconds less for each test
    monkeypatch.setattr("streammerge.engine.renames.subprocess.run", _run_here)
    return Foundry(tmp_path)


def _run_here(
    command: list[str],
    *,
    input: str,  # noqa: A002 (as subprocess calls it)
    **_: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a program of ours in this process."""
    _, _, module, *arguments = command
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setattr(sys, "stdin", io.StringIO(input))
        runpy.run_module(module, run_name="__main__")
    logging.disable(logging.NOTSET)
    return subprocess.CompletedProcess(command, 0, output.getvalue(), "")


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    for path in sorted(folder.glob("*.bin")):
        tensors.update(torch.load(path, weights_only=True))
    return tensors


def logits(model: Any) -> torch.Tensor:
    model.eval()
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        got = ours[name]
        assert got.dtype == expected.dtype, name
        assert got.shape == expected.shape, name
        # numbers by themselves have no bytes to view
        got, expected = got.reshape(-1), expected.reshape(-1)  # noqa: PLW2901
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), name


@pytest.fixture
def same_bits() -> Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], None]:
    return assert_same_bits


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge four rows at a time, the fewest that keep PEFT's bits."""
    small = functools.partial(ComputeTuning, ((1 << 30, 64),))
    monkeypatch.setattr(machine, "ComputeTuning", small)
    monkeypatch.setenv("STREAMMERGE_PROFILE", "")


@pytest.fixture
def four_rows(tiny_tiles: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Merge four rows at a time; return how many each step of a tuner's own arithmetic had."""
    steps: list[int] = []
    apply = TorchCpuBackend._apply_tuner

    def recorded(term: Any, state: Any, rows: torch.Tensor, *more: Any) -> None:
        steps.append(len(rows))
        apply(term, state, rows, *more)

    monkeypatch.setattr(TorchCpuBackend, "_apply_tuner", staticmethod(recorded))
    return steps


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """Say by how much a call raises the resident memory of the process, at its peak."""
    clear = Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        pytest.skip("the peak of a process cannot be reset here")

    def measure(call: Callable[[], object]) -> int:
        gc.collect()
        clear.write_text("5")
        before = rss_bytes()
        kept = call()
        peak = peak_rss_bytes() - before
        del kept
        return peak

    return measure


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let PEFT compute with one thread, as streammerge does: LAPACK's results depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def load_folder() -> Callable[[Path], dict[str, torch.Tensor]]:
    return load_tensors


@pytest.fixture
def edit_config() -> Callable[..., None]:
    def edit(adapter: Path, **options: Any) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **options}))

    return edit
