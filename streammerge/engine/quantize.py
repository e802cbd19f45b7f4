"""The calibrated second stage of an export: from a merge's plan to a plan of quantized tensors.

Each decoder layer is quantized into a file of a work folder beside the output, its weights merged
on the way. Then the export goes on as always, with those files as the source of the linears and the
base and its adapters as that of everything else.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.checkpoint.digest import digest_file
from streammerge.checkpoint.header import read_header
from streammerge.checkpoint.hub import HubOptions
from streammerge.dtypes import Dtype
from streammerge.engine.staging import Staging, fingerprint
from streammerge.errors import ConfigError, UnsupportedError
from streammerge.plan.layout import lay_out
from streammerge.plan.memory import plan_memory
from streammerge.plan.ops import CopyBytes, TensorPlan

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from streammerge.config import ExportConfig
    from streammerge.config.codebooks import Codebooks
    from streammerge.engine.export import Progress
    from streammerge.plan.merge_plan import MergePlan
    from streammerge.quantize.driver import LayerReport
    from streammerge.quantize.settings import QuantizeSettings
    from streammerge.quantize.skeleton import Skeleton
    from streammerge.quantize.tokens import CalibrationRecord

__all__ = [
    "QuantizedPlan",
    "bytes_needed",
    "foresee",
    "load_tokenizer",
    "quantize_layers",
    "read_settings",
    "require_models",
]


# of the export that is left, little but copies: with 8 MiB it set the peak of models of many small
# layers (64 of hidden 1024: 703 MB, against 653 MB for 4 layers)
LAST_BLOCK_BYTES = 1 << 20


@dataclass(slots=True)
class QuantizedPlan:
    """What the layers have become, and the export that is left."""

    plan: MergePlan
    layers: list[LayerReport]
    calibration: CalibrationRecord
    settings: QuantizeSettings
    work: Staging
    """The work folder; to be discarded once the output is published."""
    foreseen_bytes: int
    """The most memory that the layers were expected to take."""

    def describe(self) -> dict[str, Any]:
        """Give what the layers have become as JSON types."""
        errors = {name: e for layer in self.layers for name, e in layer.errors.items()}
        return {
            **asdict(self.settings),
            "calibration": asdict(self.calibration),
            "bits_per_weight": self._bits_per_weight(),
            "mean_relative_error": sum(errors.values()) / max(len(errors), 1),
            "relative_errors": errors,
            "unscaled": [name for layer in self.layers for name in layer.unscaled],
            "few_tokens": {
                f"layer {layer.layer}, {path}": count
                for layer in self.layers
                for path, count in layer.few_tokens.items()
            },
            "layer_seconds": [layer.seconds for layer in self.layers],
        }

    def _bits_per_weight(self) -> float:
        """Return the bits that a quantized weight takes, with its share of scales and zeros."""
        from streammerge.quantize.layout import layout_of  # noqa: PLC0415 (needs torch)

        # norms and biases that took scales of inputs are not weights
        layout = layout_of(self.settings)
        stored = [t for t in self.plan.tensors if t.name.endswith(layout.ends)]
        weights = layout.weights({t.name: t.shape for t in stored})
        return 8 * sum(t.nbytes for t in stored) / max(weights, 1)


def read_settings(config: ExportConfig) -> QuantizeSettings | None:
    """Return how to quantize; None if that is not asked for.

    Raises:
        UnsupportedError: No loader could read the result.
    """
    method, books = config.calibrated_method, config.codebooks
    bits = config.export_quantization_bit if books is None else books.weight_bits
    if method is None or bits is None:
        return None
    from streammerge.quantize.config_section import check_format  # noqa: PLC0415 (needs torch)
    from streammerge.quantize.settings import QuantizeSettings  # noqa: PLC0415

    is_awq = method == "awq"
    if (
        is_awq
        and config.export_quantization_sym
        and "export_quantization_sym" in config.model_fields_set
    ):
        raise UnsupportedError(
            "AWQ stores a zero for every group: its codes are asymmetric",
            where="export_quantization_sym",
            got=True,
            hint="remove it, or choose the method gptq",
        )
    settings = QuantizeSettings(
        method=method,
        bits=bits,
        group_size=config.export_quantization_group_size if books is None else -1,
        is_symmetric=config.export_quantization_sym and not is_awq,
        desc_act=config.export_quantization_desc_act,
        damp=config.export_quantization_damp,
        # the older format has no place for zeros of its own
        checkpoint_format="gptq" if config.export_quantization_sym else "gptq_v2",
        nsamples=config.export_quantization_nsamples,
        maxlen=config.export_quantization_maxlen,
        seed=config.export_quantization_seed,
        sampling=config.export_quantization_sampling,
        codebooks=books,
    )
    check_format(settings)
    return settings


def quantize_layers(
    plan: MergePlan,
    config: ExportConfig,
    settings: QuantizeSettings,
    progress: Progress,
) -> QuantizedPlan:
    """Quantize every decoder layer, or those that a run before this one has not finished.

    Args:
        plan: The merge.
        config: What the user asked for.
        settings: How to quantize.
        progress: Told how it goes.

    Raises:
        StreamMergeError: It cannot be done; finished layers are kept for a rerun.
    """
    import torch  # noqa: PLC0415 (planning needs no torch)

    from streammerge.quantize.budget import check_memory  # noqa: PLC0415
    from streammerge.quantize.driver import Driver  # noqa: PLC0415
    from streammerge.quantize.heap import return_freed_memory  # noqa: PLC0415
    from streammerge.quantize.layout import layout_of  # noqa: PLC0415
    from streammerge.quantize.skeleton import build_skeleton  # noqa: PLC0415
    from streammerge.quantize.source import MergedSource  # noqa: PLC0415
    from streammerge.quantize.tokens import load_calibration  # noqa: PLC0415

    _check_base(plan)
    require_models()
    # what a layer leaves in the heap would otherwise add up over the layers
    return_freed_memory()
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    skeleton = build_skeleton(plan.base, config_edits=plan.contents.config_edits, tensors=tensors)
    hub = HubOptions(None, config.cache_dir, config.hf_hub_token, local_files_only=False)
    calibration = load_calibration(
        str(config.export_quantization_dataset),
        tokenizer=load_tokenizer(plan),
        settings=settings,
        hub=hub,
    )
    _check_shapes(skeleton, settings)
    dtype = _compute_dtype(plan)
    foreseen = check_memory(
        skeleton, settings, samples=calibration.ids, dtype=dtype, max_memory=config.max_memory
    )
    work = Staging(
        plan.output.with_name(f"{plan.output.name}.layers"),
        keeps=frozenset({"hidden0.bin", "hidden1.bin"}),
    )
    parts = (
        fingerprint(plan),
        settings,
        calibration.record,
        torch.__version__,
        config.threads,
        dtype,
    )
    work.open(hashlib.sha256(repr(parts).encode()).hexdigest())
    try:
        with MergedSource(plan) as source:
            progress.start_layers(len(skeleton.layers))
            for _ in work.finished:
                progress.advance_layer()

            def record(path: Path) -> None:
                work.record(path.name, path.stat().st_size, digest_file(path, kind="xxh3-128"))
                progress.advance_layer()

            driver = Driver(
                skeleton,
                source,
                settings,
                calibration.ids,
                work.folder,
                finished=work.finished.keys(),
                on_layer=record,
                dtype=dtype,
            )
            layers = driver.run()
        final = _final_plan(plan, config, settings, work.folder, skeleton)
        note = layout_of(settings).loader_note(list(skeleton.all_linears()))
        notes = [*([note] if note else []), *_expert_notes(layers)]
        if config.export_device != "cpu":
            notes.append("layers are quantized on the CPU, whatever export_device is")
        final = replace(final, notes=(*final.notes, *notes))
    except BaseException:
        work.release()
        raise
    finally:
        progress.stop_layers()
    return QuantizedPlan(final, layers, calibration.record, settings, work, foreseen)


def _compute_dtype(plan: MergePlan) -> torch.dtype:
    """Return the dtype that layers compute in: BF16 for a BF16 model where the CPU multiplies it.

    With AMX it is 176 GFLOPS against 49 in float32 (512 x 576 by 576 x 1536, two threads, torch
    2.13.0); it is also what the model will be run in.
    """
    import torch  # noqa: PLC0415 (planning needs no torch)

    sizes = Counter[Dtype]()
    for tensor in plan.tensors:
        sizes[tensor.dtype] += tensor.nbytes
    is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
    is_bf16 = bool(sizes) and sizes.most_common(1)[0][0] is Dtype.BF16
    return torch.bfloat16 if is_bf16 and is_fast else torch.float32


def foresee(plan: MergePlan, config: ExportConfig) -> str | None:
    """Say what becomes of the merged layers, from headers alone; None if they stay as they are.

    Raises:
        UnsupportedError: They are codes already.
    """
    bits, size = config.export_quantization_bit, config.export_quantization_group_size
    books = config.codebooks
    if config.calibrated_method is None:
        return None
    _check_base(plan)
    if books is not None:
        how = f"{config.export_quantization_scheme}, groups of {books.group_size}"
    else:
        assert bits is not None
        groups = "one scale per row" if size == -1 else f"groups of {size}"
        how = f"{bits} bit, {groups}"
    packed, rest, _ = _division(plan, bits=bits or 0, group_size=size, books=books)
    return (
        f"sizes are those of the merge; its layers are quantized as they are merged "
        f"({config.export_quantization_method}, {how}), so that about "
        f"{(packed + rest) / 1e9:.2f} GB are written in place of {plan.bytes_written / 1e9:.2f} GB"
    )


def bytes_needed(plan: MergePlan, settings: QuantizeSettings) -> int:
    """Return the most bytes of disk that the run takes: layers, output, and hidden states."""
    packed, rest, widest = _division(
        plan, bits=settings.bits, group_size=settings.group_size, books=settings.codebooks
    )
    has_experts = any(".experts." in tensor.name for tensor in plan.tensors)
    # states before and behind a layer; inputs and outputs of experts
    hidden = (4 if has_experts else 2) * 4 * settings.nsamples * settings.maxlen * widest
    # a layer's file goes when the output is there
    return 2 * packed + rest + hidden


def _division(
    plan: MergePlan, *, bits: float, group_size: int, books: Codebooks | None
) -> tuple[int, int, int]:
    """Return the bytes of codes, those of all other tensors, and the widest hidden state.

    What is quantized is known only with the model; here it is every matrix of a numbered layer.
    """
    packed = rest = widest = 0
    per_weight = bits / 8 + (0 if group_size == -1 else 4 / group_size)
    per_matrix = 0
    if books is not None:
        # whole bytes or words for codes
        code_bytes = 1 if books.bits <= 8 else 2
        per_weight, per_matrix = books.count * code_bytes / books.group_size, books.table_bytes
    for tensor in plan.tensors:
        is_layer = any(part.isdecimal() for part in tensor.name.split("."))
        is_fused = len(tensor.shape) == 3
        if is_layer and (is_fused or (len(tensor.shape) == 2 and tensor.name.endswith(".weight"))):
            matrices = tensor.shape[0] if is_fused else 1
            packed += int(prod(tensor.shape) * per_weight)
            packed += matrices * (16 * sum(tensor.shape[-2:]) + per_matrix)
            widest = max(widest, min(tensor.shape[-2:]))
        else:
            rest += tensor.nbytes
    return packed, rest, widest


def _check_base(plan: MergePlan) -> None:
    quantized = plan.base_config.get("quantization_config")
    # decoded on the way, the layers are as good as any
    if quantized and "quantization_config" not in plan.contents.config_edits:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UnsupportedError(
            "base is quantized already",
            where=plan.base / "config.json",
            got=f"quant_method {method}",
            hint="give the model in 16 bit; a second quantization would only lose more",
        )


def require_models() -> None:
    """Make sure that transformers, whose layers are run, is there.

    Raises:
        ConfigError: It is not.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "transformers, whose layers are run, is not installed",
            hint="pip install 'streammerge[quantize]'",
        )


def load_tokenizer(plan: MergePlan) -> Any:
    """Return the tokenizer that the output would have.

    Raises:
        UnsupportedError: There is none, or it cannot be loaded.
    """
    import transformers  # noqa: PLC0415 (two seconds)

    folders = [sidecar.source.parent for sidecar in plan.sidecars.files if "token" in sidecar.name]
    folder = folders[0] if folders else plan.base
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedError(
            f"tokenizer cannot be loaded ({str(error).splitlines()[0][:120]})",
            where=folder,
            hint="text cannot be read without it: put the tokenizer's files beside the base",
        ) from error


def _check_shapes(skeleton: Skeleton, settings: QuantizeSettings) -> None:
    """Make sure that the layout can hold every linear, before the first is quantized.

    Raises:
        QuantizationError: It cannot.
    """
    from streammerge.quantize.layout import layout_of  # noqa: PLC0415 (needs torch)

    layout = layout_of(settings)
    for module in skeleton.all_linears():
        layout.check(*module.size, where=module.name)


def _expert_notes(layers: list[LayerReport]) -> list[str]:
    """Say which experts were calibrated on few tokens of their own."""
    few = {(layer.layer, path): n for layer in layers for path, n in layer.few_tokens.items()}
    if not few:
        return []
    (number, path), count = min(few.items(), key=lambda item: item[1])
    note = (
        f"{len(few)} experts got fewer tokens than they have inputs (layer {number}, '{path}': "
        f"{count}) and were shown other tokens of their layers besides; "
        "more calibration samples would do better"
    )
    return [note]


def _final_plan(
    plan: MergePlan,
    config: ExportConfig,
    settings: QuantizeSettings,
    folder: Path,
    skeleton: Skeleton,
) -> MergePlan:
    """Put what the layers have become in the place of their weights."""
    from streammerge.quantize.config_section import quantization_section  # noqa: PLC0415
    from streammerge.quantize.driver import layer_file  # noqa: PLC0415

    packed: dict[str, list[TensorPlan]] = {}
    known = {tensor.name for tensor in plan.tensors}
    # norms and biases that took scales of inputs
    changed: dict[str, TensorPlan] = {}
    for number in range(len(skeleton.layers)):
        for stored in read_header(layer_file(folder, number))[0]:
            planned = TensorPlan(stored.name, stored.dtype, stored, CopyBytes(), "quantized")
            if stored.name in known:
                changed[stored.name] = planned
            else:
                packed.setdefault(stored.name.rpartition(".")[0], []).append(planned)
    modules: dict[str, list[str]] = {}
    quantized: set[str] = set()
    for module in skeleton.all_linears():
        modules.setdefault(module.target, []).append(module.name)
        quantized.add(module.path)
    tensors = []
    for tensor in plan.tensors:
        if tensor.name in modules:
            tensors += [codes for name in modules[tensor.name] for codes in packed[name]]
        else:
            tensors.append(changed.get(tensor.name, tensor))
    kept = _kept_linears(skeleton, quantized)
    section = quantization_section(settings, quantized=sorted(quantized), kept=kept)
    contents = replace(
        plan.contents,
        tensors=tuple(tensors),
        config_edits={**plan.contents.config_edits, "quantization_config": section},
    )
    shards = lay_out(contents.tensors, max_shard_bytes=config.max_shard_bytes, layout=plan.layout)
    shape = replace(plan.shape, block_bytes=LAST_BLOCK_BYTES)
    memory = plan_memory(contents.tensors, max_memory=config.max_memory, shape=shape)
    return replace(plan, contents=contents, shards=shards, shape=shape, memory=memory)


def _kept_linears(skeleton: Skeleton, quantized: set[str]) -> list[str]:
    """Return what loaders may take for linears, and is not quantized.

    Returns:
        Paths by the model's names and by the checkpoint's.
    """
    from streammerge.quantize.modules import is_linear  # noqa: PLC0415 (needs torch)

    linears = [path for path, module in skeleton.model.named_modules() if is_linear(module)]
    kept = []
    # routers are no linears in memory, but are to other loaders
    for path in dict.fromkeys([*linears, *skeleton.routers()]):
        if path not in quantized:
            stored = skeleton.checkpoint_name(f"{path}.weight").removesuffix(".weight")
            kept += list(dict.fromkeys((path, stored)))
    return kept
