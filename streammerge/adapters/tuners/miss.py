"""MiSS: one small block of numbers that is repeated over the whole weight.

With the block B, every R inputs share its values, a last part of K the first of them:

    balance   W[n, k] += B[k mod R, n]                 B (R, N)
    mini      W[n, k] += B[k mod R, n mod M]           B (R, M)
    bat       W_ij += W_ij @ B_i + B_i                 B (N / R, R, R); W in blocks of R x R

each sum rounded once to the weight's dtype. Bone is the older name of the same adapters, and knows
no mini; PEFT dropped it in 0.19 for a script that renames the tensors.

Sources: peft.tuners.miss, Kang and Yin 2024, "MiSS" (arXiv:2409.15371). Shapes: N out_features, K
in_features, R rank, M mini_r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from streammerge.adapters.terms import ScaledTerm, TunerTerm
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

__all__ = ["TUNERS", "BatTerm", "Bone", "Miss", "MissTerm"]

Form = Literal["balance", "mini", "bat"]


@dataclass(frozen=True, slots=True)
class MissTerm(ScaledTerm):
    """Add the block to every R columns."""

    block: StoredTensor
    """(R, N), or (R, M) that is repeated over the rows."""
    scaling: float = 1.0

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The block."""
        return (self.block,)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the block takes when it is turned and scaled."""
        del shape
        rank, width = self.block.shape
        return 2 * 8 * rank * width

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Turn the block, so that there is a row of it for a row of the weight."""
        del weight
        block = factors[0].T.contiguous()
        return block if self.scaling == 1.0 else block * self.scaling

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Add the block's rows to these, time after time."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        count, rank = state.shape
        block = state[torch.arange(begin, begin + len(rows)) % count]
        wide = rows.to(block.dtype)
        whole = wide.shape[1] // rank * rank
        wide[:, :whole].view(len(rows), -1, rank).add_(block[:, None, :])
        wide[:, whole:].add_(block[:, : wide.shape[1] - whole])
        return wide.to(rows.dtype)


@dataclass(frozen=True, slots=True)
class BatTerm(TunerTerm):
    """Multiply each block of R x R by its block of the adapter, and add that one itself."""

    blocks: StoredTensor
    """(N / R, R, R)"""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The blocks."""
        return (self.blocks,)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what one block of the weight needs, where a tile has less room than that."""
        del shape
        return 4 * 8 * self.blocks.shape[1] ** 2

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Return the blocks."""
        del weight
        return factors[0]

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Take the part of each block of rows that is in this tile."""
        rank = state.shape[-1]
        wide = rows.to(state.dtype)
        end = begin + len(rows)
        for number in range(begin // rank, -(-end // rank)):
            first, last = max(begin, number * rank), min(end, (number + 1) * rank)
            self._change(wide[first - begin : last - begin], first - number * rank, state[number])
        return rows.copy_(wide)

    @staticmethod
    def _change(rows: torch.Tensor, first: int, block: torch.Tensor) -> None:
        """Change rows `first, ...` of a block of rows, in place.

        The product is taken of whole blocks, one by one, because it rounds otherwise with fewer
        rows or more; not of more blocks at a time than the tile itself has room for.
        """
        count, columns = rows.shape
        rank = len(block)
        step = max(1, count * columns // (rank * rank)) * rank
        for at in range(0, columns, step):
            part = rows[:, at : at + step]
            pieces = part.new_zeros(rank, part.shape[1])
            pieces[first : first + count] = part
            pieces = pieces.view(rank, -1, rank).permute(1, 0, 2).contiguous()
            delta = pieces.bmm(block.expand(pieces.shape)).add_(block)
            part.add_(delta[:, first : first + count].permute(1, 0, 2).flatten(1))


@dataclass(frozen=True, slots=True)
class _Settings:
    rank: int
    form: Form
    mini_rank: int


class Miss(Tuner):
    """`peft_type: MISS`."""

    peft_type = "MISS"
    title = "MiSS (balance, mini, bat)"
    formula = "W[n, k] += B[k mod R, n]; bat: W_ij += W_ij @ B_i + B_i"
    factors = frozenset({"miss_block"})
    options = frozenset({"mini_r", "miss_dropout", "r"})
    remarks = "adapter_weights: not with bat"
    forms: tuple[Form, ...] = ("balance", "mini", "bat")
    block_name = "miss_block"

    def read(self, options: Options) -> _Settings:
        """Read rank and form.

        Raises:
            AdapterError: They are not sound.
        """
        raw = options.get("init_weights")
        form: Any = raw if isinstance(raw, str) else "balance"
        if form not in self.forms or (isinstance(raw, str) and raw == "balance"):
            words = " or ".join(["true", "false", *self.forms[1:]])
            raise options.bad("init_weights", expected=words)
        return _Settings(options.count("r", 64), form, options.count("mini_r", 1))

    def check(self, module: AdapterModule, settings: _Settings) -> None:
        """Check the block's shape against the configuration.

        Raises:
            AdapterError: It has another.
        """
        (block,) = module.need(self.block_name)
        rank, shape = settings.rank, block.shape
        fits = {
            "balance": len(shape) == 2,
            "mini": len(shape) == 2 and shape[1] == settings.mini_rank,
            "bat": len(shape) == 3 and shape[1] == shape[2],
        }
        if not fits[settings.form] or 0 in shape:
            raise AdapterError(
                "adapter tensor has another shape than its form has",
                where=f"key '{block.name}' of {block.path}",
                expected={
                    "balance": "(r, out_features)",
                    "mini": f"(r, {settings.mini_rank})",
                    "bat": "(out_features / r, r, r)",
                }[settings.form],
                got=shape,
            )
        check_rank(module, shape[-1] if settings.form == "bat" else shape[0], expected=rank)

    def plan(self, layer: Layer, settings: _Settings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan what the block does to the weight."""
        del shared
        (block,) = layer.module.need(self.block_name)
        out_features, in_features = linear_size(layer)
        rank = settings.rank
        fits = {
            "balance": rank <= in_features and block.shape[1] == out_features,
            "mini": rank <= in_features and out_features % block.shape[1] == 0,
            "bat": in_features % rank == 0 and block.shape[0] * rank == out_features,
        }
        if not fits[settings.form]:
            raise layer.mismatch(f"{block.name.rpartition('.')[2]} {block.shape}")
        term = BatTerm(block) if settings.form == "bat" else MissTerm(block)
        return [PlannedTerm("weight", term)]

    def describe(self, module: AdapterModule, settings: _Settings) -> dict[str, Any]:
        """Give rank, form and the block's shape."""
        (block,) = module.need(self.block_name)
        return {
            "rank": settings.rank,
            "form": settings.form,
            "shape": list(block.shape),
            "dtype": block.dtype.value,
        }


class Bone(Miss):
    """`peft_type: BONE`, of PEFT before 0.19: MiSS under an older name."""

    peft_type = "BONE"
    title = "Bone (PEFT before 0.19)"
    factors = frozenset({"bone_block"})
    options = frozenset({"r"})
    remarks = "merged as the MiSS adapter that PEFT's own script turns it into"
    forms = ("balance", "bat")
    block_name = "bone_block"


TUNERS: tuple[Tuner, ...] = (Miss(), Bone())
