"""Where a layer's inputs can be scaled without changing what the layer computes.

A linear with the weight W (N, K) gives the same outputs if its inputs are divided by s (K,) and its
weight's columns are multiplied by it: `(x / s) (W s)^T = x W^T`. The division costs nothing where
an operation before it can take it: a norm in its weight, a linear in the rows of its own.

`PREVIOUS` tells which operation may come before which linear, by the names that model families give
their modules. Names promise nothing (a norm may feed a router too, two norms may have swapped
names), so that `takes_scales` tries each candidate on the layer itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from streammerge.quantize.modules import is_linear, weight_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Previous", "find_previous", "takes_scales"]

Part = Literal["all", "half", "third"]
"""Which of the outputs are the inputs: all, the second half, the last third."""

# factors of the trial: powers of two, so that hardly anything is rounded
_TRIAL = (0.5, 1.0, 2.0)
# a wrong operation changes by far more of what the layer adds to the states; a right one changes by
# roundings, which go by the states too
_OF_ADDED, _OF_STATES = 1e-4, 1e-5


@dataclass(frozen=True, slots=True)
class _Place:
    """A name that the operation before a linear may have."""

    name: str
    part: Part = "all"
    is_sibling: bool = False
    """Whether it is a child of the linear's parent instead of the layer."""


_BEFORE_ATTENTION = tuple(
    _Place(name)
    for name in (
        "input_layernorm",  # Llama, Mistral, Qwen, Gemma, Phi-3, GLM, GPT-NeoX, StarCoder2
        "self_attn_layer_norm",  # OPT
        "attention_norm",  # InternLM2
        "norm_attn_norm.norm_1",  # DBRX
        "norm_1",  # MPT
        "ln_attn",  # Falcon with two norms
        "ln_1",  # GPT-2
    )
)
_BEFORE_MLP = tuple(
    _Place(name)
    for name in (
        "pre_feedforward_layernorm",  # Gemma 2 and 3
        "post_attention_layernorm",  # Llama, Mistral, Qwen, Gemma, Phi-3, GLM, GPT-NeoX
        "final_layer_norm",  # OPT
        "ffn_norm",  # InternLM2
        "norm_2",  # MPT
        "ln_mlp",  # Falcon with two norms
        "ln_2",  # GPT-2
    )
)
_BEFORE_OUTPUT = (
    _Place("v_proj", is_sibling=True),
    _Place("qkv_proj", "third", is_sibling=True),
)
_BEFORE_DOWN = (
    _Place("up_proj", is_sibling=True),
    _Place("gate_up_proj", "half", is_sibling=True),
)

PREVIOUS: dict[str, tuple[_Place, ...]] = {
    **dict.fromkeys(
        (
            *("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv", "wqkv"),
            "c_attn",
            *("q_a_proj", "kv_a_proj_with_mqa", "in_proj_qkvz", "in_proj_qkv"),
        ),
        _BEFORE_ATTENTION,
    ),
    **dict.fromkeys(
        ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "w1", "w3"),
        _BEFORE_MLP,
    ),
    "o_proj": _BEFORE_OUTPUT,
    "out_proj": _BEFORE_OUTPUT,
    "down_proj": _BEFORE_DOWN,
    "w2": (_Place("w3", is_sibling=True),),
    # DeepSeek's latent attention has norms between its factors
    "q_b_proj": (_Place("q_a_layernorm", is_sibling=True),),
    "kv_b_proj": (_Place("kv_a_layernorm", is_sibling=True),),
}


@dataclass(frozen=True, slots=True)
class Previous:
    """An operation whose outputs can be divided."""

    path: str
    """Within the layer."""
    module: torch.nn.Module
    rows: slice
    """Which of its outputs are the inputs in question."""
    offset: float = 0.0
    """What a norm adds to its weight."""

    @property
    def is_linear(self) -> bool:
        """Whether its weight is a matrix."""
        return is_linear(self.module)

    def divide(self, factors: torch.Tensor, dtype: Callable[[str], torch.dtype]) -> torch.Tensor:
        """Divide the outputs, within what the stored dtypes can hold.

        Args:
            factors: (K,) float32, positive.
            dtype: Stored dtype of a parameter, by its name in the module; a linear's weight is
                not rounded to it.

        Returns:
            (K,) float32: what the outputs have been divided by indeed. A norm's rounded weight
            decides, so that the linears behind can make up for the rounding.
        """
        if self.is_linear:
            weight_matrix(self.module)[self.rows] /= factors[:, None]
            applied = factors
        else:
            weight = _parameter(self.module, "weight")
            before = weight + self.offset
            rounded = (before / factors - self.offset).to(dtype("weight")).to(weight.dtype)
            applied = before / (rounded + self.offset)
            # nothing comes through, or would: leave it as it is
            is_sound = torch.isfinite(applied) & (applied > 0)
            weight.copy_(torch.where(is_sound, rounded, weight))
            applied = torch.where(is_sound, applied, 1.0)
        if getattr(self.module, "bias", None) is not None:
            bias = _parameter(self.module, "bias")
            bias[self.rows] = (bias[self.rows] / applied).to(dtype("bias")).to(bias.dtype)
        return applied


def find_previous(layer: torch.nn.Module, group: Sequence[str]) -> list[Previous]:
    """Return the operations that may come before linears which share an input, likeliest first.

    Args:
        layer: With its weights.
        group: Paths of the linears within the layer.
    """
    parent, _, name = group[0].rpartition(".")
    features = weight_matrix(layer.get_submodule(group[0])).shape[1]
    modules = dict(layer.named_modules())
    found = []
    for place in PREVIOUS.get(name, ()):
        path = f"{parent}.{place.name}" if place.is_sibling and parent else place.name
        module = modules.get(path)
        if module is None or not isinstance(getattr(module, "weight", None), torch.Tensor):
            continue
        outputs = weight_matrix(module) if is_linear(module) else _parameter(module, "weight")
        rows, width = _rows(len(outputs), place.part)
        if width != features:
            # with grouped queries a value is the input of several heads
            continue
        if is_linear(module):
            found.append(Previous(path, module, rows))
            continue
        offset = _norm_offset(module, features)
        if offset is not None:
            found.append(Previous(path, module, rows, offset))
    return found


def takes_scales(
    previous: Previous,
    linears: Sequence[torch.nn.Module],
    run: Callable[[], tuple[torch.Tensor, torch.Tensor]],
) -> bool:
    """Try whether a layer stays the same when scales move from an operation to linears.

    Args:
        previous: Is as before afterwards.
        linears: Are as before afterwards.
        run: Gives the layer's inputs and outputs, both (..., tokens, hidden).
    """
    weights = [weight_matrix(linear) for linear in linears]
    features = weights[0].shape[1]
    factors = torch.tensor(_TRIAL).repeat(-(-features // len(_TRIAL)))[:features]
    kept = {
        name: _parameter(previous.module, name).clone()
        for name in ("weight", "bias")
        if getattr(previous.module, name, None) is not None
    }
    states, before = run()
    previous.divide(factors, lambda _: torch.float32)
    for weight in weights:
        weight.mul_(factors)
    after = run()[1]
    for weight in weights:
        # by powers of two: the same bits again
        weight.div_(factors)
    for name, values in kept.items():
        _parameter(previous.module, name).copy_(values)
    changed = torch.linalg.vector_norm(after - before, dim=-1)
    added = torch.linalg.vector_norm(before - states, dim=-1)
    allowed = _OF_ADDED * added + _OF_STATES * torch.linalg.vector_norm(states, dim=-1)
    return bool((changed <= allowed).all())


def _parameter(module: torch.nn.Module, name: str) -> torch.Tensor:
    value = getattr(module, name)
    assert isinstance(value, torch.Tensor)
    return value.data


def _rows(count: int, part: Part) -> tuple[slice, int]:
    """Return which outputs a part is, and how many."""
    parts = {"all": 1, "half": 2, "third": 3}[part]
    width = count // parts if count % parts == 0 else 0
    return slice(count - width, count), width


def _norm_offset(module: torch.nn.Module, features: int) -> float | None:
    """Return what a norm adds to its weight; None if it is not known to be a norm."""
    weight = _parameter(module, "weight")
    if weight.shape != (features,):
        return None
    names = [name for name, _ in module.named_parameters()]
    if not set(names) <= {"weight", "bias"}:
        return None
    kept = weight.clone()
    # unlike each other, so that no norm makes them nothing
    probe = torch.arange(1.0, features + 1.0, dtype=weight.dtype)[None, :]
    bias = _parameter(module, "bias") if "bias" in names else 0.0
    try:
        weight.zero_()
        reaches_zero = not bool((module(probe) - bias).any())
        weight.fill_(-1.0)
        is_shifted = not bool((module(probe) - bias).any())
    except (TypeError, RuntimeError):
        # called with more than states: not a plain norm
        return None
    finally:
        weight.copy_(kept)
    if reaches_zero:
        return 0.0
    return 1.0 if is_shifted else None
