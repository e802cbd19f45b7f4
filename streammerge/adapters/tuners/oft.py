"""OFT: the inputs of a layer are rotated, block by block, by `W @ M.T`; an embedding by `W @ M`.

    M = diag(R_1, R_2, ...)             M (K, K), R_i (b, b)
    R = (I - Q) @ (I + Q)^-1            Q skew-symmetric; above its diagonal is the stored vector

The inverse is solved for, or by default replaced by the start of its series:

    R = I + 2 Q + 2 Q^2 + ... + 2 Q^(t - 2) + Q^(t - 1)       t terms, PEFT from 0.18
    R = I + 2 Q + 2 Q^2 + ... + 2 Q^(t - 1)                   PEFT 0.16 and 0.17

PEFT takes the newer series for adapters of any version; here each gets the one that it was trained
with, unless PEFT's faults are to be reproduced. COFT first scales a Q that is longer than
`eps / sqrt(number of blocks)` to that length. Blocks may all be the same one.

LAPACK's bits depend on the number of threads for blocks of 256 and more.

Papers: Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning"; Qiu et al.
2025, "Orthogonal Finetuning Made Scalable". Source: peft.tuners.oft.layer. Shapes: N out_features,
K in_features (of a convolution with its window, of an embedding its dim), b block size.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import TunerTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.rotations import Windows, product_bytes, rotated_columns
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "Oft", "OftTerm", "batches"]

# entries of the blocks that are computed at a time
BATCH_ENTRIES = 1 << 16
# matrices of that size in memory at a time, LAPACK's copies included
BATCH_COPIES = 8
# blocks of this size are solved one by one: MKL fails on several at a time with several threads
MAX_BATCHED_BLOCK = 128
_OLD_HINT = "merge it with PEFT 0.15 or older, which has the formula that it was trained with"


@dataclass(frozen=True, slots=True)
class OftSettings:
    """What an OFT configuration says of the merge."""

    block_size: int
    """As asked for; 0 if the number of blocks is. PEFT changes it where K cannot be divided."""
    blocks: int
    is_shared: bool
    eps: float | None
    """The limit of COFT."""
    terms: int | None
    """Of the series; None to solve for the inverse."""
    doubles_last_term: bool
    """Whether the series is that of PEFT before 0.18."""


@dataclass(frozen=True, slots=True)
class OftTerm(TunerTerm):
    """Rotate the columns of a weight."""

    vectors: StoredTensor
    """(number of blocks, b (b - 1) / 2), or (1, ...) if all blocks are the same."""
    columns: int
    block: int
    settings: OftSettings
    is_left: bool
    """Whether PEFT multiplies `M @ W.T`, as it does but for embeddings."""

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """The vectors."""
        return (self.vectors,)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the windows of M hold, and the blocks on their way there."""
        return product_bytes(shape, self.block) + batch_bytes(self.block)

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Compute M."""
        (vectors,) = factors
        windows = Windows(
            self.columns, self.block, dtype=vectors.dtype, is_shared=len(vectors) == 1
        )
        for first, last in batches(len(vectors), self.block):
            blocks = self._blocks(vectors[first:last], count=len(vectors))
            for number, block in enumerate(blocks, first):
                windows.put(number, block if self.is_left else block.t())
        return windows.product(weight, is_left=self.is_left)

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Rotate these rows."""
        rotated: torch.Tensor = state.rows(rows, begin)
        return rotated.to(rows.dtype)

    def _blocks(self, vectors: torch.Tensor, *, count: int) -> torch.Tensor:
        """Return blocks R from their vectors, some of `count`."""
        settings = self.settings
        if settings.eps is not None:
            vectors = _limited(vectors, self.block, eps=settings.eps, count=count)
        skew = _skew(vectors, self.block)
        if settings.terms is None:
            return cayley(skew)
        return _series(skew, settings.terms, doubles_last=settings.doubles_last_term)


class Oft(Tuner):
    """`peft_type: OFT`."""

    peft_type = "OFT"
    title = "OFT (COFT, block_share, Cayley-Neumann or exact)"
    formula = "W @ blockdiag(R).T"
    factors = frozenset({"oft_R", "oft_embedding_R", "oft_r", "oft_s"})
    options = frozenset(
        """
        block_share coft eps module_dropout num_cayley_neumann_terms oft_block_size r
        use_cayley_neumann
        """.split()
    )
    remarks = "files of PEFT before 0.16 (oft_r) are refused: another parameterisation"

    def read(self, options: Options) -> OftSettings:
        """Read which rotation the vectors stand for.

        Raises:
            AdapterError: It is not sound, or of an OFT before this one.
        """
        if "oft_block_size" not in options.raw:
            raise AdapterError(
                "adapter is of the OFT of PEFT 0.13 or older, which had other rotations",
                where=options.path,
                expected="oft_block_size",
                hint=_OLD_HINT,
            )
        terms = None
        if options.flag("use_cayley_neumann", default=True):
            terms = options.count("num_cayley_neumann_terms", 5)
        eps: float | None = options.number("eps", 6e-5) if options.flag("coft") else None
        if eps is not None and eps <= 0:
            raise options.bad("eps", expected="a positive number")
        return OftSettings(
            options.count("oft_block_size", 32, least=0),
            options.count("r", 0, least=0),
            options.flag("block_share"),
            eps,
            terms,
            doubles_last_term=not options.choices.reproduces_bugs and _is_before_018(options),
        )

    def check(self, module: AdapterModule, settings: OftSettings) -> None:
        """Check that the module has one tensor, and that it holds what is above a diagonal.

        Raises:
            AdapterError: It has another, or one of an older PEFT.
        """
        old = module.get("oft_r") or module.get("oft_s")
        if old is not None:
            raise AdapterError(
                "adapter is of the OFT of PEFT 0.15 or older, which had other rotations",
                where=f"key '{old.name}' of {old.path}",
                expected="oft_R.weight",
                hint=_OLD_HINT,
            )
        vectors = _vectors(module)
        is_flat = len(vectors.shape) != 2 or not vectors.shape[0]
        if is_flat or _block_size(vectors) is None:
            raise AdapterError(
                "adapter tensor has no shape of rotations",
                where=f"key '{vectors.name}' of {vectors.path}",
                expected="(number of blocks, b * (b - 1) / 2)",
                got=vectors.shape,
            )
        if settings.is_shared and vectors.shape[0] != 1:
            raise AdapterError(
                "adapter's block_share and its tensors disagree",
                where=f"key '{vectors.name}' of {vectors.path}",
                expected="one block",
                got=vectors.shape,
            )

    def plan(self, layer: Layer, settings: OftSettings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the rotation.

        Raises:
            PlanError: It is of another size.
        """
        del shared
        module = layer.module
        vectors, columns = _vectors(module), rotated_columns(layer)
        block = _block_size(vectors)
        assert block is not None
        count = 1 if settings.is_shared else columns // block
        if columns % block or vectors.shape[0] != count:
            raise layer.mismatch(f"rotations in {vectors.shape[0]} blocks of {block} inputs")
        wanted = _wanted_block(settings, columns)
        if wanted not in {None, block}:
            raise PlanError(
                "block size of the tensors and of adapter_config.json disagree",
                where=module.where,
                expected=f"blocks of {wanted}",
                got=f"blocks of {block} from '{vectors.name}' {vectors.shape}",
                hint="adapter_config.json belongs to another adapter?",
            )
        term = OftTerm(vectors, columns, block, settings, is_left=not module.is_embedding)
        return [PlannedTerm("weight", term)]

    def variants(self, settings: OftSettings) -> tuple[str, ...]:
        """Name what differs from blocks of their own by the default series."""
        names = {
            "COFT": settings.eps is not None,
            "block_share": settings.is_shared,
            "exact Cayley": settings.terms is None,
            "Cayley-Neumann of PEFT before 0.18": settings.doubles_last_term,
        }
        return tuple(name for name, is_on in names.items() if is_on)

    def describe(self, module: AdapterModule, settings: OftSettings) -> dict[str, Any]:
        """Give the size of the blocks."""
        vectors = _vectors(module)
        return {
            "block_size": _block_size(vectors),
            "blocks": vectors.shape[0],
            "is_shared": settings.is_shared,
            "dtype": vectors.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (Oft(),)


def batches(count: int, block: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of blocks that are computed at a time."""
    step = max(1, BATCH_ENTRIES // (block * block)) if block <= MAX_BATCHED_BLOCK else 1
    for first in range(0, count, step):
        yield first, min(count, first + step)


def batch_bytes(block: int) -> int:
    """Return the bytes of the blocks of one batch on their way, in float64."""
    return BATCH_COPIES * 8 * max(BATCH_ENTRIES, block * block)


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """Return `(I - Q) @ (I + Q)^-1` for each Q (b, b)."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    identity = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    rotations: torch.Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return rotations


def _skew(vectors: torch.Tensor, block: int) -> torch.Tensor:
    """Return the skew-symmetric matrices that have the vectors above their diagonals."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    rows, columns = torch.triu_indices(block, block, 1)
    upper = torch.zeros(len(vectors), block, block, dtype=vectors.dtype)
    upper[:, rows, columns] = vectors
    return upper - upper.transpose(-2, -1)


def _limited(vectors: torch.Tensor, block: int, *, eps: float, count: int) -> torch.Tensor:
    """Scale the vectors of matrices that are too long."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    skew = _skew(vectors, block)
    limit = eps * 1 / torch.sqrt(torch.tensor(count))
    norm = torch.norm(skew, dim=(1, 2), keepdim=True)
    limited = torch.where(norm <= limit, skew, limit * (skew / norm))
    rows, columns = torch.triu_indices(block, block, 1)
    return limited[:, rows, columns]


def _series(skew: torch.Tensor, terms: int, *, doubles_last: bool) -> torch.Tensor:
    """Return the start of the series; a third term of the newer one brings a fourth."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    result = torch.eye(skew.shape[-1], dtype=skew.dtype).repeat(len(skew), 1, 1)
    if terms > 1:
        result.add_(skew, alpha=2.0)
    if terms > 2:
        power = torch.bmm(skew, skew)
        result.add_(power, alpha=2.0)
        doubled = terms - 3 if doubles_last else max(0, terms - 4)
        for _ in range(doubled):
            power = torch.bmm(power, skew)
            result.add_(power, alpha=2.0)
        if not doubles_last:
            result.add_(torch.bmm(power, skew))
    return result


def _vectors(module: AdapterModule) -> StoredTensor:
    (vectors,) = module.need("oft_embedding_R" if module.is_embedding else "oft_R")
    return vectors


def _block_size(vectors: StoredTensor) -> int | None:
    """Return b of vectors of `b (b - 1) / 2` entries, or None if that is no such number."""
    entries = vectors.shape[-1]
    block = (1 + isqrt(1 + 8 * entries)) // 2
    return block if block * (block - 1) // 2 == entries else None


def _wanted_block(settings: OftSettings, columns: int) -> int | None:
    """Return the block size of the configuration; None where PEFT takes one that is near it."""
    if settings.block_size and not columns % settings.block_size:
        return settings.block_size
    if settings.blocks and not settings.block_size and not columns % settings.blocks:
        return columns // settings.blocks
    return None


def _is_before_018(options: Options) -> bool:
    """Whether an older PEFT wrote the adapter; it noted its version from 0.18 on."""
    version = options.text("peft_version")
    numbers = [int(part) for part in (version or "").split(".")[:2] if part.isdecimal()]
    return tuple(numbers) < (0, 18)
