"""DEFT: a subspace of a weight's outputs is taken out, and another content put in.

    W + Q @ (s * R - right.T @ W)        P (N, r), R (r, K); s = alpha / r, or 1 without alpha

    relu    Q = P, right = relu(P)
    qr      Q = right = the orthogonal factor of P

PaRa leaves R out: `W - Q @ (right.T @ W)`. Everything is computed in float32, whatever the weight's
dtype, and the change is rounded before it is added. A weight stored (K, N) is turned for it.

`right.T @ W` is a sum over N, which BLAS divides by the number of threads where N is above some
hundred; LAPACK does the like with a QR decomposition of more than 32 columns. The bits are those of
PEFT with one thread; with several of them, its change of W is within
`2 * N * 2^-24 * |P| @ |right|.T @ |W|` of ours with relu.

Source: peft.tuners.deft. Shapes: N out_features, K in_features, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import TunerTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import check_rank, linear_size, whole_in
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "Deft", "DeftTerm"]


@dataclass(frozen=True, slots=True)
class DeftTerm(TunerTerm):
    """Take a subspace out, and put R in."""

    p: StoredTensor
    """(N, r)"""
    r: StoredTensor | None
    """(r, K); None to put nothing in."""
    scaling: float
    """Of R."""
    is_orthogonal: bool
    """Whether P is made orthogonal first."""
    is_transposed: bool
    """Whether the weight is stored (K, N)."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """P and R."""
        return (self.p,) if self.r is None else (self.p, self.r)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the whole weight takes in float32, and small matrices of rank r."""
        rank = self.p.shape[1]
        return 4 * (prod(shape) + 6 * rank * sum(shape))

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Find out what is in the subspace."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        whole = whole_in(torch.float32, weight)
        whole = whole.T if self.is_transposed else whole
        out = right = factors[0].float()
        if self.is_orthogonal:
            out = right = torch.linalg.qr(out)[0]
        else:
            right = torch.relu(out)
        content = right.T @ whole
        if self.r is not None:
            content = factors[1].float() * self.scaling - content
        return out, content

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Change these rows."""
        out, content = state
        part = slice(begin, begin + len(rows))
        delta = (out @ content[:, part]).T if self.is_transposed else out[part] @ content
        if self.r is None:
            delta = delta.neg_()
        return rows.add_(delta.to(rows.dtype))


@dataclass(frozen=True, slots=True)
class _Settings:
    rank: int
    alpha: float | None
    is_orthogonal: bool
    puts_in: bool


class Deft(Tuner):
    """`peft_type: DEFT`."""

    peft_type = "DEFT"
    title = "DEFT, PaRa"
    formula = "W + Q @ (s * R - right.T @ W), Q and right from P"
    factors = frozenset({"deft_P", "deft_R"})
    options = frozenset(
        {"alpha", "decomposition_method", "deft_dropout", "init_scale", "para", "r"}
    )

    def read(self, options: Options) -> _Settings:
        """Read the configuration.

        Raises:
            AdapterError: It is not sound.
        """
        return _Settings(
            rank=options.count("r", 8),
            # PEFT takes a zero for none
            alpha=options.number("alpha") if options.get("alpha") else None,
            is_orthogonal=options.choice("decomposition_method", "relu", "qr") == "qr",
            puts_in=not options.flag("para"),
        )

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check the matrices against each other and against the configuration.

        Raises:
            AdapterError: They do not fit.
        """
        (p,) = module.need("deft_P")
        r = module.need("deft_R")[0] if settings.puts_in else None
        fits = len(p.shape) == 2 and p.shape[0] >= p.shape[1] > 0
        if not fits or (r is not None and (len(r.shape) != 2 or r.shape[0] != p.shape[1])):
            raise AdapterError(
                "factors of the adapter do not belong together",
                where=module.where,
                got=f"deft_P {p.shape}, deft_R {None if r is None else r.shape}",
            )
        check_rank(module, p.shape[1], expected=min(settings.rank, p.shape[0]))

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the change of the weight."""
        del shared
        out_features, in_features = linear_size(layer, allows_conv1d=True)
        (p,) = layer.module.need("deft_P")
        r = layer.module.need("deft_R")[0] if settings.puts_in else None
        if p.shape[0] != out_features or (r is not None and r.shape[1] != in_features):
            raise layer.mismatch(f"deft_P {p.shape}, deft_R {None if r is None else r.shape}")
        scaling = settings.alpha / p.shape[1] if settings.alpha is not None else 1.0
        term = DeftTerm(p, r, scaling, settings.is_orthogonal, layer.is_transposed)
        return [PlannedTerm("weight", term)]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give the rank, and the decomposition."""
        (p,) = module.need("deft_P")
        return {
            "rank": p.shape[1],
            "method": "qr" if settings.is_orthogonal else "relu",
            "para": not settings.puts_in,
            "dtype": p.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (Deft(),)
