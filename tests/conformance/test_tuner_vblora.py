"""VB-LoRA against PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import VBLoRAConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.adapter import open_adapter
from streammerge.errors import AdapterError, PlanError

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(24, 39)
        self.lin1 = nn.Linear(51, 3, bias=False)
        self.conv0 = Conv1D(33, 27)
        self.conv1 = Conv1D(3, 30)


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv1D(24, 24)


class Wider(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(27, 39)


def config(**options: Any) -> VBLoRAConfig:
    plain = {
        "r": 4,
        "num_vectors": 17,
        "vector_length": 3,
        "target_modules": ["lin0", "lin1", "conv0", "conv1"],
        "init_vector_bank_bound": 0.5,
    }
    return VBLoRAConfig(**{**plain, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits(dtype: torch.dtype, mill: Any, tiny_tiles: None) -> None:
    mill.check(Net, config(), dtype)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_places_and_weights(dtype: torch.dtype, mill: Any, tiny_tiles: None) -> None:
    mill.check(Net, config(save_only_topk_weights=True), dtype)


@pytest.mark.parametrize("is_short", [False, True])
def test_sizes_and_options(is_short: bool, mill: Any) -> None:
    for options in (
        {"topk": 1},
        {"topk": 3, "r": 1},
        {"topk": 17, "vector_length": 1},
        # in one byte no more
        {"topk": 5, "num_vectors": 300, "bias": "vblora_only"},
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    ):
        mill.check(Net, config(**options, save_only_topk_weights=is_short), torch.bfloat16)
    square = {"vector_length": 4, "target_modules": ["conv"], "save_only_topk_weights": is_short}
    mill.check(Square, config(**square), torch.bfloat16)


def test_logits_that_tie(mill: Any) -> None:
    def change(key: str, parameter: nn.Parameter) -> None:
        noise = torch.randn(parameter.shape)
        parameter.copy_((2 * noise).round() / 2 if "logits" in key else noise)

    for options in ({"topk": 3}, {"topk": 4, "save_only_topk_weights": True}):
        mill.check(Net, config(**options), torch.float32, change=change)


def test_two_adapters_in_turn(mill: Any) -> None:
    short = {"save_only_topk_weights": True, "target_modules": ["lin0", "conv1"]}
    mill.check_in_turn(Net, torch.bfloat16, config(), config(**short), config(topk=4))


def test_an_adapter_of_float32_on_a_base_of_float64(mill: Any, same_bits: Any) -> None:
    base = mill.base(Net, torch.float64)
    adapter = mill.adapter(Net, config(save_only_topk_weights=True))
    same_bits(mill.export(base, adapter), mill.peft(Net, torch.float64, adapter))
    # PEFT cannot load what it saves then
    wide = mill.adapter(Net, config(save_only_topk_weights=True), dtype=torch.float64, name="wide")
    with pytest.raises(RuntimeError, match="dtype"):
        mill.peft(Net, torch.float64, wide)
    plain = mill.adapter(Net, config(), dtype=torch.float64, name="dewi")
    merged, expected = mill.export(base, wide), mill.export(base, plain)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-14)


def test_a_last_weight_below_zero_is_zero(mill: Any) -> None:
    base = mill.base(Net, torch.float32)
    options = {"target_modules": ["lin0"], "save_only_topk_weights": True, "topk": 3}
    adapter = mill.adapter(Net, config(**options))
    # two of three weights, which are more than one together
    weights = torch.tensor([0.7, 0.3]).nextafter(torch.tensor(1.0))
    mill.rewrite(adapter, "_topk_weights", weights.expand_as)
    assert mill.peft(Net, torch.float32, adapter)["lin0.weight"].isnan().all()
    tensors = load_file(adapter / "adapter_model.safetensors")
    bank = tensors["base_model.vblora_vector_bank"]
    pieces = [
        0.7 * bank[places[..., 0].long()] + 0.3 * bank[places[..., 1].long()]
        for places in (
            tensors[f"base_model.model.lin0.vblora_logits_{end}_topk_indices"] for end in "AB"
        )
    ]
    delta = pieces[1].transpose(1, 2).reshape(39, 4) @ pieces[0].reshape(4, 24)
    expected = load_file(base / "model.safetensors")["lin0.weight"] + delta
    merged = mill.export(base, adapter)["lin0.weight"]
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


def test_weighted_sum(mill: Any) -> None:
    base = mill.base(Net, torch.float64)
    adapters = [mill.adapter(Net, config(topk=top), name=f"top{top}") for top in (2, 3)]
    plain = load_file(base / "model.safetensors")
    apart = [mill.export(base, adapter) for adapter in adapters]
    merged = mill.export(base, *adapters, adapter_weights=[0.5, -2.0])
    for name in ("lin0.weight", "conv0.weight"):
        one, two = (alone[name] - plain[name] for alone in apart)
        expected = plain[name] + 0.5 * one - 2.0 * two
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-12)


def test_another_base(mill: Any) -> None:
    adapter = mill.adapter(Net, config(target_modules=["lin0"]))
    with pytest.raises(PlanError, match="another base"):
        mill.export(mill.base(Wider, torch.float32), adapter)


def test_places_out_of_range(mill: Any) -> None:
    base = mill.base(Net, torch.float32)
    adapter = mill.adapter(Net, config(save_only_topk_weights=True))
    mill.rewrite(adapter, "lin0.vblora_logits_B_topk_indices", lambda tensor: tensor + 17)
    with pytest.raises(AdapterError, match="out of range"):
        mill.export(base, adapter)
    assert not (mill.folder / "merged").exists()


def test_damaged_adapters(mill: Any, edit_config: Any) -> None:
    base = mill.base(Net, torch.float32)
    adapter = mill.adapter(Net, config())
    edit_config(adapter, topk=18)
    with pytest.raises(AdapterError, match="at most num_vectors, 17"):
        open_adapter(adapter)
    edit_config(adapter, topk=2, r=3)
    with pytest.raises(AdapterError, match="rank of the tensors"):
        open_adapter(adapter)
    edit_config(adapter, r=4, num_vectors=18)
    with pytest.raises(AdapterError, match="unexpected shape"):
        open_adapter(adapter)
    edit_config(adapter, num_vectors=17)
    mill.rewrite(adapter, "vector_bank", lambda tensor: tensor[:, :-1])
    with pytest.raises(AdapterError, match="unexpected shape"):
        mill.export(base, adapter)
    mill.rewrite(adapter, "vector_bank", None)
    with pytest.raises(AdapterError, match="adapter has no vblora_vector_bank"):
        mill.export(base, adapter)
    mill.rewrite(adapter, "lin0.vblora_logits_B", lambda tensor: tensor[0])
    with pytest.raises(AdapterError, match="no logits"):
        open_adapter(adapter)
    mill.rewrite(adapter, "lin0.vblora_logits_B", None)
    with pytest.raises(AdapterError, match="module has no vblora_logits_B"):
        open_adapter(adapter)


def test_damaged_short_adapters(mill: Any, edit_config: Any) -> None:
    adapter = mill.adapter(Net, config(save_only_topk_weights=True, target_modules=["lin0"]))
    edit_config(adapter, topk=3)
    with pytest.raises(AdapterError, match="unexpected shape"):
        open_adapter(adapter)
    edit_config(adapter, topk=2)
    mill.rewrite(adapter, "A_topk_weights", None)
    with pytest.raises(AdapterError, match="module has no vblora_logits_A_topk_weights"):
        open_adapter(adapter)
    path = adapter / "adapter_model.safetensors"
    name = "base_model.model.lin0.vblora_logits_A"
    save_file({**load_file(path), name: torch.zeros(4, 8, 17)}, path)
    with pytest.raises(AdapterError, match="vblora_logits_A in two forms"):
        open_adapter(adapter)


def test_description(mill: Any) -> None:
    for is_short in (False, True):
        options = {"target_modules": ["lin0"], "save_only_topk_weights": is_short}
        adapter = open_adapter(mill.adapter(Net, config(**options)))
        (module,) = adapter.modules
        described = adapter.config.tuner.describe(module, adapter.config.settings)
        assert described == {"rank": 4, "topk": 2, "shape": [39, 24], "dtype": "F32"}
