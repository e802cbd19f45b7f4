"""RoAd against PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import HRAConfig, LoraConfig, RoadConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from streammerge.engine.inspect import inspect_folder
from streammerge.errors import AdapterError, PlanError

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
VARIANTS = ["road_1", "road_2", "road_4"]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 48)
        self.lin1 = nn.Linear(40, 24, bias=False)
        self.tiny = nn.Linear(7, 12)
        self.narrow = nn.Linear(1, 24)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(30, 256)
        self.lin1 = nn.Linear(150, 192)


def road(*targets: str, **options: Any) -> RoadConfig:
    targets = targets or ("lin0", "lin1", "tiny")
    return RoadConfig(**{"group_size": 4, "target_modules": list(targets), **options})


def move(_: str, parameter: nn.Parameter) -> None:
    parameter.add_(0.5 * torch.randn(parameter.shape).to(parameter.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [2, 6, 12])
def test_linear_layers(group: int, variant: str, dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, road(variant=variant, group_size=group), dtype, change=move)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [2, 64])
def test_larger_layers(group: int, dtype: torch.dtype, mill: Any) -> None:
    mill.check(Wide, road("lin0", "lin1", group_size=group), dtype, change=move)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_that_cut_pairs(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Wide, road("lin0", "lin1"), dtype, change=move, threads=3)
    for group in (6, 24):
        config = road("lin0", "lin1", group_size=group, variant="road_2")
        mill.check(Mlp, config, dtype, change=move)


@pytest.mark.parametrize("group", [96, 192])
def test_groups_larger_than_a_tile(group: int, mill: Any, request: pytest.FixtureRequest) -> None:
    base = mill.base(Wide, torch.bfloat16)
    adapter = mill.adapter(Wide, road("lin1", group_size=group, variant="road_4"), change=move)
    expected = mill.peft(Wide, torch.bfloat16, adapter)["lin1.weight"]
    request.getfixturevalue("tiny_tiles")
    for memory in ("3GB", "2GB"):
        merged = mill.export(base, adapter, max_memory=memory, threads=2)["lin1.weight"]
        assert torch.equal(merged, expected)


def test_single_inputs(mill: Any) -> None:
    for dtype in DTYPES:
        mill.check(Mlp, road("narrow"), dtype, change=move)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tiles", ["large", "tiny"])
def test_in_turn(dtype: torch.dtype, tiles: str, mill: Any, request: pytest.FixtureRequest) -> None:
    if tiles == "tiny":
        request.getfixturevalue("tiny_tiles")
    lora = LoraConfig(r=3, target_modules=["lin0", "lin1"], init_lora_weights=False)
    configs = [lora, road(), road("lin0", group_size=24), HRAConfig(r=2, target_modules=["lin0"])]
    mill.check_in_turn(Mlp, dtype, *configs, road("lin0", group_size=8))


@pytest.mark.parametrize("tiles", ["large", "tiny"])
def test_rounded_once(tiles: str, mill: Any, request: pytest.FixtureRequest) -> None:
    if tiles == "tiny":
        request.getfixturevalue("tiny_tiles")
    base = mill.base(Mlp, torch.bfloat16)
    adapters = [
        mill.adapter(Mlp, road("lin0", group_size=24), name=name, change=move)
        for name in ("a", "b")
    ]
    merged = mill.export(base, *adapters, numerics="fp32")
    start = load_file(base / "model.safetensors")
    for name in ("lin0.weight", "lin0.bias"):
        values = start[name].double()
        for adapter in adapters:
            alpha, theta = (
                tensor.double().view(2, 1, 12).repeat(1, 2, 1).view(-1)
                for _, tensor in sorted(load_file(adapter / "adapter_model.safetensors").items())
            )
            turned = values.view(2, 2, 12, -1).flip(1) * torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)
            values = (values.T * (alpha * theta.cos())).T + (
                turned.reshape(values.shape).T * (alpha * theta.sin())
            ).T
        assert torch.equal(merged[name], values.to(torch.bfloat16))


def test_language_model(workshop: Any, same_bits: Any) -> None:
    base = workshop.base("qwen2", torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, road("q_proj", "v_proj", "down_proj", group_size=12))
    for name, parameter in model.named_parameters():
        if "road_" in name:
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    adapter = workshop.folder / "adapter"
    model.save_pretrained(adapter)
    expected, _ = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter), expected)


def test_what_inspect_says(mill: Any) -> None:
    report = inspect_folder(mill.adapter(Mlp, road("lin0", variant="road_2", group_size=8)))
    assert report["variants"] == ["road_2"]
    (module,) = report["modules"]
    assert (module["angles"], module["group_size"]) == (48, 8)


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        ("road_theta", None, "no road_theta"),
        ("road_alpha", None, "no road_alpha"),
        ("road_alpha", lambda tensor: tensor[1:], "do not belong together"),
        ("", lambda tensor: tensor[:, None], "do not belong together"),
        ("", lambda tensor: tensor[:0], "do not belong together"),
        ("", lambda tensor: tensor[2:], "shape mismatch"),
    ],
)
def test_damaged_adapters(end: str, change: Any, message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, road("lin0"))
    mill.rewrite(adapter, end, change)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"variant": "road_2"}, "shape mismatch"),
        ({"variant": "road_3"}, "bad variant"),
        ({"group_size": 3}, "bad group_size"),
        ({"group_size": 0}, "bad group_size"),
        ({"group_size": 10}, "cannot be divided into the groups"),
    ],
)
def test_another_configuration(
    edits: dict[str, Any], message: str, mill: Any, edit_config: Any
) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, road("lin0"))
    edit_config(adapter, **edits)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


@pytest.mark.parametrize("layer", [Conv1D(48, 23), nn.Conv2d(23, 48, 1)], ids=str)
def test_layers_that_peft_has_no_rotation_for(
    layer: nn.Module, mill: Any, edit_config: Any
) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = layer

    adapter = mill.adapter(Mlp, road("lin0"))
    edit_config(adapter, fan_in_fan_out=isinstance(layer, Conv1D))
    with pytest.raises(PlanError, match="for linear layers"):
        mill.export(mill.base(Other, torch.float32), adapter)


def test_no_weighted_sum(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, road("lin0"))
    with pytest.raises(PlanError, match="adapter_weights"):
        mill.export(base, adapter, adapter_weights=[0.5])
