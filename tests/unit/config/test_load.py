"""Loading a configuration: files, overrides, and one-line errors that name the key."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from streammerge.config import ExportConfig, load_config, parse_config
from streammerge.config import load as load_module
from streammerge.config.keys import NO_EFFECT_KEYS, REFUSED_KEYS, TRAINING_KEYS
from streammerge.config.load import parse_overrides
from streammerge.config.model import field_names
from streammerge.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


LEAST = {"model_name_or_path": "base", "export_dir": "out"}


def parse(**values: Any) -> ExportConfig:
    return parse_config({**LEAST, **values})


def fault_of(**values: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(**values)
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def load_fault(path: Path, text: str | bytes) -> ConfigError:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def test_null_names_are_none_of_them() -> None:
    values = {"model_name_or_path": "m", "export_dir": "o", "adapter_name_or_path": None}
    config = ExportConfig.model_validate(values)
    assert config.adapter_name_or_path == ()


def test_threads_default_to_a_positive_number() -> None:
    assert parse().threads >= 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [(5, 5 * 10**9), (0.5, 5 * 10**8), ("5GB", 5 * 10**9), ("512MB", 512 * 10**6), ("1GiB", 2**30)],
)
def test_export_size_counts_gigabytes_or_its_unit(value: object, expected: int) -> None:
    config = parse(export_size=value)
    assert config.export_size == expected
    assert config.max_shard_bytes == expected


def test_export_size_keep_has_no_shard_limit() -> None:
    config = parse(export_size="keep")
    assert config.export_size == "keep"
    assert config.max_shard_bytes is None


@pytest.mark.parametrize("value", ["5GBGB", 0, True, [5], "kept"])
def test_bad_export_size_is_refused(value: object) -> None:
    assert fault_of(export_size=value).what == "bad value for 'export_size'"


def test_max_memory_counts_bytes() -> None:
    assert parse(max_memory="1.5GiB").max_memory == 1_610_612_736
    assert parse(max_memory=3_000_000).max_memory == 3_000_000


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", ("a",)),
        ("a, b ,c", ("a", "b", "c")),
        (["a", "b,c"], ("a", "b,c")),
        ("", ()),
        (("a",), ("a",)),
    ],
)
def test_adapters_are_a_list_or_a_comma_list(value: object, expected: tuple[str, ...]) -> None:
    assert parse(adapter_name_or_path=value).adapter_name_or_path == expected


@pytest.mark.parametrize("value", [5, [1], {"a": 1}])
def test_adapters_of_another_type_are_refused(value: object) -> None:
    assert fault_of(adapter_name_or_path=value).what == "bad value for 'adapter_name_or_path'"


@pytest.mark.parametrize("value", ["0.5,1", [0.5, 1.0], (0.5, 1.0)])
def test_adapter_weights_are_one_number_per_adapter(value: object) -> None:
    assert parse(adapter_name_or_path="a,b", adapter_weights=value).adapter_weights == (0.5, 1.0)


@pytest.mark.parametrize("value", ["0.5,x", "0.5,", 0.5, ["1", "x"], [0.5, float("nan")], [[1], 2]])
def test_adapter_weights_that_are_not_numbers_are_refused(value: object) -> None:
    fault = fault_of(adapter_name_or_path="a,b", adapter_weights=value)
    assert fault.what == "bad value for 'adapter_weights'"


@pytest.mark.parametrize("key", sorted(field_names()))
def test_null_is_not_given(key: str) -> None:
    if key in LEAST:
        assert fault_of(**{key: None}).what == f"'{key}' is missing"
    else:
        assert parse(threads=2, **({key: None} if key != "threads" else {})) == parse(threads=2)


@pytest.mark.parametrize("key", sorted(NO_EFFECT_KEYS))
def test_key_without_effect_is_accepted_with_a_note(key: str) -> None:
    assert parse(**{key: "anything"}).notes == (f"{key} has no effect on an export",)


@pytest.mark.parametrize(("key", "default"), [(key, pair[0]) for key, pair in REFUSED_KEYS.items()])
def test_refused_key_passes_at_its_default_alone(key: str, default: object) -> None:
    assert parse(**{key: default}).notes == ()
    fault = fault_of(**{key: "yarn"})
    assert fault.what == f"{key} is not supported"
    assert fault.got == "'yarn'"
    assert fault.hint == REFUSED_KEYS[key][1]


def test_key_sets_do_not_overlap() -> None:
    groups = [field_names(), NO_EFFECT_KEYS, frozenset(REFUSED_KEYS), TRAINING_KEYS]
    assert sum(map(len, groups)) == len(frozenset().union(*groups))


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("export_sise", "export_size"),
        ("adapter_name_or_paths", "adapter_name_or_path"),
        ("modelnameorpath", "model_name_or_path"),
        ("max_mem", "max_memory"),
        ("trust_remote_codes", "trust_remote_code"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, near: str) -> None:
    fault = fault_of(**{key: 1})
    assert fault.what == f"unknown key '{key}'"
    assert fault.hint == f"did you mean '{near}'?"


def test_unknown_key_without_a_near_one_points_to_the_help() -> None:
    assert fault_of(zzz=1).hint == "see `streammerge export --help`"


def test_notes_cannot_be_set_by_a_user() -> None:
    assert fault_of(notes=["x"]).what == "unknown key 'notes'"


def test_unknown_key_with_line_breaks_stays_one_line() -> None:
    fault_of(**{"a\r\nb\x85c\u2028d": 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("finetuning_type", "dora"),
        ("stage", "sftt"),
        ("export_device", "gpu"),
        ("export_legacy_format", "yes"),
        ("export_quantization_bit", "4"),
        ("export_quantization_bit", 5),
        ("export_quantization_nsamples", 0),
        ("infer_dtype", "bf16"),
        ("numerics", "fast"),
        ("threads", 0),
        ("threads", "2"),
        ("io", "fast"),
        ("digest", "md5"),
        ("overwrite", 1),
        ("model_name_or_path", 7),
        ("export_dir", 7),
        ("quantization_bit", "4"),
        ("cache_dir", 1),
        ("ignore_files", 1),
    ],
)
def test_bad_value_names_its_key_and_itself(key: str, value: object) -> None:
    fault = fault_of(**{key: value})
    assert fault.what == f"bad value for '{key}'"
    assert fault.got == repr(value)
    assert fault.expected is not None
    assert fault.expected[0].islower()


def test_error_message_has_the_fixed_order() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**LEAST, "export_device": "gpu", "threads": 0}, where="x.yaml")
    assert str(caught.value) == (
        "bad value for 'export_device', in x.yaml; expected input should be "
        "'cpu', 'auto' or 'cuda'; got 'gpu'; 1 more after this one"
    )


def test_missing_keys_are_named_and_counted() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({})
    assert str(caught.value) == "'model_name_or_path' is missing; 1 more after this one"


def test_long_value_is_cut_in_the_message() -> None:
    fault = fault_of(export_device="x" * 5000)
    assert fault.got is not None
    assert len(fault.got) <= 120


@pytest.mark.parametrize("kind", ["full", "freeze"])
def test_adapter_needs_lora(kind: str) -> None:
    fault = fault_of(adapter_name_or_path="a", finetuning_type=kind)
    said = f"adapter_name_or_path needs finetuning_type: lora or oft, not {kind}; "
    assert fault.what.startswith(said)
    assert parse(finetuning_type=kind).finetuning_type == kind


@pytest.mark.parametrize(
    ("values", "start"),
    [
        (
            {"quantization_bit": 4, "adapter_name_or_path": "a"},
            "quantization_bit cannot be used with",
        ),
        ({"quantization_bit": 4}, "quantization_bit: on-the-fly quantization is not exported"),
        (
            {"export_quantization_bit": 4},
            "export_quantization_bit needs export_quantization_dataset",
        ),
        (
            {"export_quantization_bit": 4, "export_quantization_dataset": ""},
            "export_quantization_bit needs export_quantization_dataset",
        ),
        ({"adapter_weights": [1.0]}, "adapter_weights has 1 numbers for 0 adapters"),
        (
            {"adapter_name_or_path": "a,b", "adapter_weights": [1.0]},
            "adapter_weights has 1 numbers for 2 adapters",
        ),
        (
            {"infer_dtype": "float16", "export_size": "keep"},
            "export_size: keep cannot be used with infer_dtype",
        ),
    ],
)
def test_senseless_combination_is_refused(values: dict[str, Any], start: str) -> None:
    assert fault_of(**values).what.startswith(start)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantization_bits_of_the_format_pass(bits: int) -> None:
    config = parse(export_quantization_bit=bits, export_quantization_dataset="d.json")
    assert config.export_quantization_bit == bits


def test_legacy_names_mean_todays_keys() -> None:
    config = parse(new_special_tokens="<a>,<b>", checkpoint_dir="x,y")
    assert config.add_special_tokens == ("<a>", "<b>")
    assert config.adapter_name_or_path == ("x", "y")


@pytest.mark.parametrize(
    ("old", "new"),
    [("new_special_tokens", "add_special_tokens"), ("checkpoint_dir", "adapter_name_or_path")],
)
def test_legacy_name_beside_its_key_is_a_duplicate(old: str, new: str) -> None:
    assert fault_of(**{old: "x", new: "y"}).what == f"'{old}' and '{new}' are the same key"
    assert fault_of(**{new: "x", old: "y"}).what == f"'{old}' and '{new}' are the same key"


def test_training_configuration_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    fault = load_fault(
        path,
        "model_name_or_path: m\nstage: sft\ndo_train: true\nlora_rank: 8\ndataset: identity\n"
        "output_dir: saves/run\nlearning_rate: 1.0e-4\nbf16: true\n",
    )
    assert str(fault) == (
        "this is a training configuration (do_train, output_dir, learning_rate), not an export "
        f"configuration, in {path}; an export needs model_name_or_path, adapter_name_or_path "
        "(the training's output_dir, 'saves/run') and export_dir"
    )


def test_training_configuration_without_output_dir_has_the_plain_hint() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"do_train": True})
    assert caught.value.hint == (
        "an export needs model_name_or_path, adapter_name_or_path (the training's output_dir) "
        "and export_dir"
    )


def test_training_key_in_an_export_is_named() -> None:
    fault = fault_of(output_dir="x")
    assert fault.what == "'output_dir' belongs to training, not to an export"
    assert fault.hint == "remove it"


def test_yaml_and_json_mean_the_same(tmp_path: Path) -> None:
    values = {**LEAST, "adapter_name_or_path": ["a", "b"], "export_size": 0.5, "threads": 1}
    text = json.dumps(values)
    (tmp_path / "c.json").write_text(text)
    (tmp_path / "c.yml").write_text(text)
    assert (
        load_config(tmp_path / "c.json")
        == load_config(str(tmp_path / "c.yml"))
        == parse(adapter_name_or_path=["a", "b"], export_size=0.5, threads=1)
    )


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: base\nexport_dir: out\nexport_size: 2\n")
    config = load_config(path, ["export_size=512MB", "--export-dir", "other", "--overwrite"])
    assert config.export_size == 512_000_000
    assert config.export_dir.as_posix() == "other"
    assert config.overwrite is True


def test_overrides_alone_make_a_configuration() -> None:
    config = load_config(None, ["model_name_or_path=m", "export_dir=o", "adapter_weights=[]"])
    assert (config.model_name_or_path, config.export_dir.as_posix()) == ("m", "o")


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], {}),
        (["export_size=2"], {"export_size": 2}),
        (["--export_size=2"], {"export_size": 2}),
        (["--export-size", "2"], {"export_size": 2}),
        (["a=b=c"], {"a": "b=c"}),
        (["a="], {"a": None}),
        (["a=null"], {"a": None}),
        (["a=[x, y]"], {"a": ["x", "y"]}),
        (["a=false", "b=0.5"], {"a": False, "b": 0.5}),
        (["--overwrite"], {"overwrite": True}),
        (["--io=direct", "digest=none"], {"io": "direct", "digest": "none"}),
        (["--overwrite", "--io", "mmap"], {"overwrite": True, "io": "mmap"}),
        (["--overwrite", "io=mmap"], {"overwrite": True, "io": "mmap"}),
        (["--a", "s3://x?y=1"], {"a": "s3://x?y=1"}),
        (["--a", "-1"], {"a": -1}),
        (["a=1", "a=2"], {"a": 2}),
    ],
)
def test_overrides_are_parsed(items: list[str], expected: dict[str, object]) -> None:
    assert parse_overrides(items) == expected


def test_bare_word_is_not_an_override() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["overwrite"])
    assert str(caught.value) == (
        "override is not understood; expected key=value or --key value; got 'overwrite'"
    )


@pytest.mark.parametrize("text", ["[1", "{a", "'x", "2024-13-45", "0b_", "[" * 20_000])
def test_override_that_is_not_yaml_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="value of 'a' is not valid YAML"):
        parse_overrides([f"a={text}"])


def test_duplicate_yaml_key_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    fault = load_fault(path, "model_name_or_path: m\nexport_dir: a\nexport_dir: b\n")
    assert str(fault) == f"key 'export_dir' is given twice, in {path}, line 3"


def test_duplicate_key_in_a_nested_map_is_refused(tmp_path: Path) -> None:
    fault = load_fault(tmp_path / "c.yaml", "dataset:\n  a: 1\n  a: 2\n")
    assert fault.what == "key 'a' is given twice"


def test_duplicate_json_key_is_refused(tmp_path: Path) -> None:
    load_fault(
        tmp_path / "c.json", '{"model_name_or_path": "m", "export_dir": "a", "export_dir": "b"}'
    )


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("c.yaml", "a: [1\n", "configuration is not valid YAML"),
        (
            "c.yaml",
            "a: !!python/object/apply:os.system ['true']\n",
            "configuration is not valid YAML",
        ),
        ("c.yaml", "a: 2024-13-45\n", "configuration is not valid YAML"),
        ("c.yaml", "? [a]\n: 1\n", "a key is not text"),
        ("c.yaml", "a: " + "[" * 20_000, "configuration is not valid YAML"),
        ("c.json", "{", "configuration is not valid JSON"),
        ("c.json", "[" * 200_000, "configuration is not valid JSON"),
        ("c.json", "a: 1", "configuration is not valid JSON"),
        ("c.yaml", "", "configuration is not a map of keys"),
        ("c.yaml", "- a\n", "configuration is not a map of keys"),
        ("c.yaml", "1: a\n", "a key is not text"),
        ("c.json", "[]", "configuration is not a map of keys"),
        ("c.yaml", b"\xff\xfe\xff", "configuration is not UTF-8 text"),
    ],
)
def test_file_that_is_not_a_configuration_is_refused(
    tmp_path: Path, name: str, text: str | bytes, what: str
) -> None:
    fault = load_fault(tmp_path / name, text)
    assert fault.what == what
    assert str(fault.where).startswith(str(tmp_path / name))


def test_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == (
        f"cannot read the configuration (No such file or directory), in {path}"
    )


def test_huge_file_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "MAX_CONFIG_BYTES", 10)
    assert (
        load_fault(tmp_path / "c.yaml", "a: 1234567890").what == "configuration file is too large"
    )


def test_fault_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    fault = load_fault(path, "model_name_or_path: m\nexport_dir: o\nquantization_bit: 4\n")
    assert fault.where == str(path)
