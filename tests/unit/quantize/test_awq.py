"""AWQ's searches, and the scales that move from one operation of a layer to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from streammerge.errors import QuantizationError
from streammerge.quantize.awq import Moments, find_scales, quantize_awq
from streammerge.quantize.gptq import relative_error
from streammerge.quantize.linear import Grid
from streammerge.quantize.pack import pack_awq, unpack_awq
from streammerge.quantize.rtn import quantize_rtn
from streammerge.quantize.scaling import find_previous, takes_scales

if TYPE_CHECKING:
    from collections.abc import Callable

GRID = Grid(4, is_symmetric=False)
HIDDEN, INNER = 32, 48


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(tokens: int = 300, features: int = 64) -> torch.Tensor:
    """Inputs of which a few are far greater than the rest."""
    inputs = normal(tokens, features, seed=1)
    inputs[:, ::13] *= 30
    return inputs


def moments_of(inputs: torch.Tensor) -> Moments:
    moments = Moments(inputs.shape[-1])
    for part in inputs.split(100):
        moments.add(part)
    return moments


def test_moments_are_those_of_all_inputs() -> None:
    inputs = uneven()
    moments = moments_of(inputs)
    assert torch.allclose(moments.hessian, 2 / 300 * inputs.T @ inputs, rtol=1e-4, atol=1e-4)
    assert torch.allclose(moments.magnitude, inputs.abs().mean(dim=0))


def test_scales_and_clipping_each_lose_less_than_rounding() -> None:
    weight, moments = normal(40, 64), moments_of(uneven())
    rounded = quantize_rtn(weight, GRID, 32)
    scales = find_scales([weight], moments, GRID, 32)
    ones = torch.ones(64)
    clipped = quantize_awq(weight, ones, moments.hessian, GRID, 32)
    both = quantize_awq(weight, scales, moments.hessian, GRID, 32)
    before = relative_error(weight, rounded, moments.hessian)
    assert clipped.relative_error < 0.95 * before
    assert both.relative_error < 0.6 * before
    assert both.relative_error < clipped.relative_error
    assert scales[0] > 1.5 * scales[1]


def test_error_is_that_of_the_outputs() -> None:
    weight, inputs = normal(24, 64), uneven()
    moments = moments_of(inputs)
    scales = find_scales([weight], moments, GRID, 32)
    found = quantize_awq(weight, scales, moments.hessian, GRID, 32)
    right = inputs @ weight.T
    got = (inputs / scales) @ found.dequantize().T
    lost = (got - right).square().sum() / right.square().sum()
    assert found.relative_error == pytest.approx(float(lost), rel=1e-3)


def test_rows_never_lose_by_clipping() -> None:
    # inputs that go together: groups judged alone would be judged wrong
    inputs = normal(300, 1, seed=2) + 0.05 * normal(300, 64, seed=3)
    weight, moments = normal(40, 64), moments_of(inputs)
    found = quantize_awq(weight, torch.ones(64), moments.hessian, GRID, 16).dequantize()
    plain = quantize_rtn(weight, GRID, 16).dequantize()

    def errors(values: torch.Tensor) -> torch.Tensor:
        lost = values - weight
        return ((lost @ moments.hessian) * lost).sum(dim=1)

    assert bool((errors(found) <= errors(plain) * (1 + 1e-4)).all())
    assert not torch.equal(found, plain)


def test_even_inputs_of_rounded_weights_need_no_scales() -> None:
    codes = torch.randint(0, 16, (8, 32), generator=torch.Generator().manual_seed(0)).float()
    codes[:, 0], codes[:, 1] = 0, 15
    weight = (codes - 8) / 8
    moments = moments_of(normal(200, 32))
    scales = find_scales([weight], moments, GRID, 32)
    assert torch.equal(scales, torch.ones(32))
    found = quantize_awq(weight, scales, moments.hessian, GRID, 32)
    assert torch.equal(found.dequantize(), weight)
    assert found.relative_error == 0


def test_inputs_that_are_always_zero_keep_scales_finite() -> None:
    inputs = uneven()
    inputs[:, 5] = 0
    moments = moments_of(inputs)
    scales = find_scales([normal(8, 64)], moments, GRID, 32)
    assert bool(torch.isfinite(scales).all())
    assert bool((scales > 0).all())
    nothing = find_scales([normal(8, 64)], moments_of(torch.zeros(10, 64)), GRID, 32)
    assert torch.equal(nothing, torch.ones(64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weight_stays_and_packing_gives_the_same_back(dtype: torch.dtype) -> None:
    weight = normal(16, 64).to(dtype)
    before, moments = weight.clone(), moments_of(uneven())
    scales = find_scales([weight], moments, GRID, -1)
    found = quantize_awq(weight, scales, moments.hessian, GRID, -1)
    assert torch.equal(weight, before)
    back = unpack_awq(pack_awq(found), group_size=-1)
    assert torch.equal(back.codes, found.codes)
    assert torch.equal(back.scales, found.scales)
    assert torch.equal(back.zeros, found.zeros)


def test_broken_inputs_and_weights_are_refused() -> None:
    inputs = uneven()
    inputs[3, 3] = float("nan")
    with pytest.raises(QuantizationError, match=r"inputs of 'q' that are NaN"):
        find_scales([normal(8, 64)], moments_of(inputs), GRID, 32, name="q")
    weight = normal(8, 64)
    weight[1, 1] = float("inf")
    with pytest.raises(QuantizationError, match=r"'q' holds NaN"):
        quantize_awq(weight, torch.ones(64), torch.eye(64), GRID, 32, name="q")


class Attention(nn.Module):
    """Every query sees its own value only."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN)
        self.v_proj = nn.Linear(HIDDEN, values)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN)
        self.repeats = HIDDEN // values

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        values = self.v_proj(states).repeat_interleave(self.repeats, dim=-1)
        output: torch.Tensor = self.o_proj(
            self.q_proj(states).mean(-1, keepdim=True).tanh() * values
        )
        return output


class Mlp(nn.Module):
    def __init__(self, *, is_fused: bool = False, has_router: bool = False) -> None:
        super().__init__()
        if is_fused:
            self.gate_up_proj = nn.Linear(HIDDEN, 2 * INNER)
        else:
            self.gate_proj = nn.Linear(HIDDEN, INNER)
            self.up_proj = nn.Linear(HIDDEN, INNER)
        self.down_proj = nn.Linear(INNER, HIDDEN)
        self.router = nn.Linear(HIDDEN, 1) if has_router else None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "gate_up_proj"):
            gate, up = self.gate_up_proj(states).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(states), self.up_proj(states)
        output: torch.Tensor = self.down_proj(nn.functional.silu(gate) * up)
        return output if self.router is None else output * self.router(states).sigmoid()


class Layer(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], values: int = HIDDEN, **mlp: bool) -> None:
        super().__init__()
        self.input_layernorm = norm(HIDDEN)
        self.self_attn = Attention(values)
        self.post_attention_layernorm = norm(HIDDEN)
        self.mlp = Mlp(**mlp)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states + self.self_attn(self.input_layernorm(states))
        output: torch.Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return output


def build(norm: Any = LlamaRMSNorm, **options: Any) -> Layer:
    torch.manual_seed(3)
    layer = Layer(norm, **options).requires_grad_(requires_grad=False)
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(0.1 * normal(len(parameter), seed=len(name)) + 0.5)
    return layer


ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]
GATES = ["mlp.gate_proj", "mlp.up_proj"]
STATES = normal(1, 20, HIDDEN, seed=9)


def chosen(layer: Layer, group: list[str]) -> Any:
    """Return the operation that takes a group's scales, after trying that the trial is undone."""
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    linears = [layer.get_submodule(path) for path in group]
    found = [
        previous
        for previous in find_previous(layer, group)
        if takes_scales(previous, linears, lambda: (STATES, layer(STATES)))
    ]
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    return found[0] if found else None


@pytest.mark.parametrize("norm", [LlamaRMSNorm, Gemma2RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize(
    ("group", "path"),
    [
        (ATTENTION, "input_layernorm"),
        (GATES, "post_attention_layernorm"),
        (["self_attn.o_proj"], "self_attn.v_proj"),
        (["mlp.down_proj"], "mlp.up_proj"),
    ],
)
def test_scales_move_and_the_layer_computes_the_same(
    norm: Any, group: list[str], path: str
) -> None:
    layer = build(norm)
    previous = chosen(layer, group)
    assert previous.path == path
    assert previous.offset == (1.0 if norm is Gemma2RMSNorm and not previous.is_linear else 0.0)
    check_division(layer, group, previous, torch.float32)


@pytest.mark.parametrize("norm", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("group", [ATTENTION, GATES])
def test_linears_make_up_for_the_rounding_of_a_norm(norm: Any, group: list[str]) -> None:
    layer = build(norm)
    check_division(layer, group, chosen(layer, group), torch.bfloat16)


def check_division(layer: Layer, group: list[str], previous: Any, dtype: torch.dtype) -> None:
    before = layer(STATES)
    weights = [layer.get_parameter(f"{linear}.weight") for linear in group]
    factors = normal(weights[0].shape[1], seed=4).exp()
    applied = previous.divide(factors, lambda _: dtype)
    for weight in weights:
        weight.mul_(applied)
    assert torch.allclose(layer(STATES), before, rtol=1e-5, atol=2e-6)
    assert torch.allclose(applied, factors, rtol=1e-6 if dtype == torch.float32 else 0.02)
    stored = previous.module.weight
    assert torch.equal(stored.to(dtype).float(), stored)


def test_half_of_a_fused_linear_takes_the_scales() -> None:
    layer = build(is_fused=True)
    previous = chosen(layer, ["mlp.down_proj"])
    assert (previous.path, previous.rows) == ("mlp.gate_up_proj", slice(INNER, 2 * INNER))
    assert chosen(layer, ["mlp.gate_up_proj"]).path == "post_attention_layernorm"


def test_nothing_takes_scales_where_the_function_would_change() -> None:
    assert chosen(build(values=HIDDEN // 2), ["self_attn.o_proj"]) is None
    # the norm feeds a router too
    layer = build(has_router=True)
    assert find_previous(layer, GATES)
    assert chosen(layer, GATES) is None
    # and q_proj, when only v_proj is in the group
    assert chosen(layer, ["self_attn.v_proj"]) is None
    assert chosen(layer, ["mlp.router"]) is None


def test_an_input_that_a_norm_stops_is_left_alone() -> None:
    layer = build()
    layer.get_parameter("input_layernorm.weight")[3] = 0
    previous = find_previous(layer, ATTENTION)[0]
    applied = previous.divide(torch.full((HIDDEN,), 3.0), lambda _: torch.float16)
    assert applied[3] == 1
    assert bool(torch.isfinite(applied).all())
