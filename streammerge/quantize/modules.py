"""Linears as transformers has them: `Linear`, and `Conv1D`, which keeps its weight transposed."""

from __future__ import annotations

import torch

__all__ = ["is_conv1d", "is_linear", "weight_matrix"]


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, as in GPT-2."""
    # by name: the class is not worth two seconds of import
    return type(module).__name__ == "Conv1D"


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module multiplies by a matrix, and does no more than add a bias."""
    return isinstance(module, torch.nn.Linear) or is_conv1d(module)


def weight_matrix(module: torch.nn.Module) -> torch.Tensor:
    """Return the weight of a linear as (N, K); what is written to it is written to the module."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.data.T if is_conv1d(module) else weight.data
