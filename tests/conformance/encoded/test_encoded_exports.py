"""A merge that is stored as codes has the bytes of the format's library on PEFT's merge."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import libraries
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from models import assert_same, load_folder, logits, raw, section_in
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config

import streammerge
from streammerge.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from models import Merge

pytestmark = pytest.mark.filterwarnings("ignore")

FOUR_BITS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
DTYPES = ["bfloat16", "float16", "float32"]
# format, and what is asked for besides
COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("fp8", {}),
    "mxfp4": ("mxfp4", {}),
    "nvfp4": ("nvfp4", {}),
    "w4a16": ("w4a16", {}),
    "w4a16 of 32": ("w4a16", {"group_size": 32}),
    "w4a16 by rows": ("w4a16", {"group_size": -1}),
    "w8a16": ("w8a16", {}),
}


def bitsandbytes_of(merge: Merge, folder: Path, form: str, *, is_nested: bool) -> Path:
    """Let transformers quantize PEFT's merge as it is loaded, and save it."""
    if form == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=form,
            bnb_4bit_use_double_quant=is_nested,
            bnb_4bit_compute_dtype=next(iter(merge.tensors.values())).dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        merge.merged, quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    return folder


def check_bitsandbytes(merge: Merge, folder: Path, form: str, *, is_nested: bool) -> None:
    expected = bitsandbytes_of(merge, folder / "expected", form, is_nested=is_nested)
    merge.export(
        folder / "out", export_quantization_method=form, export_quantization_double=is_nested
    )
    assert_same(load_folder(folder / "out"), load_folder(expected))
    ours, theirs = section_in(folder / "out"), section_in(expected)
    kept = ours.pop("llm_int8_skip_modules")
    theirs.pop("llm_int8_skip_modules")
    assert ours == theirs
    assert "lm_head" in kept
    assert not {f"{name}.weight" for name in kept} & set(merge.linears)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "is_nested"), [*FOUR_BITS, ("int8", False)])
def test_bitsandbytes_is_that_of_transformers(
    form: str, is_nested: bool, dtype: str, merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    check_bitsandbytes(merge_of("llama", dtype), tmp_path, form, is_nested=is_nested)


@pytest.mark.parametrize("model", ["tied", "bias", "moe"])
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_bitsandbytes_in_models_of_all_kinds(
    form: str, model: str, merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    check_bitsandbytes(merge_of(model), tmp_path, form, is_nested=True)


@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
def test_bitsandbytes_where_rows_are_no_whole_blocks(
    form: str, merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    check_bitsandbytes(merge_of("odd"), tmp_path, form, is_nested=True)


def encoded(merge: Merge, form: str, names: list[str], **options: Any) -> dict[str, torch.Tensor]:
    """Return PEFT's merge with some of its weights as codes."""
    return libraries.encode_all(form, merge.tensors, names, **options)


def settings_of(form: str, options: dict[str, Any]) -> dict[str, Any]:
    keys = {
        "group_size": "export_quantization_group_size",
        "is_nested": "export_quantization_double",
    }
    more = {keys[key]: value for key, value in options.items()}
    return {"export_quantization_method": form, **more}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors_are_those_of_the_library(
    case: str, dtype: str, merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    form, options = COMPRESSED[case]
    merge = merge_of("llama", dtype)
    merge.export(tmp_path / "out", **settings_of(form, options))
    assert_same(load_folder(tmp_path / "out"), encoded(merge, form, merge.linears, **options))


@pytest.mark.parametrize("model", ["tied", "bias", "odd"])
@pytest.mark.parametrize("case", ["fp8", "w4a16 by rows"])
def test_compressed_tensors_in_models_of_all_kinds(
    case: str, model: str, merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    form, options = COMPRESSED[case]
    merge = merge_of(model)
    merge.export(tmp_path / "out", **settings_of(form, options))
    assert_same(load_folder(tmp_path / "out"), encoded(merge, form, merge.linears, **options))


@pytest.mark.parametrize("form", ["fp8", "nvfp4", "mxfp4", "w4a16"])
def test_single_experts_are_linears_of_the_checkpoint(
    form: str, merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    merge = merge_of("moe")
    merge.export(tmp_path / "out", export_quantization_method=form)
    experts = [name for name in merge.tensors if ".experts." in name]
    assert len(experts) == 2 * 3 * 3
    expected = encoded(merge, form, [*merge.linears, *experts])
    assert_same(load_folder(tmp_path / "out"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_fp8_are_those_of_transformers(
    dtype: str, merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    merge = merge_of("llama", dtype)
    report = merge.export(tmp_path / "out", export_quantization_method="fp8-block")
    # 64 outputs are no whole block
    left = [name for name in merge.linears if name.endswith(("k_proj.weight", "v_proj.weight"))]
    whole = [name for name in merge.linears if name not in left]
    assert_same(load_folder(tmp_path / "out"), encoded(merge, "fp8-block", whole))
    kept = section_in(tmp_path / "out")["modules_to_not_convert"]
    assert {name.removesuffix(".weight") for name in left} < set(kept)
    assert any(f"{len(left)} linears stay as they are" in note for note in report.notes)


@pytest.mark.parametrize("adapters", ["dora", "two"])
@pytest.mark.parametrize("form", ["nvfp4", "nf4"])
def test_other_merges_are_encoded_too(
    form: str, adapters: str, merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    # nvfp4 looks at all rows of the merge before it encodes the first
    merge = merge_of("llama", "bfloat16", adapters)
    merge.export(tmp_path / "out", export_quantization_method=form)
    assert_same(load_folder(tmp_path / "out"), encoded(merge, form, merge.linears))


def test_without_an_adapter_the_base_is_encoded(
    merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    merge = merge_of()
    report = merge.export(
        tmp_path / "out", export_quantization_method="nvfp4", adapter_name_or_path=None
    )
    expected = libraries.encode_all("nvfp4", load_folder(merge.base), merge.linears)
    assert_same(load_folder(tmp_path / "out"), expected)
    # nothing was merged of which a share could be kept
    assert not report.deltas


@pytest.mark.parametrize("case", ["nf4", "fp4", "fp8-block", *COMPRESSED])
def test_what_is_written_is_loaded_and_computes_as_its_decoded_weights(
    case: str, merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    form, options = COMPRESSED.get(case, (case, {}))
    # compressed-tensors decodes codes of FP4 to bfloat16, whatever the model's dtype is
    kind = torch.bfloat16 if form in ("mxfp4", "nvfp4") else torch.float32
    merge = merge_of("llama", str(kind).removeprefix("torch."))
    merge.export(tmp_path / "out", **settings_of(form, options))
    stored = load_folder(tmp_path / "out")
    plain: Any = AutoModelForCausalLM.from_pretrained(merge.merged)
    for name in merge.linears:
        if raw(stored.get(name, torch.zeros(0))) != raw(merge.tensors[name]):
            weight = libraries.decode(form, name, stored, kind, **options)
            plain.get_parameter(name).data = weight
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    got, expected = logits(loaded), logits(plain)
    assert not torch.equal(expected, logits(AutoModelForCausalLM.from_pretrained(merge.merged)))
    # the inputs of each of 14 linears are rounded to FP8, or by the kernel of bitsandbytes for CPUs
    # to bfloat16
    rounding = {"fp8": 2**-4, "nf4": 2**-8, "fp4": 2**-8}.get(form, 1e-6)
    assert (got - expected).norm() <= 14 * rounding * expected.norm()


@pytest.mark.parametrize("case", COMPRESSED)
def test_the_section_is_the_preset_of_compressed_tensors(
    case: str, merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    form, options = COMPRESSED[case]
    merge = merge_of()
    merge.export(tmp_path / "out", **settings_of(form, options))
    section = section_in(tmp_path / "out")
    config = QuantizationConfig.model_validate(section)
    assert config.format == libraries.FORMATS[form]
    (group,) = config.config_groups.values()
    assert group.model_dump() == libraries.scheme(form, **options).model_dump()
    assert "lm_head" in section["ignore"]
    assert not {f"{name}.weight" for name in section["ignore"]} & set(merge.linears)


def test_the_section_is_that_of_transformers_for_blocks_of_fp8(
    merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    merge_of().export(tmp_path / "out", export_quantization_method="fp8-block")
    section = section_in(tmp_path / "out")
    options = {key: value for key, value in section.items() if key != "quant_method"}
    theirs = FineGrainedFP8Config(**options).to_dict()
    assert {key: theirs[key] for key in section} == section
    # what is not said is what it would be anyway
    default = FineGrainedFP8Config(weight_block_size=[128, 128]).to_dict()
    assert {k: v for k, v in theirs.items() if k != "modules_to_not_convert"} == {
        k: v for k, v in default.items() if k != "modules_to_not_convert"
    }


@pytest.mark.parametrize("settings", [
    {"threads": 3}, {"threads": 3, "io": "direct"}, {"io": "buffered"}, {"io": "mmap"},
    {"max_memory": "2GB", "threads": 2}, {"digest": "sha256"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("form", ["nf4", "nvfp4", "int8"])
def test_bytes_do_not_depend_on_how_it_is_done(
    form: str, settings: dict[str, Any], merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    merge = merge_of("odd" if form != "nvfp4" else "llama", "float32")
    merge.export(tmp_path / "one", export_quantization_method=form)
    merge.export(tmp_path / "other", export_quantization_method=form, **settings)
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("form", ["nf4", "nvfp4", "int8", "mxfp4", "fp8", "w8a16", "fp8-block"])
def test_bytes_do_not_depend_on_the_size_of_tiles(
    form: str, tiny_tiles: None, merge_of: Callable[..., Merge], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from streammerge.engine import prepare  # noqa: PLC0415 (patched here alone)

    real: Any = prepare.plan_memory

    def least(tensors: Any, **options: Any) -> Any:
        # the smallest slabs that a plan allows
        shape = options["shape"]
        return real(tensors, **{**options, "shape": type(shape)(block_bytes=1)})

    merge = merge_of("llama", "float32")
    monkeypatch.setattr(prepare, "plan_memory", least)
    merge.export(tmp_path / "out", export_quantization_method=form, threads=2)
    names = [
        name for name in merge.linears
        if form != "fp8-block" or not name.endswith(("k_proj.weight", "v_proj.weight"))
    ]  # fmt: skip
    assert_same(load_folder(tmp_path / "out"), encoded(merge, form, names))


@pytest.mark.parametrize("form", ["nf4", "int8", "fp8", "w4a16"])
def test_shards_of_any_size_and_their_digests(
    form: str, merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    # odd sizes put what is aligned to 4 bytes before what is not
    merge = merge_of("odd")
    options = {"group_size": -1} if form == "w4a16" else {}
    for size in ("20KB", "50KB", "1MB"):
        report = merge.export(
            tmp_path / "out", **settings_of(form, options), export_size=size, digest="sha256",
            overwrite=True, threads=2,
        )  # fmt: skip
        assert_same(load_folder(tmp_path / "out"), encoded(merge, form, merge.linears, **options))
        for shard in report.shards:
            data = (tmp_path / "out" / shard["name"]).read_bytes()
            assert shard["bytes"] == len(data)
            assert shard["digest"] == hashlib.sha256(data).hexdigest()
        assert report.bytes_written == sum(shard["bytes"] for shard in report.shards)
        assert (len(report.shards) > 1) == (size != "1MB")


def test_the_plan_says_what_is_written(merge_of: Callable[..., Merge], tmp_path: Path) -> None:
    merge = merge_of("odd")
    settings = {
        "model_name_or_path": str(merge.base),
        "adapter_name_or_path": [str(path) for path in merge.adapters],
        "export_dir": str(tmp_path / "out"),
        "export_quantization_method": "nf4",
    }
    plan = streammerge.build_plan(settings)
    report = streammerge.export({**settings, "max_memory": "4GB"})
    assert plan.bytes_written == report.bytes_written
    weights = {tensor.name: tensor for tensor in plan.tensors}
    assert all(weights[name].change == "quantized" for name in merge.linears)


def test_codes_of_one_kind_become_codes_of_another(
    merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    merge = merge_of()
    merge.export(tmp_path / "fp8", export_quantization_method="fp8")
    stored = load_folder(tmp_path / "fp8")
    report = merge.export(
        tmp_path / "out",
        model_name_or_path=str(tmp_path / "fp8"),
        adapter_name_or_path=None,
        export_quantization_method="nf4",
    )
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in merge.tensors.items():
        if name in merge.linears:
            plain = libraries.decode("fp8", name, stored, torch.bfloat16)
            expected.update(libraries.encode("nf4", name, plain))
        else:
            expected[name] = tensor
    assert_same(load_folder(tmp_path / "out"), expected)
    assert section_in(tmp_path / "out")["quant_method"] == "bitsandbytes"
    assert any("base is quantized" in note for note in report.notes)


def test_groups_that_do_not_divide_inputs_name_those_that_do(
    merge_of: Callable[..., Merge], tmp_path: Path
) -> None:
    merge = merge_of("odd")
    with pytest.raises(
        UnsupportedError, match="expected a multiple of 128 inputs; got 77"
    ) as error:
        merge.export(tmp_path / "out", export_quantization_method="w4a16")
    assert "export_quantization_group_size" in str(error.value) or "-1" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_torch_has_its_threads_afterwards(merge_of: Callable[..., Merge], tmp_path: Path) -> None:
    merge = merge_of()
    before = torch.get_num_threads()
    merge.export(tmp_path / "out", export_quantization_method="nf4", threads=2)
    assert torch.get_num_threads() == before
