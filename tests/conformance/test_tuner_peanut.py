"""PEANuT against PEFT."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeanutConfig
from safetensors.torch import load_file
from torch import nn
from transformers.activations import ACT2FN

from streammerge.adapters.adapter import open_adapter
from streammerge.adapters.tuners.peanut import ACTIVATIONS
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
TARGETS = ["lin0", "lin1"]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 41)
        self.lin1 = nn.Linear(41, 23, bias=False)


class Tall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(33, 4100)


def peanut(**options: Any) -> PeanutConfig:
    return PeanutConfig(**{"r": 5, "target_modules": TARGETS, **options})


def edit(adapter: Path, **edits: Any) -> None:
    """Change an adapter's configuration."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edits}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_peanut(dtype: torch.dtype, depth: int, mill: Any) -> None:
    mill.check(Mlp, peanut(depth=depth, act_fn="gelu"), dtype)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name: str, mill: Any) -> None:
    config = peanut(depth=1, act_fn=name, scaling=0.3, target_modules=["lin0"])
    mill.check(Mlp, config, torch.float32)


def test_every_activation_is_known_or_refused(mill: Any) -> None:
    assert set(ACT2FN) - ACTIVATIONS <= {"xielu"}
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, peanut())
    edit(adapter, act_fn="xielu")
    with pytest.raises(AdapterError, match="activation that is not known"):
        mill.export(base, adapter)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_tiles(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, peanut(depth=2, act_fn="silu"), dtype, threads=3)


def test_in_turn(mill: Any) -> None:
    mill.check_in_turn(Mlp, torch.bfloat16, peanut(), peanut(depth=1, r=3))


@pytest.mark.usefixtures("one_thread")
def test_long_sums(mill: Any) -> None:
    mill.check(Tall, peanut(target_modules=["lin0"], depth=1), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_long_sums_with_several_threads(dtype: torch.dtype, mill: Any) -> None:
    # of so many outputs BLAS divides the sum by the number of threads
    base = mill.base(Tall, dtype)
    adapter = mill.adapter(Tall, peanut(target_modules=["lin0"]), dtype=dtype)
    merged, expected = mill.export(base, adapter), mill.peft(Tall, dtype, adapter)
    weight = load_file(base / "model.safetensors")["lin0.weight"].double().abs()
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.lin0.peanut_{end}.weight"].double().abs() for end in "AB")
    # relu makes no difference larger
    bound = 2 * 4100 * 2.0**-24 * (b @ (a @ weight))
    bound += 2 * torch.finfo(dtype).eps * expected["lin0.weight"].double().abs()
    difference = (merged["lin0.weight"].double() - expected["lin0.weight"].double()).abs()
    assert bool((difference <= bound).all())


def test_no_weighted_sum(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    with pytest.raises(PlanError, match="adapter_weights"):
        mill.export(base, mill.adapter(Mlp, peanut()), adapter_weights=[0.5])


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        ("peanut_A.weight", None, "no peanut_A"),
        ("peanut_encoders.1.weight", None, "no peanut_encoders.1"),
        ("peanut_decoders.0.weight", lambda tensor: tensor[1:], "unexpected shape"),
        ("peanut_B.weight", lambda tensor: tensor[1:], "do not belong together"),
    ],
)
def test_damaged_adapters(end: str, change: Any, message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, peanut(depth=2))
    mill.rewrite(adapter, end, change)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"r": 4}, "rank"),
        ({"depth": 1}, "not used"),
        ({"depth": 3}, "no peanut_encoders.2"),
    ],
)
def test_another_configuration(edits: dict[str, Any], message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, peanut(depth=2))
    edit(adapter, **edits)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


def test_another_base(mill: Any) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = nn.Linear(23, 42)
            self.lin1 = nn.Linear(42, 23, bias=False)

    with pytest.raises(PlanError, match="shape mismatch"):
        mill.export(mill.base(Other, torch.float32), mill.adapter(Mlp, peanut()))


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Mlp, peanut(depth=1)))
    (module,) = [module for module in adapter.modules if module.module == "lin0"]
    assert adapter.config.tuner.describe(module, adapter.config.settings) == {
        "rank": 5,
        "depth": 1,
        "activation": "relu",
        "scaling": 1.0,
        "dtype": "F32",
    }
