"""Choose which weights of an export are stored as codes, and say so in config.json."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from streammerge.codecs.registry import find_codec
from streammerge.codecs.schemes import section_of, with_kept
from streammerge.dtypes import Dtype
from streammerge.errors import PlanError, UnsupportedError
from streammerge.plan.encode import encode_again, encode_weights
from streammerge.plan.family import is_conv1d
from streammerge.plan.linears import linear_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streammerge.checkpoint.index import Checkpoint
    from streammerge.codecs.base import Codec
    from streammerge.config import ExportConfig, FormatName
    from streammerge.plan.build import TensorPlans
    from streammerge.plan.ops import TensorPlan

__all__ = ["encode"]

_FLOATS = (Dtype.BF16, Dtype.F16, Dtype.F32)
_GROUPED = ("w4a16", "w8a16")


def encode(
    contents: TensorPlans, config: ExportConfig, *, base: Checkpoint, decoded: Checkpoint
) -> TensorPlans:
    """Let weights be stored as codes, where that is asked for.

    Args:
        contents: The merge.
        config: What the user asked for.
        base: The base as it is stored.
        decoded: The same, its weights decoded if they are codes.

    Raises:
        PlanError: The base has no codes, or no weight could be encoded.
        UnsupportedError: The format has no place for a weight.
    """
    if config.export_requantize is not None:
        return _as_before(contents, base=base, decoded=decoded)
    if config.encoded_format is not None:
        return _in_format(contents, config, config.encoded_format, base=decoded)
    return contents


def _as_before(contents: TensorPlans, *, base: Checkpoint, decoded: Checkpoint) -> TensorPlans:
    """Store what was codes as codes of the same kind again."""
    section = base.config.get("quantization_config")
    if not isinstance(section, dict):
        raise PlanError(
            "base is not quantized, so that it has no format to write again",
            where=base.path,
            hint="choose one by export_quantization_method",
        )
    codec = find_codec(section, decoded.main_dtype)
    if not codec.encodes:
        raise UnsupportedError(
            "codes of the base's format cannot be made without calibration",
            where=base.path,
            got=codec.title,
            hint="quantize the merge by export_quantization_bit and a dataset, or leave "
            "export_requantize out to write it in 16 bit",
        )
    tensors = encode_again(contents.tensors, codec, base=base, decoded=decoded)
    edits = {k: v for k, v in contents.config_edits.items() if k != "quantization_config"}
    count = sum(tensor.encoding is not None for tensor in tensors)
    note = f"{count} merged weights are quantized again ({codec.title}), the others stay as stored"
    return replace(contents, tensors=tensors, config_edits=edits, notes=(*contents.notes, note))


def _in_format(
    contents: TensorPlans, config: ExportConfig, form: FormatName, *, base: Checkpoint
) -> TensorPlans:
    """Store every linear in a format."""
    dtype = _main_dtype(contents.tensors)
    section = section_of(
        form,
        group_size=config.export_quantization_group_size,
        is_nested=config.export_quantization_double,
        dtype=dtype,
    )
    codec = find_codec(section, dtype)
    linears = linear_weights([t.output for t in contents.tensors], base.config)
    is_bitsandbytes = section["quant_method"] == "bitsandbytes"
    if is_bitsandbytes and "llama4" in str(base.config.get("model_type")):
        raise UnsupportedError(
            "transformers takes the experts of Llama 4 apart where it finds codes of bitsandbytes, "
            "and cannot load them fused",
            where=base.path,
            hint="choose another export_quantization_method",
        )
    # in memory transformers fuses single experts, and bitsandbytes has codes for linears alone
    chosen = (*linears.quantized, *(() if is_bitsandbytes else linears.experts))
    # these are stored as (inputs, outputs), and their codes as (outputs, inputs)
    turned = [n for n in chosen if is_conv1d(n.removesuffix(".weight"), config=base.config)]
    tensors, left = encode_weights(contents.tensors, codec, set(chosen).difference(turned))
    left = (*turned, *left)
    if set(left).difference(turned) and form in _GROUPED:
        raise _misfit(contents.tensors, left, config.export_quantization_group_size)
    if not any(tensor.encoding is not None for tensor in tensors):
        raise PlanError(
            f"no weight of this model can be stored as {form}",
            where=base.path,
            expected="weights (outputs, inputs) of linear layers, in whole blocks or groups",
            got=f"{len(chosen)} linears, the first is '{left[0]}'" if left else "none",
            hint="choose another export_quantization_method, such as gptq",
        )
    # loaders look for modules by their names in memory, or by those of the checkpoint
    stored = [name.removesuffix(".weight") for name in (*linears.kept, *left)]
    section = with_kept(section, list(dict.fromkeys([*linears.kept_modules, *stored])))
    return replace(
        contents,
        tensors=tensors,
        config_edits={**contents.config_edits, "quantization_config": section},
        notes=(*contents.notes, *_notes(tensors, left, codec), *_expert_notes(tensors, form)),
    )


def _main_dtype(tensors: Sequence[TensorPlan]) -> Dtype:
    """Return the dtype that most bytes of the merge have."""
    sizes = {dtype: sum(t.nbytes for t in tensors if t.dtype is dtype) for dtype in _FLOATS}
    return max(_FLOATS, key=lambda dtype: sizes[dtype])


def _misfit(tensors: Sequence[TensorPlan], left: Sequence[str], size: int) -> UnsupportedError:
    widths = {tensor.shape[-1] for tensor in tensors if tensor.name in left}
    fitting = [n for n in (128, 64, 32, 16) if n != size and not any(w % n for w in widths)]
    advice = f"export_quantization_group_size: {fitting[0]} or -1" if fitting else "group size -1"
    return UnsupportedError(
        f"inputs of {len(left)} linears do not divide into groups",
        where=left[0],
        expected=f"a multiple of {size} inputs",
        got=min(width for width in widths if width % size),
        hint=f"{advice} would do",
    )


def _notes(tensors: Sequence[TensorPlan], left: Sequence[str], codec: Codec) -> list[str]:
    count = sum(tensor.encoding is not None for tensor in tensors)
    notes = [f"{count} linears are stored as codes ({codec.title})"]
    if left:
        notes.append(
            f"{len(left)} linears stay as they are, such as '{left[0]}': they are not made of "
            "whole blocks or groups, or not stored as (outputs, inputs)"
        )
    return notes


def _expert_notes(tensors: Sequence[TensorPlan], form: FormatName) -> list[str]:
    """Say what becomes of experts, which are most of a model that has them."""
    experts = [t for t in tensors if ".experts." in t.name and len(t.shape) in (2, 3)]
    plain = [tensor for tensor in experts if tensor.encoding is None]
    notes = []
    if plain:
        share = sum(t.nbytes for t in plain) / sum(t.nbytes for t in tensors)
        notes.append(
            f"experts stay as they are, {share:.0%} of what is written, such as '{plain[0].name}': "
            + (
                "loaders take codes of single experts"
                if len(plain[0].shape) == 3
                else f"transformers has no codes of {form} for them"
            )
        )
    elif experts and form == "nvfp4":
        notes.append(
            "transformers 5.23 loads experts in NVFP4 without their global scales, and so wrong"
        )
    return notes
