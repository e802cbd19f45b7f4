"""IA3 on the outputs and the inputs of every layer that PEFT has it for, against PEFT."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import IA3Config, get_peft_model
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
# the last digit tells a layer whose inputs are multiplied from its twin
OUTPUTS = ["lin0", "bare0", "turned0", "square0", "conv0", "even0", "deep0", "grouped0"]
INPUTS = ["lin1", "bare1", "turned1", "square1", "conv1", "even1", "deep1", "grouped1"]


class Mixed(nn.Module):
    """Layers of odd shapes, two of each kind that PEFT has IA3 for."""

    def __init__(self) -> None:
        super().__init__()
        for end in "01":
            self.add_module(f"turned{end}", turned(19, 13))
            self.add_module(f"lin{end}", nn.Linear(23, 41))
            self.add_module(f"bare{end}", nn.Linear(7, 9, bias=False))
            self.add_module(f"square{end}", nn.Linear(10, 10))
            self.add_module(f"conv{end}", nn.Conv2d(6, 11, (3, 2)))
            self.add_module(f"even{end}", nn.Conv2d(8, 8, 3, bias=False))
            self.add_module(f"deep{end}", nn.Conv3d(3, 5, (1, 2, 3)))
            self.add_module(f"grouped{end}", nn.Conv2d(12, 8, 3, groups=4))
        self.rest = nn.Linear(4, 4)


def turned(n: int, k: int) -> Conv1D:
    layer = Conv1D(n, k)
    nn.init.normal_(layer.bias)
    return layer


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(12, 20)


def config(**options: Any) -> IA3Config:
    return IA3Config(
        **{"target_modules": [*OUTPUTS, *INPUTS], "feedforward_modules": INPUTS, **options}
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_layers(dtype: torch.dtype, mill: Any) -> None:
    merged = mill.check(Mixed, config(), dtype)
    before = mill.model(Mixed, dtype).state_dict()
    for name in OUTPUTS + INPUTS:
        assert not torch.equal(merged[f"{name}.weight"], before[f"{name}.weight"]), name
        if f"{name}.bias" in before:
            is_kept = torch.equal(merged[f"{name}.bias"], before[f"{name}.bias"])
            assert is_kept == (name in INPUTS), name


def test_bits_do_not_depend_on_tiles(mill: Any, four_rows: list[int]) -> None:
    mill.check(Mixed, config(), torch.bfloat16)
    # a bias counts as rows of one column
    assert 4 in four_rows
    assert max(four_rows) < 24


@pytest.mark.parametrize(
    "feedforward", [".*[a-z]1", r"(lin|turned|square)\d", "nothing", "lin1", []]
)
def test_feedforward_by_pattern(feedforward: str | list[str], mill: Any) -> None:
    targets = "|".join([*OUTPUTS, *INPUTS])
    options = {"target_modules": targets, "feedforward_modules": feedforward}
    mill.check(Mixed, config(**options), torch.bfloat16)


def test_ends_of_paths_need_no_dot(mill: Any) -> None:
    options = {"target_modules": ["lin0", "lin1", "1"], "feedforward_modules": ["1"]}
    mill.check(Mixed, config(**options), torch.bfloat16)


def test_vectors_that_do_not_start_as_ones(mill: Any) -> None:
    mill.check(Mixed, config(init_ia3_weights=False), torch.float16)


@pytest.mark.parametrize("shape", [(1, 7), (3, 1), (1, 1)])
def test_narrow_layers(shape: tuple[int, int], mill: Any) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(shape[1], shape[0]), nn.Linear(shape[1], shape[0]))

    mill.check(
        build, IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]), torch.bfloat16
    )


@pytest.mark.parametrize("family", ["llama-bias", "gpt2"])
def test_transformers_models(family: str, workshop: Any, same_bits: Any) -> None:
    base = workshop.base(family, torch.bfloat16)
    adapter = workshop.folder / "adapter"
    is_gpt2 = family == "gpt2"
    targets = ["c_attn", "mlp.c_proj"] if is_gpt2 else ["k_proj", "v_proj", "down_proj"]
    save_trained(base, IA3Config(target_modules=targets, feedforward_modules=targets[-1:]), adapter)
    expected, _ = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter), expected)


def test_two_adapters_in_turn(mill: Any, same_bits: Any) -> None:
    base = mill.base(Mixed, torch.bfloat16)
    first = mill.adapter(Mixed, config(), name="first")
    second = mill.adapter(Mixed, config(), name="second")
    expected = mill.peft(Mixed, torch.bfloat16, first, second)
    same_bits(mill.export(base, first, second), expected)


def test_half_precision_file(mill: Any, same_bits: Any) -> None:
    base = mill.base(Mixed, torch.float16)
    adapter = mill.adapter(Mixed, config())
    path = adapter / "adapter_model.safetensors"
    save_file({name: t.to(torch.bfloat16) for name, t in load_file(path).items()}, path)
    expected = mill.peft(Mixed, torch.float16, adapter)
    same_bits(mill.export(base, adapter), expected)


def test_is_no_sum(mill: Any) -> None:
    base = mill.base(Mixed, torch.float32)
    with pytest.raises(PlanError, match="not a sum"):
        mill.export(base, mill.adapter(Mixed, config()), adapter_weights=[0.5])


@pytest.mark.parametrize("target", ["lin1", "turned1", "conv1", "deep0"])
def test_feedforward_that_is_not_said(target: str, mill: Any, same_bits: Any) -> None:
    """Where sizes differ, they say it as well."""
    base = mill.base(Mixed, torch.bfloat16)
    mine = {"target_modules": [target], "feedforward_modules": [target] if "1" in target else []}
    adapter = mill.adapter(Mixed, config(**mine))
    expected = mill.peft(Mixed, torch.bfloat16, adapter)
    edit_config(adapter, feedforward_modules=None)
    same_bits(mill.export(base, adapter), expected)


@pytest.mark.parametrize("target", ["even0", "grouped1"])
def test_feedforward_that_cannot_be_known(target: str, mill: Any) -> None:
    base = mill.base(Mixed, torch.bfloat16)
    mine = {"target_modules": [target], "feedforward_modules": [target] if "1" in target else []}
    adapter = mill.adapter(Mixed, config(**mine))
    edit_config(adapter, feedforward_modules=None)
    with pytest.raises(PlanError, match="feedforward_modules"):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedforward_modules": ["lin0"]}, "shape mismatch"),
        ({"feedforward_modules": "lin\\d"}, "shape mismatch"),
        ({"feedforward_modules": "("}, "bad feedforward_modules"),
        ({"feedforward_modules": "(a+)+b"}, "for ever"),
        ({"feedforward_modules": 3}, "bad feedforward_modules"),
    ],
)
def test_other_configuration(options: dict[str, Any], message: str, mill: Any) -> None:
    base = mill.base(Small, torch.float32)
    small = {"target_modules": ["lin0"], "feedforward_modules": []}
    adapter = mill.adapter(Small, config(**small))
    edit_config(adapter, **options)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (torch.ones(19, 1), "shape mismatch"),
        (torch.ones(1, 12), "shape mismatch"),
        (torch.ones(1, 20, 1, 1), "shape mismatch"),
        (torch.ones(20), "no vector"),
        (torch.ones(0, 1), "no vector"),
        (torch.ones(4, 5), "no vector"),
    ],
)
def test_damaged_adapter(vector: torch.Tensor, message: str, mill: Any) -> None:
    base = mill.base(Small, torch.float32)
    small = {"target_modules": ["lin0"], "feedforward_modules": []}
    adapter = mill.adapter(Small, config(**small))
    save_file({"base_model.model.lin0.ia3_l": vector}, adapter / "adapter_model.safetensors")
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


def test_other_groups(mill: Any) -> None:
    adapter = mill.adapter(Mixed, config())

    def build(groups: int, channels: int) -> nn.Module:
        model = Mixed()
        model.grouped1 = nn.Conv2d(channels, 8, 3, groups=groups)
        return model

    for groups, channels in ((4, 20), (1, 24), (8, 40)):
        base = mill.base(functools.partial(build, groups, channels), torch.float32)
        with pytest.raises(PlanError, match="shape mismatch"):
            mill.export(base, adapter)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Mixed, config()))
    tuner, settings = adapter.config.tuner, adapter.config.settings
    said = {m.module: tuner.describe(m, settings) for m in adapter.modules}
    assert said["lin0"] == {"shape": [41, 1], "dtype": "F32", "multiplies": "outputs"}
    assert said["conv1"] == {"shape": [1, 6, 1, 1], "dtype": "F32", "multiplies": "inputs"}


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
