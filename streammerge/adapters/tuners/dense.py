"""What kinds of adapters for linear layers share: checks, and a look at all of a weight."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    import torch

    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer

__all__ = ["check_rank", "linear_size", "svd_bytes", "whole_in"]


def linear_size(layer: Layer, *, allows_conv1d: bool = False) -> tuple[int, int]:
    """Return N and K of a linear layer.

    Args:
        layer: The layer.
        allows_conv1d: Whether its weight may be stored (K, N).

    Raises:
        PlanError: It is another layer, for which PEFT has no adapter of the kind.
    """
    weight = layer.parameters.get("weight")
    if weight is None or len(weight.shape) != 2 or (layer.is_transposed and not allows_conv1d):
        found = next(iter(layer.parameters.values()), None)
        name = "nothing" if found is None else f"'{found.name}' {found.shape}"
        raise PlanError(
            "this kind of adapter is for linear layers",
            where=layer.module.where,
            expected="a weight of two dimensions, stored (out_features, in_features)",
            got=f"{name} of a Conv1D" if layer.is_transposed else name,
            hint="give the base that the adapter was trained on",
        )
    return layer.out_features, layer.in_features


def check_rank(module: AdapterModule, got: int, *, expected: int) -> None:
    """Check the rank of a module's tensors.

    Raises:
        AdapterError: It is not that of adapter_config.json.
    """
    if got != expected:
        raise AdapterError(
            "rank of the tensors and of adapter_config.json disagree",
            where=module.where,
            expected=f"r = {expected}",
            got=f"r = {got}",
            hint="adapter_config.json belongs to another adapter?",
        )


def whole_in(dtype: torch.dtype, weight: Weight) -> torch.Tensor:
    """Return a whole weight as a new matrix of `shape[0]` rows in a dtype, and no copy besides."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    result = torch.empty((weight.shape[0], prod(weight.shape[1:])), dtype=dtype)
    for begin, rows in weight.tiles():
        result[begin : begin + len(rows)] = rows
    return result


def svd_bytes(rows: int, columns: int) -> int:
    """Return what the reduced singular value decomposition of a float32 matrix holds at its peak.

    That is the matrix, LAPACK's copy of it, both matrices of vectors and their copies in the order
    of rows, and the work space of gesdd.
    """
    least = min(rows, columns)
    floats = 2 * rows * columns + 2 * (rows + columns) * least + 8 * least * least
    return 4 * floats + 64 * (rows + columns)
