"""Norms that were trained whole, and vectors added to biases, against PEFT."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import BeftConfig, LNTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from streammerge.adapters.adapter import open_adapter
from streammerge.adapters.tuners.beft import AddVectorTerm
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
NORMS = ["layer", "bare", "rms", "batch", "group", "inner.norm", "lin"]
BIASED = ["lin", "wide", "one"]


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LayerNorm(17)
        self.bare = nn.LayerNorm((3, 5), bias=False)
        self.rms = nn.RMSNorm(19)
        self.batch = nn.BatchNorm1d(7)
        self.group = nn.GroupNorm(2, 6)
        self.inner = nn.Module()
        self.inner.norm = nn.LayerNorm(9)
        # any layer may be trained so
        self.lin = nn.Linear(5, 3)
        self.rest = nn.LayerNorm(4)


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(7, 23)
        self.wide = nn.Linear(2, 300)
        self.one = nn.Linear(6, 1)
        self.none = nn.Linear(6, 5, bias=False)
        self.rest = nn.Linear(4, 4)


# LN tuning


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype: torch.dtype, mill: Any) -> None:
    merged = mill.check(Norms, LNTuningConfig(target_modules=NORMS), dtype)
    before = mill.model(Norms, dtype).state_dict()
    for name in NORMS:
        assert not torch.equal(merged[f"{name}.weight"], before[f"{name}.weight"]), name
    assert torch.equal(merged["rest.weight"], before["rest.weight"])


def test_buffers_of_norms(mill: Any, same_bits: Any) -> None:
    base = mill.base(Norms, torch.bfloat16)
    model = get_peft_model(
        mill.model(Norms, torch.bfloat16), LNTuningConfig(target_modules=["batch"])
    )
    trained = model.base_model.model.batch.ln_tuning_layers["default"]
    trained.train()(torch.randn(8, 7, dtype=torch.bfloat16) + 3)
    adapter = mill.folder / "adapter"
    model.save_pretrained(adapter)
    merged = mill.export(base, adapter)
    same_bits(merged, mill.peft(Norms, torch.bfloat16, adapter))
    assert merged["batch.num_batches_tracked"] == 1
    assert merged["batch.running_mean"].min() > 0


def test_norms_trained_in_another_dtype(mill: Any, same_bits: Any) -> None:
    base = mill.base(Norms, torch.bfloat16)
    adapter = mill.adapter(Norms, LNTuningConfig(target_modules=NORMS), dtype=torch.float32)
    expected = mill.peft(Norms, torch.bfloat16, adapter)
    same_bits(mill.export(base, adapter), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_of_transformers_models(family: str, workshop: Any, same_bits: Any) -> None:
    base = workshop.base(family, torch.bfloat16)
    adapter = workshop.folder / "adapter"
    norms = ["ln_1", "ln_f"] if family == "gpt2" else ["input_layernorm", "norm"]
    save_trained(base, LNTuningConfig(target_modules=norms), adapter)
    keys = load_file(adapter / "adapter_model.safetensors").keys()
    assert all(".ln_tuning_layers." in key for key in keys)
    expected, _ = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter), expected)


def test_norms_beside_modules_to_save(workshop: Any, same_bits: Any) -> None:
    base = workshop.base("llama", torch.bfloat16, tie_word_embeddings=False)
    adapter = workshop.folder / "adapter"
    config = LNTuningConfig(target_modules=["input_layernorm"], modules_to_save=["lm_head"])
    save_trained(base, config, adapter)
    expected, _ = workshop.peft(base, adapter)
    # PEFT leaves the wrapper in the model that it merges
    expected["lm_head.weight"] = expected.pop("lm_head.modules_to_save.default.weight")
    assert not torch.equal(
        expected["lm_head.weight"], expected.pop("lm_head.original_module.weight")
    )
    same_bits(workshop.export(base, adapter), expected)


def test_later_norms_replace_earlier_ones(mill: Any, same_bits: Any) -> None:
    base = mill.base(Norms, torch.bfloat16)
    config = functools.partial(LNTuningConfig, target_modules=NORMS)
    first = mill.adapter(Norms, config(), name="first", dtype=torch.bfloat16)
    second = mill.adapter(Norms, config(), name="second", dtype=torch.bfloat16)
    expected = mill.peft(Norms, torch.bfloat16, first, second)
    same_bits(mill.export(base, first, second), expected)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layer.ln_tuning_layers.weight", torch.ones(16), "shape mismatch"),
        ("other.ln_tuning_layers.weight", torch.ones(17), "no base tensor"),
        ("layer.ln_tuning_layers.scale", torch.ones(17), "no base tensor"),
        ("layer.lora_A.weight", torch.ones(4, 17), "another kind"),
    ],
)
def test_norms_that_do_not_fit(name: str, tensor: torch.Tensor, message: str, mill: Any) -> None:
    base = mill.base(Norms, torch.float32)
    adapter = mill.adapter(Norms, LNTuningConfig(target_modules=["layer"]))
    path = adapter / "adapter_model.safetensors"
    save_file({f"base_model.model.{name}": tensor}, path)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


# BEFT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_biases(dtype: torch.dtype, mill: Any) -> None:
    merged = mill.check(Biased, BeftConfig(target_modules=BIASED), dtype)
    before = mill.model(Biased, dtype).state_dict()
    for name in BIASED:
        assert not torch.equal(merged[f"{name}.bias"], before[f"{name}.bias"])
        assert torch.equal(merged[f"{name}.weight"], before[f"{name}.weight"])


@pytest.mark.parametrize("seed", range(6))
def test_bias_of_one_number(seed: int, mill: Any) -> None:
    def noise(name: str, parameter: torch.nn.Parameter) -> None:
        torch.manual_seed(seed)
        parameter.normal_()

    mill.check(Biased, BeftConfig(target_modules=["one"]), torch.bfloat16, change=noise)


def test_bits_do_not_depend_on_tiles(
    mill: Any, tiny_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    apply = AddVectorTerm.apply

    def recorded(self: AddVectorTerm, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        steps.append(len(rows))
        return apply(self, rows, begin, state)

    monkeypatch.setattr(AddVectorTerm, "apply", recorded)
    mill.check(Biased, BeftConfig(target_modules=BIASED), torch.bfloat16)
    assert len(steps) > 20


def test_biases_of_two_adapters_in_turn(mill: Any, same_bits: Any) -> None:
    base = mill.base(Biased, torch.bfloat16)
    config = functools.partial(BeftConfig, target_modules=BIASED)
    first = mill.adapter(Biased, config(), name="first")
    second = mill.adapter(Biased, config(), name="second")
    expected = mill.peft(Biased, torch.bfloat16, first, second)
    same_bits(mill.export(base, first, second), expected)


def test_weights_of_biases(mill: Any) -> None:
    base = mill.base(Biased, torch.float32)
    adapter = mill.adapter(Biased, BeftConfig(target_modules=["lin"]))
    merged = mill.export(base, adapter, adapter_weights=[0.25])["lin.bias"]
    start = load_file(base / "model.safetensors")["lin.bias"]
    vector = load_file(adapter / "adapter_model.safetensors")["base_model.model.lin.beft_bias"]
    torch.testing.assert_close(merged, start + 0.25 * vector[0], rtol=0, atol=1e-7)


def test_biases_of_a_transformers_model(workshop: Any, same_bits: Any) -> None:
    base = workshop.base("qwen2", torch.bfloat16)
    adapter = workshop.folder / "adapter"
    save_trained(base, BeftConfig(target_modules=["v_proj"]), adapter)
    expected, _ = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter), expected)


def test_layer_without_bias(mill: Any) -> None:
    base = mill.base(Biased, torch.float32)
    adapter = mill.adapter(Biased, BeftConfig(target_modules=["none"]))
    with pytest.raises(PlanError, match="no bias"):
        mill.export(base, adapter)


@pytest.mark.parametrize("shape", [(1, 22), (23,), (23, 1)])
def test_biases_that_do_not_fit(shape: tuple[int, ...], mill: Any) -> None:
    base = mill.base(Biased, torch.float32)
    adapter = mill.adapter(Biased, BeftConfig(target_modules=["lin"]))
    path = adapter / "adapter_model.safetensors"
    save_file({"base_model.model.lin.beft_bias": torch.ones(shape)}, path)
    with pytest.raises(AdapterError, match="another base"):
        mill.export(base, adapter)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Biased, BeftConfig(target_modules=["lin"])))
    tuner, (module,) = adapter.config.tuner, adapter.modules
    assert tuner.describe(module, None) == {"shape": [1, 23], "dtype": "F32"}


def save_trained(base: Path, config: Any, path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
    model.save_pretrained(path)
