"""BOFT: the inputs of a layer are rotated by a product of sparse matrices, and its rows scaled.

    s * (W @ M.T),  M = M_m @ ... @ M_1             W (N, K), M (K, K), s (N,)
    M_i = P_i @ diag(R_i1, R_i2, ...) @ P_i.T       R (b, b)
    R = (I - Q) @ (I + Q)^-1,  Q = (X - X.T) / 2    X (b, b) as stored

P_i is a butterfly: of each `b * 2^(i - 1)` inputs, pieces of `b / 2` are reordered, first those in
even places and then those in odd ones. So M_1 is block-diagonal, and M is so with blocks of
`b * 2^(m - 1)`.

PEFT needs its CUDA extension for m > 1; without it, it makes m = 1 of any configuration, and cannot
load a file that has more. Here such files are merged as PEFT merges them with the extension.

LAPACK's bits depend on the number of threads for blocks of 256 and more.

Paper: Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization".
Source: peft.tuners.boft.layer. Shapes: N out_features, K in_features (of a convolution with its
window), b block size, m number of factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import TunerTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.oft import batch_bytes, batches, cayley
from streammerge.adapters.tuners.rotations import Windows, product_bytes, rotated_columns
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "Boft", "BoftTerm"]


@dataclass(frozen=True, slots=True)
class BoftTerm(TunerTerm):
    """Rotate the columns of a weight and scale its rows."""

    blocks: StoredTensor
    """(m, K / b, b, b): X."""
    scale: StoredTensor
    """N values in any shape: s."""
    columns: int

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """Blocks and scale."""
        return (self.blocks, self.scale)

    @property
    def _size(self) -> int:
        """Columns of a block of M."""
        return _reach(self.blocks)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the windows of M, of a factor and of their product hold, and the blocks."""
        product = product_bytes(shape, self._size)
        copies = 1 if self.blocks.shape[0] == 1 else 3
        return copies * product + batch_bytes(self.blocks.shape[-1])

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Compute M."""
        stored, scale = factors
        product: Windows | None = None
        for number, blocks in enumerate(stored):
            factor = self._factor(blocks, number)
            if product is None:
                product = factor
            else:
                product.multiply_left(factor)
        assert product is not None
        return product.product(weight, is_left=True), scale.reshape(-1, 1)

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Rotate and scale these rows."""
        product, scale = state
        rotated: torch.Tensor = product.rows(rows, begin) * scale[begin : begin + len(rows)]
        return rotated.to(rows.dtype)

    def _factor(self, blocks: torch.Tensor, number: int) -> Windows:
        """Return M_i, counted from 0, from its blocks X."""
        count, block = blocks.shape[:2]
        windows = Windows(self.columns, self._size, block=block, dtype=blocks.dtype)
        for first, last in batches(count, block):
            part = blocks[first:last]
            rotations = cayley(0.5 * (part - part.transpose(1, 2)))
            for at, rotation in enumerate(rotations, first):
                windows.put(at, rotation)
        if number:
            windows.turn(_butterfly(self.columns, block, number))
        return windows


class Boft(Tuner):
    """`peft_type: BOFT`."""

    peft_type = "BOFT"
    title = "BOFT (any number of butterfly factors)"
    formula = "s * (W @ M.T), M a product of permuted block-diagonal rotations"
    factors = frozenset({"boft_R", "boft_s"})
    options = frozenset({"boft_block_num", "boft_block_size", "boft_dropout",
                         "boft_n_butterfly_factor"})  # fmt: skip

    def read(self, options: Options) -> tuple[int, int]:
        """Read size and number of the blocks, one of which is 0."""
        size = options.count("boft_block_size", 4, least=0)
        return size, options.count("boft_block_num", 0, least=0)

    def check(self, module: AdapterModule, settings: tuple[int, int]) -> None:
        """Check the blocks against the configuration, and whether butterflies can be made of them.

        Raises:
            AdapterError: They do not fit.
        """
        blocks, _ = module.need("boft_R", "boft_s")
        shape = blocks.shape
        is_square = len(shape) == 4 and shape[2] == shape[3] and 0 not in shape
        factors = shape[0] if is_square else 1
        # a butterfly exchanges halves of blocks among `2^i` of them
        is_divisible = factors == 1 or (
            factors <= shape[1].bit_length()
            and not shape[1] % 2 ** (factors - 1)
            and not shape[2] % 2
        )
        if not is_square or not is_divisible:
            raise AdapterError(
                "adapter tensor has no shape of butterfly rotations",
                where=f"key '{blocks.name}' of {blocks.path}",
                expected="(factors, number of blocks, b, b), for more than one factor b even and "
                "the number of blocks a multiple of 2^(factors - 1)",
                got=shape,
            )
        size, count = settings
        if size not in {0, shape[2]} or (not size and count not in {0, shape[1]}):
            raise AdapterError(
                "blocks of the tensors and of adapter_config.json disagree",
                where=module.where,
                expected=f"blocks of {size}" if size else f"{count} blocks",
                got=f"{shape[1]} blocks of {shape[2]}",
                hint="adapter_config.json belongs to another adapter?",
            )

    def plan(self, layer: Layer, settings: Any, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan rotation and scale.

        Raises:
            PlanError: They are of another size.
        """
        del settings, shared
        module = layer.module
        columns = rotated_columns(layer)
        blocks, scale = module.need("boft_R", "boft_s")
        shape = layer.weight.shape
        if blocks.shape[1] * blocks.shape[2] != columns:
            got = f"rotations in {blocks.shape[1]} blocks of {blocks.shape[2]} inputs"
            raise layer.mismatch(got)
        wanted = (shape[0], 1) if len(shape) == 2 else (1, shape[0])
        if scale.shape != wanted:
            raise PlanError(
                "scale has an unexpected shape: another base?",
                where=f"key '{scale.name}' of {scale.path}",
                expected=wanted,
                got=scale.shape,
            )
        return [PlannedTerm("weight", BoftTerm(blocks, scale, columns))]

    def describe(self, module: AdapterModule, settings: Any) -> dict[str, Any]:
        """Give size and number of the blocks, and the number of factors."""
        del settings
        (blocks,) = module.need("boft_R")
        return {
            "block_size": blocks.shape[2],
            "blocks": blocks.shape[1],
            "butterfly_factors": blocks.shape[0],
            "dtype": blocks.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (Boft(),)


def _reach(blocks: StoredTensor) -> int:
    """Return the number of inputs among which all factors together exchange."""
    reach: int = blocks.shape[-1] * 2 ** (blocks.shape[0] - 1)
    return reach


def _butterfly(columns: int, block: int, number: int) -> torch.Tensor:
    """Return which column goes where in factor `number`, counted from 0, for which it is none."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    # (groups, pairs of pieces, even or odd, piece)
    order = torch.arange(columns).view(-1, 2**number, 2, block // 2)
    return order.transpose(1, 2).reshape(-1)
