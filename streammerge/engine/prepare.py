"""Turn a configuration into a plan: open the inputs, plan tensors, layout and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.adapters.adapter import open_adapter
from streammerge.backends.select import check_device
from streammerge.checkpoint.hub import HubOptions, resolve_folder
from streammerge.checkpoint.index import open_checkpoint
from streammerge.checkpoint.reader import ReaderPool
from streammerge.checkpoint.sidecars import added_tokens, find_sidecars
from streammerge.checkpoint.torch_bin import storage_class
from streammerge.dtypes import Dtype
from streammerge.engine.machine import choose_io
from streammerge.engine.renames import transformers_renames
from streammerge.errors import AdapterError, ConfigError, UnsupportedError
from streammerge.plan.build import PlanOptions, plan_tensors
from streammerge.plan.family import find_embeddings
from streammerge.plan.layout import Layout, lay_out
from streammerge.plan.match import NameResolver
from streammerge.plan.memory import plan_memory
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

__all__ = ["prepare"]

_DTYPES = {"float16": Dtype.F16, "bfloat16": Dtype.BF16, "float32": Dtype.F32}
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
    base = open_checkpoint(base_path, ignore_files=config.ignore_files)
    adapters = [open_adapter(path) for path in adapter_paths]
    renames, rename_note = _renames(base, adapters)
    contents = plan_tensors(
        base,
        adapters,
        options=PlanOptions(config.adapter_weights, _DTYPES.get(config.infer_dtype)),
        same_bytes=_same_bytes,
        renames=renames,
    )
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
        base_shards={name: tensor.path for name, tensor in base.tensors.items()},
    )
    output = _resolve_output(config.export_dir)
    io, shape, io_notes = choose_io(config, base=base_path, output=output)
    memory = plan_memory(contents.tensors, max_memory=config.max_memory, shape=shape)
    sidecars, notes = _sidecars(config, base, adapters, contents)
    unused = [
        f"{name} in the base is not part of the checkpoint" for name in base.unused_weight_files
    ]
    return MergePlan(
        base=base_path,
        adapters=tuple(adapter_paths),
        output=output,
        layout=layout,
        numerics="fp32" if config.adapter_weights else config.numerics,
        contents=contents,
        shards=shards,
        sidecars=sidecars,
        io=io,
        shape=shape,
        memory=memory,
        base_config=base.config,
        notes=(
            *config.notes,
            *contents.notes,
            *unused,
            *notes,
            *filter(None, [rename_note]),
            *io_notes,
        ),
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
    if config.export_quantization_bit is not None:
        raise UnsupportedError(
            "export_quantization_bit: this version merges, and does not quantize yet",
            hint="remove the export_quantization keys to export in 16 bit, and quantize the result",
        )
    if config.finetuning_type == "oft":
        raise UnsupportedError("finetuning_type: oft is not exported by this version")


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


def _renames(base: Checkpoint, adapters: Sequence[Adapter]) -> tuple[dict[str, str], str | None]:
    """Ask for transformers' names only where an adapter's names are not found without them."""
    resolver = NameResolver(frozenset(base.tensors))
    paths = [f"{module.module}.weight" for adapter in adapters for module in adapter.modules]
    paths += [r.path for adapter in adapters for r in adapter.replacements]
    # these are not stored where they are new, or tied
    absent = {"score.weight", "classifier.weight"}
    embeddings = find_embeddings(base.tensors, config=base.config)
    if embeddings.is_tied and embeddings.is_known:
        absent.add(embeddings.output)
    if not base.config or all(path in absent or resolver.find_direct(path) for path in paths):
        return {}, None
    return transformers_renames(base.path, base.tensors)


def _same_bytes(left: StoredTensor, right: StoredTensor) -> bool:
    """Compare two stored tensors piece by piece."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    pieces = [bytearray(min(COMPARE_BYTES, left.nbytes)) for _ in range(2)]
    with ReaderPool(mode="buffered") as readers:
        for start in range(0, left.nbytes, COMPARE_BYTES):
            count = min(COMPARE_BYTES, left.nbytes - start)
            for piece, tensor in zip(pieces, (left, right), strict=True):
                readers.reader(tensor.path).read_into(
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
