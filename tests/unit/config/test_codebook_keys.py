"""The keys of AQLM: what goes together, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from streammerge.config import ExportConfig, parse_config
from streammerge.config.codebooks import Codebooks
from streammerge.engine.quantize import read_settings
from streammerge.errors import ConfigError
from streammerge.quantize.settings import QuantizeSettings

BASE = {"model_name_or_path": "base", "export_dir": "out"}
AQLM = {"export_quantization_method": "aqlm", "export_quantization_dataset": "builtin"}


def parse(**keys: Any) -> ExportConfig:
    return parse_config({**BASE, **{f"export_quantization_{key}": v for key, v in keys.items()}})


def aqlm(**keys: Any) -> ExportConfig:
    return parse(**({"method": "aqlm", "dataset": "builtin"} | keys))


def test_a_method_without_bits() -> None:
    assert aqlm().codebooks == Codebooks(2, 8, 8)
    assert aqlm().calibrated_method == "aqlm"
    assert aqlm(scheme="1x16", in_group_size=16).codebooks == Codebooks(1, 16, 16)
    assert parse().codebooks is None
    assert parse(bit=4, dataset="builtin").codebooks is None


@pytest.mark.parametrize(
    ("keys", "bits"),
    [({}, 2), ({"bit": 2}, 2), ({"scheme": "1x12"}, 1.5), ({"scheme": "4x8", "bit": 4}, 4)],
)
def test_each_key_has_its_setting(keys: dict[str, Any], bits: float) -> None:
    config = aqlm(**keys, damp=0.2, seed=3, nsamples=5, maxlen=7)
    wanted = QuantizeSettings(
        "aqlm", bits, -1, damp=0.2, seed=3, nsamples=5, maxlen=7, codebooks=config.codebooks
    )
    assert read_settings(config) == wanted


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"scheme": "2y8"}, "export_quantization_scheme.*codebooks x bits of each.*'2y8'"),
        ({"scheme": "1x17"}, "export_quantization_scheme"),
        ({"in_group_size": 0}, "export_quantization_in_group_size"),
        ({"bit": 4}, "export_quantization_bit: 4 is not what.*2x8 gives in groups of 8, 2 bits"),
        ({"bit": 2, "scheme": "1x12"}, "groups of 8, 1.5 bits"),
        ({"dataset": None}, "export_quantization_method: aqlm needs export_quantization_dataset"),
        ({"group_size": 64}, "export_quantization_group_size has no meaning for"),
        ({"desc_act": True}, "export_quantization_desc_act has no meaning for"),
        ({"sym": False}, "export_quantization_sym has no meaning for"),
    ],
)
def test_refusals(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        aqlm(**keys)


@pytest.mark.parametrize("key", [{"scheme": "2x8"}, {"in_group_size": 8}])
def test_keys_of_codebooks_need_the_method(key: dict[str, Any]) -> None:
    (name,) = key
    with pytest.raises(ConfigError, match=f"{name} needs export_quantization_method: aqlm"):
        parse(bit=4, dataset="builtin", **key)


@pytest.mark.parametrize("other", [{"export_legacy_format": True}, {"export_requantize": "same"}])
def test_what_does_not_go_with_it(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(other))):
        parse_config({**BASE, **AQLM, **other, "adapter_name_or_path": "a"})
