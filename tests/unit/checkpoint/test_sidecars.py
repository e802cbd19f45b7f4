"""What is carried over beside the weights, what is left out, and how config.json changes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from streammerge.checkpoint.sidecars import (
    Sidecar,
    Sidecars,
    added_tokens,
    find_sidecars,
    write_durably,
    write_sidecars,
)
from streammerge.errors import CheckpointError, InputError, ResourceError

if TYPE_CHECKING:
    from pathlib import Path

COPIED = [
    "LICENSE", "README.md", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "configuration_custom.py", "generation_config.json", "merges.txt", "modeling_custom.py",
    "preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "spiece.model",
    "spk_dict.pt", "tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "video_preprocessor_config.json", "vocab.json", "assets/voice.wav", "1_Pooling/config.json",
    "modules.json", "sentence_bert_config.json",
]  # fmt: skip
LEFT_OUT = [
    "model.safetensors", "model.safetensors.index.json", "model.safetensors.index.fp16.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "model-q4.gguf", "tf_model.h5",
    "flax_model.msgpack", "rust_model.ot", "consolidated.00.pth", "params.json", "model.onnx",
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "trainer_state.json",
    "training_args.bin", "adapter_config.json", "adapter_model.safetensors", "model.pt",
    "x.incomplete", "x.lock", "model.safetensors.partial", "sub/weights.bin",
]  # fmt: skip
FOLDERS_LEFT_OUT = ["original", "metal", "onnx", "openvino", "coreml", "checkpoint-500", "runs",
                    "global_step10", "__pycache__", ".cache", ".git"]  # fmt: skip


def put(folder: Path, name: str, text: str = "") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text or name)
    return path


def names(sidecars: Sidecars) -> list[str]:
    return [sidecar.name for sidecar in sidecars.files]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


def test_files_of_the_model_are_copied_and_weights_left_out(base: Path) -> None:
    for name in [*COPIED, *LEFT_OUT, "config.json", ".gitattributes"]:
        put(base, name)
    for name in FOLDERS_LEFT_OUT:
        put(base, f"{name}/inside.json")
    found = find_sidecars(base, tokenizer_from=None)
    assert found.files == tuple(Sidecar(name, base / name) for name in sorted(COPIED))
    assert found.left_out == tuple(sorted([*LEFT_OUT, *(f"{name}/" for name in FOLDERS_LEFT_OUT)]))


def test_linked_folder_is_not_entered(base: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "secret.json")
    (base / "link").symlink_to(tmp_path / "elsewhere")
    found = find_sidecars(base, tokenizer_from=None)
    assert (found.files, found.left_out) == ((), ("link/",))


def test_link_into_the_hub_cache_is_copied_and_one_elsewhere_is_not(tmp_path: Path) -> None:
    base = tmp_path / "models--a--b" / "snapshots" / "0123"
    base.mkdir(parents=True)
    (base / "tokenizer.json").symlink_to(put(tmp_path / "models--a--b", "blobs/77"))
    (base / "notes.txt").symlink_to(put(tmp_path, "secret"))
    (base / "gone.txt").symlink_to(tmp_path / "nowhere")
    found = find_sidecars(base, tokenizer_from=None)
    assert names(found) == ["tokenizer.json"]
    assert found.left_out == ("gone.txt", "notes.txt")


def test_adapters_tokenizer_replaces_the_bases_as_a_whole(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    for name in ["tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja", "modeling.py",
                 "sub/tokenizer.json"]:  # fmt: skip
        put(base, name)
    for name in ["tokenizer.json", "added_tokens.json", "README.md", "adapter_config.json",
                 "adapter_model.safetensors", "tokenizer.bin", "chat_template.json"]:  # fmt: skip
        put(adapter, name)
    (adapter / "tokenizer_folder").mkdir()
    found = find_sidecars(base, tokenizer_from=adapter)
    assert found.files == (
        Sidecar("added_tokens.json", adapter / "added_tokens.json"),
        Sidecar("chat_template.json", adapter / "chat_template.json"),
        Sidecar("modeling.py", base / "modeling.py"),
        Sidecar("sub/tokenizer.json", base / "sub/tokenizer.json"),
        Sidecar("tokenizer.json", adapter / "tokenizer.json"),
    )


def test_extra_files_go_to_the_top_and_never_replace_the_config(base: Path, tmp_path: Path) -> None:
    put(base, "README.md")
    extras = [put(tmp_path, "x/README.md"), put(tmp_path, "x/value_head.safetensors"),
              put(tmp_path, "x/config.json")]  # fmt: skip
    found = find_sidecars(base, tokenizer_from=None, extra=extras)
    assert found.files == (
        Sidecar("README.md", extras[0]),
        Sidecar("value_head.safetensors", extras[1]),
    )


def write(
    output: Path,
    files: tuple[Sidecar, ...],
    source: Path,
    edits: dict[str, Any],
    config: dict[str, Any],
) -> None:
    write_sidecars(
        output, Sidecars(files, ()), config_source=source, config_edits=edits, config=config
    )


def test_files_are_copied_byte_for_byte_into_their_folders(base: Path, output: Path) -> None:
    one, two = put(base, "a.py", "é\r\n"), put(base, "b/c/d.json", "{}")
    write(output, (Sidecar("a.py", one), Sidecar("b/c/d.json", two)), base / "config.json", {}, {})
    assert (output / "a.py").read_bytes() == one.read_bytes()
    assert (output / "b/c/d.json").read_text() == "{}"
    assert not (output / "config.json").exists()


def test_config_without_edits_is_copied_byte_for_byte(base: Path, output: Path) -> None:
    text = '{"b":1,\r\n\t"a" : "\\u00e9", "x": 1e-05 }'
    source = put(base, "config.json", text)
    write(output, (), source, {}, json.loads(text))
    assert (output / "config.json").read_bytes() == text.encode()


def test_edited_config_keeps_the_order_of_its_keys(base: Path, output: Path) -> None:
    config = {
        "z": 1,
        "name": "é",
        "gone": 2,
        "inner": {"y": 1, "x": 2, "gone": 3},
        "a": [1],
        "flat": 1,
    }
    edits = {
        "a": [2],
        "gone": None,
        "absent": None,
        "inner": {"x": 9, "gone": None, "new": 4},
        "flat": {"k": 1},
        "added": {"k": 2},
    }
    expected = {
        "z": 1, "name": "é", "inner": {"y": 1, "x": 9, "new": 4}, "a": [2], "flat": {"k": 1},
        "added": {"k": 2},
    }  # fmt: skip
    write(output, (), put(base, "config.json", "old"), edits, config)
    text = (output / "config.json").read_text(encoding="utf-8")
    assert text == json.dumps(expected, indent=2, ensure_ascii=False) + "\n"
    assert config["inner"] == {"y": 1, "x": 2, "gone": 3}


def test_edited_config_with_a_lone_surrogate_is_written(output: Path, base: Path) -> None:
    config = json.loads('{"name": "\\ud800"}')
    write(output, (), base / "config.json", {"dtype": "bfloat16"}, config)
    assert json.loads((output / "config.json").read_bytes()) == {**config, "dtype": "bfloat16"}


def test_vanished_source_is_an_input_error(base: Path, output: Path) -> None:
    with pytest.raises(InputError) as caught:
        write(output, (Sidecar("a", base / "a"),), base / "config.json", {}, {})
    assert str(caught.value) == f"cannot read the file (No such file or directory), in {base / 'a'}"


def test_output_that_cannot_be_written_is_a_resource_error(base: Path, output: Path) -> None:
    (output / "b").touch()
    with pytest.raises(ResourceError, match="cannot write"):
        write(output, (Sidecar("b/c", put(base, "c")),), base / "config.json", {}, {})


def test_write_durably_returns_the_bytes_written(tmp_path: Path) -> None:
    assert write_durably(tmp_path / "f", "é\n") == 3
    assert (tmp_path / "f").read_bytes() == "é\n".encode()


def test_added_tokens_of_both_files_are_joined(tmp_path: Path) -> None:
    assert added_tokens(tmp_path) == {}
    put(
        tmp_path,
        "tokenizer.json",
        '{"added_tokens": [{"id": 7, "content": "<a>", "special": true}]}',
    )
    assert added_tokens(tmp_path) == {"<a>": 7}
    put(tmp_path, "added_tokens.json", '{"<b>": 8}')
    assert added_tokens(tmp_path) == {"<a>": 7, "<b>": 8}


@pytest.mark.parametrize("text", ["{}", '{"added_tokens": null}', '{"added_tokens": []}'])
def test_tokenizer_without_added_tokens_has_none(tmp_path: Path, text: str) -> None:
    put(tmp_path, "tokenizer.json", text)
    assert added_tokens(tmp_path) == {}


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"added_tokens": [1]}', '{"added_tokens": 5}', '{"added_tokens": [{"id": 1}]}',
     '{"added_tokens": [{"content": [], "id": 1}]}'],
)  # fmt: skip
def test_damaged_tokenizer_is_a_checkpoint_error(tmp_path: Path, text: str) -> None:
    put(tmp_path, "tokenizer.json", text)
    with pytest.raises(CheckpointError):
        added_tokens(tmp_path)
