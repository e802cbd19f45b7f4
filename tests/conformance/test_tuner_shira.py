"""SHiRA and Super-Tuning against PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import ShiraConfig, SupertuningConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

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


class Distinct(nn.Module):
    """A model without two entries of the same magnitude, whatever the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(9, 14)
        order = torch.randperm(self.lin0.weight.numel())
        signs = torch.where(order % 3 == 0, -1.0, 1.0)
        self.lin0.weight.data = (signs * (order + 1) / 64).view_as(self.lin0.weight)


def shira(rank: int = 3, seed: int = 5) -> ShiraConfig:
    return ShiraConfig(r=rank, target_modules=TARGETS, random_seed=seed)


def supertuning(**options: Any) -> SupertuningConfig:
    return SupertuningConfig(**{"target_modules": TARGETS, "sparsity": 0.9, **options})


def rewrite(adapter: Path, **changes: Any) -> None:
    """Change tensors of an adapter by the ends of their names; None takes one away."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for end, change in changes.items():
        for name in [name for name in tensors if name.endswith(end)]:
            tensor = tensors.pop(name)
            if change is not None:
                tensors[name] = change(tensor).contiguous()
    save_file(tensors, path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shira(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, shira(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [None, 3])
def test_supertuning(dtype: torch.dtype, rank: int | None, mill: Any) -> None:
    mill.check(Mlp, supertuning(r=rank), dtype)


def test_supertuning_options(mill: Any) -> None:
    mill.check(Mlp, supertuning(r=4, lora_alpha=3.0, select_top=False, sparsity=0.55), torch.half)


@pytest.mark.usefixtures("tiny_tiles")
def test_tiny_tiles(mill: Any) -> None:
    mill.check(Mlp, shira(), torch.bfloat16, threads=3)
    mill.check(Mlp, supertuning(r=3), torch.bfloat16, threads=3)


def test_in_turn(mill: Any) -> None:
    mill.check_in_turn(Mlp, torch.bfloat16, shira(), supertuning(r=2), shira(seed=6))


def test_positions_written_on_windows(mill: Any, same_bits: Any) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    adapter = mill.adapter(Mlp, shira())
    expected = mill.peft(Mlp, torch.bfloat16, adapter)
    rewrite(adapter, shira_indices=lambda tensor: tensor.float())
    same_bits(mill.export(base, adapter), expected)


@pytest.mark.parametrize("select_top", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions_that_are_found_again(dtype: torch.dtype, select_top: bool, mill: Any) -> None:
    config = supertuning(
        target_modules=["lin0"], save_precomputed_indices=False, select_top=select_top
    )
    mill.check(Distinct, config, dtype)


def test_equal_magnitudes_leave_positions_open(mill: Any, same_bits: Any) -> None:
    config = supertuning(save_precomputed_indices=False, sparsity=0.3)
    base = mill.base(Mlp, torch.bfloat16)
    adapter = mill.adapter(Mlp, config, dtype=torch.bfloat16)
    with pytest.raises(AdapterError, match="equal magnitude"):
        mill.export(base, adapter)
    expected = mill.peft(Mlp, torch.bfloat16, adapter)
    same_bits(mill.export(base, adapter, peft_bugs="reproduce"), expected)


def test_a_tie_at_the_edge_of_the_selection(mill: Any) -> None:
    class Edge(Distinct):
        def __init__(self) -> None:
            super().__init__()
            # twelve of 126 entries are taken: the smallest of them gets a twin among the others
            magnitudes = self.lin0.weight.data.abs()
            last = magnitudes.flatten().sort(descending=True).values[11]
            self.lin0.weight.data[magnitudes == magnitudes.min()] = -last

    config = supertuning(target_modules=["lin0"], save_precomputed_indices=False)
    base = mill.base(Edge, torch.float32)
    with pytest.raises(AdapterError, match="equal magnitude"):
        mill.export(base, mill.adapter(Edge, config))


def test_weighted_sum(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    first = mill.adapter(Mlp, shira(), name="first")
    second = mill.adapter(Mlp, supertuning(r=2), name="second")
    merged = mill.export(base, first, second, adapter_weights=[0.5, -2.0])
    start = load_file(base / "model.safetensors")
    parts = [mill.peft(Mlp, torch.float32, path) for path in (first, second)]
    for name, before in start.items():
        wanted = before + 0.5 * (parts[0][name] - before) - 2.0 * (parts[1][name] - before)
        torch.testing.assert_close(merged[name], wanted, rtol=0, atol=1e-6)
    recomputed = mill.adapter(Mlp, supertuning(save_precomputed_indices=False), name="third")
    with pytest.raises(PlanError, match="adapter_weights"):
        mill.export(base, first, recomputed, adapter_weights=[0.5, 0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shira_indices": lambda t: t[:, 1:]}, "do not belong together"),
        ({"shira_indices": lambda t: t + 40}, "outside of the weight"),
        ({"shira_indices": lambda t: t - 40}, "outside of the weight"),
        ({"shira_indices": lambda t: t[:, :1].expand(t.shape)}, "names an entry twice"),
        ({"shira_indices": None}, "no shira_indices"),
        ({"shira_weight": None}, "no shira_weight"),
        (
            {"shira_weight": lambda t: t[:64], "shira_indices": lambda t: t[:, :64]},
            "shape mismatch",
        ),
    ],
)
def test_damaged_shira_adapters(change: dict[str, Any], message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, shira())
    rewrite(adapter, **change)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)
    assert not (mill.folder / "merged").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"supertuning_indices": lambda t: t[1:]}, "do not belong together"),
        ({"supertuning_indices": lambda t: t + 900}, "outside of the weight"),
        ({"supertuning_values": None}, "no supertuning_values"),
        ({"lora_A.weight": None}, "no supertuning_lora_A"),
        ({"lora_A.weight": lambda t: t[1:], "lora_B.weight": lambda t: t[:, 1:]}, "rank"),
        ({"lora_B.weight": lambda t: t[1:]}, "unexpected shape"),
        (
            {"supertuning_values": lambda t: t[1:], "supertuning_indices": lambda t: t[1:]},
            "shape mismatch",
        ),
    ],
)
def test_damaged_supertuning_adapters(change: dict[str, Any], message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, supertuning(r=3))
    rewrite(adapter, **change)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


def test_another_base(mill: Any) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = nn.Linear(24, 41)
            self.lin1 = nn.Linear(41, 24, bias=False)

    base = mill.base(Other, torch.float32)
    for config in (shira(), supertuning()):
        with pytest.raises(PlanError, match="shape mismatch"):
            mill.export(base, mill.adapter(Mlp, config))


def test_conv1d_is_refused(mill: Any) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = Conv1D(41, 23)
            self.lin1 = Conv1D(23, 41)

    base = mill.base(Turned, torch.float32)
    adapter = mill.adapter(Mlp, shira())
    config = adapter / "adapter_config.json"
    config.write_text(
        config.read_text().replace('"fan_in_fan_out": false', '"fan_in_fan_out": true')
    )
    with pytest.raises(PlanError, match="linear layers"):
        mill.export(base, adapter)


def test_description(mill: Any) -> None:
    wanted: list[tuple[Any, dict[str, Any]]] = [
        (shira(), {"entries": 192, "dtype": "F32"}),
        (supertuning(), {"entries": 94, "dtype": "F32"}),
        (supertuning(r=4), {"entries": 94, "dtype": "F32", "rank": 4, "scaling": 2.0}),
    ]
    for config, description in wanted:
        adapter = open_adapter(mill.adapter(Mlp, config))
        for module in adapter.modules:
            found = adapter.config.tuner.describe(module, adapter.config.settings)
            assert found == description
