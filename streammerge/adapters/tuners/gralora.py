"""GraLoRA: a weight is cut into k x k blocks, each with a low-rank delta of its own.

Block (p, q) has N / k rows and K / k columns, and a rank of R / k. Columns q share A_q, of which
block p takes columns p of rank; rows p share B_p, of which block q takes rows q of rank:

    delta_pq = (A_q[:, p] @ B_p[q, :]).T          A (k, K / k, R), B (k, R, N / k)
    W += scaling * (delta + B_g @ A_g)            scaling = alpha / (R + hybrid_r)

with the low-rank delta of hybrid_r over all of the weight only in the hybrid form.

PEFT spreads A so that the products of all blocks of a row are one, over the whole rank with zeros
in it; so is it done here, that the same numbers are added in the same order.

Source: peft.tuners.gralora, Jung et al. 2025, "GraLoRA" (arXiv:2505.20355). Shapes: N
out_features, K in_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import ScaledTerm
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

__all__ = ["TUNERS", "Gralora", "GraloraTerm"]

# a product of fewer columns rounds otherwise
_LEAST_COLUMNS = 4
# multiplications in a block below which torch's batched product is a loop of its own, not BLAS
_LEAST_FOR_BLAS = 400


@dataclass(frozen=True, slots=True)
class GraloraTerm(ScaledTerm):
    """Add the deltas of all blocks."""

    a: StoredTensor
    """(k, K / k, R)"""
    b: StoredTensor
    """(k, R, N / k)"""
    general: tuple[StoredTensor, StoredTensor] | None
    """(hybrid_r, K) and (N, hybrid_r) of the hybrid form."""
    scaling: float
    is_transposed: bool
    """Whether the weight is stored (K, N)."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """A and B, and those of the whole weight."""
        return (self.a, self.b, *(self.general or ()))

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what A takes when it is spread."""
        del shape
        blocks, inputs, rank = self.a.shape
        return 2 * 8 * blocks * blocks * inputs * rank

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Spread A: for each p a matrix (K, R), for inputs q with what is not of q left zero."""
        del weight
        a, b, *general = factors
        blocks, inputs, rank = a.shape
        part = rank // blocks
        spread = a.new_zeros(blocks, blocks, inputs, blocks, part)
        for q in range(blocks):
            # (K / k, k, R / k): rank p goes to row p
            spread[:, q, :, q] = a[q].view(inputs, blocks, part).transpose(0, 1)
        return spread.view(blocks, blocks * inputs, rank), b, general

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Add the rows of the delta."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        a, b, general = state
        end = begin + len(rows)
        if b.shape[2] < _LEAST_COLUMNS:
            # so few outputs that all blocks are multiplied at a time
            delta = a.bmm(b).transpose(0, 1).flatten(1)
            delta = delta[begin:end] if self.is_transposed else delta.T[begin:end].contiguous()
        elif self.is_transposed:
            products = [_product(a[p], b[p], rows=slice(begin, end)) for p in range(len(a))]
            delta = torch.cat(products, dim=1)
        else:
            delta = self._of_outputs(a, b, begin, end)
        if general:
            part = slice(begin, end)
            delta.add_(
                (general[1] @ general[0][:, part]).T
                if self.is_transposed
                else general[1][part] @ general[0]
            )
        return rows.copy_(delta.mul_(self.scaling).add_(rows))

    @staticmethod
    def _of_outputs(a: torch.Tensor, b: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Return rows of the delta (n, K)."""
        width = b.shape[2]
        delta = a.new_empty(end - begin, a.shape[1])
        for p in range(begin // width, -(-end // width)):
            first, last = max(begin, p * width), min(end, (p + 1) * width)
            into = delta[first - begin : last - begin]
            first, last = first - p * width, last - p * width
            # some that are not asked for, if they are too few
            start = max(0, min(first, last - _LEAST_COLUMNS))
            stop = max(last, start + _LEAST_COLUMNS)
            product = _product(a[p], b[p], columns=slice(start, stop))
            into.copy_(product[:, first - start : last - start].T)
        return delta


@dataclass(frozen=True, slots=True)
class _Settings:
    rank: int
    hybrid_rank: int
    blocks: int
    scaling: float


class Gralora(Tuner):
    """`peft_type: GRALORA`."""

    peft_type = "GRALORA"
    title = "GraLoRA (hybrid too)"
    formula = "W_pq + scaling * (A_q[:, p] @ B_p[q, :]).T (+ scaling * B_g @ A_g)"
    factors = frozenset({"gralora_A", "gralora_A_general", "gralora_B", "gralora_B_general"})
    options = frozenset({"alpha", "gralora_dropout", "gralora_k", "hybrid_r", "r"})
    is_additive = True

    def read(self, options: Options) -> _Settings:
        """Read the ranks, the number of blocks and the scaling.

        Raises:
            AdapterError: They are not sound.
        """
        rank, hybrid_rank = options.count("r", 32), options.count("hybrid_r", 0, least=0)
        blocks = options.count("gralora_k", 2)
        if rank % blocks:
            raise options.bad("gralora_k", expected=f"a divisor of r = {rank}")
        scaling = options.number("alpha", 64) / (rank + hybrid_rank)
        return _Settings(rank, hybrid_rank, blocks, scaling)

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check the factors against each other and against the configuration.

        Raises:
            AdapterError: They do not fit.
        """
        a, b = module.need("gralora_A", "gralora_B")
        is_pair = len(a.shape) == len(b.shape) == 3 and a.shape[2] == b.shape[1]
        if not is_pair or not a.shape[0] == b.shape[0] == settings.blocks:
            raise AdapterError(
                "factors of the adapter do not belong together",
                where=module.where,
                expected=f"gralora_k = {settings.blocks} blocks in each",
                got=f"gralora_A {a.shape}, gralora_B {b.shape}",
            )
        check_rank(module, a.shape[2], expected=settings.rank)

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the addition of the deltas."""
        del shared
        module = layer.module
        out_features, in_features = linear_size(layer, allows_conv1d=True)
        a, b = module.need("gralora_A", "gralora_B")
        if (b.shape[2] * settings.blocks, a.shape[1] * settings.blocks) != (
            out_features,
            in_features,
        ):
            raise layer.mismatch(f"gralora_A {a.shape}, gralora_B {b.shape}")
        general = None
        if settings.hybrid_rank:
            general = (
                module.fit("gralora_A_general", settings.hybrid_rank, in_features),
                module.fit("gralora_B_general", out_features, settings.hybrid_rank),
            )
        return [
            PlannedTerm("weight", GraloraTerm(a, b, general, settings.scaling, layer.is_transposed))
        ]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give ranks, blocks, scaling and the delta's shape."""
        a, b = module.need("gralora_A", "gralora_B")
        return {
            "rank": settings.rank,
            "hybrid_rank": settings.hybrid_rank,
            "blocks": settings.blocks,
            "scaling": settings.scaling,
            "shape": [b.shape[2] * settings.blocks, a.shape[1] * settings.blocks],
            "dtype": a.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (Gralora(),)


def _product(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> torch.Tensor:
    """Return a part of `a @ b`, rounded as in a batch of whole products."""
    part_a, part_b = a[rows], b[:, columns]
    if a.numel() * b.shape[1] < _LEAST_FOR_BLAS:
        return part_a[None].bmm(part_b[None])[0]
    return part_a @ part_b
