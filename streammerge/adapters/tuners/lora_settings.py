"""What the configuration of a LoRA adapter says of its merge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from streammerge.adapters.options import Options, first_match
from streammerge.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streammerge.adapters.tuners.lora_base import ResidualKind

__all__ = [
    "BlockDiagonal",
    "LoraSettings",
    "Variant",
    "is_wrapped_parameter",
    "read_settings",
]

Variant = Literal["DoRA", "QA-LoRA", "BD-LoRA", "VeLoRA", "MonteCLoRA", "KaSA", "MiCA"]
_VARIANTS: dict[str, Variant] = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
# these start from changed base weights that cannot be found again from the base alone
_LOST_BASES = {
    "pissa_niter": "its randomised SVD gives another base each time",
    "loftq": "its base was quantized and corrected in turns",
    "corda": "its base was decomposed with the covariance of training data",
    "lora_ga": "its base was changed by gradients of training data",
}
_PLAIN_INITS = frozenset({"true", "false", "gaussian", "orthogonal", "eva", "mica"})
_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA depends on the prompt and has no merged form",
    "arrow_config": "an Arrow router chooses per token and has no merged form",
}
_KEEP_BASE_HINT = (
    "save it once with path_initial_model_for_weight_conversion (LLaMA-Factory: use the "
    "pissa_converted folder); or merge it onto the saved residual base with base_is_residual: true"
)


@dataclass(frozen=True, slots=True)
class BlockDiagonal:
    """Which factors of BD-LoRA are block-diagonal."""

    blocks: int
    in_a: tuple[str, ...]
    in_b: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What a LoRA configuration says of the merge."""

    rank: int
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    variant: Variant | None = None
    residual: ResidualKind | None = None
    """What was taken off the base before training, if it is to be taken off again."""
    has_gain: bool = False
    """Whether a vector stands between B and A (KaSA)."""
    rounds_delta: bool = False
    """Whether PEFT rounds the delta to the weight's dtype before it adds it."""
    pool: int = 1
    """Inputs per column of A (QA-LoRA)."""
    block_diagonal: BlockDiagonal | None = None
    target_parameters: tuple[str, ...] = ()
    """Parameters that are adapted as such; patterns are matched against their own paths."""

    @property
    def is_plain(self) -> bool:
        """Whether the delta is `scaling * B @ A` of the factors as they are, and that is all."""
        is_spread = self.pool > 1 or self.block_diagonal is not None
        return not (self.use_dora or self.has_gain or is_spread or self.residual is not None)

    def rank_of(self, module: str) -> int:
        """Return the rank that a module, or a parameter, was trained with."""
        rank: int = first_match(self.rank_pattern or {}, self._path(module), self.rank)
        return rank

    def _path(self, module: str) -> str:
        weight = f"{module}.weight"
        return weight if is_wrapped_parameter(weight, self.target_parameters) else module

    def scaling_of(self, module: str, *, rank: int | None = None) -> float:
        """Return the factor of `B @ A` for a module.

        It is `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rsLoRA.

        Args:
            module: Path of the module in memory, without the `base_model.model.` prefix.
            rank: The rank to go with, if it is not what the configuration says.
        """
        rank = self.rank_of(module) if rank is None else rank
        alpha: float = first_match(self.alpha_pattern or {}, self._path(module), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_settings(options: Options) -> LoraSettings:
    """Read the configuration.

    Raises:
        AdapterError: It is not sound, or has no merged form.
    """
    for option, reason in _REFUSED.items():
        if options.get(option):
            got = f"{option}: {options.get(option)!r}"[:120]
            hint = "use it unmerged, with PEFT"
            raise AdapterError(reason, where=options.path, got=got, hint=hint)
    init = str(options.get("init_lora_weights") if "init_lora_weights" in options.raw else True)
    variant = _variant(init, options)
    pool = 1
    if options.flag("use_qalora"):
        pool = options.count("qalora_group_size", 16, least=2)
    return LoraSettings(
        rank=options.count("r", 8),
        lora_alpha=options.number("lora_alpha", 8),
        use_rslora=options.flag("use_rslora"),
        use_dora=options.flag("use_dora"),
        rank_pattern=options.pattern("rank_pattern", whole=True),
        alpha_pattern=options.pattern("alpha_pattern", whole=False),
        variant=variant,
        residual=_residual(init, options, has_kasa=variant == "KaSA"),
        has_gain=variant == "KaSA",
        rounds_delta=variant in {"KaSA", "BD-LoRA", "MiCA"},
        pool=pool,
        block_diagonal=_block_diagonal(options),
        target_parameters=options.names("target_parameters"),
    )


def is_wrapped_parameter(path: str, targets: Iterable[str]) -> bool:
    """Whether PEFT wraps a parameter by `target_parameters`."""
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _variant(init: str, options: Options) -> Variant | None:
    """Return the one variant that the adapter is of.

    Raises:
        AdapterError: It is of several, for which PEFT has no formula.
    """
    named = [variant for option, variant in _VARIANTS.items() if options.get(option)]
    if init == "mica":
        named.append("MiCA")
    if len(named) > 1:
        raise AdapterError(
            "adapter is of several variants of LoRA that have no formula in common",
            where=options.path,
            expected="one of them",
            got=" and ".join(named),
        )
    return named[0] if named else None


def _residual(init: str, options: Options, *, has_kasa: bool) -> ResidualKind | None:
    """Say what has to be taken off the base again.

    Raises:
        AdapterError: It cannot be found again.
    """
    name = init.lower()
    if options.choices.base_is_residual:
        return None
    if name in _PLAIN_INITS:
        return "kasa" if has_kasa else None
    if name in {"pissa", "olora"}:
        if has_kasa:
            raise AdapterError(
                "adapter of KaSA starts from a base that was changed twice",
                where=options.path,
                got=f"kasa_config and init_lora_weights: {init!r}",
                hint="merge it onto the saved base of the training with base_is_residual: true",
            )
        return "pissa" if name == "pissa" else "olora"
    lost = next((why for start, why in _LOST_BASES.items() if name.startswith(start)), None)
    raise AdapterError(
        f"adapter starts from changed base weights (init_lora_weights: {init!r}): {lost}"
        if lost
        else "adapter uses an initialisation that is not known to leave the base as it is",
        where=options.path,
        expected=None if lost else "true, false, gaussian, orthogonal, eva, mica, pissa or olora",
        got=None if lost else f"init_lora_weights: {init!r}",
        hint=_KEEP_BASE_HINT,
    )


def _block_diagonal(options: Options) -> BlockDiagonal | None:
    raw = options.get("use_bdlora")
    if not raw:
        return None
    if not isinstance(raw, dict):
        raise options.bad("use_bdlora", expected="a map with nblocks and target modules")
    inner = Options(raw, options.path)
    return BlockDiagonal(
        inner.count("nblocks", 1),
        inner.names("target_modules_bd_a"),
        inner.names("target_modules_bd_b"),
    )
