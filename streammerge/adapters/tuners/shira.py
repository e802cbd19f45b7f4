"""Sparse adapters: some entries of a weight are trained by themselves.

SHiRA, with n values v at the positions (row, column):

    W[row_i, column_i] += v_i                                   one rounding

Super-Tuning, with n values at positions of the flattened weight; Supra adds a low-rank delta:

    W.flat[index_i] += v_i        v is rounded first, then the sum
    W += lora_alpha / r * B @ A   rounded before it is added

A file of Super-Tuning may leave its positions out: they are those of the entries that are largest
(or smallest) by magnitude. Entries of equal magnitude have no order of their own there, so that
such a file says what it means only for a weight whose trained entries all differ.

Sources: peft.tuners.shira, Bhardwaj et al. 2024, "Sparse High Rank Adapters"; peft.tuners.
supertuning, arXiv:2607.09287. Shapes: N out_features, K in_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import Factor, LoraTerm, TunerTerm
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

__all__ = ["TUNERS", "Shira", "SparseTerm", "SuperTuning"]

# positions in int64: as read, of rows and columns, and as they are sorted and checked
_BYTES_PER_ENTRY = 128
# a weight, its magnitudes, and what a partial sort keeps of each entry: its value and position
_BYTES_TO_RANK_ENTRY = 8 + 8 + 16


@dataclass(frozen=True, slots=True)
class SparseTerm(TunerTerm):
    """Add values to single entries."""

    values: StoredTensor
    """(n,)"""
    indices: StoredTensor | None
    """(2, n) rows and columns, or (n,) positions in the flattened weight; None to rank entries."""
    shape: tuple[int, int]
    """Of the weight."""
    rounds_values: bool
    """Whether the values are rounded to the weight's dtype before they are added."""
    takes_largest: bool = True
    """Whether the largest entries are meant where there are no positions."""
    breaks_ties: bool = False
    """Whether entries of equal magnitude may be told apart by torch's sort alone."""
    scaling: float = 1.0

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The values, and the positions if they are stored."""
        return (self.values,) if self.indices is None else (self.values, self.indices)

    @property
    def is_additive(self) -> bool:
        """Whether it adds what does not depend on the weight: not if the weight is ranked."""
        return self.indices is not None

    def scaled(self, weight: float) -> TunerTerm:
        """Return `weight` times the term."""
        if self.indices is None:
            return TunerTerm.scaled(self, weight)
        return replace(self, scaling=self.scaling * weight)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what positions need; and what a ranking of all entries does."""
        ranking = _BYTES_TO_RANK_ENTRY * prod(shape) if self.indices is None else 0
        return _BYTES_PER_ENTRY * self.values.shape[0] + ranking

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Sort the entries by position, so that a tile finds its own.

        Raises:
            AdapterError: Positions are outside the weight, named twice, or not to be found again.
        """
        values = factors[0]
        if self.scaling != 1.0:
            values = values * self.scaling
        if self.rounds_values:
            values = values.to(weight.dtype).to(values.dtype)
        if self.indices is None:
            positions = self._ranked(weight.whole().view(-1))
        else:
            positions = self._flattened(factors[1])
        positions, order = positions.sort()
        if bool((positions[1:] == positions[:-1]).any()):
            raise AdapterError(
                "adapter names an entry twice", where=self._where, got="equal positions"
            )
        return positions, values[order]

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Add the values that are in this tile."""
        positions, values = state
        columns = self.shape[1]
        start = begin * columns
        first, last = _between(positions, start, start + rows.numel())
        if first == last:
            return rows
        flat = rows.view(-1)
        at = positions[first:last] - start
        flat[at] = (flat[at].to(values.dtype) + values[first:last]).to(rows.dtype)
        return rows

    @property
    def _where(self) -> str:
        tensor = self.indices or self.values
        return f"key '{tensor.name}' of {tensor.path}"

    def _flattened(self, stored: torch.Tensor) -> torch.Tensor:
        """Return positions in the flattened weight.

        Raises:
            AdapterError: They are outside of it.
        """
        count, columns = self.shape
        # of files that were written on Windows they are floating-point numbers
        stored = stored.long()
        limits = (count, columns) if stored.dim() == 2 else (count * columns,)
        for numbers, limit in zip(stored.view(len(limits), -1), limits, strict=True):
            if numbers.numel() and (int(numbers.min()) < 0 or int(numbers.max()) >= limit):
                raise AdapterError(
                    "adapter names entries outside of the weight: another base?",
                    where=self._where,
                    expected=f"positions from 0 to {limit - 1}",
                    got=f"{int(numbers.min())} to {int(numbers.max())}",
                )
        return stored[0] * columns + stored[1] if stored.dim() == 2 else stored

    def _ranked(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the positions of the entries that are largest or smallest.

        Raises:
            AdapterError: Entries of equal magnitude are in question.
        """
        import torch  # noqa: PLC0415 (planning needs no torch)

        magnitudes = flat.abs()
        count = self.values.shape[0]
        found, positions = torch.topk(magnitudes, count, largest=self.takes_largest)
        has_ties = bool((found[1:] == found[:-1]).any())
        has_ties |= int((magnitudes == found[-1]).sum()) > 1
        if has_ties and not self.breaks_ties:
            raise AdapterError(
                "adapter has no positions, and its base has entries of equal magnitude: which "
                "value is whose cannot be known",
                where=self._where,
                expected="supertuning_indices",
                hint="save it again with save_precomputed_indices=True; peft_bugs: reproduce "
                "takes the order that PEFT finds on a CPU",
            )
        return positions


@dataclass(frozen=True, slots=True)
class _ShiraSettings:
    rank: int


class Shira(Tuner):
    """`peft_type: SHIRA`."""

    peft_type = "SHIRA"
    title = "SHiRA"
    formula = "W[indices] += values"
    factors = frozenset({"shira_weight", "shira_indices"})
    options = frozenset({"mask_type", "r", "random_seed"})
    is_additive = True

    def read(self, options: Options) -> _ShiraSettings:
        """Read the rank, which says how many entries there are."""
        return _ShiraSettings(options.count("r", 32))

    def check(self, module: AdapterModule, settings: Any) -> None:
        """Check that each value has a position."""
        del settings
        values, indices = module.need("shira_weight", "shira_indices")
        if len(values.shape) != 1 or not values.shape[0] or indices.shape != (2, values.shape[0]):
            raise AdapterError(
                "values and positions of the adapter do not belong together",
                where=module.where,
                got=f"shira_weight {values.shape}, shira_indices {indices.shape}",
            )

    def plan(self, layer: Layer, settings: _ShiraSettings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the addition to the weight."""
        del shared
        size = linear_size(layer)
        values, indices = layer.module.need("shira_weight", "shira_indices")
        if values.shape[0] != settings.rank * sum(size):
            raise layer.mismatch(
                f"{values.shape[0]} entries, which are not r * (out_features + in_features) of "
                f"r = {settings.rank}"
            )
        return [PlannedTerm("weight", SparseTerm(values, indices, size, rounds_values=False))]

    def describe(self, module: AdapterModule, settings: Any) -> dict[str, Any]:
        """Give the number of entries."""
        del settings
        (values,) = module.need("shira_weight")
        return {"entries": values.shape[0], "dtype": values.dtype.value}


@dataclass(frozen=True, slots=True)
class _SuperSettings:
    sparsity: float
    rank: int | None
    """None without the low-rank part."""
    scaling: float
    takes_largest: bool
    breaks_ties: bool


class SuperTuning(Tuner):
    """`peft_type: SUPERTUNING`."""

    peft_type = "SUPERTUNING"
    title = "Super-Tuning, Supra"
    formula = "W.flat[indices] += values; W += lora_alpha / r * B @ A"
    factors = frozenset(
        {"supertuning_indices", "supertuning_lora_A", "supertuning_lora_B", "supertuning_values"}
    )
    options = frozenset(
        {"lora_alpha", "lora_dropout", "r", "save_precomputed_indices", "select_top", "sparsity"}
    )
    is_additive = True
    remarks = "without saved positions: no adapter_weights, and no two entries of equal magnitude"

    def read(self, options: Options) -> _SuperSettings:
        """Read the configuration.

        Raises:
            AdapterError: It is not sound.
        """
        sparsity = options.number("sparsity", 0.99)
        if not 0 <= sparsity < 1:
            raise options.bad("sparsity", expected="a number from 0 to below 1")
        rank = options.count("r") if options.get("r") is not None else None
        scaling = options.number("lora_alpha", 2 * rank) / rank if rank is not None else 1.0
        return _SuperSettings(
            sparsity=sparsity,
            rank=rank,
            scaling=scaling,
            takes_largest=options.flag("select_top", default=True),
            breaks_ties=options.choices.reproduces_bugs,
        )

    def check(self, module: AdapterModule, settings: _SuperSettings) -> None:
        """Check that each value has a position, and that the factors are there."""
        (values,) = module.need("supertuning_values")
        indices = module.get("supertuning_indices")
        is_flat = len(values.shape) == 1 and values.shape[0]
        if not is_flat or (indices is not None and indices.shape != values.shape):
            raise AdapterError(
                "values and positions of the adapter do not belong together",
                where=module.where,
                got=f"supertuning_values {values.shape}, supertuning_indices "
                f"{None if indices is None else indices.shape}",
            )
        if settings.rank is not None:
            a, b = module.need("supertuning_lora_A", "supertuning_lora_B")
            is_pair = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
            check_rank(module, a.shape[0] if is_pair else 0, expected=settings.rank)

    def plan(self, layer: Layer, settings: _SuperSettings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the addition of single entries, then of the low-rank delta."""
        del shared
        module, size = layer.module, linear_size(layer)
        (values,) = module.need("supertuning_values")
        expected = int(prod(size) * (1 - settings.sparsity))
        if values.shape[0] != expected:
            raise layer.mismatch(
                f"{values.shape[0]} entries, where a sparsity of {settings.sparsity} leaves "
                f"{expected}"
            )
        sparse = SparseTerm(
            values,
            module.get("supertuning_indices"),
            size,
            rounds_values=True,
            takes_largest=settings.takes_largest,
            breaks_ties=settings.breaks_ties,
        )
        planned = [PlannedTerm("weight", sparse)]
        if settings.rank is not None:
            out_features, in_features = size
            low_rank = LoraTerm(
                Factor(module.fit("supertuning_lora_A", settings.rank, in_features)),
                Factor(module.fit("supertuning_lora_B", out_features, settings.rank)),
                settings.scaling,
                is_transposed=False,
                rounds_delta=True,
            )
            planned.append(PlannedTerm("weight", low_rank))
        return planned

    def describe(self, module: AdapterModule, settings: _SuperSettings) -> dict[str, Any]:
        """Give the number of entries, and the rank if there is a low-rank part."""
        (values,) = module.need("supertuning_values")
        described: dict[str, Any] = {"entries": values.shape[0], "dtype": values.dtype.value}
        if settings.rank is not None:
            described.update(rank=settings.rank, scaling=settings.scaling)
        return described


TUNERS: tuple[Tuner, ...] = (Shira(), SuperTuning())


def _between(positions: torch.Tensor, start: int, end: int) -> tuple[int, int]:
    """Return which of sorted positions are in a range."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    first, last = torch.searchsorted(positions, torch.tensor([start, end])).tolist()
    return first, last
