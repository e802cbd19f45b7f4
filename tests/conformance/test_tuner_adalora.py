"""AdaLoRA before and after ranks were taken away, against PEFT."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.adapter import open_adapter
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
TARGETS = ["lin0", "lin1", "turned", "conv"]


class Mixed(nn.Module):
    """Layers of odd shapes, each kind that PEFT has AdaLoRA for."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 41)
        self.lin1 = nn.Linear(41, 5)
        self.turned = Conv1D(29, 19)
        self.conv = nn.Conv2d(6, 11, (3, 2))
        self.rest = nn.Linear(4, 4)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(12, 20)


def config(**options: Any) -> AdaLoraConfig:
    options = {"target_modules": TARGETS, "init_r": 6, "target_r": 2, "lora_alpha": 9, **options}
    return AdaLoraConfig(total_step=10, **options)


def masked(mill: Any, dtype: torch.dtype, name: str = "masked", **options: Any) -> Path:
    """Save an adapter whose ranks were taken away, all of one layer's and some of others'."""
    model = get_peft_model(mill.model(Mixed, dtype), config(**options))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.peft_config["default"].rank_pattern = {
        f"{module}.lora_E.default": [number % 6 < kept for number in range(model_rank(options))]
        for module, kept in (("lin0", 3), ("lin1", 0), ("turned", 6), ("conv", 1))
    }
    path: Path = mill.folder / name
    model.save_pretrained(path)
    return path


def model_rank(options: dict[str, Any]) -> int:
    rank: int = options.get("init_r", 6)
    return rank


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 0}, {"init_r": 1}, {"init_r": 17}])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_before_ranks_are_taken_away(
    dtype: torch.dtype, options: dict[str, Any], mill: Any
) -> None:
    mill.check(Mixed, config(**options), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_after_ranks_were_taken_away(dtype: torch.dtype, mill: Any, same_bits: Any) -> None:
    base = mill.base(Mixed, dtype)
    adapter = masked(mill, dtype)
    shapes = {name: t.shape for name, t in load_file(adapter / "adapter_model.safetensors").items()}
    assert shapes["base_model.model.lin0.lora_A"] == (3, 23)
    assert shapes["base_model.model.lin1.lora_A"] == (0, 41)
    same_bits(mill.export(base, adapter), mill.peft(Mixed, dtype, adapter))


def test_rank_that_bfloat16_does_not_have(mill: Any, same_bits: Any) -> None:
    """PEFT keeps the initial rank in the weight's dtype, where 259 becomes 260."""
    base = mill.base(Mixed, torch.bfloat16)
    adapter = masked(mill, torch.bfloat16, init_r=259)
    same_bits(mill.export(base, adapter), mill.peft(Mixed, torch.bfloat16, adapter))


def test_trained_scaling_without_alpha(mill: Any, same_bits: Any) -> None:
    """Training divides the initial rank by itself; PEFT forgets it when it loads the adapter."""
    base = mill.base(Mixed, torch.float32)
    adapter = masked(mill, torch.float32, lora_alpha=0)
    as_peft = mill.export(base, adapter, peft_bugs="reproduce")
    same_bits(as_peft, mill.peft(Mixed, torch.float32, adapter))
    merged = mill.export(base, adapter)["lin0.weight"].double()
    start = load_file(base / "model.safetensors")["lin0.weight"].double()
    parts = load_file(adapter / "adapter_model.safetensors")
    a, b, e = (parts[f"base_model.model.lin0.lora_{end}"].double() for end in "ABE")
    torch.testing.assert_close(merged - start, b @ (a * e) * 6 / 6.00001, rtol=0, atol=1e-6)
    assert not torch.equal(as_peft["lin0.weight"].double(), merged)


@pytest.mark.parametrize("is_masked", [False, True])
def test_bits_do_not_depend_on_tiles(
    is_masked: bool, mill: Any, same_bits: Any, four_rows: list[int]
) -> None:
    base = mill.base(Mixed, torch.bfloat16)
    adapter = (
        masked(mill, torch.bfloat16)
        if is_masked
        else mill.adapter(Mixed, config(), dtype=torch.bfloat16)
    )
    expected = mill.peft(Mixed, torch.bfloat16, adapter)
    same_bits(mill.export(base, adapter), expected)
    assert 4 in four_rows
    assert max(four_rows) < 8


def test_two_adapters_in_turn(mill: Any, same_bits: Any) -> None:
    base = mill.base(Mixed, torch.bfloat16)
    first = mill.adapter(Mixed, config(init_r=3), name="first")
    second = masked(mill, torch.bfloat16, name="second")
    expected = mill.peft(Mixed, torch.bfloat16, first, second)
    same_bits(mill.export(base, first, second), expected)


def test_gpt2(workshop: Any, same_bits: Any) -> None:
    base = workshop.base("gpt2", torch.bfloat16)
    mixin = config(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    adapter = workshop.folder / "adapter"
    save_trained(base, mixin, adapter)
    expected, _ = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter), expected)


def test_weights_of_adapters(mill: Any) -> None:
    base = mill.base(Small, torch.float32)
    adapter = mill.adapter(Small, config(target_modules=["lin0"]))
    merged = mill.export(base, adapter, adapter_weights=[0.5])["lin0.weight"]
    start = load_file(base / "model.safetensors")["lin0.weight"].double()
    parts = load_file(adapter / "adapter_model.safetensors")
    a, b, e = (parts[f"base_model.model.lin0.lora_{end}"].double() for end in "ABE")
    delta = b @ (a * e) * 9 / 6.00001
    assert delta.abs().max() > 1e-3
    torch.testing.assert_close(merged.double(), start + delta / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda name, tensor: None if name.endswith("lora_E") else tensor, "no lora_E"),
        (lambda name, tensor: tensor[:4] if name.endswith("lora_A") else tensor, "rank"),
        (lambda name, tensor: tensor.T if name.endswith("lora_E") else tensor, "rank"),
        (lambda name, tensor: tensor[:, :9] if name.endswith("lora_A") else tensor, "mismatch"),
        (lambda name, tensor: tensor[:0, 0] if name.endswith("lora_A") else tensor, "gathered"),
    ],
)
def test_damaged_adapter(edit: Any, message: str, mill: Any) -> None:
    base = mill.base(Small, torch.float32)
    adapter = mill.adapter(Small, config(target_modules=["lin0"]))
    path = adapter / "adapter_model.safetensors"
    edited = {name: edit(name, tensor) for name, tensor in load_file(path).items()}
    save_file({n: t.contiguous() for n, t in edited.items() if t is not None}, path)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"lin0.lora_E": [True] * 3}}, "rank"),
        ({"rank_pattern": {"lin0.lora_E": 6}}, "bad rank_pattern"),
        ({"rank_pattern": {"lin0": [True] * 6}}, "bad rank_pattern"),
        ({"rank_pattern": [6]}, "bad rank_pattern"),
        ({"init_r": 5}, "rank"),
        ({"use_dora": True}, "magnitudes"),
        ({"use_what": True}, "does not know"),
    ],
)
def test_other_configuration(options: dict[str, Any], message: str, mill: Any) -> None:
    base = mill.base(Small, torch.float32)
    adapter = mill.adapter(Small, config(target_modules=["lin0"]))
    edit_config(adapter, **options)
    with pytest.raises(AdapterError, match=message):
        mill.export(base, adapter)


def test_masks_under_names_of_other_versions(mill: Any, same_bits: Any) -> None:
    base = mill.base(Small, torch.float32)
    adapter = mill.adapter(Small, config(target_modules=["lin0"]))
    expected = mill.export(base, adapter)
    edit_config(adapter, rank_pattern={"base_model.model.lin0.lora_E.default": [True] * 6})
    same_bits(mill.export(base, adapter), expected)


def test_description(mill: Any) -> None:
    adapter = open_adapter(masked(mill, torch.float32))
    tuner, settings = adapter.config.tuner, adapter.config.settings
    said = {m.module: tuner.describe(m, settings) for m in adapter.modules}
    assert said["lin0"] == {
        "rank": 3,
        "scaling": pytest.approx(9 / 6.00001),
        "shape": [41, 23],
        "dtype": "F32",
    }
    assert said["conv"]["shape"] == [11, 36]


def edit_config(adapter: Path, **options: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def save_trained(base: Path, config: Any, path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter.dtype))
    model.save_pretrained(path)
