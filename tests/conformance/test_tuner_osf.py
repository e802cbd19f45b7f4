"""OSF against PEFT: the same bits with one thread, a bound with others."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import OSFConfig
from safetensors.torch import load_file
from torch import nn

from streammerge.adapters.adapter import open_adapter
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


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(260, 180)


def osf(**options: Any) -> OSFConfig:
    return OSFConfig(**{"target_modules": TARGETS, **options})


def edit(adapter: Path, **edits: Any) -> None:
    """Change an adapter's configuration."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edits}))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [None, 3, 0.3, 0.9])
def test_osf(dtype: torch.dtype, rank: float | None, mill: Any) -> None:
    mill.check(Mlp, osf(effective_rank=rank), dtype)


@pytest.mark.usefixtures("one_thread")
def test_patterns(mill: Any) -> None:
    # anywhere in a path, and the first of them
    config = osf(effective_rank=5, rank_pattern={"in1": 0.25, "lin": 11})
    mill.check(Mlp, config, torch.bfloat16)


@pytest.mark.usefixtures("tiny_tiles", "one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_tiles(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, osf(), dtype, threads=3)


@pytest.mark.usefixtures("one_thread")
def test_in_turn(mill: Any) -> None:
    mill.check_in_turn(Mlp, torch.bfloat16, osf(), osf(effective_rank=2))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_larger_weights(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Wide, osf(target_modules=["lin0"]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_larger_weights_with_several_threads(dtype: torch.dtype, mill: Any) -> None:
    base = mill.base(Wide, dtype)
    adapter = mill.adapter(Wide, osf(target_modules=["lin0"]), dtype=dtype)
    merged, expected = mill.export(base, adapter), mill.peft(Wide, dtype, adapter)
    weight = load_file(base / "model.safetensors")["lin0.weight"].double()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    least, eps = 180, torch.finfo(dtype).eps
    half = least // 2
    terms = (u[:, half:].abs() * s[half:]) @ v[half:].abs()
    bound = eps * (2 * terms + expected["lin0.weight"].double().abs())
    bound += least * 2.0**-24 * float(s[0])
    difference = (merged["lin0.weight"].double() - expected["lin0.weight"].double()).abs()
    assert bool((difference <= bound).all())


def test_fp32_numerics_take_off_what_training_began_with(mill: Any) -> None:
    def leave(name: str, parameter: nn.Parameter) -> None:
        """Do not train."""

    base = mill.base(Mlp, torch.bfloat16)
    adapter = mill.adapter(Mlp, osf(), dtype=torch.bfloat16, change=leave)
    merged = mill.export(base, adapter, numerics="fp32")
    for name, before in load_file(base / "model.safetensors").items():
        assert torch.equal(merged[name], before)


def test_no_weighted_sum(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    with pytest.raises(PlanError, match="adapter_weights"):
        mill.export(base, mill.adapter(Mlp, osf()), adapter_weights=[0.5])


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        ("U_low", None, "no osf_svd_params.U_low"),
        ("S_low", None, "no osf_svd_params.S_low"),
        ("S_low", lambda tensor: tensor[1:], "do not belong together"),
        ("V_low", lambda tensor: tensor[:, 1:], "shape mismatch"),
        ("U_low", lambda tensor: tensor[1:], "shape mismatch"),
    ],
)
def test_damaged_adapters(end: str, change: Any, message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, osf())
    mill.rewrite(adapter, end, change)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"effective_rank": 4}, "rank"),
        ({"rank_pattern": {"lin0": 0.9}}, "rank"),
        ({"effective_rank": "all"}, "bad effective_rank"),
        ({"rank_pattern": {"(x+)+": 2}}, "take for ever"),
    ],
)
def test_another_configuration(edits: dict[str, Any], message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, osf())
    edit(adapter, **edits)
    with pytest.raises(AdapterError, match=message):
        mill.export(base, adapter)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Mlp, osf()))
    (module,) = [module for module in adapter.modules if module.module == "lin0"]
    assert adapter.config.tuner.describe(module, adapter.config.settings) == {
        "components": 12,
        "shape": [41, 23],
        "dtype": "F32",
    }
