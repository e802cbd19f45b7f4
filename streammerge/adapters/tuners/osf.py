"""OSF: the smallest singular components of a weight are trained, the largest stay as they are.

    W - U0 @ diag(S0) @ V0 + U @ diag(S) @ V        U (N, l), S (l,), V (l, K)

U0, S0 and V0 are the l smallest components of W, in W's dtype; both products and their difference
are in float32, and the sum is rounded once. l is min(N, K) less the effective rank.

The components are not stored: they are found from the weight again. Their product hardly depends on
how LAPACK finds them, but its rounding does, and with it on the number of threads. The bits are
those of PEFT with one thread; with several of them, its merged weight W' is within

    eps * (2 * |U0| @ diag(S0) @ |V0| + |W'|) + min(N, K) * 2^-24 * ||W||_2

of ours, entry by entry, where eps is that of W's dtype.

Sources: peft.tuners.osf, Nayak et al. 2025, "Sculpting Subspaces: Constrained Full Fine-Tuning in
LLMs for Continual Learning" (arXiv:2504.07097). Shapes: N out_features, K in_features.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import TunerTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import check_rank, linear_size, svd_bytes, whole_in
from streammerge.dtypes import Dtype
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "Osf", "OsfTerm"]


@dataclass(frozen=True, slots=True)
class OsfTerm(TunerTerm):
    """Put other components in the place of the smallest ones."""

    u: StoredTensor
    """(N, l)"""
    s: StoredTensor
    """(l,)"""
    v: StoredTensor
    """(l, K)"""
    dtype: Dtype
    """Of the weight in memory, to which its components are rounded whatever the numerics are:
    training went on from them.
    """

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """U, S and V."""
        return (self.u, self.s, self.v)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the decomposition holds, and then the components."""
        rows, columns = shape
        return svd_bytes(rows, columns) + 3 * 8 * self.s.shape[0] * (rows + columns)

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Decompose the weight."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        u, s, v = factors
        rounded = {Dtype.BF16: torch.bfloat16, Dtype.F16: torch.float16}.get(
            self.dtype, torch.float32
        )
        parts = torch.linalg.svd(whole_in(torch.float32, weight), full_matrices=False)
        first = len(parts[1]) - len(s)
        small = parts[0][:, first:], parts[1][first:], parts[2][first:]
        u_before, s_before, v_before = (part.to(rounded).to(weight.compute_dtype) for part in small)
        return u * s, v, u_before * s_before, v_before.contiguous()

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Change these rows."""
        u, v, u_before, v_before = state
        end = begin + len(rows)
        delta = (u[begin:end] @ v).sub_(u_before[begin:end] @ v_before)
        return rows.copy_(delta.add_(rows))


@dataclass(frozen=True, slots=True)
class _Settings:
    kept: float | None
    """Components that stay, or the share of them; None for half."""
    patterns: dict[str, float]

    def trained_of(self, module: str, size: tuple[int, int]) -> int:
        """Return how many components of a layer are trained."""
        kept = self.kept
        for pattern, value in self.patterns.items():
            # anywhere in the path, unlike the patterns of other kinds
            if re.search(pattern, module):
                kept = value
                break
        least = min(size)
        if kept is None:
            return least - least // 2
        # JSON tells 1.0, which is all of them, from 1
        count = int(least * kept if type(kept) is float and 0 < kept <= 1 else kept)
        return least - max(0, min(least, count))


class Osf(Tuner):
    """`peft_type: OSF`."""

    peft_type = "OSF"
    title = "OSF"
    formula = "W - U0 @ diag(S0) @ V0 + U @ diag(S) @ V, the smallest singular components"
    factors = frozenset({"osf_svd_params"})
    parts = frozenset({"S_low", "U_low", "V_low"})
    options = frozenset({"effective_rank", "rank_pattern", "target_svd_config"})
    remarks = "within the rounding of a singular value decomposition, which needs the whole weight"

    def read(self, options: Options) -> _Settings:
        """Read how many components stay.

        Raises:
            AdapterError: It is not sound.
        """
        kept = options.get("effective_rank")
        return _Settings(
            options.number("effective_rank") if kept is not None else None,
            options.pattern("rank_pattern", whole=False),
        )

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check the components against each other.

        Raises:
            AdapterError: They do not fit.
        """
        del settings
        u, s, v = _components(module)
        count = s.shape[0] if len(s.shape) == 1 else -1
        if len(u.shape) != 2 or len(v.shape) != 2 or not u.shape[1] == v.shape[0] == count:
            raise AdapterError(
                "components of the adapter do not belong together",
                where=module.where,
                got=f"U_low {u.shape}, S_low {s.shape}, V_low {v.shape}",
            )

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the change of the weight."""
        del shared
        size, module = linear_size(layer), layer.module
        u, s, v = _components(module)
        if (u.shape[0], v.shape[1]) != size:
            raise layer.mismatch(f"U_low {u.shape}, V_low {v.shape}")
        check_rank(module, s.shape[0], expected=settings.trained_of(module.module, size))
        term = OsfTerm(u, s, v, layer.weight.dtype or Dtype.F32)
        return [PlannedTerm("weight", term)]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give the number of trained components."""
        del settings
        u, s, v = _components(module)
        return {
            "components": s.shape[0],
            "shape": [u.shape[0], v.shape[1]],
            "dtype": u.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (Osf(),)


def _components(module: AdapterModule) -> list[StoredTensor]:
    return module.need(*(f"osf_svd_params.{end}" for end in ("U_low", "S_low", "V_low")))
