"""FRoD against PEFT."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import FrodConfig, LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.adapter import open_adapter
from streammerge.adapters.tuners.frod import _category
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
TARGETS = ["lin0", "lin1"]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 41)
        self.lin1 = nn.Linear(41, 23, bias=False)


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = Conv1D(41, 23)
        self.lin1 = Conv1D(23, 41)


class Deep(nn.Module):
    """Layers that share a basis."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": Mlp()}) for _ in range(3))


def frod(**options: Any) -> FrodConfig:
    options = {"target_modules": TARGETS, "progressbar": False, "sparse_rate": 0.1, **options}
    return FrodConfig(**options)


def rewrite(adapter: Path, end: str, change: Any) -> None:
    """Change the tensors whose names hold it; None takes them away."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if end in name]:
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = change(tensor).contiguous()
    save_file(tensors, path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frod(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, frod(), dtype)
    mill.check(Turned, frod(fan_in_fan_out=True), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_basis(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Deep, frod(), dtype)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_no_and_all_entries(rate: float, mill: Any) -> None:
    mill.check(Mlp, frod(sparse_rate=rate), torch.bfloat16)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_tiles(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, frod(), dtype, threads=3)
    mill.check(Turned, frod(fan_in_fan_out=True), dtype)


def test_before_another_adapter(mill: Any) -> None:
    lora = LoraConfig(target_modules=TARGETS, r=2)
    mill.check_in_turn(Mlp, torch.bfloat16, frod(bias="frod_only"), lora)


def test_after_another_adapter(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    first = mill.adapter(Mlp, LoraConfig(target_modules=["lin0"], r=2), name="first")
    second = mill.adapter(Mlp, frod(), name="second")
    with pytest.raises(PlanError, match="an adapter before this one changes a weight"):
        mill.export(base, first, second)


def test_basis_without_an_inverse(mill: Any) -> None:
    class Flat(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.lin0.weight.data[:, 3] = 0.0

    mill.check(Flat, frod(target_modules=["lin0"]), torch.float64)


@pytest.mark.parametrize(
    ("module", "category"),
    [
        ("lin0", "lin0"),
        ("model.layers.3.self_attn.q_proj", "self_attn_q_proj"),
        ("layers.3.dense", "dense"),
        ("encoder.layer.0.attention.output.dense", "attention_output"),
        ("encoder.layer.0.output.dense", "output_dense"),
    ],
)
def test_categories(module: str, category: str) -> None:
    assert _category(module) == category


def test_no_basis(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, frod(save_projection=False))
    with pytest.raises(AdapterError, match="no basis for a layer"):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        ("lin1.frod_lambda_l", None, "no frod_lambda_l"),
        ("frod_V.lin1", None, "no basis"),
        ("frod_s_size.lin0", lambda tensor: tensor + 1, "another size"),
        ("frod_s_indices.lin0", lambda tensor: tensor + 9, "another size"),
        ("frod_s_indices.lin0", lambda tensor: tensor[:, 1:], "shape mismatch"),
        ("lin0.frod_lambda_l", lambda tensor: tensor[1:], "shape mismatch"),
        ("frod_lambda_s_values", lambda tensor: tensor[None], "no vector"),
        # both of one layer
        ("model.lin0.", None, "layers that it has not"),
    ],
)
def test_damaged_adapters(end: str, change: Any, message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, frod())
    rewrite(adapter, end, change)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


def test_projection_that_the_configuration_denies(mill: Any, same_bits: Any) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    adapter = mill.adapter(Mlp, frod(), dtype=torch.bfloat16)
    expected = mill.peft(Mlp, torch.bfloat16, adapter)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "save_projection": False}))
    same_bits(mill.export(base, adapter), expected)


def test_no_weighted_sum(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    with pytest.raises(PlanError, match="adapter_weights"):
        mill.export(base, mill.adapter(Mlp, frod()), adapter_weights=[0.5])


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Mlp, frod()))
    (module,) = [module for module in adapter.modules if module.module == "lin0"]
    assert adapter.config.tuner.describe(module, adapter.config.settings) == {
        "diagonal": 23,
        "entries": 52,
        "category": "lin0",
        "dtype": "F32",
    }
