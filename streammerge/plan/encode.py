"""Store merged weights as codes: in a format of the user's choice, or in the base's own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from streammerge.checkpoint.header import StoredTensor
from streammerge.codecs.decoded import DecodedTensor
from streammerge.codecs.turned import TurnedWeight
from streammerge.errors import UnsupportedError
from streammerge.plan.ops import ApplyTerms, CopyBytes, Encoding, TensorPlan

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from streammerge.checkpoint.index import Checkpoint
    from streammerge.codecs.base import Codec

__all__ = ["encode_again", "encode_weights"]

# linears of one input that vLLM makes one of
_JOINED = (
    ("q_proj", "k_proj", "v_proj"),
    ("wq", "wk", "wv"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def encode_weights(
    tensors: Sequence[TensorPlan], codec: Codec, names: Collection[str]
) -> tuple[tuple[TensorPlan, ...], tuple[str, ...]]:
    """Encode weights that a format can hold.

    Args:
        tensors: Every output tensor.
        codec: The format.
        names: The weights that loaders expect to be codes.

    Returns:
        The tensors, and the names of those weights that stay as they are because their size is no
        multiple of what shares a scale.

    Raises:
        UnsupportedError: The format has no place for a weight.
    """
    encoded, left = [], []
    for tensor in tensors:
        found = tensor
        if tensor.name in names:
            # there is nothing in an empty one
            if codec.holds_whole(tensor.shape) and tensor.nbytes:
                found = _encoded(tensor, codec)
            if not _is_smaller(found):
                found = tensor
                left.append(tensor.name)
        encoded.append(found)
    return tuple(_together(encoded) if codec.shares_scales else encoded), tuple(left)


def encode_again(
    tensors: Sequence[TensorPlan], codec: Codec, *, base: Checkpoint, decoded: Checkpoint
) -> tuple[TensorPlan, ...]:
    """Store every weight that was codes as codes again; those that nothing changed as they were.

    Args:
        tensors: Every output tensor.
        codec: The base's format.
        base: The base as it is stored.
        decoded: The same with its weights decoded.

    Raises:
        UnsupportedError: The format is only read, or has no place for a weight.
    """
    changed = {tensor.name for tensor in tensors if tensor.change != "decoded"}
    found: list[TensorPlan] = []
    for tensor in tensors:
        was = decoded.tensors.get(tensor.name)
        stays = tensor.name not in changed and not (
            codec.shares_scales and changed.intersection(_joined(tensor.name))
        )
        if not isinstance(was, DecodedTensor):
            found.append(tensor)
        elif stays:
            found.extend(_as_it_was(was))
        elif isinstance(was.weight, TurnedWeight):
            raise UnsupportedError(
                "weight that models keep as (inputs, outputs) is not encoded again",
                where=tensor.name,
                hint="remove export_requantize to write it in 16 bit",
            )
        else:
            found.append(_encoded(tensor, codec.like(was.weight)))
    if codec.shares_scales:
        found = _together(found)
    names = {spec.name for tensor in found for spec in tensor.specs}
    parts = {part.name for tensor in decoded.tensors.values() for part in _parts(tensor)}
    # what scales the inputs and caches of layers
    found += [
        TensorPlan(name, stored.dtype, stored, CopyBytes(), "copied")
        for name, stored in base.tensors.items()
        if name not in names and name not in parts and name not in decoded.tensors
    ]
    return tuple(found)


def _is_smaller(tensor: TensorPlan) -> bool:
    """Whether codes take no more room than what they are made of, in whose place they are put."""
    encoding = tensor.encoding
    return encoding is not None and encoding.code_bytes(0, tensor.rows) <= tensor.source.nbytes


def _encoded(tensor: TensorPlan, codec: Codec) -> TensorPlan:
    op = tensor.op
    if isinstance(op, CopyBytes):
        op = ApplyTerms(tensor.dtype, ())
    return replace(tensor, op=op, change="quantized", encoding=Encoding.of(codec, tensor))


def _joined(name: str) -> list[str]:
    """Return the names of the weights that loaders make one of, this one among them."""
    path, _, last = name.removesuffix(".weight").rpartition(".")
    group = next((group for group in _JOINED if last in group), (last,))
    return [f"{path}.{member}.weight" for member in group]


def _together(tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
    """Let weights that loaders join know of each other."""
    encoded = {t.name: t for t in tensors if t.encoding is not None}
    found = []
    for tensor in tensors:
        if tensor.encoding is None:
            found.append(tensor)
            continue
        others = [encoded[n] for n in _joined(tensor.name) if n in encoded and n != tensor.name]
        found.append(replace(tensor, encoding=replace(tensor.encoding, together=tuple(others))))
    return found


def _as_it_was(tensor: DecodedTensor) -> Iterator[TensorPlan]:
    for part in _parts(tensor):
        yield TensorPlan(part.name, part.dtype, part, CopyBytes(), "copied")


def _parts(tensor: StoredTensor) -> Iterator[StoredTensor]:
    if isinstance(tensor, DecodedTensor):
        for part in tensor.weight.parts:
            if isinstance(part.tensor, StoredTensor):
                yield part.tensor
