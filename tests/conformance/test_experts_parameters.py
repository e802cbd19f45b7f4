"""Adapters on whole expert parameters (`target_parameters`), against PEFT."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from streammerge.config.tuning import ComputeTuning, DiskTuning
from streammerge.engine import machine
from streammerge.errors import StreamMergeError
from streammerge.plan import memory

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "olmoe",
    "granitemoe",
)  # fmt: skip
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
ROUTERS = {"gpt_oss": "router", "llama4_text": "router", "granitemoe": "router"}
SQUARE = {"intermediate_size": 16, "moe_intermediate_size": 16}
KEY = "base_model.model.model.layers.{}.mlp.experts.{}lora_{}.weight"
Tensors = dict[str, torch.Tensor]


def adapt(foundry: Any, base: Path, name: str = "adapter", **options: Any) -> Path:
    options = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": BOTH} | options
    return foundry.adapter(base, name, **options)


def changed(before: Tensors, after: Tensors) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "first", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts(
    family: str, parameters: list[str], foundry: Any, same_bits: Any, load_folder: Any
) -> None:
    base = foundry.base(family, torch.bfloat16)
    adapter = adapt(foundry, base, target_parameters=parameters)
    merged = foundry.export(base, adapter)
    same_bits(merged, foundry.merged_by_peft(base, adapter))
    # the base's own names, of which those of experts changed, and all of them
    ends = {
        "experts.gate_up_proj": (".gate_proj.weight", ".up_proj.weight", ".w1.weight", ".w3.weight",
                                 "gate_up_proj", "input_linear.weight"),
        "experts.down_proj": (".down_proj.weight", ".w2.weight", "down_proj",
                              "output_linear.weight"),
    }  # fmt: skip
    wanted = tuple(end for parameter in parameters for end in ends[parameter])
    experts = {name for name in merged if "experts." in name or "_linear" in name}
    routed = {name for name in experts if "shared" not in name and "bias" not in name}
    assert changed(load_folder(base), merged) == {n for n in routed if n.endswith(wanted)} != set()


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_at_once(family: str, foundry: Any, same_bits: Any, load_folder: Any) -> None:
    """Experts, routers, attention and shared experts, with ranks and alphas of their own."""
    base = foundry.base(family, torch.bfloat16)
    router = f"{ROUTERS.get(family, 'gate')}.weight"
    adapter = adapt(
        foundry,
        base,
        target_modules=r".*\.(o_proj|shared_experts?\.\w+_proj)",
        target_parameters=[*BOTH, router],
        rank_pattern={r".*gate_up_proj": 4, router: 3, "o_proj": 5},
        alpha_pattern={"down_proj": 7, router: 5},
        use_rslora=True,
    )
    merged = foundry.export(base, adapter)
    same_bits(merged, foundry.merged_by_peft(base, adapter))
    names = changed(load_folder(base), merged)
    assert any(name.endswith((router, "router.layer.weight")) for name in names)
    assert any("o_proj" in name for name in names)
    # of the families that PEFT converts it takes shared experts for routed ones, and drops them
    has_shared = family in {"qwen2_moe", "llama4_text"}
    assert has_shared == any("shared_expert" in name for name in names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_dtypes(dtype: torch.dtype, family: str, foundry: Any, same_bits: Any) -> None:
    base = foundry.base(family, dtype)
    adapter = adapt(foundry, base)
    same_bits(foundry.export(base, adapter), foundry.merged_by_peft(base, adapter))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "granitemoe"])
def test_fused_bases(family: str, foundry: Any, same_bits: Any) -> None:
    base = foundry.base(family, torch.bfloat16)
    adapter = adapt(foundry, base, target_modules=["o_proj"], target_parameters=[
        *BOTH, f"{ROUTERS.get(family, 'gate')}.weight",
    ])  # fmt: skip
    expected = foundry.merged_by_peft(base, adapter, fuses=True)
    same_bits(foundry.export(foundry.fused(base), adapter), expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_two_adapters_in_turn(family: str, foundry: Any, same_bits: Any) -> None:
    base = foundry.base(family, torch.bfloat16)
    first = adapt(foundry, base, "first")
    second = adapt(foundry, base, "second", r=3, target_parameters=BOTH[:1])
    expected = foundry.merged_by_peft(base, first, second)
    same_bits(foundry.export(base, first, second), expected)


def test_parts_of_experts_after_whole_ones(foundry: Any, same_bits: Any) -> None:
    """A second adapter on the halves of what the first one changed as a whole, and the reverse."""
    base = foundry.base("mixtral", torch.bfloat16)
    whole = adapt(foundry, base)
    path = "model.layers.{}.block_sparse_moe.experts.{}.{}"
    shapes = {
        path.format(layer, expert, name): ((2, 32), (20, 2)) if name != "w2" else ((2, 20), (32, 2))
        for layer in range(2) for expert in range(3) for name in ("w1", "w2", "w3")
    }  # fmt: skip
    single = foundry.by_hand(shapes, "single", target_modules=["w1", "w2", "w3"])
    fused = foundry.fused(base)
    for adapters in ((whole, single), (single, whole)):
        expected = foundry.merged_by_peft(base, *adapters)
        same_bits(foundry.export(base, *adapters), expected)
        expected = foundry.merged_by_peft(base, *adapters, fuses=True)
        same_bits(foundry.export(fused, *adapters), expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text", "granitemoe"])
def test_bits_do_not_depend_on_memory(
    family: str, foundry: Any, same_bits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = foundry.base(family, torch.bfloat16)
    adapter = adapt(foundry, base)
    expected = foundry.merged_by_peft(base, adapter)
    # blocks of a few rows and products of four
    monkeypatch.setattr(machine, "DiskTuning", functools.partial(DiskTuning, block_bytes=4096))
    tiny = dataclasses.replace(machine.BUFFERED, block_bytes=4096)
    monkeypatch.setattr(machine, "BUFFERED", tiny)
    compute = functools.partial(ComputeTuning, ((1 << 30, 512),))
    monkeypatch.setattr(machine, "ComputeTuning", compute)
    monkeypatch.setattr(memory, "MIN_SLAB_BYTES", 4096)
    for threads in (1, 3):
        same_bits(foundry.export(base, adapter, threads=threads), expected)


def swap(adapter: Path, *, experts: int, rank: int) -> Tensors:
    """Return the factors as PEFT 0.17 and 0.18 wrote them: in and out change places."""
    swapped = {}
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key, a in tensors.items():
        if "lora_A" in key:
            b_key = key.replace("lora_A", "lora_B")
            b = tensors[b_key]
            of_b = b.reshape(len(b), rank, experts).permute(2, 1, 0)
            of_a = a.reshape(experts, rank, -1).permute(2, 1, 0)
            swapped[key] = of_b.reshape(experts * rank, -1).contiguous()
            swapped[b_key] = of_a.reshape(-1, rank * experts).contiguous()
    return swapped


def set_option(adapter: Path, key: str, value: object) -> None:
    path = adapter / "adapter_config.json"
    options = json.loads(path.read_text())
    if value is None:
        options.pop(key, None)
    path.write_text(json.dumps(options if value is None else options | {key: value}))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "llama4_text", "granitemoe"])
def test_layout_before_peft_0_19(family: str, foundry: Any, same_bits: Any) -> None:
    base = foundry.base(family, torch.bfloat16)
    adapter = adapt(foundry, base)
    expected = foundry.merged_by_peft(base, adapter)
    foundry.rewrite(adapter, swap(adapter, experts=3, rank=2))
    # the shapes say it, whatever the version
    for version in ("0.18.1", None, "0.21.2"):
        set_option(adapter, "peft_version", version)
        same_bits(foundry.export(base, adapter), expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_square_matrices(family: str, foundry: Any, same_bits: Any) -> None:
    base = foundry.base(family, torch.bfloat16, **SQUARE)
    adapter = adapt(foundry, base)
    expected = foundry.merged_by_peft(base, adapter)
    same_bits(foundry.export(base, adapter), expected)
    swapped = swap(adapter, experts=3, rank=2)
    # where the family declares in and out, both versions wrote the same
    if family != "gpt_oss":
        foundry.rewrite(adapter, swapped)
    for version in ("0.17.0", "0.18.1", None):
        set_option(adapter, "peft_version", version)
        same_bits(foundry.export(base, adapter), expected)
    set_option(adapter, "peft_version", "0.19.0")
    other = foundry.export(base, adapter)
    same = all(torch.equal(other[name], expected[name]) for name in expected)
    assert same == (family == "gpt_oss")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_columns_as_unsloth_trains_them(family: str, foundry: Any, same_bits: Any) -> None:
    base = foundry.base(family, torch.bfloat16)
    adapter = adapt(foundry, base)
    expected = foundry.merged_by_peft(base, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if "lora_B" in key:
            by_expert = tensor.reshape(len(tensor), 2, 3).transpose(1, 2)
            tensors[key] = by_expert.reshape(len(tensor), 6).contiguous()
    foundry.rewrite(adapter, tensors)
    same_bits(foundry.export(base, adapter, moe_b_layout="unsloth"), expected)
    wrong = foundry.export(base, adapter)
    assert any(not torch.equal(wrong[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_on_attention_leave_experts_alone(
    family: str, foundry: Any, same_bits: Any, load_folder: Any
) -> None:
    base = foundry.base(family, torch.bfloat16)
    for path in (base, foundry.fused(base)):
        adapter = adapt(foundry, base, target_modules=["o_proj"], target_parameters=[])
        merged = foundry.export(path, adapter)
        names = changed(load_folder(path), merged)
        assert names == {f"model.layers.{n}.self_attn.o_proj.weight" for n in range(2)}


def test_one_expert_only(foundry: Any, same_bits: Any) -> None:
    base = foundry.base("qwen2_moe", torch.bfloat16, num_experts=1, num_experts_per_tok=1, **SQUARE)
    adapter = adapt(foundry, base)
    same_bits(foundry.export(base, adapter), foundry.merged_by_peft(base, adapter))


def test_numerics_fp32_is_one_rounding_of_the_sum(foundry: Any, load_folder: Any) -> None:
    base = foundry.base("granitemoe", torch.bfloat16)
    first, second = (adapt(foundry, base, name) for name in ("first", "second"))
    name = "model.layers.1.block_sparse_moe.output_linear.weight"
    total = load_folder(base)[name].double()
    for path in (first, second):
        tensors = load_file(path / "adapter_model.safetensors")
        key = "base_model.model.model.layers.1.block_sparse_moe.experts.lora_{}.weight"
        a = tensors[key.format("A")].double().reshape(3, 2, -1)
        b = tensors[key.format("B")].double().reshape(-1, 2, 3)
        total += 1.5 * torch.einsum("ork,rkd->rod", b.permute(0, 2, 1), a)
    once = foundry.export(base, first, second, numerics="fp32")[name]
    thrice = foundry.export(base, first, second)[name]
    # but for sums so near to zero, or to the middle between two numbers, that F32 rounds otherwise
    assert (once != total.bfloat16()).sum() <= 2
    assert (thrice != total.bfloat16()).sum() > 200


class Bank(torch.nn.Module):
    """Stacks and matrices that are parameters called like a layer's."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(shape))


class Banks(torch.nn.Module):
    """None so small that torch.bmm takes a kernel of its own: R * D1 * D2 is 400 or more."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Bank(5, 9, 12)
        self.square = Bank(2, 16, 16)
        self.alone = Bank(1, 9, 12)
        self.matrix = Bank(7, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_parameters_called_weight(dtype: torch.dtype, mill: Any) -> None:
    config = LoraConfig(
        r=2,
        target_parameters=["stack.weight", "square.weight", "alone.weight", "matrix.weight"],
        rank_pattern={"matrix.weight": 3, "stack.weight": 4},
        alpha_pattern={"alone.weight": 5},
    )
    merged = mill.check(Banks, config, dtype)
    before = mill.model(Banks, dtype).state_dict()
    assert not any(torch.equal(before[name], merged[name]) for name in before)


A, B = (6, 32), (40, 6)
DOWN_A, DOWN_B = (6, 20), (32, 6)
PATH = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize(
    ("shapes", "config", "message"),
    [
        # E, rank, width, and a matrix that is neither way round
        ({"": ((8, 32), (40, 8))}, {"target_parameters": BOTH[:1]}, "do not fit"),
        ({"": (A, B)}, {"target_parameters": BOTH[:1], "r": 3}, "do not fit"),
        ({"": ((6, 32), (40, 4))}, {"target_parameters": BOTH[:1]}, "do not fit"),
        ({"": ((6, 32), (42, 6))}, {"target_parameters": BOTH[:1]}, "do not fit"),
        ({"": ((6, 32), (32, 6))}, {"target_parameters": BOTH[:1]}, "do not fit"),
        # one pair for two parameters, two for one, and in the wrong order
        ({"": (A, B)}, {"target_parameters": BOTH}, "do not fit"),
        ({"base_layer.": (A, B), "": (DOWN_A, DOWN_B)}, {"target_parameters": BOTH[:1]}, "not fit"),
        ({"base_layer.": (DOWN_A, DOWN_B), "": (A, B)}, {"target_parameters": BOTH}, "do not fit"),
        ({"base_layer.": (A, B)}, {"target_parameters": BOTH[:1]}, "do not fit"),
        # nothing says which parameter is meant
        ({"": (A, B)}, {"target_parameters": []}, "has no base tensor"),
        ({"": (A, B)}, {"target_parameters": ["experts.no_such"]}, "has no base tensor"),
        ({"": (A, B)}, {"target_parameters": BOTH[:1], "use_qalora": True}, "only plain LoRA"),
        ({"": (A, B)}, {"target_parameters": BOTH[:1], "init_lora_weights": "pissa"}, "only plain"),
    ],
)
def test_what_does_not_fit(
    layout: str, shapes: Any, config: Any, message: str, foundry: Any
) -> None:
    base = foundry.base("qwen3_moe", torch.bfloat16)
    base = foundry.fused(base) if layout == "fused" else base
    at = {f"{PATH}.{inner}".removesuffix("."): pair for inner, pair in shapes.items()}
    adapter = foundry.by_hand(at, **config)
    with pytest.raises(StreamMergeError, match=message) as caught:
        foundry.export(base, adapter)
    assert "experts" in str(caught.value)
    assert not (foundry.folder / "merged").exists()


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("lora_magnitude_vector", {"use_dora": True}, "only plain LoRA"),
        ("lora_B.bias", {"lora_bias": True}, "only plain LoRA"),
    ],
)
def test_more_than_two_factors(name: str, config: Any, message: str, foundry: Any) -> None:
    base = foundry.base("qwen3_moe", torch.bfloat16)
    more = {f"{PATH}.{name}": torch.ones(40)}
    adapter = foundry.by_hand({PATH: (A, B)}, more=more, target_parameters=BOTH[:1], **config)
    with pytest.raises(StreamMergeError, match=message):
        foundry.export(base, adapter)


def test_parameters_of_one_shape_in_an_unknown_order(foundry: Any) -> None:
    base = foundry.folder / "base"
    base.mkdir()
    weights = {f"model.layers.0.moe.bank.{name}": torch.ones(3, 8, 12) for name in ("one", "two")}
    foundry.save(weights, base)
    shapes = {
        "model.layers.0.moe.bank": ((6, 12), (8, 6)),
        "model.layers.0.moe.bank.base_layer": ((6, 12), (8, 6)),
    }
    adapter = foundry.by_hand(shapes, target_parameters=["bank.one", "bank.two"])
    with pytest.raises(StreamMergeError, match="not clear which"):
        foundry.export(base, adapter)


def test_experts_of_different_shapes(foundry: Any) -> None:
    base = foundry.folder / "base"
    base.mkdir()
    foundry.save({f"{PATH}.{n}.down_proj.weight": torch.ones(32, 20 + n) for n in range(3)}, base)
    adapter = foundry.by_hand({PATH: (DOWN_A, DOWN_B)}, target_parameters=BOTH[1:])
    with pytest.raises(StreamMergeError, match="differ in shape"):
        foundry.export(base, adapter)
