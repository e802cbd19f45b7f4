"""PSOFT: the largest singular components of a weight are turned among themselves.

    W + scaling * B @ (T - I) @ A        A (R, K), B (N, R), scaling = alpha / R

with U, S, V the R largest components of W:

    psoft_init    A = V,             B = U @ diag(S / scaling)
    pissa_init    A = diag(q) @ V,   B = U @ diag(q),  q = sqrt(S / scaling)

T = diag(b) @ C @ diag(a), where C is a free matrix, or the Cayley transform of the skew-symmetric Q
whose upper triangle is stored: (I + Q) @ inverse(I - Q), or some terms of its Neumann series
`I + 2 Q + 2 Q^2 + ... + Q^n`.

A and B are not in the file. They are found from the weight again, but only up to the sign of each
component, which is LAPACK's choice: it differs between processors and GPUs, library versions, and
numbers of threads. T mixes the components, so that another sign gives another weight, and nothing
tells. Such an adapter is refused, unless PEFT's faults are asked for; then the signs are those that
this machine finds with one thread. svd_lowrank finds them with random numbers besides, which a seed
makes the same.

Sources: peft.tuners.psoft, Wu et al. 2025, "Efficient Orthogonal Fine-Tuning with Principal
Subspace Adaptation". Shapes: N out_features, K in_features, R rank.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import TunerTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import linear_size, svd_bytes, whole_in
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "Psoft", "PsoftTerm"]

_MOST_TERMS = 1000
# torch's random numbers are those of the whole process
_random = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Decomposition:
    """How A and B are found."""

    rank: int
    scaling: float
    is_symmetric: bool
    """Whether A and B both have a root of the singular values."""
    iterations: int | None
    """Of svd_lowrank; None for all of the singular value decomposition."""
    seed: int


@dataclass(frozen=True, slots=True)
class _Rotation:
    """How T is made of what is stored."""

    is_orthogonal: bool
    terms: int | None
    """Of the Neumann series; None for the Cayley transform itself."""
    limit: float | None
    """The largest norm of Q that the series is taken of."""
    has_vectors: tuple[bool, bool]
    """Whether there are a and b."""


@dataclass(frozen=True, slots=True)
class PsoftTerm(TunerTerm):
    """Turn the largest components."""

    core: StoredTensor
    """(R * (R - 1) / 2,), or (R, R) of a free matrix"""
    vectors: tuple[StoredTensor, ...]
    """a and b, (R,) each, as far as they are there"""
    decomposition: _Decomposition
    rotation: _Rotation

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """What T is made of."""
        return (self.core, *self.vectors)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the decomposition holds, and some matrices of rank R."""
        rows, columns = shape
        rank = self.decomposition.rank
        small = 8 * rank * (4 * (rows + columns) + 8 * rank)
        if self.decomposition.iterations is not None:
            return 4 * prod(shape) + svd_bytes(rank, max(shape)) + small
        return svd_bytes(rows, columns) + small

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Decompose the weight, and turn what is found."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        dtype = factors[0].dtype
        a, b = self._components(whole_in(torch.float32, weight))
        turned = self._turn(factors) - torch.eye(self.decomposition.rank, dtype=dtype)
        return b.to(dtype) @ turned, a.to(dtype)

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Change these rows."""
        left, a = state
        delta = (left[begin : begin + len(rows)] @ a).mul_(self.decomposition.scaling)
        return rows.add_(delta.to(rows.dtype))

    def _components(self, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        how = self.decomposition
        rank = how.rank
        if how.iterations is None:
            u, s, v = torch.linalg.svd(whole, full_matrices=False)
        else:
            with _random, torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(how.seed)
                u, s, v = torch.svd_lowrank(whole, q=rank, niter=how.iterations)
            v = v.T
        u, v, s = u[:, :rank], v[:rank], s[:rank] / how.scaling
        if how.is_symmetric:
            root = torch.diag(torch.sqrt(s))
            return (root @ v).contiguous(), u @ root
        return v.contiguous(), u @ torch.diag(s)

    def _turn(self, factors: list[torch.Tensor]) -> torch.Tensor:
        """Return T."""
        core, *vectors = factors
        turn: torch.Tensor = self._cayley(core) if self.rotation.is_orthogonal else core
        has_a, has_b = self.rotation.has_vectors
        if has_b:
            turn = vectors[-1][:, None] * turn
        if has_a:
            turn = turn * vectors[0][None, :]
        return turn

    def _cayley(self, core: torch.Tensor) -> torch.Tensor:
        """Return an orthogonal matrix, or one that is nearly so."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        rank = self.decomposition.rank
        skew = core.new_zeros(rank, rank)
        rows, columns = torch.triu_indices(rank, rank, 1)
        skew[rows, columns] = core
        skew = skew - skew.T
        one = torch.eye(rank, dtype=core.dtype)
        terms = self.rotation.terms
        if terms is None:
            exact: torch.Tensor = torch.linalg.solve(one - skew, one + skew, left=False)
            return exact
        if self.rotation.limit is not None:
            norm = torch.linalg.norm(skew, ord="fro")
            if bool(torch.isfinite(norm)) and bool(norm > self.rotation.limit):
                skew = skew * (self.rotation.limit / (norm + 1e-12))
        # of three terms PEFT makes four
        last = max(3, terms - 1)
        result, power = one, skew
        if terms > 1:
            result = result + 2.0 * skew
        for number in range(2, last + 1 if terms > 2 else 0):
            power = power @ skew
            result.add_(power, alpha=2.0 if number < last else 1.0)
        return result


@dataclass(frozen=True, slots=True)
class _Settings:
    decomposition: _Decomposition
    rotation: _Rotation


class Psoft(Tuner):
    """`peft_type: PSOFT`."""

    peft_type = "PSOFT"
    title = "PSOFT"
    formula = "W + scaling * B @ (T - I) @ A, A and B from the singular components of W"
    factors = frozenset({"psoft_R"})
    parts = frozenset({"vector_a", "vector_b"})
    options = frozenset(
        """
        ab_svd_init cayley_neumann_eps num_cayley_neumann_terms psoft_alpha psoft_dropout
        psoft_mag_a psoft_mag_b psoft_orth psoft_svd psoft_svd_lowrank_niter r random_seed
        use_cayley_neumann
        """.split()
    )
    remarks = "only with peft_bugs: reproduce, because its file does not say what it was trained on"

    def read(self, options: Options) -> _Settings:
        """Read the configuration.

        Raises:
            AdapterError: It is not sound, or PEFT's faults are not asked for.
        """
        if not options.choices.reproduces_bugs:
            raise AdapterError(
                "adapter's file leaves out its matrices A and B, and the signs of what is found in "
                "their place differ between machines",
                where=options.path,
                got="peft_type PSOFT",
                hint="convert it to LoRA where it was trained; peft_bugs: reproduce takes the "
                "signs that this machine finds, as PEFT does",
            )
        rank = options.count("r", 32)
        has_series = options.flag("use_cayley_neumann")
        limit = options.number("cayley_neumann_eps") if options.get("cayley_neumann_eps") else None
        terms = options.count("num_cayley_neumann_terms", 5)
        if terms > _MOST_TERMS:
            raise options.bad("num_cayley_neumann_terms", expected=f"at most {_MOST_TERMS}")
        is_partial = options.choice("psoft_svd", "full", "lowrank") == "lowrank"
        iterations = options.count("psoft_svd_lowrank_niter", 10, least=0)
        init = options.choice("ab_svd_init", "psoft_init", "pissa_init")
        return _Settings(
            _Decomposition(
                rank=rank,
                scaling=options.number("psoft_alpha", 32) / rank,
                is_symmetric=init == "pissa_init",
                iterations=iterations if is_partial else None,
                seed=options.count("random_seed", 0, least=0),
            ),
            _Rotation(
                is_orthogonal=options.flag("psoft_orth", default=True),
                terms=terms if has_series else None,
                limit=limit,
                has_vectors=(
                    options.flag("psoft_mag_a", default=True),
                    options.flag("psoft_mag_b", default=True),
                ),
            ),
        )

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check the shapes against the configuration.

        Raises:
            AdapterError: They do not fit.
        """
        _ = _tensors(module, settings)

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the change of the weight."""
        del shared
        size = linear_size(layer)
        how = settings.decomposition
        if how.rank > min(size):
            raise layer.mismatch(f"components of a rank of {how.rank}")
        core, *vectors = _tensors(layer.module, settings)
        term = PsoftTerm(core, tuple(vectors), how, settings.rotation)
        return [PlannedTerm("weight", term)]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give rank and scaling."""
        (core,) = module.need("psoft_R")
        how = settings.decomposition
        return {"rank": how.rank, "scaling": how.scaling, "dtype": core.dtype.value}


TUNERS: tuple[Tuner, ...] = (Psoft(),)


def _tensors(module: AdapterModule, settings: _Settings) -> list[StoredTensor]:
    """Return what T is made of, checked.

    Raises:
        AdapterError: A tensor is missing, or has another shape.
    """
    rank = settings.decomposition.rank
    shape = (rank * (rank - 1) // 2,) if settings.rotation.is_orthogonal else (rank, rank)
    names = [
        f"psoft_R.{name}"
        for name, is_there in zip(
            ("vector_a", "vector_b"), settings.rotation.has_vectors, strict=True
        )
        if is_there
    ]
    return [module.fit("psoft_R", *shape), *(module.fit(name, rank) for name in names)]
