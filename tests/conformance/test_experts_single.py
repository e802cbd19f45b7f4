"""Adapters on single experts, as transformers 4 had them, on bases of either kind."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from streammerge.errors import StreamMergeError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

HIDDEN, WIDTH, LAYERS = 32, 20, 2
# where experts are in transformers 4, and what their projections are called: gate, up, down
NAMES = {
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen2_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v3": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "gpt_oss": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "llama4_text": ("feed_forward.experts", ("gate_proj", "up_proj", "down_proj")),
    "granitemoe": ("block_sparse_moe.experts", ("gate_proj", "up_proj", "down_proj")),
}
EXPERTS = {"deepseek_v3": 4}
DENSE = {"deepseek_v3": 1}
CONVERTED = ("mixtral", "qwen3_moe", "deepseek_v3", "olmoe")
Shapes = dict[str, tuple[tuple[int, int], tuple[int, int]]]


def pair(n: int, k: int, rank: int = 2) -> tuple[tuple[int, int], tuple[int, int]]:
    return (rank, k), (n, rank)


def single_experts(family: str, *, width: int = WIDTH, experts: int | None = None) -> Shapes:
    """Return the factors' shapes of an adapter on every projection of every expert."""
    container, (gate, up, down) = NAMES[family]
    shapes: Shapes = {}
    for layer in range(DENSE.get(family, 0), LAYERS):
        for expert in range(experts or EXPERTS.get(family, 3)):
            path = f"model.layers.{layer}.{container}.{expert}"
            shapes[f"{path}.{gate}"] = shapes[f"{path}.{up}"] = pair(width, HIDDEN)
            shapes[f"{path}.{down}"] = pair(HIDDEN, width)
    return shapes


def routers(family: str, *, experts: int | None = None) -> Shapes:
    block = NAMES[family][0].removesuffix(".experts")
    shape = pair(experts or EXPERTS.get(family, 3), HIDDEN)
    return {f"model.layers.{n}.{block}.gate": shape for n in range(DENSE.get(family, 0), LAYERS)}


def targets(family: str) -> list[str]:
    return [*NAMES[family][1], "gate"]


def by_formula(
    tensors: dict[str, torch.Tensor], adapter: Path, scaling: float, *, rounds: bool = False
) -> dict[str, torch.Tensor]:
    """Add `scaling * B @ A` to the weight of each module of an adapter."""
    merged = dict(tensors)
    factors = load_file(adapter / "adapter_model.safetensors")
    for key, a in factors.items():
        if key.endswith("lora_A.weight"):
            b = factors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            delta = (b.float() @ a.float()) * scaling
            delta = delta.to(merged[name].dtype) if rounds else delta
            merged[name] = (merged[name] + delta).to(merged[name].dtype)
    return merged


@pytest.mark.parametrize("family", CONVERTED)
def test_what_peft_converts(family: str, foundry: Any, same_bits: Any, load_folder: Any) -> None:
    base = foundry.base(family, torch.bfloat16)
    shapes = single_experts(family) | routers(family)
    adapter = foundry.by_hand(shapes, target_modules=targets(family))
    merged = foundry.export(base, adapter)
    same_bits(merged, foundry.merged_by_peft(base, adapter))
    before = load_folder(base)
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {f"{module}.weight" for module in shapes}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_dtypes(dtype: torch.dtype, foundry: Any, same_bits: Any) -> None:
    base = foundry.base("mixtral", dtype)
    adapter = foundry.by_hand(single_experts("mixtral"), target_modules=["w1", "w2", "w3"])
    same_bits(foundry.export(base, adapter), foundry.merged_by_peft(base, adapter))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_of_half_precision(dtype: torch.dtype, foundry: Any, same_bits: Any) -> None:
    base = foundry.base("qwen3_moe", torch.bfloat16)
    shapes = single_experts("qwen3_moe")
    adapter = foundry.by_hand(shapes, dtype=dtype, target_modules=targets("qwen3_moe")[:3])
    same_bits(foundry.export(base, adapter), foundry.merged_by_peft(base, adapter))


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_fault_of_rslora_on_gate_and_up(family: str, foundry: Any, same_bits: Any) -> None:
    base = foundry.base(family, torch.bfloat16)
    shapes = single_experts(family)
    adapter = foundry.by_hand(shapes, target_modules=targets(family)[:3], use_rslora=True)
    theirs = foundry.merged_by_peft(base, adapter)
    same_bits(foundry.export(base, adapter, peft_bugs="reproduce"), theirs)
    before = foundry.export(base, name="copy")
    right = by_formula(before, adapter, 3 / 2**0.5, rounds=True)
    merged = foundry.export(base, adapter)
    same_bits(merged, right)
    gates = tuple(f"{name}.weight" for name in NAMES[family][1][:2])
    for name in before:
        is_expert = ".experts." in name
        assert torch.equal(merged[name], theirs[name]) != (is_expert and name.endswith(gates)), name


def test_shared_experts_and_dense_layers_are_merged(
    foundry: Any, same_bits: Any, load_folder: Any
) -> None:
    base = foundry.base("deepseek_v3", torch.bfloat16)
    experts = single_experts("deepseek_v3")
    others: Shapes = {"model.layers.1.self_attn.o_proj": pair(HIDDEN, HIDDEN)}
    for path, width in (("layers.0.mlp", WIDTH), ("layers.1.mlp.shared_experts", WIDTH)):
        others[f"model.{path}.gate_proj"] = others[f"model.{path}.up_proj"] = pair(width, HIDDEN)
        others[f"model.{path}.down_proj"] = pair(HIDDEN, width)
    names = [*targets("deepseek_v3")[:3], "o_proj"]
    adapter = foundry.by_hand(experts | others, target_modules=names)
    merged = foundry.export(base, adapter)
    theirs = foundry.merged_by_peft(base, adapter)
    expected = by_formula(load_folder(base), adapter, 3 / 2)
    dropped = {f"{module}.weight" for module in others if "self_attn" not in module}
    # PEFT leaves out all of these, and says nothing
    assert {name for name in merged if not torch.equal(theirs[name], merged[name])} == dropped
    same_bits({n: merged[n] for n in dropped}, {n: expected[n] for n in dropped})


@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_qwen2_moe_which_peft_ignores(
    layout: str, foundry: Any, same_bits: Any, load_folder: Any
) -> None:
    base = foundry.base("qwen2_moe", torch.bfloat16)
    shapes = single_experts("qwen2_moe") | routers("qwen2_moe")
    path = "model.layers.1.mlp"
    shapes[f"{path}.shared_expert.gate_proj"] = pair(28, HIDDEN)
    shapes[f"{path}.shared_expert_gate"] = pair(1, HIDDEN)
    adapter = foundry.by_hand(shapes, target_modules=targets("qwen2_moe"))
    expected = by_formula(load_folder(base), adapter, 3 / 2)
    if layout == "fused":
        base, expected = foundry.fused(base), fuse(expected, NAMES["qwen2_moe"])
    same_bits(foundry.export(base, adapter), expected)


def fuse(
    tensors: dict[str, torch.Tensor], names: tuple[str, tuple[str, str, str]]
) -> dict[str, torch.Tensor]:
    """Put the tensors of experts together as they are in memory."""
    container, (gate, up, down) = names
    fused = {name: t for name, t in tensors.items() if not re.search(r"experts\.\d", name)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.{container}"
        count = sum(f"{at}.{n}.{gate}.weight" in tensors for n in range(8))
        if count:
            memory = f"model.layers.{layer}.mlp.experts"
            fused[f"{memory}.gate_up_proj"] = torch.stack([
                torch.cat([tensors[f"{at}.{n}.{one}.weight"] for one in (gate, up)])
                for n in range(count)
            ])  # fmt: skip
            fused[f"{memory}.down_proj"] = torch.stack(
                [tensors[f"{at}.{n}.{down}.weight"] for n in range(count)]
            )
    return fused


@pytest.mark.parametrize("family", CONVERTED)
def test_fused_bases(family: str, foundry: Any, same_bits: Any) -> None:
    base = foundry.base(family, torch.bfloat16)
    adapter = foundry.by_hand(
        single_experts(family) | routers(family), target_modules=targets(family)
    )
    expected = foundry.merged_by_peft(base, adapter, fuses=True)
    expected.pop("model.rotary_emb.inv_freq", None)
    same_bits(foundry.export(foundry.fused(base), adapter), expected)


def fused_by_formula(
    tensors: dict[str, torch.Tensor], adapter: Path, family: str, scaling: float
) -> dict[str, torch.Tensor]:
    """Do what `by_formula` does on tensors that are always fused, one rounding for each expert."""
    merged = {name: tensor.clone() for name, tensor in tensors.items()}
    factors = load_file(adapter / "adapter_model.safetensors")
    for key in factors:
        match = re.fullmatch(r"base_model\.model\.(.+)\.(\d+)\.(\w+)\.lora_A\.weight", key)
        if match is None:
            continue
        container, expert, projection = match[1], int(match[2]), match[3]
        a, b = factors[key], factors[key.replace("lora_A", "lora_B")]
        delta = (b @ a) * scaling
        is_down = projection == "down_proj"
        if family == "granitemoe":
            block = container.removesuffix(".experts")
            name = f"{block}.{'output' if is_down else 'input'}_linear.weight"
        else:
            name = f"{container}.{'down_proj' if is_down else 'gate_up_proj'}"
            delta = delta.T
        weight = merged[name][expert]
        half = weight
        if not is_down and family == "gpt_oss":
            half = weight[:, projection == "up_proj" :: 2]
        elif not is_down:
            half = weight.chunk(2, dim=0 if family == "granitemoe" else 1)[projection == "up_proj"]
        half += delta
    return merged


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "granitemoe"])
def test_families_that_are_always_fused(
    family: str, foundry: Any, same_bits: Any, load_folder: Any
) -> None:
    base = foundry.base(family, torch.bfloat16)
    adapter = foundry.by_hand(single_experts(family))
    expected = fused_by_formula(load_folder(base), adapter, family, 3 / 2)
    same_bits(foundry.export(base, adapter), expected)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "granitemoe", "qwen3_moe"])
def test_twice_the_width_is_the_hidden_size(
    family: str, foundry: Any, same_bits: Any, load_folder: Any
) -> None:
    """Sizes do not say which dimension is which: the family does."""
    sizes = {"intermediate_size": 16, "moe_intermediate_size": 16}
    base = foundry.base(family, torch.bfloat16, **sizes)
    adapter = foundry.by_hand(single_experts(family, width=16), target_modules=targets(family)[:3])
    if family == "qwen3_moe":
        expected = foundry.merged_by_peft(base, adapter, fuses=True)
        expected.pop("model.rotary_emb.inv_freq", None)
        base = foundry.fused(base)
    else:
        expected = fused_by_formula(load_folder(base), adapter, family, 3 / 2)
    same_bits(foundry.export(base, adapter), expected)


def test_experts_without_an_adapter_keep_their_bytes(
    foundry: Any, same_bits: Any, load_folder: Any
) -> None:
    base = foundry.fused(foundry.base("mixtral", torch.bfloat16))
    module = "model.layers.0.block_sparse_moe.experts.1.w3"
    adapter = foundry.by_hand({module: pair(WIDTH, HIDDEN)}, target_modules=["w3"])
    before, merged = load_folder(base), foundry.export(base, adapter)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{module}.lora_{end}.weight"] for end in "AB")
    expected = before[name].clone()
    expected[1, WIDTH:] += ((b @ a) * 1.5).bfloat16()
    same_bits(merged, before | {name: expected})
    assert not torch.equal(expected, before[name])


def test_ranks_of_single_experts(foundry: Any, same_bits: Any, load_folder: Any) -> None:
    base = foundry.base("qwen2_moe", torch.bfloat16)
    path = "model.layers.0.mlp.experts"
    shapes = {
        f"{path}.0.gate_proj": pair(WIDTH, HIDDEN, 5),
        f"{path}.1.gate_proj": pair(WIDTH, HIDDEN),
    }
    adapter = foundry.by_hand(
        shapes,
        rank_pattern={"experts.0.gate_proj": 5},
        alpha_pattern={"experts.0.gate_proj": 7.5},
        target_modules=["gate_proj"],
    )
    same_bits(foundry.export(base, adapter), by_formula(load_folder(base), adapter, 1.5))


HAS_BIAS = {"model.layers.0.mlp.experts.1.up_proj.lora_B.bias": torch.ones(WIDTH)}
HAS_NORMS = {"model.layers.0.mlp.experts.1.up_proj.lora_magnitude_vector": torch.ones(WIDTH)}


@pytest.mark.parametrize(
    ("module", "shapes", "config", "more", "message"),
    [
        ("3.up_proj", pair(WIDTH, HIDDEN), {}, {}, "shape mismatch"),
        ("1.up_proj", pair(WIDTH, HIDDEN, 3), {}, {}, "rank"),
        ("1.up_proj", ((2, HIDDEN), (WIDTH, 4)), {}, {}, "rank"),
        ("1.up_proj", pair(WIDTH + 1, HIDDEN), {}, {}, "shape mismatch"),
        ("1.up_proj", pair(HIDDEN, WIDTH), {}, {}, "shape mismatch"),
        ("1.down_proj", pair(WIDTH, WIDTH), {}, {}, "shape mismatch"),
        ("1.other_proj", pair(WIDTH, HIDDEN), {}, {}, "has no base tensor"),
        ("1.up_proj", pair(WIDTH, HIDDEN), {"use_dora": True}, HAS_NORMS, "only plain LoRA"),
        ("1.up_proj", pair(WIDTH, HIDDEN), {"lora_bias": True}, HAS_BIAS, "only plain LoRA"),
        ("1.up_proj", pair(WIDTH, HIDDEN), {"init_lora_weights": "pissa"}, {}, "only plain LoRA"),
    ],
)
def test_what_does_not_fit_a_fused_tensor(
    module: str, shapes: Any, config: Any, more: Any, message: str, foundry: Any
) -> None:
    base = foundry.fused(foundry.base("qwen3_moe", torch.bfloat16))
    path = f"model.layers.0.mlp.experts.{module}"
    adapter = foundry.by_hand({path: shapes}, more=more, target_modules=["up_proj"], **config)
    with pytest.raises(StreamMergeError, match=message) as caught:
        foundry.export(base, adapter)
    assert "model.layers.0.mlp.experts" in str(caught.value)
    assert not (foundry.folder / "merged").exists()


def test_dora_of_experts_that_are_stored_apart(
    foundry: Any, same_bits: Any, load_folder: Any
) -> None:
    base = foundry.base("qwen3_moe", torch.bfloat16)
    module = "model.layers.0.mlp.experts.1.up_proj"
    norms = {f"{module}.lora_magnitude_vector": 1 + torch.rand(WIDTH)}
    adapter = foundry.by_hand(
        {module: pair(WIDTH, HIDDEN)}, more=norms, target_modules=["up_proj"], use_dora=True
    )
    before = load_folder(base)
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{module}.lora_{end}.weight"] for end in "AB")
    summed = before[f"{module}.weight"].float() + (b @ a) * 1.5
    scale = norms[f"{module}.lora_magnitude_vector"] / torch.linalg.norm(summed, dim=1)
    expected = (scale.view(-1, 1) * summed).bfloat16()
    same_bits(foundry.export(base, adapter), before | {f"{module}.weight": expected})
