"""HiRA: a weight is multiplied, entry by entry, by one plus a low-rank matrix.

    W + W * (B @ A)        A (R, K), B (N, R); the product is rounded, then W times it, then the sum

For a weight stored (K, N) and for embeddings, A (R, tokens) and B (dim, R), it is the transpose of
`B @ A`; for convolutions A (R, in, window...) and B (N, R, 1...) are convolved, as torch does it
with several threads. There is no scaling.

PEFT takes no notice of rank_pattern when it makes an adapter, so that a file may have either rank;
and it cannot merge a Conv3d whose window is one in its first two dimensions, which is merged here.

Sources: peft.tuners.hira, Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank
Adaptation". Shapes: N out_features, K in_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.options import first_match
from streammerge.adapters.terms import TunerTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import check_rank, linear_size
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "Hira", "HiraTerm"]

# inputs of a convolution from which torch takes the same kernel with one thread as with several
_BATCH = 16


@dataclass(frozen=True, slots=True)
class HiraTerm(TunerTerm):
    """Multiply by one plus `B @ A`."""

    a: StoredTensor
    """(R, K), or (R, in, window...)"""
    b: StoredTensor
    """(N, R), or (N, R, 1...)"""
    is_transposed: bool
    """Whether the weight is stored (K, N)."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """A and B."""
        return (self.a, self.b)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what a convolution takes: its result, and torch's own copies."""
        if len(shape) == 2:
            return 0
        inputs = max(_BATCH, shape[1])
        return 8 * inputs * prod(shape[2:]) * (3 * shape[0] + 3 * self.a.shape[0])

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Convolve the factors of a convolution, which gives a whole matrix; keep others apart."""
        del weight
        a, b = factors
        return (a, b) if a.dim() == 2 else (None, _convolved(a, b))

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Multiply these rows."""
        a, b = state
        end = begin + len(rows)
        if a is None:
            factor = b[begin:end]
        elif self.is_transposed:
            factor = (b @ a[:, begin:end]).T
        else:
            factor = b[begin:end] @ a
        # PEFT adds it to zeros first, which leaves no negative zero
        factor = factor.to(rows.dtype) + 0.0
        return rows.add_(factor.mul_(rows))


@dataclass(frozen=True, slots=True)
class _Settings:
    rank: int
    rank_pattern: dict[str, int]

    def ranks_of(self, module: str) -> set[int]:
        """Return the ranks that a module may have."""
        return {self.rank, first_match(self.rank_pattern, module, self.rank)}


class Hira(Tuner):
    """`peft_type: HIRA`."""

    peft_type = "HIRA"
    title = "HiRA"
    formula = "W + W * (B @ A)"
    factors = frozenset({"hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"})
    options = frozenset({"hira_dropout", "r", "rank_pattern"})

    def read(self, options: Options) -> _Settings:
        """Read the ranks."""
        return _Settings(options.count("r", 32), options.pattern("rank_pattern", whole=True))

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check the factors against each other and against the configuration.

        Raises:
            AdapterError: They do not fit.
        """
        a, b = _pair(module)
        fits = len(a.shape) == len(b.shape) >= 2 and a.shape[0] == b.shape[1]
        if not fits or prod(b.shape[2:]) != 1 or 0 in a.shape + b.shape:
            raise AdapterError(
                "factors of the adapter do not belong together",
                where=module.where,
                got=f"{a.shape} and {b.shape}",
            )
        if a.shape[0] not in settings.ranks_of(module.module):
            check_rank(module, a.shape[0], expected=settings.rank)

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the product."""
        del settings, shared
        module = layer.module
        a, b = _pair(module)
        is_transposed = layer.is_transposed or module.is_embedding
        weight = layer.parameters.get("weight")
        if weight is not None and len(weight.shape) in {3, 4, 5}:
            # a convolution; one with groups has fewer inputs than A, and PEFT has none of them
            fits = (b.shape[0], *a.shape[1:]) == weight.shape
        else:
            _ = linear_size(layer, allows_conv1d=True)
            delta = (b.shape[0], *a.shape[1:])
            fits = (delta[::-1] if is_transposed else delta) == layer.weight.shape
        if not fits:
            raise layer.mismatch(f"hira_A {a.shape}, hira_B {b.shape}")
        return [PlannedTerm("weight", HiraTerm(a, b, is_transposed))]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give the rank and the factor's shape."""
        del settings
        a, b = _pair(module)
        return {
            "rank": a.shape[0],
            "shape": [b.shape[0], *a.shape[1:]],
            "dtype": a.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (Hira(),)


def _convolved(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the factors of a convolution as one matrix (N, in * window)."""
    from torch.nn import functional  # noqa: PLC0415 (planning needs no torch)

    if a.dim() == 4 and prod(a.shape[2:]) == 1:
        return b.flatten(1) @ a.flatten(1)
    inputs = a.transpose(0, 1)
    count = len(inputs)
    if 1 < count < _BATCH:
        # what PEFT computes with several threads
        inputs = functional.pad(inputs, (0, 0) * (a.dim() - 1) + (0, _BATCH - count))
    convolve = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[a.dim()]
    return convolve(inputs, b)[:count].transpose(0, 1).flatten(1)


def _pair(module: AdapterModule) -> list[StoredTensor]:
    """Return A and B.

    Raises:
        AdapterError: One is missing, or there are those of a layer and of an embedding.
    """
    if module.is_embedding and not module.tensors.keys().isdisjoint({"hira_A", "hira_B"}):
        message = "module has the factors of an embedding and of a layer"
        raise AdapterError(message, where=module.where)
    wanted = (
        ("hira_embedding_A", "hira_embedding_B") if module.is_embedding else ("hira_A", "hira_B")
    )
    return module.need(*wanted)
