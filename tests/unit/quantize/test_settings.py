"""Settings of a quantization."""

from __future__ import annotations

from dataclasses import replace

from streammerge.config import parse_config
from streammerge.engine.quantize import read_settings
from streammerge.quantize.settings import QuantizeSettings

CONFIG = {"model_name_or_path": "base", "export_dir": "out"}


def test_not_asked_for() -> None:
    assert read_settings(parse_config(CONFIG)) is None


def test_each_key_has_its_setting() -> None:
    keys = {
        "bit": 8, "method": "rtn", "group_size": 64, "desc_act": True, "damp": 0.2, "nsamples": 3,
        "maxlen": 17, "seed": 5, "sampling": "llamafactory", "dataset": "builtin",
    }  # fmt: skip
    config = parse_config(
        {**CONFIG, **{f"export_quantization_{key}": value for key, value in keys.items()}}
    )
    assert read_settings(config) == QuantizeSettings(
        method="rtn", bits=8, group_size=64, desc_act=True, damp=0.2, nsamples=3, maxlen=17,
        seed=5, sampling="llamafactory",
    )  # fmt: skip


def test_defaults_agree() -> None:
    keys = {"export_quantization_bit": 4, "export_quantization_dataset": "builtin"}
    assert read_settings(parse_config({**CONFIG, **keys})) == QuantizeSettings()


def test_grid() -> None:
    settings = replace(QuantizeSettings(), bits=3, is_symmetric=False)
    assert settings.grid.highest == 7
    assert not settings.grid.is_symmetric
