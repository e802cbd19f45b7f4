"""Turn a configuration into a plan: open the inputs, plan tensors, layout and memory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from streammerge.adapters.adapter import open_adapter
from streammerge.adapters.combine import Combining
from streammerge.adapters.options import Choices
from streammerge.backends.select import check_device
from streammerge.checkpoint.hub import HubOptions, resolve_folder
from streammerge.checkpoint.index import open_checkpoint
from streammerge.checkpoint.reader import ReaderPool
from streammerge.checkpoint.sidecars import added_tokens, find_sidecars
from streammerge.checkpoint.torch_bin import storage_class
from streammerge.codecs.decoded import READER_BYTES, DecodedTensor, decode_checkpoint
from streammerge.codecs.registry import find_codec
from streammerge.dtypes import Dtype
from streammerge.engine.encode import encode
from streammerge.engine.machine import choose_io
from streammerge.engine.qlora import trained_base
from streammerge.engine.renames import find_renames
from streammerge.errors import AdapterError, ConfigError, PlanError
from streammerge.plan.build import PlanOptions, plan_tensors
from streammerge.plan.family import is_conv1d
from streammerge.plan.layout import Layout, lay_out
from streammerge.plan.memory import BASELINE_BYTES, plan_memory
from streammerge.plan.merge_plan import MergePlan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from streammerge.adapters.adapter import Adapter
    from streammerge.checkpoint.header import StoredTensor
    from streammerge.checkpoint.index import Checkpoint
    from streammerge.checkpoint.sidecars import Sidecars
    from streammerge.config import ExportConfig
    from streammerge.plan.build import TensorPlans
    from streammerge.plan.ops import Numerics

__all__ = ["prepare"]

_DTYPES = {"float16": Dtype.F16, "bfloat16": Dtype.BF16, "float32": Dtype.F32}
# their codes follow from calibration, which a merge onto them makes void
_CALIBRATED = frozenset({"gptq", "awq", "aqlm"})
COMPARE_BYTES = 4 << 20


def prepare(config: ExportConfig, *, local_only: bool = False) -> MergePlan:
    """Plan an export.

    Args:
        config: What the user asked for.
        local_only: Whether a hub id may be answered from the local cache alone.

    Raises:
        StreamMergeError: The export cannot be done; nothing was written.
    """
    _check_supported(config)
    base_path, adapter_paths = _resolve(config, local_only=local_only)
    stored = open_checkpoint(base_path, ignore_files=config.ignore_files)
    base, decoded_notes = _decoded(stored, config)
    choices = Choices(config.base_is_residual, config.peft_bugs == "reproduce")
    adapters = [open_adapter(path, choices) for path in adapter_paths]
    trained = trained_base(base, adapters, config, is_quantized=bool(decoded_notes))
    base = trained.checkpoint
    renames, rename_note = find_renames(base, adapters)
    contents = plan_tensors(
        base,
        adapters,
        options=PlanOptions(
            config.adapter_weights or _unit_weights(config),
            _DTYPES.get(config.infer_dtype),
            moe_layout=config.moe_b_layout,
            combining=_combining(config, adapters),
            reproduces_bugs=choices.reproduces_bugs,
        ),
        same_bytes=_same_bytes,
        renames=renames,
    )
    if decoded_notes:
        contents.config_edits["quantization_config"] = None
    contents = encode(contents, config, base=stored, decoded=base)
    if not config.use_kv_cache:
        contents.config_edits["use_cache"] = False
    layout: Layout = "torch_bin" if config.export_legacy_format else "safetensors"
    if layout == "torch_bin":
        for tensor in contents.tensors:
            storage_class(tensor.dtype, name=tensor.name)
    shards = lay_out(
        contents.tensors,
        max_shard_bytes=config.max_shard_bytes,
        layout=layout,
        base_shards={n: t.path for n, t in (stored.tensors | base.tensors).items()},
    )
    output = _resolve_output(config.export_dir)
    io, shape, io_notes = choose_io(config, base=base_path, output=output)
    reader_bytes = io.readers * READER_BYTES if decoded_notes else 0
    reader_bytes += trained.reserve(readers=io.readers, workers=shape.workers)
    memory = plan_memory(
        contents.tensors,
        max_memory=config.max_memory,
        shape=shape,
        baseline=BASELINE_BYTES + reader_bytes,
    )
    sidecars, notes = _sidecars(config, base, adapters, contents)
    unused = [
        f"{name} in the base is not part of the checkpoint" for name in base.unused_weight_files
    ]
    return MergePlan(
        base=base_path,
        adapters=tuple(adapter_paths),
        output=output,
        layout=layout,
        numerics=_numerics(config),
        contents=contents,
        shards=shards,
        sidecars=sidecars,
        io=io,
        shape=shape,
        memory=memory,
        base_config=stored.config,
        notes=(
            *config.notes,
            *decoded_notes,
            *trained.notes,
            *contents.notes,
            *unused,
            *notes,
            *filter(None, [rename_note]),
            *io_notes,
        ),
        reader_bytes=reader_bytes,
    )


def _decoded(base: Checkpoint, config: ExportConfig) -> tuple[Checkpoint, list[str]]:
    """Have a quantized base's weights decoded as they are read, where arithmetic is done on them.

    Raises:
        PlanError: Its codes were calibrated, and the user has not asked for what they stand for.
        UnsupportedError: They are of a kind that is not decoded.
    """
    section = base.config.get("quantization_config")
    is_changed = (
        bool(config.adapter_name_or_path)
        or config.infer_dtype in _DTYPES
        or config.encoded_format is not None
    )
    if not isinstance(section, dict) or not (is_changed or config.allow_dequantize):
        return base, []
    method = section.get("quant_method")
    if method in _CALIBRATED and not config.allow_dequantize:
        raise PlanError(
            f"base is quantized ({method}): its weights have lost what calibration could not keep, "
            "and so would a merge onto them",
            where=base.path,
            expected="the model that was quantized, in 16 or 32 bit",
            hint="set model_name_or_path to it, or allow_dequantize: true to merge onto what the "
            "codes stand for",
        )
    named = base.config.get("dtype") or base.config.get("torch_dtype")
    codec = find_codec(section, _DTYPES.get(str(named), Dtype.BF16))
    with ReaderPool(mode="buffered") as pool:
        decoded = decode_checkpoint(
            base,
            codec,
            pool,
            is_turned=lambda name: is_conv1d(name.removesuffix(".weight"), config=base.config),
        )
    dtypes = {t.dtype.value for t in decoded.tensors.values() if isinstance(t, DecodedTensor)}
    stored = " and ".join(sorted(dtypes)) or "nothing"
    rest = {key: value for key, value in base.config.items() if key != "quantization_config"}
    note = f"base is quantized ({codec.title}): its weights are decoded to {stored}"
    return replace(decoded, config=rest), [note]


def _unit_weights(config: ExportConfig) -> tuple[float, ...]:
    return (1.0,) * len(config.adapter_name_or_path) if config.adapter_combination else ()


def _numerics(config: ExportConfig) -> Numerics:
    """Round once in a weighted sum, which PEFT has only by way of a combination."""
    is_own_sum = config.adapter_weights and config.adapter_combination is None
    return "fp32" if is_own_sum else config.numerics


def _combining(config: ExportConfig, adapters: Sequence[Adapter]) -> Combining | None:
    if config.adapter_combination is None or not adapters:
        return None
    stray = 1.0
    settings = [adapter.config.settings for adapter in adapters]
    if config.peft_bugs == "reproduce" and getattr(settings[0], "use_rslora", False):
        ranks = [max((one.rank, *(one.rank_pattern or {}).values())) for one in settings]
        stray = math.sqrt(sum(ranks) if config.adapter_combination == "cat" else ranks[0])
    return Combining(
        # PEFT takes a single adapter as it is
        config.adapter_combination if len(adapters) > 1 else "linear",
        density=1.0 if config.adapter_density is None else config.adapter_density,
        majority_sign=config.adapter_majority_sign,
        seed=config.adapter_seed,
        stray_factor=stray,
    )


def _resolve_output(path: Path) -> Path:
    try:
        output = path.expanduser().resolve()
        output.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"export_dir cannot be used ({error})", got=str(path)[:120]) from error
    return output


def _check_supported(config: ExportConfig) -> None:
    check_device(config.export_device)


def _resolve(config: ExportConfig, *, local_only: bool) -> tuple[Path, list[Path]]:
    """Find the base's folder and the adapters' folders."""
    options = HubOptions(
        config.model_revision, config.cache_dir, config.hf_hub_token, local_files_only=local_only
    )
    base = resolve_folder(config.model_name_or_path, options=options)
    # the revision is the base's: an adapter of its own repository has another history
    options = HubOptions(None, config.cache_dir, config.hf_hub_token, local_files_only=local_only)
    adapters = []
    for name in config.adapter_name_or_path:
        folder = resolve_folder(name, options=options)
        if config.adapter_folder:
            folder = folder / config.adapter_folder
            if not folder.is_dir():
                raise AdapterError("adapter_folder does not exist", where=folder)
        adapters.append(folder)
    return base, adapters


def _same_bytes(left: StoredTensor, right: StoredTensor) -> bool:
    """Compare two stored tensors piece by piece."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    pieces = [bytearray(min(COMPARE_BYTES, left.nbytes)) for _ in range(2)]
    with ReaderPool(mode="buffered") as readers:
        for start in range(0, left.nbytes, COMPARE_BYTES):
            count = min(COMPARE_BYTES, left.nbytes - start)
            for piece, tensor in zip(pieces, (left, right), strict=True):
                readers.reader(tensor.file).read_into(
                    tensor.offset + start, memoryview(piece)[:count]
                )
            if pieces[0][:count] != pieces[1][:count]:
                return False
    return True


def _sidecars(
    config: ExportConfig, base: Checkpoint, adapters: Sequence[Adapter], contents: TensorPlans
) -> tuple[Sidecars, list[str]]:
    """Choose the files beside the weights, and whose tokenizer it is."""
    notes = []
    tokenizer_from = None
    ours = added_tokens(base.path)
    for adapter in reversed(adapters):
        theirs = added_tokens(adapter.path)
        if theirs and (contents.vocabulary_rows is not None or theirs.keys() - ours.keys()):
            tokenizer_from = adapter.path
            new = len(theirs.keys() - ours.keys())
            notes.append(f"tokenizer taken from {adapter.path}: {new} tokens more than the base's")
            break
    if contents.vocabulary_rows is not None and tokenizer_from is None:
        notes.append(
            f"the vocabulary has {contents.vocabulary_rows} rows now, but no adapter folder brings "
            "a tokenizer: the base's is kept"
        )
    wanted = {*config.add_tokens, *config.add_special_tokens}
    known = ours if tokenizer_from is None else added_tokens(tokenizer_from)
    missing = sorted(wanted - known.keys())
    if missing or (config.new_special_tokens_config and tokenizer_from is None):
        raise ConfigError(
            "tokens to be added are in no tokenizer, and their rows in no adapter",
            got=", ".join(missing) or config.new_special_tokens_config,
            hint="put the trained tokenizer into the adapter's folder, or remove the key",
        )
    extra = []
    if config.stage == "rm":
        for folder in (*(adapter.path for adapter in reversed(adapters)), base.path):
            heads = [folder / name for name in ("value_head.safetensors", "value_head.bin")]
            found = [head for head in heads if head.exists()]
            if found:
                extra = found[:1]
                break
        else:
            notes.append("stage: rm, but there is no value_head beside the adapters or the base")
    return find_sidecars(base.path, tokenizer_from=tokenizer_from, extra=extra), notes
