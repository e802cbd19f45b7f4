"""Several adapters combined, against PEFT's add_weighted_adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils import merge_utils
from torch import nn

from streammerge.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WEIGHTS = [0.7, -0.4, 1.3]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(37, 24)
        self.lin0 = nn.Linear(24, 41)
        self.lin1 = nn.Linear(41, 24)


def make(mill: Any, dtype: torch.dtype, **options: Any) -> tuple[Path, list[Path]]:
    """Two adapters on two layers, and one on three."""
    base = mill.base(Net, dtype)
    adapters = []
    for number, targets in enumerate((["lin0", "lin1"], ["lin0", "lin1"], ["emb", "lin0"])):
        config = LoraConfig(
            r=options.get("ranks", [4, 4, 4])[number],
            lora_alpha=[6, 4, 9][number],
            use_rslora=bool(options.get("rslora")) and number == 0,
            target_modules=targets,
        )
        adapters.append(mill.adapter(Net, config, dtype=dtype, name=f"adapter{number}"))
    return base, adapters


def with_peft(
    mill: Any, dtype: torch.dtype, adapters: list[Path], **options: Any
) -> dict[str, torch.Tensor]:
    model: Any = mill.model(Net, dtype)
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
    for number, path in enumerate(adapters[1:], start=1):
        model.load_adapter(path, adapter_name=str(number))
    names = [str(number) for number in range(len(adapters))]
    model.add_weighted_adapter(names, WEIGHTS[: len(adapters)], "sum", **options)
    model.set_adapter("sum")
    merged = model.merge_and_unload(adapter_names=["sum"])
    return {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cat", {}),
        ("linear", {}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.4, "majority_sign_method": "frequency"}),
        ("ties", {"density": 1.0}),
        ("magnitude_prune", {"density": 0.55}),
    ],
)
def test_combinations_have_the_bits_of_peft(
    kind: str, options: dict[str, Any], dtype: torch.dtype, mill: Any, same_bits: Any
) -> None:
    base, adapters = make(mill, dtype)
    expected = with_peft(mill, dtype, adapters, combination_type=kind, **options)
    ours = {"adapter_density": options.get("density")} if "density" in options else {}
    if "majority_sign_method" in options:
        ours["adapter_majority_sign"] = options["majority_sign_method"]
    merged = mill.export(base, *adapters, adapter_weights=WEIGHTS, adapter_combination=kind, **ours)
    same_bits(merged, expected)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_random_pruning_is_what_peft_does_with_the_same_draws(
    kind: str, mill: Any, same_bits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = make(mill, torch.bfloat16)
    draws: list[torch.Tensor] = []
    bernoulli = torch.bernoulli

    def draw(values: torch.Tensor, **options: Any) -> torch.Tensor:
        draws.append(bernoulli(values, **options))
        return draws[-1]

    def replay(tensor: torch.Tensor, density: float, *, rescale: bool) -> torch.Tensor:
        assert rescale
        mask = next(mask for mask in draws if mask.shape == tensor.shape)
        draws[:] = [other for other in draws if other is not mask]
        return tensor * mask / density

    options = {"adapter_combination": kind, "adapter_density": 0.5}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", draw)
        merged = mill.export(base, *adapters, adapter_weights=WEIGHTS, **options)
    # 3 + 2 + 1 pairs of factors
    assert len(draws) == 2 * (3 + 2 + 1)
    again = mill.export(base, *adapters, adapter_weights=WEIGHTS, threads=3, **options)
    same_bits(again, merged)
    other = mill.export(base, *adapters, adapter_weights=WEIGHTS, adapter_seed=1, **options)
    assert not torch.equal(other["lin0.weight"], merged["lin0.weight"])
    with monkeypatch.context() as patch:
        patch.setattr(merge_utils, "random_pruning", replay)
        expected = with_peft(mill, torch.bfloat16, adapters, combination_type=kind, density=0.5)
    # the order of the draws differs between layers of one shape, of which there is none
    same_bits(merged, expected)


def test_cat_takes_any_ranks_and_is_the_sum_of_the_deltas(mill: Any, same_bits: Any) -> None:
    base, adapters = make(mill, torch.float32, ranks=[2, 5, 8])
    expected = with_peft(mill, torch.float32, adapters, combination_type="cat")
    merged = mill.export(base, *adapters, adapter_weights=WEIGHTS, adapter_combination="cat")
    same_bits(merged, expected)
    plain = mill.export(base, *adapters, adapter_weights=WEIGHTS)
    for name, tensor in merged.items():
        torch.testing.assert_close(plain[name], tensor, rtol=1e-5, atol=1e-6)


def test_rslora_of_the_first_adapter_is_not_inherited(mill: Any, same_bits: Any) -> None:
    base, adapters = make(mill, torch.bfloat16, rslora=True)
    wrong = with_peft(mill, torch.bfloat16, adapters, combination_type="cat")
    options = {"adapter_weights": WEIGHTS, "adapter_combination": "cat"}
    right = mill.export(base, *adapters, **options)
    sums = mill.export(base, *adapters, adapter_weights=WEIGHTS, infer_dtype="float32")
    for name, tensor in right.items():
        assert (tensor.float() - sums[name]).abs().max() < 0.02, name
    assert (wrong["lin0.weight"].float() - sums["lin0.weight"]).abs().max() > 0.1
    same_bits(mill.export(base, *adapters, peft_bugs="reproduce", **options), wrong)


def test_one_adapter_is_taken_as_it_is(mill: Any, same_bits: Any) -> None:
    base, adapters = make(mill, torch.bfloat16)
    expected = with_peft(mill, torch.bfloat16, adapters[:1], combination_type="linear")
    merged = mill.export(
        base, adapters[0], adapter_weights=WEIGHTS[:1],
        adapter_combination="ties", adapter_density=0.1,
    )  # fmt: skip
    same_bits(merged, expected)


def test_what_cannot_be_combined_is_refused(mill: Any) -> None:
    base, adapters = make(mill, torch.bfloat16, ranks=[2, 4, 4])
    with pytest.raises(PlanError, match="one rank"):
        mill.export(base, *adapters, adapter_combination="linear")
    dora = mill.adapter(Net, LoraConfig(target_modules=["lin0"], use_dora=True), name="dora")
    with pytest.raises(PlanError, match="plain LoRA"):
        mill.export(base, adapters[0], dora, adapter_combination="cat")
    with pytest.raises(PlanError, match="not a sum"):
        mill.export(base, adapters[0], dora, adapter_weights=[1.0, 1.0])
    with pytest.raises(ConfigError, match="adapter_density"):
        mill.export(base, *adapters, adapter_combination="ties")
    with pytest.raises(ConfigError, match="adapter_density"):
        mill.export(base, *adapters, adapter_combination="cat", adapter_density=0.3)
