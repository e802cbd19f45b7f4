"""Perplexity of a checkpoint on a text, with or without adapters, from plan to report."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.checkpoint.writer import require_space
from streammerge.config import parse_config
from streammerge.engine.prepare import prepare
from streammerge.engine.quantize import load_tokenizer, require_models
from streammerge.errors import ConfigError, InputError, MemoryBudgetError, UnsupportedError
from streammerge.report.export_report import peak_rss_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from streammerge.config import ExportConfig
    from streammerge.plan.merge_plan import MergePlan
    from streammerge.quantize.skeleton import Skeleton
    from streammerge.quantize.source import MergedSource

__all__ = ["EvaluateOptions", "EvaluationReport", "evaluate", "evaluate_merge"]

# more characters than most tokens have
_TOKEN_CHARS = 8


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """How much of a text is looked at, and with how much memory."""

    max_tokens: int | None = None
    """Tokens of the text that count; all by default."""
    length: int = 1024
    """Tokens of a window, of which all but the first are foreseen. A text of fewer tokens is one
    window; tokens behind the last whole window are left out.
    """
    max_memory: int | None = None
    """Ceiling on resident memory, in bytes; that of an export by default."""
    work_folder: Path | None = None
    """Where hidden states go; that of temporary files by default."""


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """How well a model foresees a text."""

    checkpoint: str
    adapters: tuple[str, ...]
    text: str
    quantization: str | None
    """Method and bits of a quantized checkpoint."""
    tokens: int
    """Tokens that were to be foreseen."""
    tokens_left_out: int
    """Tokens behind the last whole window."""
    windows: int
    length: int
    """Tokens of a window."""
    loss: float
    """Mean of the negative log-likelihoods, in nats."""
    perplexity: float
    seconds: float
    peak_rss_bytes: int
    """VmHWM of the process."""

    @property
    def label(self) -> str:
        """What was measured, in a line."""
        names = [Path(name).name or name for name in (self.checkpoint, *self.adapters)]
        codes = f" ({self.quantization})" if self.quantization else ""
        return " + ".join(names) + codes

    def to_dict(self) -> dict[str, Any]:
        """Give the report as JSON types."""
        return asdict(self)


def evaluate(
    checkpoint: str,
    text: Path,
    *,
    adapters: Sequence[str] = (),
    options: EvaluateOptions | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> EvaluationReport:
    """Measure the perplexity of a checkpoint, layer by layer, and write nothing that stays.

    Args:
        checkpoint: Folder or hub id of a checkpoint in 16 or 32 bit, or quantized in any format
            that is decoded.
        text: UTF-8 file.
        adapters: Folders or hub ids, merged in turn on the way.
        options: How much of the text is looked at, and with how much memory.
        progress: Told each layer.

    Raises:
        StreamMergeError: The checkpoint cannot be evaluated, or needs more memory.
    """
    options = options or EvaluateOptions()
    values: dict[str, Any] = {
        "model_name_or_path": checkpoint,
        "adapter_name_or_path": list(adapters),
        # nothing is written there
        "export_dir": str(options.work_folder or tempfile.gettempdir()),
    }
    if options.max_memory is not None:
        values["max_memory"] = options.max_memory
    return evaluate_merge(parse_config(values), text, options=options, progress=progress)


def evaluate_merge(
    config: ExportConfig,
    text: Path,
    *,
    options: EvaluateOptions | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> EvaluationReport:
    """Measure the perplexity of what an export would write, and write nothing that stays.

    Args:
        config: The export, without a quantization.
        text: UTF-8 file.
        options: How much of the text is looked at; the memory is the configuration's.
        progress: Told each layer.

    Raises:
        StreamMergeError: The merge cannot be evaluated, or needs more memory.
    """
    from streammerge.quantize.evaluate import Evaluator  # noqa: PLC0415 (needs torch)
    from streammerge.quantize.heap import return_freed_memory  # noqa: PLC0415 (is beside it)
    from streammerge.quantize.source import MergedSource  # noqa: PLC0415

    started = time.perf_counter()
    options = options or EvaluateOptions()
    if options.length < 2 or (options.max_tokens is not None and options.max_tokens < 2):
        raise ConfigError("length and max_tokens are 2 or more")
    require_models()
    return_freed_memory()
    # what is quantized is measured by what its codes stand for
    config = config.model_copy(update={"allow_dequantize": True})
    with tempfile.TemporaryDirectory(prefix="streammerge-eval-", dir=options.work_folder) as name:
        folder = Path(name)
        plan = prepare(config)
        section = _section(plan)
        ids = _read_tokens(text, load_tokenizer(plan), max_tokens=options.max_tokens)
        windows = _cut(ids, options.length, text)
        with MergedSource(plan) as source:
            skeleton = _skeleton(plan, source)
            _check_room(
                skeleton,
                windows,
                folder,
                max_memory=config.max_memory,
                reader_bytes=plan.reader_bytes,
            )
            count = len(skeleton.layers)
            evaluator = Evaluator(
                skeleton,
                source,
                windows,
                folder,
                on_layer=lambda number: progress(f"layer {number + 1} of {count}"),
            )
            found = evaluator.run()
    return EvaluationReport(
        checkpoint=config.model_name_or_path,
        adapters=config.adapter_name_or_path,
        text=str(text),
        quantization=_describe(section),
        tokens=found.tokens,
        tokens_left_out=len(ids) - windows.numel(),
        windows=len(windows),
        length=windows.shape[1],
        loss=found.loss,
        perplexity=found.perplexity,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _describe(section: dict[str, Any] | None) -> str | None:
    """Name a format, with its bits if it says how many they are."""
    if section is None:
        return None
    bits = f" {section['bits']} bit" if "bits" in section else ""
    return f"{section.get('quant_method')}{bits}"


def _section(plan: MergePlan) -> dict[str, Any] | None:
    section = plan.base_config.get("quantization_config")
    return section if isinstance(section, dict) else None


def _skeleton(plan: MergePlan, source: MergedSource) -> Skeleton:
    """Build the model without its weights.

    Raises:
        UnsupportedError: transformers has no such model, or it cannot be run layer by layer.
    """
    from streammerge.quantize.skeleton import build_skeleton  # noqa: PLC0415 (needs torch)

    try:
        return build_skeleton(
            plan.base,
            config_edits=plan.contents.config_edits,
            tensors={name: source.plan(name) for name in source.names},
            is_for_codes=False,
        )
    except UnsupportedError as error:
        raise UnsupportedError(
            "model cannot be run layer by layer", where=error.where, got=error.what
        ) from error


def _read_tokens(path: Path, tokenizer: Any, *, max_tokens: int | None) -> list[int]:
    """Return the ids of a text, with whatever the tokenizer puts before it.

    Raises:
        InputError: The file is not UTF-8.
    """
    ids: list[int]
    chars = -1 if max_tokens is None else _TOKEN_CHARS * max_tokens
    while True:
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(chars)
                is_whole = not file.read(1)
        except UnicodeDecodeError as error:
            raise InputError("text is not UTF-8", where=path, got=error.reason) from error
        # not `verbose`: a text longer than the model's context is what this is for
        ids = tokenizer(text, verbose=False)["input_ids"]
        # a token at the end may have been cut
        if is_whole or max_tokens is None or len(ids) > max_tokens:
            return ids[:max_tokens]
        chars *= 2


def _cut(ids: list[int], length: int, path: Path) -> torch.Tensor:
    """Cut a text into windows, (windows, tokens) int64.

    Raises:
        InputError: There is nothing to be foreseen.
    """
    import torch  # noqa: PLC0415 (a quarter of a second)

    if len(ids) < 2:
        raise InputError("text is too short", where=path, expected="2 tokens", got=len(ids))
    length = min(length, len(ids))
    count = len(ids) // length
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def _check_room(
    skeleton: Skeleton,
    windows: torch.Tensor,
    folder: Path,
    *,
    max_memory: int,
    reader_bytes: int,
) -> None:
    """Foresee the peak: a layer and one window's states, or a piece of the head and its logits.

    Raises:
        MemoryBudgetError: The ceiling is lower.
        DiskSpaceError: The hidden states do not fit.
    """
    import torch  # noqa: PLC0415 (a quarter of a second)

    from streammerge.quantize.budget import (  # noqa: PLC0415
        BASELINE_BYTES,
        layer_bytes,
        states_bytes,
    )
    from streammerge.quantize.evaluate import LOGITS_BYTES, ROWS_BYTES  # noqa: PLC0415
    from streammerge.quantize.source import PIECE_BYTES  # noqa: PLC0415

    count, tokens = windows.shape
    dtype = torch.float32
    sizes = [module.size for module in skeleton.all_linears()]
    # a weight of codes is, for a moment, there five times over
    weights = layer_bytes(skeleton, dtype=dtype) + 5 * 4 * max(n * k for n, k in sizes)
    # as stored and in float32; logits are there in two dtypes, and while they are changed
    vocabulary = max(3 * PIECE_BYTES + 5 * LOGITS_BYTES, ROWS_BYTES + 3 * PIECE_BYTES)
    ids = 2 * 8 * windows.numel() + 2 * 8 * windows.numel()
    states = states_bytes(skeleton, tokens=tokens, dtype=dtype)
    needed = BASELINE_BYTES + reader_bytes + max(weights, vocabulary) + states + ids
    if needed > max_memory:
        raise MemoryBudgetError(
            "max_memory is too small to run a layer of this model",
            expected=f"at least {-(-needed // 10**6)}MB",
            got=f"{max_memory // 10**6}MB",
            hint="raise it, or lower length",
        )
    require_space(
        folder,
        needed=2 * 4 * count * tokens * skeleton.hidden_size,
        purpose="for hidden states",
        hint="lower max_tokens, or choose another folder for temporary files (TMPDIR)",
    )
