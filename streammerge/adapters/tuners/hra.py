"""HRA: the inputs of a layer are reflected, one vector after the other.

    W @ M,  M = H_1 @ ... @ H_r,  H = I - 2 u u.T       u (K,): a stored vector over its length

With apply_GS the vectors U (K, r) are made orthogonal first, by Gram and Schmidt, and
M = I - 2 U @ U.T.

M is dense, and PEFT multiplies by all of it. So it is done here up to 8192 columns; beyond that M
would take more memory than a tile of W, so the rows of a tile are reflected one vector at a time,
which gives the same matrix within the rounding of float32 products, and takes no time.

PEFT's bits depend on the number of threads: with apply_GS from some hundred columns on, without it
where the number of columns is not a multiple of 16. M is made with as many threads as PEFT has.

Paper: Yuan et al. 2024, "Bridging The Gap between Low-rank and Orthogonal Adaptation via
Householder Reflection Adaptation". Source: peft.tuners.hra.layer. Shapes: N out_features, K
in_features (of a convolution with its window), r number of vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from streammerge.adapters.terms import TunerTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import check_rank
from streammerge.adapters.tuners.rotations import (
    DENSE_COLUMNS,
    Windows,
    product_bytes,
    rotated_columns,
)
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "Hra", "HraTerm"]

# rows of M, or of a tile, that are reflected at a time
M_ROWS = 512
TILE_ROWS = 16
# in a product with a vector, MKL rounds rows alike that come in multiples of as many
ALIKE_ROWS = 16


@dataclass(frozen=True, slots=True)
class HraTerm(TunerTerm):
    """Reflect the rows of a weight."""

    depends_on_threads: ClassVar[bool] = True

    vectors: StoredTensor
    """(K, r)"""
    is_orthogonal: bool
    """Whether the vectors are made orthogonal first."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The vectors."""
        return (self.vectors,)

    @property
    def _is_dense(self) -> bool:
        return self.vectors.shape[0] <= DENSE_COLUMNS

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the vectors hold, and M with its rows in the making, if there is one."""
        columns, rank = prod(shape[1:]), self.vectors.shape[1]
        vectors = 3 * 8 * columns * rank
        if not self._is_dense:
            return vectors
        rows = _rows_at_a_time(columns)
        return vectors + product_bytes(shape, columns) + 3 * 8 * rows * columns

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Give the vectors their length, and compute M."""
        vectors = _orthogonal(factors[0]) if self.is_orthogonal else _of_length_one(factors[0])
        if not self._is_dense:
            return vectors
        columns = len(vectors)
        windows = Windows(columns, columns, dtype=vectors.dtype)
        step = _rows_at_a_time(columns)
        for first in range(0, columns, step):
            rows = vectors.new_zeros(min(step, columns - first), columns)
            rows.diagonal(first).fill_(1.0)
            if self.is_orthogonal:
                rows.sub_(2 * vectors[first : first + step] @ vectors.t())
            else:
                _reflect(rows, vectors)
            windows.put_columns(first, rows.t())
        return windows.product(weight, is_left=False)

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Reflect these rows."""
        if self._is_dense:
            reflected: torch.Tensor = state.rows(rows, begin)
            return reflected.to(rows.dtype)
        for first in range(0, len(rows), TILE_ROWS):
            part = rows[first : first + TILE_ROWS]
            # always as many rows, so that they round alike however the weight is cut
            filled = state.new_zeros(TILE_ROWS, rows.shape[1])
            filled[: len(part)] = part
            part.copy_(_reflect(filled, state)[: len(part)])
        return rows


class Hra(Tuner):
    """`peft_type: HRA`."""

    peft_type = "HRA"
    title = "HRA (apply_GS)"
    formula = "W @ (I - 2 u_1 u_1.T) @ ... @ (I - 2 u_r u_r.T)"
    factors = frozenset({"hra_u"})
    options = frozenset({"apply_GS", "r"})
    remarks = f"beyond {DENSE_COLUMNS} inputs within the rounding of float32"

    def read(self, options: Options) -> tuple[int, bool]:
        """Read the number of vectors, and whether they are made orthogonal."""
        return options.count("r", 8), options.flag("apply_GS")

    def check(self, module: AdapterModule, settings: tuple[int, bool]) -> None:
        """Check that there are as many vectors as the configuration says.

        Raises:
            AdapterError: There are not.
        """
        (vectors,) = module.need("hra_u")
        if len(vectors.shape) != 2 or 0 in vectors.shape:
            raise AdapterError(
                "adapter tensor has no shape of vectors",
                where=f"key '{vectors.name}' of {vectors.path}",
                expected="(in_features, r)",
                got=vectors.shape,
            )
        check_rank(module, vectors.shape[1], expected=settings[0])

    def plan(
        self, layer: Layer, settings: tuple[int, bool], shared: Shared
    ) -> Sequence[PlannedTerm]:
        """Plan the reflections.

        Raises:
            PlanError: They are of another size.
        """
        del shared
        columns = rotated_columns(layer)
        (vectors,) = layer.module.need("hra_u")
        if vectors.shape[0] != columns:
            raise layer.mismatch(f"reflections of {vectors.shape[0]} inputs")
        return [PlannedTerm("weight", HraTerm(vectors, is_orthogonal=settings[1]))]

    def variants(self, settings: tuple[int, bool]) -> tuple[str, ...]:
        """Name what differs from plain reflections."""
        return ("Gram-Schmidt",) if settings[1] else ()

    def describe(self, module: AdapterModule, settings: tuple[int, bool]) -> dict[str, Any]:
        """Give the number of vectors and their length."""
        (vectors,) = module.need("hra_u")
        return {
            "rank": vectors.shape[1],
            "inputs": vectors.shape[0],
            "is_orthogonal": settings[1],
            "dtype": vectors.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (Hra(),)


def _rows_at_a_time(columns: int) -> int:
    """Return how many rows of M are made at a time; PEFT makes all of them, with the same bits."""
    is_regular = columns > 2 * M_ROWS and columns % ALIKE_ROWS == 0
    return M_ROWS if is_regular else columns


def _of_length_one(vectors: torch.Tensor) -> torch.Tensor:
    scaled: torch.Tensor = vectors / vectors.norm(dim=0)
    return scaled


def _orthogonal(vectors: torch.Tensor) -> torch.Tensor:
    """Take off each vector what it has of those before it, and give it its length."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    done: list[torch.Tensor] = []
    for column in vectors.t():
        vector = column.view(-1, 1)
        for other in done:
            vector = vector - (other.t() @ vector) * other
        done.append(vector / vector.norm())
    return torch.cat(done, dim=1)


def _reflect(rows: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Change rows (n, K) to `rows @ H` for one vector after the other, in place."""
    for column in vectors.t():
        vector = column.view(-1, 1)
        rows.sub_(2 * (rows @ vector) @ vector.t())
    return rows
