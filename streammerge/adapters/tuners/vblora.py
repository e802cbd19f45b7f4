"""VB-LoRA: both factors are cut into short vectors, each a mixture of a few vectors of one bank.

    W + B @ A        piece = sum over i of softmax(the k greatest logits)_i * bank[i]

Logits of A are (R, K / length, V), of B (N / length, R, V), with V vectors in the bank (V, length).

With save_only_topk_weights the file has the places of the k greatest logits and, but for the last
one, their weights; the last is what is missing to one. PEFT makes logits of them again. Where the
others are rounded to more than one the last weight is zero here, and NaN in PEFT.

Sources: peft.tuners.vblora; Li et al. 2024, "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with
Vector Banks". Shapes: N out_features, K in_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import check_rank, linear_size
from streammerge.adapters.tuners.seeded import ProductTerm, check_indices, fit_shared
from streammerge.dtypes import Dtype
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "VbLora", "VbLoraTerm"]

_BANK = "vblora_vector_bank"
_NAMES = ("vblora_logits_A", "vblora_logits_B")
_ENDS = ("_topk_indices", "_topk_weights")


@dataclass(frozen=True, slots=True)
class VbLoraTerm(ProductTerm):
    """Add the product of two factors made of a bank's vectors."""

    top: int
    """Vectors in a mixture."""
    bank: StoredTensor
    """(V, length)"""
    a: tuple[StoredTensor, ...]
    """The logits, or places and weights, (R, K / length, ...)."""
    b: tuple[StoredTensor, ...]
    """The same, (N / length, R, ...)."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The bank, and what chooses from it."""
        return (self.bank, *self.a, *self.b)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of the logits if they are made again, and of all vectors chosen."""
        vectors, length = self.bank.shape
        entries = self.a[0].shape[0] * sum(shape)
        # each chosen vector and its multiple, the mixtures, and those in another order
        chosen = (2 * self.top + 2) * entries
        # in place of the logits there are their logarithms, and infinities before them
        logits = 3 * vectors * entries // length if len(self.a) > 1 else 0
        # values, places and weights of the greatest
        greatest = 4 * self.top * entries // length
        return 8 * (chosen + logits + greatest)

    def matrices(
        self, factors: list[torch.Tensor], weight: Weight
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix the vectors of both factors."""
        bank, rest = factors[0], factors[1:]
        of_a, of_b = rest[: len(self.a)], rest[len(self.a) :]
        dtype = weight.compute_dtype
        mixed = self._mixed(self._logits(of_a, self.a).to(dtype), bank)
        a = mixed.reshape(len(mixed), -1)
        mixed = self._mixed(self._logits(of_b, self.b).to(dtype), bank)
        # the pieces of B are columns
        b = mixed.transpose(1, 2).reshape(-1, mixed.shape[1])
        return a, b

    def _mixed(self, logits: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        greatest, places = logits.topk(self.top, dim=-1)
        mixed: torch.Tensor = (greatest.softmax(dim=-1).unsqueeze(-1) * bank[places]).sum(-2)
        return mixed

    def _logits(
        self, factors: list[torch.Tensor], stored: tuple[StoredTensor, ...]
    ) -> torch.Tensor:
        """Return the logits, which are made again of places and weights.

        Raises:
            AdapterError: A place is not in the bank.
        """
        if len(factors) == 1:
            return factors[0]
        import torch  # noqa: PLC0415 (planning needs no torch)

        count = self.bank.shape[0]
        places = check_indices(factors[0], stored[0], count=count)
        # in the dtype of the file, as PEFT does it when it loads one
        dtype = torch.float64 if stored[1].dtype is Dtype.F64 else torch.float32
        weights = factors[1].to(dtype)
        last = (1 - weights.sum(-1, keepdim=True)).clamp_(min=0)
        known = torch.cat([weights, last], dim=-1).log()
        nothing = torch.full((*known.shape[:-1], count), float("-inf"), dtype=dtype)
        return nothing.scatter_(-1, places, known)


@dataclass(frozen=True, slots=True)
class _Settings:
    rank: int
    top: int
    vectors: int
    length: int


class VbLora(Tuner):
    """`peft_type: VBLORA`."""

    peft_type = "VBLORA"
    title = "VB-LoRA"
    formula = "W + B @ A, of vectors from one bank"
    factors = frozenset({*_NAMES, *(name + end for name in _NAMES for end in _ENDS)})
    shared = frozenset({_BANK})
    options = frozenset(
        {
            "init_logits_std", "init_vector_bank_bound", "num_vectors", "r",
            "save_only_topk_weights", "topk", "vblora_dropout", "vector_length",
        }
    )  # fmt: skip
    is_additive = True

    def read(self, options: Options) -> _Settings:
        """Read the sizes.

        Raises:
            AdapterError: They do not fit each other.
        """
        settings = _Settings(
            options.count("r", 4),
            options.count("topk", 2),
            options.count("num_vectors", 256),
            options.count("vector_length", 256),
        )
        if settings.top > settings.vectors:
            raise options.bad("topk", expected=f"at most num_vectors, {settings.vectors}")
        return settings

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check the tensors against the configuration.

        Raises:
            AdapterError: They do not fit.
        """
        for at, name in enumerate(_NAMES):
            tensors = _tensors(module, name)
            shape = tensors[0].shape
            if len(shape) != 3 or 0 in shape:
                raise AdapterError("adapter has no logits", where=module.where, got=shape)
            check_rank(module, shape[at], expected=settings.rank)
            wanted = [settings.vectors] if len(tensors) == 1 else [settings.top, settings.top - 1]
            for tensor, count in zip(tensors, wanted, strict=True):
                _ = module.fit(_name_of(module, tensor), *shape[:2], count)

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the product."""
        outputs, inputs = linear_size(layer, allows_conv1d=True)
        a, b = (_tensors(layer.module, name) for name in _NAMES)
        length = settings.length
        if (b[0].shape[0] * length, a[0].shape[1] * length) != (outputs, inputs):
            raise layer.mismatch(
                f"'{a[0].name}' {a[0].shape} and '{b[0].name}' {b[0].shape}, of vectors of {length}"
            )
        bank = fit_shared(layer, shared, _BANK, settings.vectors, length)
        term = VbLoraTerm(layer.is_transposed, settings.top, bank, a, b)
        return [PlannedTerm("weight", term)]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give the rank and the delta's shape."""
        a, b = (_tensors(module, name) for name in _NAMES)
        return {
            "rank": settings.rank,
            "topk": settings.top,
            "shape": [b[0].shape[0] * settings.length, a[0].shape[1] * settings.length],
            "dtype": a[-1].dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (VbLora(),)


def _tensors(module: AdapterModule, name: str) -> tuple[StoredTensor, ...]:
    """Return the logits of a factor, or places and weights.

    Raises:
        AdapterError: There are neither, or both.
    """
    short = [name + end for end in _ENDS]
    if module.tensors.keys().isdisjoint(short):
        return tuple(module.need(name))
    if name in module.tensors:
        raise AdapterError(f"module has {name} in two forms", where=module.where)
    return tuple(module.need(*short))


def _name_of(module: AdapterModule, tensor: StoredTensor) -> str:
    return next(name for name, found in module.tensors.items() if found is tensor)
