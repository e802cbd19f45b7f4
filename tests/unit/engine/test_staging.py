"""The staging folder: lock, journal, publication."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from streammerge.engine.export import build_plan
from streammerge.engine.staging import Staging, check_output, fingerprint
from streammerge.errors import OutputExistsError, ResourceError


def finish(staging: Staging, name: str, content: bytes = b"shard") -> None:
    (staging.folder / name).write_bytes(content)
    staging.record(name, len(content), digest(content))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_finished_shards_survive_for_the_same_plan(tmp_path: Path) -> None:
    first = Staging(tmp_path / "out")
    first.open("plan")
    assert first.finished == {}
    finish(first, "one")
    finish(first, "two", b"longer shard")
    (first.folder / "three.partial").write_bytes(b"x")
    first.release()
    second = Staging(tmp_path / "out")
    second.open("plan")
    assert second.finished == {
        "one": (5, digest(b"shard")),
        "two": (12, digest(b"longer shard")),
    }
    names = {path.name for path in second.folder.iterdir()}
    assert names == {"one", "two", ".lock", ".journal"}
    second.release()


def test_another_plan_empties_the_folder(tmp_path: Path) -> None:
    first = Staging(tmp_path / "out")
    first.open("plan")
    finish(first, "one")
    (first.folder / "sub").mkdir()
    (first.folder / "sub" / "file").write_text("x")
    (first.folder / "link").symlink_to(tmp_path)
    first.release()
    second = Staging(tmp_path / "out")
    second.open("other plan")
    assert second.finished == {}
    assert {path.name for path in second.folder.iterdir()} == {".lock", ".journal"}
    assert tmp_path.is_dir()
    second.release()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / ".journal").unlink(),
        lambda folder: (folder / ".journal").write_text(""),
        lambda folder: (folder / ".journal").write_text('{"plan": "plan"}\n{"shard": "one"'),
        lambda folder: (folder / ".journal").write_text('{"plan": "plan"}\n{"shard": "one"}\n'),
        lambda folder: (folder / ".journal").write_text(
            '{"plan": "plan"}\n{"shard": "one", "bytes": 5}\n'
        ),
        lambda folder: (folder / ".journal").write_text('{"plan": "plan"}\n[1]\n'),
        lambda folder: (folder / "one").write_bytes(b"other length"),
        lambda folder: (folder / "one").unlink(),
    ],
)
def test_a_damaged_journal_or_shard_starts_over(spoil: Any, tmp_path: Path) -> None:
    first = Staging(tmp_path / "out")
    first.open("plan")
    finish(first, "one")
    first.release()
    spoil(first.folder)
    second = Staging(tmp_path / "out")
    second.open("plan")
    assert second.finished == {}
    assert not (second.folder / "one").exists()
    finish(second, "one")
    second.release()
    third = Staging(tmp_path / "out")
    third.open("plan")
    assert third.finished == {"one": (5, digest(b"shard"))}
    third.release()


def test_a_journal_line_that_was_cut_off_does_not_hide_a_later_run(tmp_path: Path) -> None:
    first = Staging(tmp_path / "out")
    first.open("plan")
    finish(first, "one")
    first.release()
    with (first.folder / ".journal").open("a") as journal:
        journal.write('{"shard": "tw')
    for _ in range(2):
        again = Staging(tmp_path / "out")
        again.open("plan")
        finish(again, "two")
        again.release()
    last = Staging(tmp_path / "out")
    last.open("plan")
    assert "two" in last.finished
    last.release()


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    first, second = Staging(tmp_path / "out"), Staging(tmp_path / "out")
    first.open("plan")
    finish(first, "one")
    with pytest.raises(ResourceError, match="another export writes to this folder"):
        second.open("plan")
    second.discard()
    assert (first.folder / "one").exists()
    first.release()
    second.open("plan")
    assert second.finished == {"one": (5, digest(b"shard"))}
    second.discard()
    assert not second.folder.exists()
    second.release()


def test_a_place_that_cannot_be_written_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot write"):
        Staging(tmp_path / "file" / "out").open("plan")


@pytest.mark.parametrize("before", ["absent", "empty", "full"])
def test_publication_replaces_the_output(before: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if before != "absent":
        output.mkdir()
    if before == "full":
        (output / "old").write_text("old")
    staging = Staging(output)
    staging.open("plan")
    finish(staging, "one")
    staging.publish(overwrite=True)
    assert [path.name for path in output.iterdir()] == ["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("rerun", ["plan", "other plan"])
def test_a_publication_cut_off_between_its_renames_is_taken_back(
    rerun: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    staging = Staging(output)
    staging.open("plan")
    finish(staging, "one")
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self == staging.folder:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            staging.publish(overwrite=True)
    staging.release()
    assert not output.exists()
    again = Staging(output)
    again.open(rerun)
    assert (output / "old").read_text() == "old"
    finish(again, "one")
    again.publish(overwrite=True)
    assert [path.name for path in output.iterdir()] == ["one"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_finished_publication_left_is_removed(tmp_path: Path) -> None:
    output, replaced = tmp_path / "out", tmp_path / ".out.streammerge-replaced"
    for folder in (output, replaced):
        folder.mkdir()
        (folder / folder.name).write_text("x")
    staging = Staging(output)
    staging.open("plan")
    assert not replaced.exists()
    assert (output / "out").exists()
    staging.discard()


def test_output_must_be_free_and_apart_from_the_inputs(tmp_path: Path) -> None:
    output, source, adapter = tmp_path / "out", tmp_path / "in", tmp_path / "lora"
    check_output(output, base=source, adapters=[adapter], overwrite=False)
    for taken in (source, source / "below", adapter, tmp_path):
        with pytest.raises(OutputExistsError, match="share a folder"):
            check_output(taken, base=source, adapters=[adapter], overwrite=True)
    check_output(adapter / "merged", base=source, adapters=[adapter], overwrite=False)
    output.mkdir()
    check_output(output, base=source, adapters=[adapter], overwrite=False)
    (output / "file").write_text("x")
    with pytest.raises(OutputExistsError, match="not empty"):
        check_output(output, base=source, adapters=[adapter], overwrite=False)
    check_output(output, base=source, adapters=[adapter], overwrite=True)
    with pytest.raises(OutputExistsError, match="is a file"):
        check_output(output / "file", base=source, adapters=[adapter], overwrite=True)


def test_fingerprints_change_with_what_changes_bytes(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = folders
    options: dict[str, Any] = {
        "model_name_or_path": str(base),
        "adapter_name_or_path": str(adapter),
        "export_dir": str(tmp_path / "out"),
    }

    def identity(**more: Any) -> str:
        return fingerprint(build_plan({**options, **more}))

    first = identity()
    assert identity() == first
    for io in ("direct", "buffered", "mmap"):
        assert identity(max_memory="3GB", threads=1, io=io) == first
    others = [
        identity(numerics="fp32"),
        identity(export_size="300B"),
        identity(export_legacy_format=True),
        identity(infer_dtype="bfloat16"),
        identity(digest="sha256"),
        identity(digest="none"),
        identity(adapter_name_or_path=[]),
    ]
    os.utime(adapter / "adapter_model.safetensors", ns=(1, 1))
    others.append(identity())
    assert len({first, *others}) == 9
