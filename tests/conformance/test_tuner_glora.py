"""GLoRA against PEFT."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import GloraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from streammerge.adapters.adapter import open_adapter
from streammerge.adapters.tuners.base import Layer, Parameter, Shared
from streammerge.checkpoint.header import read_header
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
        self.lin0 = nn.Linear(300, 203)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 41, bias=False)
        self.lin1 = nn.Linear(41, 23, bias=False)


class Signed(Mlp):
    """A model with zeros of both signs."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0.weight.data[::2] = -0.0
        self.lin1.weight.data[::3] = 0.0
        self.lin0.bias.data[::2] = -0.0


def glora(a_b: str = "lora", c: str = "lora", d_e: str = "constant", **options: Any) -> GloraConfig:
    forms = {"config_A_B": a_b, "config_C": c, "config_D_E": d_e}
    return GloraConfig(**{"r": 5, "target_modules": TARGETS, **forms, **options})


def rewrite(adapter: Path, **changes: Any) -> None:
    """Change the tensors whose names end so, with one underscore for the dot; None removes them."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for key, change in changes.items():
        end = ".".join(key.rsplit("_", 1))
        for name in [name for name in tensors if name.endswith(end)]:
            tensor = tensors.pop(name)
            if change is not None:
                tensors[name] = change(tensor).contiguous()
    save_file(tensors, path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("a_b", "c", "d_e"),
    [
        ("lora", "lora", "constant"),
        ("vector", "vector", "vector"),
        ("constant", "none", "none"),
        ("none", "lora", "none"),
        ("none", "none", "constant"),
    ],
)
def test_forms(dtype: torch.dtype, a_b: str, c: str, d_e: str, mill: Any) -> None:
    mill.check(Mlp, glora(a_b, c, d_e), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_without_a_bias(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Bare, glora(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_either_sign(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Signed, glora("none", "none", "vector"), dtype)
    mill.check(Signed, glora("vector", "none", "none"), dtype)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_tiles(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, glora(), dtype, threads=3)
    mill.check(Mlp, glora("vector", "vector", "vector"), dtype)
    mill.check(Wide, glora(c="none", r=20), dtype, threads=3)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_for_the_bias(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Wide, glora(r=20), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_for_the_bias_with_several_threads(dtype: torch.dtype, mill: Any) -> None:
    # of so many inputs BLAS divides the sum by the number of threads
    base = mill.base(Wide, dtype)
    adapter = mill.adapter(Wide, glora(r=20), dtype=dtype)
    merged, expected = mill.export(base, adapter), mill.peft(Wide, dtype, adapter)
    assert torch.equal(merged["lin0.weight"], expected["lin0.weight"])
    start, parts = (
        load_file(base / "model.safetensors"),
        load_file(adapter / "adapter_model.safetensors"),
    )
    down, up = (parts[f"base_model.model.lin0.glora_C.{end}"].double() for end in ("Xd", "Xu"))
    terms = start["lin0.weight"].double().abs() @ (down @ up).abs()
    largest = float(terms.max() + expected["lin0.bias"].double().abs().max())
    bound = 2 * largest * (300 * 2.0**-24 + torch.finfo(dtype).eps)
    difference = (merged["lin0.bias"].double() - expected["lin0.bias"].double()).abs().max()
    assert float(difference) <= bound


def test_trained_biases(mill: Any) -> None:
    mill.check(Mlp, glora(bias="glora_only"), torch.bfloat16)


def test_in_turn(mill: Any) -> None:
    mill.check_in_turn(
        Mlp, torch.bfloat16, glora(), glora("vector", "none"), glora("constant", "none", "vector")
    )


def test_a_weight_that_was_changed_before(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    first, second = (mill.adapter(Mlp, glora(), name=name) for name in ("first", "second"))
    with pytest.raises(PlanError, match="an adapter before this one changes a weight"):
        mill.export(base, first, second)


def test_no_weighted_sum(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, glora())
    with pytest.raises(PlanError, match="adapter_weights"):
        mill.export(base, adapter, adapter_weights=[0.5])


def test_memory_holds_the_weight_of_a_bias(mill: Any) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    adapter = open_adapter(mill.adapter(Mlp, glora()))
    stored = {tensor.name: tensor for tensor in read_header(base / "model.safetensors")[0]}
    (module,) = [module for module in adapter.modules if module.module == "lin0"]
    parameters = {
        end: Parameter(f"lin0.{end}", stored[f"lin0.{end}"].shape, stored[f"lin0.{end}"])
        for end in ("weight", "bias")
    }
    planned = adapter.config.tuner.plan(
        Layer(module, parameters, is_transposed=False), adapter.config.settings, Shared()
    )
    (term,) = [one.term for one in planned if one.parameter == "bias"]
    assert stored["lin0.weight"] in term.factors
    assert term.work_bytes((41,)) >= 41 * 23 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"glora_A_Xd": None}, "glora_A as lora"),
        ({"glora_C_Xu": None}, "glora_C as lora"),
        # all of C, but D and E are there
        ({"glora_C_Xu": None, "glora_C_Xd": None}, "glora_C as lora"),
        ({"glora_D_X": None}, "glora_D as constant"),
        ({"glora_A_Xd": lambda tensor: tensor[1:]}, "unexpected shape"),
        ({"glora_C_Xd": lambda tensor: tensor[1:]}, "unexpected shape"),
        ({"glora_E_X": lambda tensor: tensor.repeat(2)}, "unexpected shape"),
    ],
)
def test_damaged_adapters(change: dict[str, Any], message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, glora(target_modules=["lin0"]))
    rewrite(adapter, **change)
    with pytest.raises(AdapterError, match=message):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"r": 4}, "unexpected shape"),
        ({"config_A_B": "vector"}, "glora_A as vector"),
        ({"config_C": "none"}, "glora_C as none"),
        ({"config_D_E": "vector"}, "unexpected shape"),
        ({"config_D_E": "lora"}, "bad config_D_E"),
    ],
)
def test_another_configuration(edits: dict[str, Any], message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, glora())
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edits}))
    with pytest.raises(AdapterError, match=message):
        mill.export(base, adapter)


def test_biases_that_are_not_there(mill: Any) -> None:
    adapter = mill.adapter(Mlp, glora())
    with pytest.raises(PlanError, match="the adapter of a layer with a bias"):
        mill.export(mill.base(Bare, torch.float32), adapter)
    adapter = mill.adapter(Bare, glora())
    with pytest.raises(PlanError, match="the adapter of a layer without a bias"):
        mill.export(mill.base(Mlp, torch.float32), adapter)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Mlp, glora("vector")))
    (module,) = [module for module in adapter.modules if module.module == "lin0"]
    assert adapter.config.tuner.describe(module, adapter.config.settings) == {
        "rank": 5,
        "A": "vector",
        "B": "vector",
        "C": "lora",
        "D": "constant",
        "E": "constant",
    }
