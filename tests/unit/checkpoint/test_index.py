"""Opening a checkpoint folder: the index decides, and nothing beside it is mistaken for a shard."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Protocol

import pytest

from streammerge.checkpoint.index import open_checkpoint
from streammerge.dtypes import Dtype
from streammerge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    class MakeFolder(Protocol):
        def __call__(
            self,
            shards: dict[str, dict[str, list[float]]],
            *,
            weight_map: object = None,
            index: str | None = None,
        ) -> Path: ...


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BIN_ONE, BIN_TWO = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
SHARDS = {ONE: {"a": [1.0, 2.0], "b": [3.0]}, TWO: {"c": [4.0]}}
MAP = {"a": ONE, "b": ONE, "c": TWO}


def fault_of(folder: Path, *, ignore_files: Sequence[str] = ()) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, ignore_files=ignore_files)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def test_single_safetensors_file_is_opened(make_folder: MakeFolder) -> None:
    folder = make_folder({"model.safetensors": {"a": [1.0, 2.0], "b": [3.0]}})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(folder)
    assert checkpoint.path == folder
    assert checkpoint.format == "safetensors"
    assert checkpoint.config == {"model_type": "llama"}
    assert [shard.path for shard in checkpoint.shards] == [folder / "model.safetensors"]
    assert list(checkpoint.tensors) == ["a", "b"]
    assert tuple(checkpoint.tensors.values()) == checkpoint.shards[0].tensors
    assert checkpoint.total_bytes == 12
    assert checkpoint.main_dtype is Dtype.F32
    assert checkpoint.unused_weight_files == ()


def test_sharded_safetensors_is_opened_in_the_order_of_the_index(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS, weight_map={"c": TWO, "a": ONE, "b": ONE})
    checkpoint = open_checkpoint(folder)
    assert [shard.path.name for shard in checkpoint.shards] == [TWO, ONE]
    assert list(checkpoint.tensors) == ["c", "a", "b"]
    assert checkpoint.config == {}


def test_single_bin_is_opened(make_folder: MakeFolder) -> None:
    checkpoint = open_checkpoint(make_folder({"pytorch_model.bin": {"a": [1.0]}}))
    assert checkpoint.format == "torch_bin"
    assert checkpoint.tensors["a"].shape == (1,)


def test_sharded_bin_is_opened(make_folder: MakeFolder) -> None:
    shards = {BIN_ONE: {"a": [1.0]}, BIN_TWO: {"b": [2.0]}}
    checkpoint = open_checkpoint(make_folder(shards, weight_map={"a": BIN_ONE, "b": BIN_TWO}))
    assert checkpoint.format == "torch_bin"
    assert [shard.path.name for shard in checkpoint.shards] == [BIN_ONE, BIN_TWO]


def test_safetensors_win_over_their_bin_twins(make_folder: MakeFolder) -> None:
    folder = make_folder({"model.safetensors": {"a": [1.0]}, "pytorch_model.bin": {"b": [1.0]}})
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.format, list(checkpoint.tensors)) == ("safetensors", ["a"])
    assert checkpoint.unused_weight_files == ("pytorch_model.bin",)


def test_other_layouts_are_listed_and_not_opened(make_folder: MakeFolder) -> None:
    folder = make_folder({"model.safetensors": {"a": [1.0]}})
    others = [
        "adapter_model.safetensors",
        "consolidated.00.safetensors",
        "consolidated.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "model.fp16.safetensors",
        "training_args.bin",
        "value_head.safetensors",
    ]
    for name in others:
        (folder / name).write_bytes(b"not opened")
    (folder / "folder.safetensors").mkdir()
    (folder / "notes.txt").write_text("x")
    assert open_checkpoint(folder).unused_weight_files == tuple(others)


def test_single_file_beside_an_index_is_stray(make_folder: MakeFolder) -> None:
    folder = make_folder({**SHARDS, "model.safetensors": {"a": [1.0, 2.0]}}, weight_map=MAP)
    fault = fault_of(folder)
    assert fault.what == "stray weight file: the checkpoint does not name it"
    assert fault.where == str(folder / "model.safetensors")
    assert fault.expected == f"only {ONE}, {TWO}"
    assert fault.hint == "move it away, or accept it with ignore_files: ['model.safetensors']"


def test_stray_lists_three_shards_at_most(make_folder: MakeFolder) -> None:
    names = [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
    shards = {name: {f"t{n}": [1.0]} for n, name in enumerate(names)}
    folder = make_folder(shards, weight_map={f"t{n}": name for n, name in enumerate(names)})
    (folder / "more.safetensors").write_bytes(b"")
    assert fault_of(folder).expected == "only " + ", ".join(names[:3]) + " ..."


@pytest.mark.parametrize(
    "name", ["model-00003-of-00003.safetensors", "lora.safetensors", "model_fp16.safetensors"]
)
def test_stray_safetensors_is_refused_unless_ignored(make_folder: MakeFolder, name: str) -> None:
    folder = make_folder(SHARDS, weight_map=MAP)
    (folder / name).write_bytes(b"")
    assert fault_of(folder, ignore_files=["other*"]).where == str(folder / name)
    assert open_checkpoint(folder, ignore_files=["x", name]).unused_weight_files == (name,)
    assert open_checkpoint(folder, ignore_files=["*.safetensors"]).unused_weight_files == (name,)


def test_bin_folder_takes_its_own_kind_alone_for_stray(make_folder: MakeFolder) -> None:
    folder = make_folder({"pytorch_model.bin": {"a": [1.0]}})
    (folder / "training_args.bin").write_bytes(b"")
    assert open_checkpoint(folder).unused_weight_files == ("training_args.bin",)
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    assert fault_of(folder).where == str(folder / "pytorch_model-00001-of-00002.bin")


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "a\\b",
        "",
        ".",
        "..",
        "./x.safetensors",
        "x.safetensors/",
        "x/.",
        "a\nb",
        "a\x00b",
        5,
        None,
        ["x"],
    ],
)
def test_index_that_leaves_its_folder_is_refused(make_folder: MakeFolder, name: object) -> None:
    folder = make_folder(SHARDS, weight_map={**MAP, "evil": name})
    fault = fault_of(folder)
    assert fault.what == "index places tensor 'evil' outside its folder"
    assert fault.got == repr(name)
    assert fault.where == str(folder / "model.safetensors.index.json")


def test_shard_outside_the_folder_is_never_opened(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS, weight_map={**MAP, "evil": "../outside.safetensors"})
    (folder.parent / "outside.safetensors").write_bytes((folder / TWO).read_bytes())
    assert fault_of(folder).hint == "do not trust this checkpoint"


def test_shard_name_beyond_the_file_systems_limit_is_refused(make_folder: MakeFolder) -> None:
    fault_of(make_folder(SHARDS, weight_map={**MAP, "d": "x" * 300}))


@pytest.mark.parametrize("weight_map", [{}, [], "x", 5])
def test_index_without_a_weight_map_is_refused(make_folder: MakeFolder, weight_map: object) -> None:
    assert fault_of(make_folder(SHARDS, weight_map=weight_map)).what == "index has no weight_map"


def test_index_without_the_key_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert fault_of(folder).what == "index has no weight_map"


@pytest.mark.parametrize(
    ("text", "what"),
    [("{", "file is not valid JSON"), ("[]", "JSON file does not hold an object")],
)
def test_damaged_index_is_refused(make_folder: MakeFolder, text: str, what: str) -> None:
    folder = make_folder(SHARDS)
    (folder / "model.safetensors.index.json").write_text(text)
    assert fault_of(folder).what == what


def test_missing_shard_is_named(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS, weight_map=MAP)
    (folder / TWO).unlink()
    assert str(fault_of(folder)) == (
        f"shard is missing, in {folder / TWO}; model.safetensors.index.json names it: "
        "download it again"
    )


def test_tensor_in_two_shards_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder(
        {ONE: {"a": [1.0]}, TWO: {"a": [2.0], "b": [1.0]}}, weight_map={"a": ONE, "b": TWO}
    )
    fault = fault_of(folder)
    assert fault.what == "tensor 'a' is stored twice"
    assert fault.where == f"{folder / ONE} and {folder / TWO}"


def test_tensor_of_the_index_that_no_shard_holds_is_refused(make_folder: MakeFolder) -> None:
    fault = fault_of(make_folder(SHARDS, weight_map={**MAP, "d": TWO}))
    assert fault.what == "tensor 'd' is not where the index says"
    assert (fault.expected, fault.got) == (TWO, "no shard")


def test_tensor_in_another_shard_than_the_index_says_is_refused(make_folder: MakeFolder) -> None:
    fault = fault_of(make_folder(SHARDS, weight_map={**MAP, "b": TWO}))
    assert fault.what == "tensor 'b' is not where the index says"
    assert (fault.expected, fault.got) == (TWO, ONE)


def test_tensor_that_the_index_does_not_name_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder(SHARDS, weight_map={"a": ONE, "c": TWO})
    fault = fault_of(folder)
    assert fault.what == "tensor 'b' is in a shard but not in the index"
    assert fault.where == str(folder / ONE)


def test_folder_without_a_checkpoint_says_what_is_there(tmp_path: Path) -> None:
    assert fault_of(tmp_path).got == "an empty folder"
    for name in "hgfedcba":
        (tmp_path / name).touch()
    fault = fault_of(tmp_path)
    assert fault.what == "folder holds no checkpoint"
    assert fault.got == "a, b, c, d, e, f"


def test_what_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "none"):
        assert fault_of(tmp_path / name).what == "checkpoint is not a folder"


def test_checkpoint_without_tensors_is_refused(make_folder: MakeFolder) -> None:
    assert fault_of(make_folder({"model.safetensors": {}})).what == "checkpoint holds no tensor"


def test_damaged_config_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder({"model.safetensors": {"a": [1.0]}})
    (folder / "config.json").write_text("{")
    assert fault_of(folder).where == str(folder / "config.json")


def test_main_dtype_holds_most_bytes(make_folder: MakeFolder) -> None:
    folder = make_folder({"model.safetensors": {"a": [1.0]}})
    header = {
        "many": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]},
        "wide": {"dtype": "BF16", "shape": [3], "data_offsets": [5, 11]},
    }
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(11))
    assert open_checkpoint(folder).main_dtype is Dtype.BF16
