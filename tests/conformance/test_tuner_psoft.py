"""PSOFT against PEFT, where its own fault is asked for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PsoftConfig
from torch import nn

from streammerge.adapters.adapter import open_adapter
from streammerge.adapters.options import Choices
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TARGETS = ["lin0", "lin1"]
REPRODUCE = {"peft_bugs": "reproduce"}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 41)
        self.lin1 = nn.Linear(41, 23, bias=False)


def psoft(**options: Any) -> PsoftConfig:
    return PsoftConfig(**{"r": 6, "target_modules": TARGETS, **options})


def edit(adapter: Path, **edits: Any) -> None:
    """Change an adapter's configuration."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edits}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ab_svd_init": "pissa_init", "psoft_alpha": 5},
        {"psoft_orth": False},
        {"psoft_mag_a": False},
        {"psoft_mag_b": False, "r": 1},
        {"psoft_mag_a": False, "psoft_mag_b": False, "r": 23},
        {"psoft_svd": "lowrank"},
        {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 2, "random_seed": 9},
    ],
    ids=str,
)
def test_psoft(dtype: torch.dtype, options: dict[str, Any], mill: Any) -> None:
    mill.check(Mlp, psoft(**options), dtype, **REPRODUCE)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("eps", [None, 0.2])
def test_neumann_series(terms: int, eps: float | None, mill: Any) -> None:
    config = psoft(use_cayley_neumann=True, num_cayley_neumann_terms=terms, cayley_neumann_eps=eps)
    mill.check(Mlp, config, torch.float32, **REPRODUCE)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_tiles(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, psoft(), dtype, threads=3, **REPRODUCE)
    mill.check(Mlp, psoft(psoft_svd="lowrank"), dtype, threads=3, **REPRODUCE)


def test_random_numbers_of_others_stay_as_they_are(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, psoft(psoft_svd="lowrank"))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    mill.export(base, adapter, **REPRODUCE)
    assert torch.equal(torch.rand(4), expected)


def test_in_turn(mill: Any) -> None:
    mill.check_in_turn(Mlp, torch.bfloat16, psoft(), psoft(r=2), **REPRODUCE)


def test_refused_because_signs_are_lost(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, psoft())
    with pytest.raises(AdapterError, match="signs of what is found"):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        ("psoft_R.weight", None, "no psoft_R"),
        ("vector_a", None, "no psoft_R.vector_a"),
        ("vector_b", lambda tensor: tensor[1:], "unexpected shape"),
        ("psoft_R.weight", lambda tensor: tensor[1:], "unexpected shape"),
    ],
)
def test_damaged_adapters(end: str, change: Any, message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, psoft())
    mill.rewrite(adapter, end, change)
    with pytest.raises(AdapterError, match=message):
        mill.export(base, adapter, **REPRODUCE)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"r": 4}, "unexpected shape"),
        ({"psoft_orth": False}, "unexpected shape"),
        ({"psoft_mag_a": False}, "not used"),
        ({"ab_svd_init": "olora"}, "bad ab_svd_init"),
        ({"num_cayley_neumann_terms": 10**6}, "bad num_cayley_neumann_terms"),
    ],
)
def test_another_configuration(edits: dict[str, Any], message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, psoft())
    edit(adapter, **edits)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter, **REPRODUCE)


def test_another_base(mill: Any) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = nn.Linear(5, 41)
            self.lin1 = nn.Linear(41, 5, bias=False)

    base = mill.base(Other, torch.float32)
    with pytest.raises(PlanError, match="shape mismatch"):
        mill.export(base, mill.adapter(Mlp, psoft()), **REPRODUCE)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Mlp, psoft()), Choices(reproduces_bugs=True))
    (module,) = [module for module in adapter.modules if module.module == "lin0"]
    assert adapter.config.tuner.describe(module, adapter.config.settings) == {
        "rank": 6,
        "scaling": 32 / 6,
        "dtype": "F32",
    }
