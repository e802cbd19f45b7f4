"""The export configuration: every key that changes an export, with its default and its checks."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from streammerge.config.codebooks import Codebooks
from streammerge.config.sizes import parse_bytes

__all__ = ["FORMATS", "CalibratedName", "ExportConfig", "FormatName"]

CalibratedName = Literal["gptq", "awq", "rtn", "aqlm"]

FormatName = Literal["nf4", "fp4", "int8", "fp8", "fp8-block", "mxfp4", "nvfp4", "w4a16", "w8a16"]
FORMATS: tuple[FormatName, ...] = get_args(FormatName)
"""What weights can be encoded in as they are merged, without calibration."""
_CALIBRATED: tuple[CalibratedName, ...] = get_args(CalibratedName)
_FORMAT_BITS = {"nf4": 4, "fp4": 4, "mxfp4": 4, "nvfp4": 4, "w4a16": 4}


def _split_commas(value: object) -> object:
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _shard_size(value: object) -> object:
    return "keep" if value == "keep" else parse_bytes(value, number_unit=10**9)


def _weights(value: object) -> object:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, (list, tuple)):
        return value
    try:
        weights = tuple(float(part) for part in value)
    except (TypeError, ValueError):
        weights = (math.nan,)
    if not all(map(math.isfinite, weights)):
        msg = "a list of numbers, such as [0.7, 0.3]"
        raise ValueError(msg)
    return weights


def _subfolder(value: object) -> object:
    if isinstance(value, str) and (value.startswith("/") or ".." in value.split("/")):
        msg = "a folder inside the adapter's own"
        raise ValueError(msg)
    return value


def _scheme(value: object) -> object:
    if isinstance(value, str):
        Codebooks.of(value, 1)
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]


class ExportConfig(BaseModel):
    """A validated export configuration. Sizes are in bytes.

    Keys and defaults are LLaMA-Factory's, up to `infer_dtype`; the ones after it are this
    project's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    model_name_or_path: str
    """The base: a folder, or a hub id."""
    export_dir: Path = Field(strict=False)
    """Folder of the merged checkpoint; it appears there only when it is complete."""
    adapter_name_or_path: Names = ()
    """Adapters in the order in which they are merged: folders or hub ids."""
    adapter_folder: Annotated[str | None, BeforeValidator(_subfolder)] = None
    """Subfolder of each adapter that holds its files."""
    template: str | None = None
    """Accepted; the base's own tokenizer and chat template are kept, which is what it describes."""
    finetuning_type: Literal["lora", "oft", "freeze", "full"] = "lora"
    stage: Literal["pt", "sft", "rm", "ppo", "dpo", "kto"] = "sft"
    """`rm` carries the value head of a reward model over."""
    export_size: Annotated[int | Literal["keep"], BeforeValidator(_shard_size)] = 5 * 10**9
    """Most bytes of a shard, or `keep` for the base's own shards."""
    export_device: Literal["cpu", "auto", "cuda"] = "cpu"
    """Where weights are merged: `cuda` is all GPUs; `auto` too, if their link is faster than the
    CPU's arithmetic.
    """
    export_legacy_format: bool = False
    """Write `pytorch_model*.bin` instead of safetensors."""
    export_quantization_bit: Literal[2, 3, 4, 8] | None = None
    export_quantization_dataset: str | None = None
    export_quantization_method: Literal[CalibratedName, FormatName] = "gptq"
    """`gptq`, `awq` and `rtn` need a number of bits and a dataset, `aqlm` a dataset; formats need
    neither.
    """
    export_quantization_group_size: Annotated[int, Field(ge=-1)] = 128
    """Inputs per scale; -1 for one scale per row."""
    export_quantization_scheme: Annotated[str, BeforeValidator(_scheme)] = "2x8"
    """AQLM: codebooks, and the bits of each."""
    export_quantization_in_group_size: Annotated[int, Field(ge=1, le=64)] = 8
    """AQLM: inputs of a codebook entry."""
    export_quantization_double: bool = True
    """NF4 and FP4: quantize the scales too."""
    export_requantize: Literal["same"] | None = None
    """`same`: write what is merged onto a quantized base in the base's own format."""
    export_quantization_desc_act: bool = False
    """GPTQ: form the groups in the order of the inputs' magnitudes."""
    export_quantization_damp: Annotated[float, Field(gt=0, lt=1, strict=False)] = 0.05
    """GPTQ and AQLM: share of the mean diagonal that is added to the matrix of inputs."""
    export_quantization_sym: bool = True
    """Whether the middle code means zero."""
    export_quantization_seed: int = 0
    export_quantization_sampling: Literal["blocks", "llamafactory"] = "blocks"
    export_quantization_nsamples: Annotated[int, Field(gt=0)] = 128
    export_quantization_maxlen: Annotated[int, Field(gt=0)] = 1024
    export_hub_model_id: str | None = None
    """Hub repository to push the finished checkpoint to."""
    model_revision: str = "main"
    """Revision of the base on the hub; adapters are taken at their default revision."""
    cache_dir: Path | None = Field(default=None, strict=False)
    hf_hub_token: str | None = Field(default=None, repr=False)
    quantization_bit: int | None = None
    use_kv_cache: bool = True
    resize_vocab: bool = False
    add_tokens: Names = ()
    add_special_tokens: Names = ()
    new_special_tokens_config: str | None = None
    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Dtype of every floating-point tensor of the output; `auto` keeps the base's, tensor by
    tensor.
    """

    max_memory: Annotated[int, BeforeValidator(parse_bytes)] = 2 * 10**9
    """Ceiling on the resident memory of the whole process."""
    max_device_memory: Annotated[int, BeforeValidator(parse_bytes)] = 2 * 10**9
    """Ceiling on what is taken of each GPU, its driver's own memory apart."""
    numerics: Literal["peft", "fp32"] = "peft"
    """`peft`: the bits of PEFT's merge_and_unload on a CPU. `fp32`: one rounding per tensor."""
    peft_bugs: Literal["fix", "reproduce"] = "fix"
    """`reproduce`: merge as PEFT does even where it is known to be wrong (docs/numerics.md)."""
    base_is_residual: bool = False
    """The base is the residual that PiSSA, OLoRA and the like trained on, not the original."""
    allow_dequantize: bool = False
    """Merge onto what a GPTQ, AWQ or AQLM base stands for; write any quantized base in 16 bit."""
    qlora_base: Literal["original", "dequantized-nf4"] | None = None
    """`dequantized-nf4`: merge onto what the base's linears are in NF4, as a QLoRA training had it;
    `original`, the default: onto its weights as they are.
    """
    moe_b_layout: Literal["peft", "unsloth"] = "peft"
    """How adapters on fused experts divide the columns of B; Unsloth's files look like PEFT's."""
    adapter_weights: Annotated[tuple[float, ...], BeforeValidator(_weights)] = ()
    """One factor per adapter: merge their weighted sum instead of one after the other."""
    adapter_combination: (
        Literal["linear", "cat", "ties", "dare_ties", "dare_linear", "magnitude_prune"] | None
    ) = None
    """Combine LoRA factors as PEFT's `add_weighted_adapter` does; weights are 1 by default."""
    adapter_density: Annotated[float | None, Field(ge=0, le=1, strict=False)] = None
    """Share of the entries of each factor that ties, dare_* and magnitude_prune keep."""
    adapter_majority_sign: Literal["total", "frequency"] = "total"
    """What elects the sign in ties and dare_ties: the sum of the entries, or their count."""
    adapter_seed: int = 0
    """Of what dare_* draws."""
    overwrite: bool = False
    """Replace a non-empty `export_dir`."""
    threads: Annotated[int, Field(gt=0, le=1024)] = Field(
        default_factory=lambda: len(os.sched_getaffinity(0))
    )
    """Threads that merge; by default the cores that the process may use."""
    io: Literal["auto", "direct", "buffered", "mmap"] = "auto"
    """How weight files are read and written; `auto` is direct where the file system is known to
    take it, or what `streammerge tune` measured to be better.
    """
    digest: Literal["xxh3-128", "sha256", "none"] = "xxh3-128"
    """Digest of each shard for the report, computed while it is written."""
    allow_nonfinite: bool = False
    """Let NaN and Inf in a merged tensor pass."""
    ignore_files: Names = ()
    """Name patterns of stray weight files in the base that may be ignored."""
    notes: tuple[str, ...] = Field(default=(), exclude=True)
    """What was accepted without effect."""

    @property
    def max_shard_bytes(self) -> int | None:
        """Most bytes of a shard; None for the base's own shards."""
        return None if self.export_size == "keep" else self.export_size

    @property
    def encoded_format(self) -> FormatName | None:
        """The format in which weights are encoded as they are merged; None if they are not."""
        method = self.export_quantization_method
        return method if method in FORMATS else None

    @property
    def calibrated_method(self) -> CalibratedName | None:
        """The method by which layers are quantized after the merge; None if they are not."""
        method = self.export_quantization_method
        if self.export_quantization_bit is None and self.codebooks is None:
            return None
        return method if method in _CALIBRATED else None

    @property
    def codebooks(self) -> Codebooks | None:
        """The codebooks of a weight; None for a method without."""
        if self.export_quantization_method != "aqlm":
            return None
        return Codebooks.of(self.export_quantization_scheme, self.export_quantization_in_group_size)

    @model_validator(mode="after")
    def _check_combinations(self) -> ExportConfig:
        for message in _forbidden(self):
            raise ValueError(message)
        return self


def _forbidden(config: ExportConfig) -> list[str]:
    """Say which combinations of keys make no sense together."""
    faults = []
    adapters = config.adapter_name_or_path
    if adapters and config.finetuning_type not in {"lora", "oft"}:
        faults.append(
            "adapter_name_or_path needs finetuning_type: lora or oft, not "
            f"{config.finetuning_type}; leave the adapter out to export a fully fine-tuned model"
        )
    if config.quantization_bit is not None:
        if adapters:
            faults.append(
                "quantization_bit cannot be used with an adapter: a merge adds to the weights, and "
                "a quantized base has codes instead of weights, so merging needs the unquantized "
                "base; remove quantization_bit (QLoRA adapters too are merged onto the 16-bit base)"
            )
        else:
            faults.append("quantization_bit: on-the-fly quantization is not exported; remove it")
    faults += _forbidden_encodings(config)
    size = config.export_quantization_group_size
    if size != -1 and (size <= 0 or size % 8):
        faults.append("export_quantization_group_size is -1 or a multiple of 8")
    is_coded = config.encoded_format or config.calibrated_method or config.export_requantize
    if is_coded and config.export_legacy_format:
        faults.append("export_legacy_format has no form for quantized weights; remove it")
    if config.adapter_weights and len(config.adapter_weights) != len(adapters):
        faults.append(
            f"adapter_weights has {len(config.adapter_weights)} numbers for "
            f"{len(adapters)} adapters"
        )
    if config.qlora_base is not None and not adapters:
        faults.append(
            f"qlora_base: {config.qlora_base} is about what an adapter is merged onto, and there "
            "is no adapter_name_or_path; remove it"
        )
    prunes = config.adapter_combination not in {None, "linear", "cat"}
    if prunes and not config.adapter_density:
        faults.append(
            f"adapter_combination: {config.adapter_combination} needs adapter_density, above 0"
        )
    if not prunes and config.adapter_density is not None:
        faults.append("adapter_density needs adapter_combination: ties, dare_* or magnitude_prune")
    if config.infer_dtype != "auto" and config.export_size == "keep":
        faults.append(
            "export_size: keep cannot be used with infer_dtype: the tensors change their size"
        )
    return faults


def _forbidden_encodings(config: ExportConfig) -> list[str]:
    """Say which keys of quantization make no sense together."""
    faults = []
    method, bits = config.export_quantization_method, config.export_quantization_bit
    form = config.encoded_format
    if form is not None:
        is_calibrated = config.export_quantization_dataset is not None
        if bits not in {None, _FORMAT_BITS.get(form, 8)}:
            faults.append(
                f"export_quantization_method: {form} has {_FORMAT_BITS.get(form, 8)} bits; remove "
                "export_quantization_bit"
            )
        if is_calibrated:
            faults.append(
                f"export_quantization_method: {form} is not calibrated; remove "
                "export_quantization_dataset, or choose gptq or awq"
            )
        if config.export_size == "keep":
            faults.append("export_size: keep cannot be used with codes: tensors change their size")
    elif (config.codebooks or bits is not None) and not config.export_quantization_dataset:
        key = "method: aqlm" if config.codebooks else "bit"
        faults.append(f"export_quantization_{key} needs export_quantization_dataset")
    elif (
        config.codebooks is None
        and bits is None
        and "export_quantization_method" in config.model_fields_set
    ):
        faults.append(f"export_quantization_method: {method} needs export_quantization_bit")
    faults += _forbidden_codebooks(config)
    if config.export_requantize is None:
        return faults
    if form is not None or config.calibrated_method is not None:
        faults.append(
            "export_requantize writes the base's own format; remove it to choose another by "
            "export_quantization_method"
        )
    if not config.adapter_name_or_path:
        faults.append("export_requantize needs an adapter: without one the base stays as it is")
    if config.infer_dtype != "auto":
        faults.append("export_requantize cannot be used with infer_dtype: codes have no such dtype")
    return faults


def _forbidden_codebooks(config: ExportConfig) -> list[str]:
    """Say which keys have nothing to do with codebooks, or no meaning without."""
    books, bits = config.codebooks, config.export_quantization_bit
    own, others = ("scheme", "in_group_size"), ("group_size", "desc_act", "sym")
    wrong = [
        f"export_quantization_{key}"
        for key in (own if books is None else others)
        if f"export_quantization_{key}" in config.model_fields_set
    ]
    if books is None:
        return [f"{key} needs export_quantization_method: aqlm" for key in wrong]
    faults = [f"{key} has no meaning for export_quantization_method: aqlm" for key in wrong]
    if bits not in {None, books.weight_bits}:
        faults.append(
            f"export_quantization_bit: {bits} is not what export_quantization_scheme: "
            f"{config.export_quantization_scheme} gives in groups of {books.group_size}, "
            f"{books.weight_bits:g} bits; remove export_quantization_bit"
        )
    return faults


def field_names() -> frozenset[str]:
    """Return the keys that a user may set."""
    return frozenset(ExportConfig.model_fields) - {"notes"}
