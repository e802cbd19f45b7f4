"""DEFT and PaRa against PEFT."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import DeftConfig
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.adapter import open_adapter
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
TARGETS = ["lin0", "lin1"]
OPTIONS = [{}, {"decomposition_method": "qr"}, {"para": True}, {"alpha": 7}, {"alpha": 0}]


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


class Tall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(33, 4100)


def deft(**options: Any) -> DeftConfig:
    return DeftConfig(**{"r": 5, "target_modules": TARGETS, "init_weights": False, **options})


def edit(adapter: Path, **edits: Any) -> None:
    """Change an adapter's configuration."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edits}))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_deft(dtype: torch.dtype, options: dict[str, Any], mill: Any) -> None:
    mill.check(Mlp, deft(**options), dtype)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_conv1d(options: dict[str, Any], mill: Any) -> None:
    mill.check(Turned, deft(fan_in_fan_out=True, **options), torch.bfloat16)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_tiles(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, deft(), dtype, threads=3)
    mill.check(Mlp, deft(para=True), dtype)
    mill.check(Turned, deft(fan_in_fan_out=True), dtype, threads=3)


def test_rank_above_the_number_of_outputs(mill: Any) -> None:
    mill.check(Mlp, deft(r=30, alpha=4, target_modules=["lin1"]), torch.bfloat16)


def test_start_of_training(mill: Any) -> None:
    mill.check(Mlp, deft(init_weights=True), torch.bfloat16)


def test_in_turn(mill: Any) -> None:
    mill.check_in_turn(Mlp, torch.bfloat16, deft(), deft(para=True), deft(bias="deft_only"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["relu", "qr"])
def test_long_sums(method: str, mill: Any) -> None:
    config = deft(r=33, decomposition_method=method, target_modules=["lin0"])
    mill.check(Tall, config, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_long_sums_with_several_threads(dtype: torch.dtype, mill: Any) -> None:
    # of so many outputs BLAS divides the sum by the number of threads
    base = mill.base(Tall, dtype)
    adapter = mill.adapter(Tall, deft(target_modules=["lin0"]), dtype=dtype)
    merged, expected = mill.export(base, adapter), mill.peft(Tall, dtype, adapter)
    weight = load_file(base / "model.safetensors")["lin0.weight"].double().abs()
    (p,) = [t for n, t in load_file(adapter / "adapter_model.safetensors").items() if "_P" in n]
    content = p.double().relu().T @ weight
    bound = 2 * 4100 * 2.0**-24 * (p.double().abs() @ content)
    bound += 2 * torch.finfo(dtype).eps * expected["lin0.weight"].double().abs()
    difference = (merged["lin0.weight"].double() - expected["lin0.weight"].double()).abs()
    assert bool((difference <= bound).all())
    assert float((difference > 0).float().mean()) < 0.05 or dtype == torch.float32


def test_no_weighted_sum(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    with pytest.raises(PlanError, match="adapter_weights"):
        mill.export(base, mill.adapter(Mlp, deft()), adapter_weights=[0.5])


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        ("deft_P", None, "no deft_P"),
        ("deft_R", None, "no deft_R"),
        ("deft_R", lambda tensor: tensor[1:], "do not belong together"),
        ("deft_R", lambda tensor: tensor[:, 1:], "shape mismatch"),
        ("deft_P", lambda tensor: tensor[1:], "shape mismatch"),
    ],
)
def test_damaged_adapters(end: str, change: Any, message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, deft())
    mill.rewrite(adapter, end, change)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"r": 4}, "rank"),
        ({"decomposition_method": "svd"}, "bad decomposition_method"),
        # R has no use then
        ({"para": True}, "not used"),
    ],
)
def test_another_configuration(edits: dict[str, Any], message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, deft())
    edit(adapter, **edits)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Mlp, deft(para=True)))
    (module,) = [module for module in adapter.modules if module.module == "lin0"]
    assert adapter.config.tuner.describe(module, adapter.config.settings) == {
        "rank": 5,
        "method": "relu",
        "para": True,
        "dtype": "F32",
    }
