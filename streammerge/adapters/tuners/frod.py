"""FRoD: a weight is written in a basis that layers share, and only its coordinates are trained.

    W' = U @ (S + diag(l)) @ V.T        V (K, K), U (N, K), l (K,), S (K, K) sparse

V belongs to all layers of a category, which share the last two parts of their paths. U is not
stored: its columns are those of `W @ inverse(V).T`, of length one, so that the untrained l and no S
give W. U is found in float64; all else is done in W's dtype, each product rounded to it, and so are
`W' - W` and the sum of that and W. With numerics: fp32 nothing is rounded.

U is found from the V of the file. PEFT finds U from a V that it makes anew of the base, and then
takes the V of the file to multiply: where LAPACK makes another V than it did for training (another
library, another number of threads, a base of another dtype), the two do not belong together.

The last digits of the solution in float64 depend on the number of threads, and now and then that of
a rounded U with them: the bits are those of PEFT with one thread.

An adapter without V (save_projection: false) is refused: V would have to be found from all layers
of the base together, and its columns have no sign of their own. So is one for a weight that another
adapter changed before, because U is of the weight that training began with.

Source: peft.tuners.frod, https://doi.org/10.1609/aaai.v40i31.39813. Shapes: N out_features, K
in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import TunerTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import linear_size, whole_in
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "Frod", "FrodTerm"]

# columns of U that are shorter than that are zero
_LEAST_LENGTH = 1e-12
_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")


@dataclass(frozen=True, slots=True)
class FrodTerm(TunerTerm):
    """Put a weight of other coordinates in the place of this one."""

    diagonal: StoredTensor
    """(K,): l."""
    values: StoredTensor
    """(n,): of S."""
    basis: StoredTensor
    """(K, K): V."""
    indices: StoredTensor
    """(2, n): rows and columns of S."""
    size: StoredTensor
    """(2,): of S, K and K."""
    is_transposed: bool
    """Whether the weight is stored (K, N)."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The coordinates and the basis."""
        return (self.diagonal, self.values, self.basis, self.indices, self.size)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the solution for U holds in float64, or what then is multiplied."""
        inputs = self.basis.shape[0]
        outputs = shape[1] if self.is_transposed else shape[0]
        return 8 * (5 * outputs * inputs + 5 * inputs * inputs)

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Return the other weight, as it is stored."""
        diagonal, values, basis, indices, size = factors
        dtype = weight.dtype
        basis = basis.to(dtype)
        middle = self._coordinates(diagonal.to(dtype), values.to(dtype), indices, size)
        other = self._outputs(basis, weight).to(dtype) @ middle @ basis.T
        return other.T if self.is_transposed else other

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Change these rows by what they differ in."""
        other = state[begin : begin + len(rows)]
        return rows.add_(other - rows)

    def _outputs(self, basis: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Return U in float32."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        whole = whole_in(torch.float64, weight)
        whole = whole.T if self.is_transposed else whole
        wide = basis.double()
        try:
            columns: torch.Tensor = torch.linalg.solve(wide, whole.T).T
        except RuntimeError:
            # V has no inverse
            columns = whole @ torch.linalg.pinv(wide, rtol=1e-6).T
        lengths = torch.linalg.norm(columns, dim=0)
        is_long = lengths > _LEAST_LENGTH
        lengths[~is_long] = 1.0
        columns = columns / lengths
        columns[:, ~is_long] = 0.0
        return columns.float()

    def _coordinates(
        self,
        diagonal: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
        size: torch.Tensor,
    ) -> torch.Tensor:
        """Return `S + diag(l)`.

        Raises:
            AdapterError: S is of another size.
        """
        import torch  # noqa: PLC0415 (planning needs no torch)

        count = len(diagonal)
        is_inside = not indices.numel() or 0 <= int(indices.min()) <= int(indices.max()) < count
        if size.tolist() != [count, count] or not is_inside:
            raise AdapterError(
                "sparse matrix of the adapter is of another size: another base?",
                where=f"key '{self.indices.name}' of {self.indices.path}",
                expected=f"{count} x {count}",
                got=f"{size.tolist()}, with indices {indices.flatten()[:4].tolist()} and others",
            )
        sparse = torch.sparse_coo_tensor(indices, values, (count, count)).coalesce()
        return sparse.to_dense() + torch.diag(diagonal)


class Frod(Tuner):
    """`peft_type: FROD`."""

    peft_type = "FROD"
    title = "FRoD"
    formula = "U @ (S + diag(l)) @ V.T, U from W and V"
    factors = frozenset({"frod_lambda_l", "frod_lambda_s_values"})
    # categories
    has_free_parts = True
    shared = frozenset(_SHARED)
    options = frozenset(
        {
            "frod_dropout", "progressbar", "projection_prng_key", "regularization_alpha",
            "runtime_offload_base_weight", "save_projection", "sparse_rate",
        }
    )  # fmt: skip
    remarks = "with save_projection, as the first adapter on a weight; needs the whole weight"

    def read(self, options: Options) -> None:
        """Read nothing: the file says it all, or does not."""

    def check(self, module: AdapterModule, settings: Any) -> None:
        """Check that the coordinates are vectors.

        Raises:
            AdapterError: They are not.
        """
        del settings
        diagonal, values = module.need("frod_lambda_l", "frod_lambda_s_values")
        if len(diagonal.shape) != 1 or len(values.shape) != 1:
            raise AdapterError(
                "adapter tensor is no vector",
                where=module.where,
                got=f"frod_lambda_l {diagonal.shape}, frod_lambda_s_values {values.shape}",
            )

    def plan(self, layer: Layer, settings: Any, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the change of the weight."""
        del settings
        module = layer.module
        _check_categories(layer, shared)
        _, in_features = linear_size(layer, allows_conv1d=True)
        category = _category(module.module)
        found = [shared.tensors.get(f"{name}.{category}") for name in _SHARED]
        basis, indices, size = found
        if basis is None or indices is None or size is None:
            raise AdapterError(
                "adapter has no basis for a layer: it was saved without, and the base's layers "
                "do not say which one it was",
                where=module.where,
                expected=", ".join(f"{name}.{category}" for name in _SHARED),
                hint="save it again with save_projection=True",
            )
        diagonal, values = module.need("frod_lambda_l", "frod_lambda_s_values")
        is_square = basis.shape == (in_features, in_features) == diagonal.shape * 2
        if not is_square or indices.shape != (2, *values.shape) or size.shape != (2,):
            raise layer.mismatch(
                f"frod_lambda_l {diagonal.shape}, frod_lambda_s_values {values.shape}, frod_V "
                f"{basis.shape}, frod_s_indices {indices.shape}"
            )
        if layer.weight.is_changed:
            raise PlanError(
                "an adapter before this one changes a weight that FRoD writes in another basis",
                where=module.where,
                got=layer.weight.name,
                hint="merge this one first",
            )
        term = FrodTerm(diagonal, values, basis, indices, size, layer.is_transposed)
        return [PlannedTerm("weight", term)]

    def describe(self, module: AdapterModule, settings: Any) -> dict[str, Any]:
        """Give the number of coordinates."""
        del settings
        diagonal, values = module.need("frod_lambda_l", "frod_lambda_s_values")
        return {
            "diagonal": diagonal.shape[0],
            "entries": values.shape[0],
            "category": _category(module.module),
            "dtype": diagonal.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (Frod(),)


def _category(module: str) -> str:
    """Return the category of a layer, by which layers share a basis."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    # apart from the output of a feed-forward network
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def _check_categories(layer: Layer, shared: Shared) -> None:
    """Check that every basis is some layer's.

    Raises:
        AdapterError: One is of none.
    """
    categories = {_category(other.module.module) for other in shared.layers}
    lost = [n for n in shared.tensors if n.partition(".")[2] not in categories]
    if lost:
        raise AdapterError(
            "adapter holds the basis of layers that it has not",
            where=layer.module.where,
            expected=", ".join(sorted(categories)),
            got=lost[0],
        )
