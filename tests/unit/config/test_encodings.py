"""Keys that store weights as codes, and what makes no sense with them."""

from __future__ import annotations

from typing import Any

import pytest

from streammerge.config import parse_config
from streammerge.config.model import FORMATS
from streammerge.errors import ConfigError

LEAST = {"model_name_or_path": "base", "export_dir": "out", "adapter_name_or_path": "a"}


def fault_of(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({**LEAST, **values})
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("form", FORMATS)
def test_a_format_needs_no_bits_and_no_dataset(form: str) -> None:
    config = parse_config({**LEAST, "export_quantization_method": form})
    assert config.encoded_format == form
    assert config.calibrated_method is None


@pytest.mark.parametrize(("form", "bits"), [
    ("nf4", 4), ("fp4", 4), ("int8", 8), ("fp8", 8), ("fp8-block", 8), ("mxfp4", 4), ("nvfp4", 4),
    ("w4a16", 4), ("w8a16", 8),
])  # fmt: skip
def test_bits_may_be_said_but_only_those_that_it_has(form: str, bits: int) -> None:
    values = {"export_quantization_method": form}
    parse_config({**LEAST, **values, "export_quantization_bit": bits})
    other = 12 - bits
    fault = fault_of(**values, export_quantization_bit=other)
    assert f"export_quantization_method: {form} has {bits} bits" in fault


@pytest.mark.parametrize(("values", "said"), [
    ({"export_quantization_method": "nf5"}, "export_quantization_method"),
    (
        {"export_quantization_method": "nf4", "export_quantization_dataset": "c4.json"},
        "nf4 is not calibrated; remove export_quantization_dataset",
    ),
    (
        {"export_quantization_method": "nf4", "export_size": "keep"},
        "export_size: keep cannot be used with codes",
    ),
    (
        {"export_quantization_method": "nf4", "export_legacy_format": True},
        "export_legacy_format has no form for quantized weights",
    ),
    (
        {"export_quantization_method": "w4a16", "export_quantization_group_size": 20},
        "export_quantization_group_size is -1 or a multiple of 8",
    ),
    ({"export_quantization_method": "awq"}, "awq needs export_quantization_bit"),
    (
        {"export_requantize": "same", "export_quantization_method": "nf4"},
        "export_requantize writes the base's own format",
    ),
    (
        {
            "export_requantize": "same", "export_quantization_bit": 4,
            "export_quantization_dataset": "c4.json",
        },
        "export_requantize writes the base's own format",
    ),
    (
        {"export_requantize": "same", "adapter_name_or_path": None},
        "export_requantize needs an adapter",
    ),
    (
        {"export_requantize": "same", "infer_dtype": "float16"},
        "export_requantize cannot be used with infer_dtype",
    ),
    (
        {"export_requantize": "same", "export_legacy_format": True},
        "export_legacy_format has no form for quantized weights",
    ),
    ({"export_requantize": "other"}, "export_requantize"),
])  # fmt: skip
def test_what_makes_no_sense_is_named(values: dict[str, Any], said: str) -> None:
    assert said in fault_of(**values)


def test_the_base_s_shards_may_be_kept_where_its_format_is() -> None:
    config = parse_config({**LEAST, "export_requantize": "same", "export_size": "keep"})
    assert config.max_shard_bytes is None
    assert config.encoded_format is None
