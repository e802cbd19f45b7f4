"""The base as adapters saw it whose training had it in 4 bits, where that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.adapters.training import TrainedInFourBits, trained_in_four_bits
from streammerge.codecs.rounded import AbsmaxStore, RoundedTensor, round_checkpoint
from streammerge.errors import PlanError
from streammerge.plan.family import is_conv1d
from streammerge.plan.linears import linear_weights
from streammerge.plan.names import canonical_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streammerge.adapters.adapter import Adapter
    from streammerge.checkpoint.index import Checkpoint
    from streammerge.config import ExportConfig

__all__ = ["TrainedBase", "trained_base"]

# beside one for each thread: the next ones are looked at while the last are still in use
SPARE_WEIGHTS = 2


@dataclass(frozen=True, slots=True)
class TrainedBase:
    """What adapters are merged onto."""

    checkpoint: Checkpoint
    store: AbsmaxStore
    """Of the weights that are rounded."""
    notes: tuple[str, ...] = ()

    def reserve(self, *, readers: int, workers: int) -> int:
        """Let as many weights be kept as threads may need, and return the memory that it takes.

        Args:
            readers: Threads that read blocks.
            workers: Threads that may look at whole weights besides.
        """
        tensors = self.checkpoint.tensors.values()
        weights = [tensor.weight for tensor in tensors if isinstance(tensor, RoundedTensor)]
        if not weights:
            return 0
        threads = readers + workers
        self.store.capacity = threads + SPARE_WEIGHTS
        return (
            threads * max(weight.reader_bytes for weight in weights)
            + self.store.capacity * max(weight.absmax_bytes for weight in weights)
            + max(weight.scan_bytes for weight in weights)
        )


def trained_base(
    base: Checkpoint, adapters: Sequence[Adapter], config: ExportConfig, *, is_quantized: bool
) -> TrainedBase:
    """Return the base as the adapters are to be merged onto it.

    Args:
        base: As it is stored, or decoded.
        adapters: The adapters.
        config: What the user asked for.
        is_quantized: Whether it is stored as codes.

    Raises:
        PlanError: The base is quantized, or has nothing to be rounded; or the training is known to
            have had other codes.
        UnsupportedError: A weight is of a dtype or a size that is not rounded.
    """
    store = AbsmaxStore(SPARE_WEIGHTS)
    signs = [sign for adapter in adapters if (sign := trained_in_four_bits(adapter)) is not None]
    if config.qlora_base == "dequantized-nf4":
        return _rounded(base, signs, store, is_quantized=is_quantized)
    if config.qlora_base is None and signs and not is_quantized:
        return TrainedBase(base, store, (_advice(signs[0]),))
    return TrainedBase(base, store)


def _rounded(
    base: Checkpoint, signs: Sequence[TrainedInFourBits], store: AbsmaxStore, *, is_quantized: bool
) -> TrainedBase:
    if is_quantized:
        raise PlanError(
            "qlora_base: dequantized-nf4 is for a base in 16 bits, and this one is quantized",
            where=base.path,
            hint="remove qlora_base: the merge is onto what the codes stand for anyway",
        )
    is_nested = _is_nested(signs)
    skipped = {name for sign in signs for name in sign.skipped}
    linears = linear_weights(base.tensors.values(), base.config)
    names = [name for name in linears.quantized if not _is_skipped(name, skipped, base)]
    if not names:
        raise PlanError(
            "base has no linear layers that bitsandbytes would quantize",
            where=base.path,
            hint="remove qlora_base",
        )
    rounded = round_checkpoint(
        base,
        names,
        store,
        is_nested=is_nested,
        is_turned=lambda name: is_conv1d(name.removesuffix(".weight"), config=base.config),
    )
    double = "with" if is_nested else "without"
    what = f"NF4 codes of {len(names)} linears stand for, {double} double quantization"
    notes = [f"merged onto what {what} (qlora_base)"]
    if not linears.is_family_known:
        notes.append("the family is not known: only linears with common names are rounded to NF4")
    if linears.experts or any(
        len(t.shape) == 3 and "expert" in t.name for t in base.tensors.values()
    ):
        notes.append("experts are not rounded to NF4: transformers 5 keeps them in 16 bits")
    notes += [
        f"{sign.sign}: that checkpoint itself as model_name_or_path is surer to be what it was "
        "trained on"
        for sign in signs
        if sign.checkpoint is not None
    ]
    return TrainedBase(rounded, store, tuple(notes))


def _is_nested(signs: Sequence[TrainedInFourBits]) -> bool:
    """Whether trainings had double quantization, which they have unless they say otherwise.

    Raises:
        PlanError: They had other codes, or contradict each other.
    """
    for sign in signs:
        if sign.quant_type not in {None, "nf4"}:
            raise PlanError(
                "qlora_base: dequantized-nf4 is not what this adapter was trained on",
                where=sign.sign,
                expected="nf4",
                got=sign.quant_type,
                hint="set qlora_base: original",
            )
    nested = {sign.is_nested for sign in signs} - {None}
    if len(nested) > 1:
        raise PlanError(
            "adapters were trained with and without double quantization",
            where=" and ".join(sign.sign for sign in signs),
            hint="merge one of them by itself, then the other onto the result",
        )
    return nested != {False}


def _is_skipped(name: str, skipped: set[str], base: Checkpoint) -> bool:
    """Whether a module is in a list of those that are not converted, as transformers reads it."""
    module = canonical_name(name, base.config).removesuffix(".weight")
    return any(
        module == entry or module.startswith(f"{entry}.") or module.endswith(entry)
        for entry in skipped
    )


def _advice(sign: TrainedInFourBits) -> str:
    instead = (
        f"model_name_or_path: {sign.checkpoint}"
        if sign.checkpoint is not None
        else "qlora_base: dequantized-nf4"
    )
    return (
        f"{sign.sign}: a training on 4 bits, merged onto the weights as they are given "
        f"(qlora_base: original); `streammerge compare-bases` shows what that makes, {instead} "
        "merges onto what it was trained on"
    )
