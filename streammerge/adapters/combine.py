"""Several LoRA adapters as one: the combinations of PEFT's `add_weighted_adapter`.

With s_i the scaling of adapter i, w_i its weight, and `p_i = w_i * s_i`, the combined adapter has
scaling 1 and the factors

| combination | A | B |
|---|---|---|
| cat | `[p_1 A_1; p_2 A_2; ...]` | `[B_1, B_2, ...]` |
| linear | `sum sign(p_i) sqrt(|p_i|) A_i` | `sum sqrt(|p_i|) B_i` |
| magnitude_prune | linear, of the entries of greatest magnitude | the same of B |
| dare_linear | linear, of entries drawn at random, divided by the density | the same of B |
| ties | entries of greatest magnitude; the mean of those with the elected sign | the same of B |
| dare_ties | entries drawn at random, divided by the density; then as in ties | the same of B |

`cat` is the exact sum of the deltas. The others have cross terms: they combine factors, as PEFT
does, and not deltas. Sources: peft.utils.merge_utils; Yadav et al., "TIES-Merging", 2023; Yu et
al., "Language Models are Super Mario", 2023 (DARE). What is drawn at random depends on the seed,
the adapter's number and the tensor's name alone.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from streammerge.adapters.terms import LoraTerm, TunerTerm
from streammerge.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.terms import Weight
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["CombinationKind", "CombinedTerm", "Combining", "combine"]

CombinationKind = Literal["linear", "cat", "ties", "dare_ties", "dare_linear", "magnitude_prune"]
MajoritySign = Literal["total", "frequency"]


@dataclass(frozen=True, slots=True)
class Combining:
    """How adapters are combined."""

    kind: CombinationKind
    density: float = 1.0
    """Share of the entries that are kept."""
    majority_sign: MajoritySign = "total"
    """What elects a sign: the sum of the entries, or their count."""
    seed: int = 0
    stray_factor: float = 1.0
    """The root of the combined rank, by which PEFT multiplies if the first adapter is of rsLoRA."""


@dataclass(frozen=True, slots=True)
class CombinedTerm(TunerTerm):
    """The delta of the combined adapter on one weight."""

    parts: tuple[LoraTerm, ...]
    weights: tuple[float, ...]
    combining: Combining

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """A and B of each adapter in turn."""
        return tuple(factor for part in self.parts for factor in (part.a.tensor, part.b.tensor))

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of the stacks of factors, and of what choosing among them takes."""
        del shape
        # the stack, its mask, magnitudes and their order (of 8 bytes), the weighted stack, a sum
        return 5 * 8 * sum(prod(factor.shape) for factor in self.factors)

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Combine the factors."""
        pairs = [w * part.scaling for w, part in zip(self.weights, self.parts, strict=True)]
        flat = [factor.reshape(factor.shape[0], -1) for factor in factors]
        a, b = flat[0::2], flat[1::2]
        if self.combining.kind == "cat":
            import torch  # noqa: PLC0415 (planning needs no torch)

            # PEFT multiplies by the two numbers in turn
            scaled = [
                one * w * part.scaling
                for one, w, part in zip(a, self.weights, self.parts, strict=True)
            ]
            # it copies them into an adapter of the weight's dtype
            pair = torch.cat(scaled, dim=0), torch.cat(b, dim=1)
            return tuple(factor.to(weight.dtype).to(weight.compute_dtype) for factor in pair)
        names = [factor.name for factor in self.factors]
        signed = [math.sqrt(abs(pair)) * (1 if pair >= 0 else -1) for pair in pairs]
        return (
            _mix(a, signed, self.combining, names[0::2]),
            _mix(b, [math.sqrt(abs(pair)) for pair in pairs], self.combining, names[1::2]),
        )

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Add the rows of `B @ A`."""
        a, b = state
        first = self.parts[0]
        if first.is_transposed:
            delta = (b @ a[:, begin : begin + len(rows)]).T
        else:
            delta = b[begin : begin + len(rows)] @ a
        if self.combining.stray_factor != 1.0:
            delta = delta * self.combining.stray_factor
        if first.rounds_delta or self.combining.kind == "cat":
            delta = delta.to(rows.dtype)
        merged: torch.Tensor = (rows + delta).to(rows.dtype)
        return merged


def combine(
    terms: Sequence[tuple[LoraTerm, float]], combining: Combining, *, name: str
) -> CombinedTerm:
    """Combine the terms of several adapters on one weight.

    Args:
        terms: Each with its adapter's weight.
        combining: How.
        name: Of the target, for messages.

    Raises:
        PlanError: They cannot be combined.
    """
    parts = tuple(term for term, _ in terms)
    for part in parts:
        is_plain = part.a.is_whole and part.b.is_whole and part.gain is None and part.region is None
        if not is_plain or not part.is_additive:
            raise PlanError(
                "adapter_combination takes plain LoRA only",
                where=f"'{name}'",
                got="DoRA" if not part.is_additive else "a variant, or an adapter on experts",
                hint="leave adapter_combination out to merge one adapter after the other",
            )
    if combining.kind != "cat" and len({part.rank for part in parts}) > 1:
        raise PlanError(
            f"adapter_combination: {combining.kind} needs adapters of one rank",
            where=f"'{name}'",
            got=f"ranks {', '.join(str(part.rank) for part in parts)}",
            hint="use adapter_combination: cat, which takes any ranks",
        )
    return CombinedTerm(parts, tuple(weight for _, weight in terms), combining)


def _mix(
    tensors: Sequence[torch.Tensor], weights: list[float], how: Combining, names: Sequence[str]
) -> torch.Tensor:
    """Mix one factor of all adapters; each (R, K), or (N, R)."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    kind = how.kind
    if kind in {"ties", "magnitude_prune"}:
        tensors = [_keep_greatest(tensor, how.density) for tensor in tensors]
    elif kind in {"dare_ties", "dare_linear"}:
        tensors = [
            _keep_at_random(tensor, how.density, seed=f"{how.seed}/{number}/{name}")
            for number, (tensor, name) in enumerate(zip(tensors, names, strict=True))
        ]
    stack = torch.stack(list(tensors))
    # of float32, as PEFT has them, whatever the factors are
    weighted = stack * torch.tensor(weights).view(-1, *[1] * (stack.ndim - 1))
    if kind not in {"ties", "dare_ties"}:
        return weighted.sum(dim=0)
    votes = stack if how.majority_sign == "total" else stack.sign()
    elected = torch.where(votes.sum(dim=0) >= 0, 1, -1)
    agrees = stack.sign() == elected
    return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1.0)


def _keep_greatest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    import torch  # noqa: PLC0415 (planning needs no torch)

    if density >= 1:
        return tensor
    mask = torch.zeros_like(tensor).view(-1)
    mask[torch.topk(tensor.abs().reshape(-1), k=int(density * tensor.numel())).indices] = 1
    return tensor * mask.view(tensor.shape)


def _keep_at_random(tensor: torch.Tensor, density: float, *, seed: str) -> torch.Tensor:
    import torch  # noqa: PLC0415 (planning needs no torch)

    if density >= 1:
        return tensor
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    mask = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
    return tensor * mask / density
