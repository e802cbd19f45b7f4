"""LoHa and LoKr: deltas made of Hadamard and Kronecker products of small factors.

LoHa (FedPara, Hyeon-Woo et al. 2022), with A_i (N, R) and B_i (R, K):

    W + scaling * (A_1 @ B_1) * (A_2 @ B_2)               the middle star is element by element

For convolutions there is a Tucker form (proposition 3 there). Either factor of the Hadamard product
is then, with T (R, R, kernel), a (R, N) and b (R, channels),

    M[p, r, k, l] = sum over i, j of T[i, j, k, l] * b[j, r] * a[i, p]

LoKr (Yeh et al. 2024), with U (n1, k1) and V (n2, k2), n1 * n2 = N and k1 * k2 = K:

    W + scaling * kron(U, V)

U is stored whole or as a product; V whole, as a product, or in the Tucker form. The row
`p * n2 + q` of the product is the outer product of row p of U and row q of V, so that no more than
V is ever held. scaling is alpha / r.

Sources: peft.tuners.loha, peft.tuners.lokr, peft.tuners.lycoris_utils.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.options import first_match
from streammerge.adapters.terms import ScaledTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import check_rank
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Parameter, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "HadamardTerm", "KroneckerTerm", "LoHa", "LoKr", "LycorisSettings"]

_OPTIONS = frozenset(
    """
    alpha alpha_pattern decompose_both decompose_factor module_dropout r rank_dropout
    rank_dropout_scale rank_pattern use_effective_conv2d
    """.split()
)
# widest numbers that are computed with
_ITEM = 8
# convolutions with fewer columns, or with fewer multiplications, are computed whole
_NARROW, _SMALL = 64, 1 << 16


@dataclass(frozen=True, slots=True)
class LycorisSettings:
    """What a configuration of either kind says of the merge."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Return the rank that a module was trained with."""
        rank: int = first_match(self.rank_pattern, module, self.rank)
        return rank

    def scaling_of(self, module: str) -> float:
        """Return `alpha / r`."""
        alpha: float = first_match(self.alpha_pattern, module, self.alpha)
        return alpha / self.rank_of(module)


@dataclass(frozen=True, slots=True)
class HadamardTerm(ScaledTerm):
    """`scaling` times the element-wise product of two matrices of low rank (LoHa)."""

    tensors: tuple[StoredTensor, ...]
    """A_1, B_1, A_2, B_2, and T_1, T_2 of the Tucker form."""
    scaling: float

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The factors of both matrices."""
        return self.tensors

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the inner products of the Tucker form hold, (R, K) each, or all of a delta.

        Twice over: einsum orders its operands and its result anew.
        """
        rows, columns = shape[0], prod(shape[1:])
        whole = 4 * rows * columns if self._is_small(rows, columns) else 0
        if len(self.tensors) == 4:
            return _ITEM * whole
        core = self.tensors[4].shape
        return _ITEM * (whole + 4 * core[0] * columns + 2 * prod(core))

    def _is_small(self, rows: int, columns: int) -> bool:
        """Whether the bits depend on how many rows are computed at a time."""
        if len(self.tensors) == 4:
            # a matrix times a vector
            return columns == 1
        # einsum calls torch's batched product, which takes small matrices, and narrow ones, another
        # way than the plain product that tiles need: up to 400 and below 16 (torch 2.13.0)
        return columns < _NARROW or rows * columns * self.tensors[4].shape[0] < _SMALL

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Multiply what does not depend on the row, or everything."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        is_small = self._is_small(weight.shape[0], prod(weight.shape[1:]))
        if len(factors) == 4:
            return self._delta(factors, 0, weight.shape[0]) if is_small else factors
        a1, b1, a2, b2, t1, t2 = factors
        if is_small:
            # in one call, as in PEFT
            first, second = (
                torch.einsum("ijkl,jr,ip->prkl", core, inner, outer)
                for core, inner, outer in ((t1, b1, a1), (t2, b2, a2))
            )
            return self._scale((first * second).reshape(weight.shape[0], -1))
        inner1, inner2 = (
            torch.einsum("ijkl,jr->rkli", core, inner).reshape(-1, len(core)).contiguous()
            for core, inner in ((t1, b1), (t2, b2))
        )
        return [a1, inner1, a2, inner2]

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Add the delta's rows."""
        end = begin + len(rows)
        delta = self._delta(state, begin, end) if isinstance(state, list) else state[begin:end]
        return rows.copy_(rows.to(delta.dtype) + delta)

    def _delta(self, state: list[torch.Tensor], begin: int, end: int) -> torch.Tensor:
        a1, b1, a2, b2 = state
        if len(self.tensors) == 4:
            return self._scale((a1[begin:end] @ b1).mul_(a2[begin:end] @ b2))
        # this way round einsum multiplies too
        return self._scale((b1 @ a1[:, begin:end]).mul_(b2 @ a2[:, begin:end])).T

    def _scale(self, product: torch.Tensor) -> torch.Tensor:
        import torch  # noqa: PLC0415 (planning needs no torch)

        # a tensor on purpose, as in PEFT: of an F64 weight too the scaling is a float32
        return product.mul_(torch.tensor(self.scaling, dtype=torch.float32))


@dataclass(frozen=True, slots=True)
class KroneckerTerm(ScaledTerm):
    """`scaling` times the Kronecker product of two matrices (LoKr)."""

    left: tuple[StoredTensor, ...]
    """U, or two matrices whose product it is."""
    right: tuple[StoredTensor, ...]
    """V, or two matrices whose product it is, or these and the core of the Tucker form."""
    scaling: float

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """U, then V."""
        return (*self.left, *self.right)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what U and V hold where they are products, and what einsum holds besides."""
        rows, columns = _left_shape(self.left)
        left = rows * columns if len(self.left) == 2 else 0
        if len(self.right) == 1:
            return _ITEM * left
        right = prod(shape) // (rows * columns)
        if len(self.right) == 2:
            return _ITEM * (left + right)
        # V and the core in other orders too; the core times the first factor, in two orders
        first, core = self.right[0], self.right[2]
        inner = first.shape[1] * prod(core.shape[1:])
        return _ITEM * (left + 2 * right + 2 * inner + 2 * prod(core.shape))

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Multiply out U and V, which are small."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        del weight
        left, right = factors[: len(self.left)], factors[len(self.left) :]
        u = left[0] if len(left) == 1 else left[0] @ left[1]
        if len(right) == 1:
            v = right[0]
        elif len(right) == 2:
            v = right[0] @ right[1]
        else:
            v = torch.einsum("ijkl,ip,jr->prkl", right[2], right[0], right[1])
        # rows and what is in them, but for the one form that apply has to tell from the others
        return u, v if v.ndim == 3 else v.reshape(len(v), -1).contiguous()

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Add the delta's rows."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        u, v = state
        number = torch.arange(begin, begin + len(rows))
        if v.ndim == 3:
            # `torch.kron` of a matrix and a kernel of one dimension takes the matrix for the last
            # two dimensions; PEFT reads the result as (N, channels, kernel), in training as well
            delta = v[number // len(u)].unsqueeze(2) * u[number % len(u)][:, None, :, None]
        else:
            delta = u[number // len(v)].unsqueeze(2) * v[number % len(v)].unsqueeze(1)
        delta = delta.view(rows.shape).mul_(self.scaling)
        return rows.copy_(delta.add_(rows.to(delta.dtype)))


class _Lycoris(Tuner):
    """What both kinds have in common."""

    options = _OPTIONS
    is_additive = True

    def read(self, options: Options) -> LycorisSettings:
        """Read ranks and alphas.

        Raises:
            AdapterError: They are not sound.
        """
        return LycorisSettings(
            rank=options.count("r", 8),
            alpha=options.number("alpha", 8),
            rank_pattern=options.pattern("rank_pattern", whole=True),
            alpha_pattern=options.pattern("alpha_pattern", whole=False),
        )

    def _weight(self, layer: Layer) -> Parameter:
        """Return the weight.

        Raises:
            PlanError: PEFT does not define this kind for such a layer.
        """
        weight = layer.parameters.get("weight")
        if weight is None or not 2 <= len(weight.shape) <= 4:
            raise layer.mismatch(f"{self.title} of a linear layer or a convolution")
        if layer.is_transposed:
            raise PlanError(
                f"{self.title} is not defined for a weight that is stored transposed (Conv1D)",
                where=layer.module.where,
                got=f"'{weight.name}' {weight.shape}",
                hint="adapter of another model?",
            )
        return weight


class LoHa(_Lycoris):
    """`peft_type: LOHA`."""

    peft_type = "LOHA"
    title = "LoHa"
    formula = "W + scaling * (A1 @ B1) * (A2 @ B2)"
    factors = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"})
    remarks = "linear layers and convolutions, with the Tucker form too"

    def check(self, module: AdapterModule, settings: LycorisSettings) -> None:
        """Check the rank.

        Raises:
            AdapterError: A factor is missing, or has another rank than is configured.
        """
        tensors = module.need("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        has_core = _has_core(module)
        if has_core:
            module.need("hada_t1", "hada_t2")
        rank = tensors[0].shape[0 if has_core else -1] if tensors[0].shape else 0
        check_rank(module, rank, expected=settings.rank_of(module.module))

    def plan(self, layer: Layer, settings: LycorisSettings, shared: Shared) -> list[PlannedTerm]:
        """Plan the delta of the weight."""
        del shared
        shape, module = self._weight(layer).shape, layer.module
        rank = settings.rank_of(module.module)
        if _has_core(module):
            kernel = _kernel(layer, shape)
            pairs = [
                module.fit(f"hada_w{number}_{end}", rank, shape["ab".index(end)])
                for number in (1, 2)
                for end in "ab"
            ]
            cores = [module.fit(name, rank, rank, *kernel) for name in ("hada_t1", "hada_t2")]
            tensors = (*pairs, *cores)
        else:
            tensors = (
                module.fit("hada_w1_a", shape[0], rank),
                module.fit("hada_w1_b", rank, prod(shape[1:])),
                module.fit("hada_w2_a", shape[0], rank),
                module.fit("hada_w2_b", rank, prod(shape[1:])),
            )
        term = HadamardTerm(tensors, settings.scaling_of(module.module))
        return [PlannedTerm("weight", term)]

    def describe(self, module: AdapterModule, settings: LycorisSettings) -> dict[str, Any]:
        """Give rank, scaling and the delta's shape."""
        a, b = module.need("hada_w1_a", "hada_w1_b")
        core = module.get("hada_t1")
        window = prod(core.shape[2:]) if core else 1
        return {
            "rank": settings.rank_of(module.module),
            "scaling": settings.scaling_of(module.module),
            "shape": [a.shape[1 if core else 0], b.shape[1] * window],
            "dtype": a.dtype.value,
        }


class LoKr(_Lycoris):
    """`peft_type: LOKR`."""

    peft_type = "LOKR"
    title = "LoKr"
    formula = "W + scaling * kron(U, V)"
    factors = frozenset(
        {
            "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
        }
    )  # fmt: skip
    remarks = "linear layers and convolutions, with the Tucker form too"

    def check(self, module: AdapterModule, settings: LycorisSettings) -> None:
        """Check that the factors can be multiplied.

        Raises:
            AdapterError: One is missing or flat, or has another rank than is configured.
        """
        left, right = _left(module), _right(module)
        rank = settings.rank_of(module.module)
        for tensor in (*left, *right):
            if len(tensor.shape) < 2 or 0 in tensor.shape:
                raise AdapterError(
                    "adapter tensor is empty or flat",
                    where=f"key '{tensor.name}' of {tensor.path}",
                    got=f"shape {tensor.shape}",
                    hint="shards of training that were not gathered? Save the adapter again",
                )
        ranks = [(left[0], 1), (left[1], 0)] if len(left) == 2 else []
        if len(right) == 2:
            ranks += [(right[0], 1), (right[1], 0)]
        elif len(right) == 3:
            ranks += [(right[0], 0), (right[1], 0), (right[2], 0), (right[2], 1)]
        for tensor, dimension in ranks:
            check_rank(module, tensor.shape[dimension], expected=rank)

    def plan(self, layer: Layer, settings: LycorisSettings, shared: Shared) -> list[PlannedTerm]:
        """Plan the delta of the weight."""
        del shared
        shape, module = self._weight(layer).shape, layer.module
        left, right = _left(module), _right(module)
        rows, columns = _left_shape(left)
        # of V, as PEFT makes it for this layer
        outer = (shape[0] // rows, shape[1] // columns)
        is_divided = outer == (shape[0] / rows, shape[1] / columns)
        if len(right) == 3:
            got: tuple[int, ...] = (
                right[0].shape[1],
                right[1].shape[1],
                *right[2].shape[2:],
            )
            fits = got == (*outer, *_kernel(layer, shape))
        else:
            got = (right[0].shape[0], *right[-1].shape[1:])
            flat = (outer[0], outer[1] * prod(shape[2:]))
            fits = got == (flat if len(right) == 2 else (*outer, *shape[2:]))
        if not is_divided or not fits:
            raise layer.mismatch(f"the Kronecker product of {(rows, columns)} and {got}")
        term = KroneckerTerm(left, right, settings.scaling_of(module.module))
        return [PlannedTerm("weight", term)]

    def describe(self, module: AdapterModule, settings: LycorisSettings) -> dict[str, Any]:
        """Give rank, scaling and the delta's shape."""
        left, right = _left(module), _right(module)
        rows, columns = _left_shape(left)
        if len(right) == 3:
            v = right[0].shape[1], right[1].shape[1] * prod(right[2].shape[2:])
        else:
            v = right[0].shape[0], prod(right[-1].shape[1:])
        return {
            "rank": settings.rank_of(module.module),
            "scaling": settings.scaling_of(module.module),
            "shape": [rows * v[0], columns * v[1]],
            "dtype": left[0].dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (LoHa(), LoKr())


def _has_core(module: AdapterModule) -> bool:
    return not module.tensors.keys().isdisjoint({"hada_t1", "hada_t2"})


def _kernel(layer: Layer, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the kernel of a convolution as the Tucker form has it: of two dimensions.

    Raises:
        PlanError: The layer is no convolution.
    """
    if len(shape) < 3:
        raise layer.mismatch("factors of a convolution")
    return shape[2], shape[3] if len(shape) == 4 else 1


def _left(module: AdapterModule) -> tuple[StoredTensor, ...]:
    whole = module.get("lokr_w1")
    return (whole,) if whole else tuple(module.need("lokr_w1_a", "lokr_w1_b"))


def _right(module: AdapterModule) -> tuple[StoredTensor, ...]:
    whole = module.get("lokr_w2")
    if whole:
        return (whole,)
    core = module.get("lokr_t2")
    return (*module.need("lokr_w2_a", "lokr_w2_b"), *([core] if core else []))


def _left_shape(left: Sequence[StoredTensor]) -> tuple[int, int]:
    return left[0].shape[0], left[-1].shape[1]
