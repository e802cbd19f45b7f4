"""Adapters that were trained on a changed base: take off again what training took off.

PiSSA (Meng et al. 2024), OLoRA (Büyükakyüz 2024) and KaSA (Wang et al. 2024) decompose each weight
before training and go on with a part of it. PEFT does it when it loads an adapter
(peft.tuners.lora, layer.py and variants.py); here it is a term of its own, before the delta's,
because its result is rounded to the weight's dtype.

| kind | W becomes |
|---|---|
| pissa | `W - (scaling * B0) @ A0`, A0 = `sqrt(S/scaling) Vh`, B0 = `U sqrt(S/scaling)` |
| olora | `W - (scaling * B0) @ A0`, A0 = `T[:R]`, B0 = `Q[:, :R]` |
| kasa | `(U S)[:, :k-R] @ Vh[:k-R]`, with k the smaller of N and K |

W is U S Vh, of which pissa takes the R largest components, or Q T; A0 is (R, K), B0 is (N, R). All
of it is done in F32, whatever the weight's dtype. LAPACK's bits depend on the number of threads, so
they are PEFT's where torch has as many.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from streammerge.adapters.terms import TunerTerm

if TYPE_CHECKING:
    import torch

    from streammerge.adapters.terms import Weight
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["ResidualKind", "ResidualTerm"]

ResidualKind = Literal["pissa", "olora", "kasa"]


@dataclass(frozen=True, slots=True)
class ResidualTerm(TunerTerm):
    """Take the start of the factors off the base."""

    kind: ResidualKind
    rank: int
    scaling: float
    is_transposed: bool
    """Whether the weight is stored (K, N)."""

    depends_on_threads: ClassVar[bool] = True

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """None: what is taken off is found from the base alone."""
        return ()

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what a decomposition holds at its peak.

        With k the smaller side: the weight and LAPACK's copy of it, two factors of together no more
        than the weight and k * k, and its work space, which was seen to be 0.9 to 1.7 times the
        weight or 3.9 k * k (gesdd of oneMKL 2024.2, 512 to 8192 rows and columns).
        """
        rows, columns = shape[0], prod(shape[1:])
        small = min(rows, columns)
        started = (rows + columns) * min(self.rank, small)
        return 4 * (4 * rows * columns + 5 * small * small + 4 * started)

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Decompose the whole weight: return what is subtracted, as two factors, or what is left.

        Returns:
            `scaling * B0` and A0; of KaSA the matrix that takes the weight's place, (N, K).
        """
        del factors
        import torch  # noqa: PLC0415 (planning needs no torch)

        if self.kind == "olora":
            # PEFT decomposes a transposed weight as it is stored
            q, t = torch.linalg.qr(weight.whole().to(torch.float32))
            a, b = t[: self.rank].contiguous(), q[:, : self.rank].contiguous()
            return self.scaling * b, a
        matrix = weight.whole().to(torch.float32)
        u, s, vh = torch.linalg.svd(matrix.T if self.is_transposed else matrix, full_matrices=False)
        del matrix
        if self.kind == "kasa":
            kept = len(s) - self.rank
            left = (u[:, :kept] * s[:kept]) @ vh[:kept]
            return left.to(weight.dtype)
        root = torch.diag(torch.sqrt(s[: self.rank] / self.scaling))
        a, b = root @ vh[: self.rank], u[:, : self.rank] @ root
        return self.scaling * b, a

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Return the rows of the changed base."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        end = begin + len(rows)
        if self.kind == "kasa":
            left: torch.Tensor = state[begin:end]
            return left
        b, a = state
        if self.kind == "pissa" and self.is_transposed:
            taken = (b @ a[:, begin:end]).T
        else:
            taken = b[begin:end] @ a
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rest: torch.Tensor = (wide - taken).to(rows.dtype)
        return rest
