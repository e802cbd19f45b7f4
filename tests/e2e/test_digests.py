"""The report's digests are those of the files, whoever wrote them, and when."""

from __future__ import annotations

import subprocess
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xxhash
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import streammerge
from streammerge.engine.export import rehearse

if TYPE_CHECKING:
    from pathlib import Path

export_module: Any = import_module("streammerge.engine.export")
# one tensor in each shard
SMALL_SHARDS = "0.000009"
IO = ["direct", "buffered", "mmap", "auto"]


def settings(case: Any, **more: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(case.base),
        "adapter_name_or_path": str(case.adapter),
        "export_dir": str(case.output),
        "export_size": SMALL_SHARDS,
        **more,
    }


def sha256sum(path: Path) -> str:
    done = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


def shards_of(report: Any) -> dict[str, tuple[int, str]]:
    return {shard["name"]: (shard["bytes"], shard["digest"]) for shard in report.shards}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("io", IO)
def test_sha256_is_that_of_sha256sum(io: str, legacy: bool, case: Any) -> None:
    report = streammerge.export(
        settings(case, digest="sha256", io=io, threads=2, export_legacy_format=legacy)
    )
    files = sorted(case.output.glob("*.bin" if legacy else "*.safetensors"))
    assert len(files) == 2
    assert report.digest == "sha256"
    assert shards_of(report) == {
        file.name: (file.stat().st_size, sha256sum(file)) for file in files
    }
    assert report.bytes_written == sum(file.stat().st_size for file in files)


def test_by_default_it_is_xxh3(case: Any) -> None:
    report = streammerge.export(settings(case))
    assert report.digest == "xxh3-128"
    for name, (_, digest) in shards_of(report).items():
        assert digest == xxhash.xxh3_128((case.output / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("legacy", [False, True])
def test_without_a_digest_there_is_none(legacy: bool, case: Any) -> None:
    report = streammerge.export(settings(case, digest="none", export_legacy_format=legacy))
    assert report.digest == "none"
    assert {digest for _, digest in shards_of(report).values()} == {""}
    assert all(nbytes for nbytes, _ in shards_of(report).values())


@pytest.mark.parametrize("legacy", [False, True])
def test_shards_of_an_interrupted_run_keep_their_digests(
    legacy: bool, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = settings(case, digest="sha256", export_legacy_format=legacy)
    real = export_module._Run.on_shard

    def stop_after_the_first(run: Any, *arguments: Any) -> None:
        if run.written:
            raise OSError("the power went off")
        real(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(export_module._Run, "on_shard", stop_after_the_first)
        with pytest.raises(OSError, match="the power went off"):
            streammerge.export(options)
    report = streammerge.export(options)
    assert report.resumed_shards == 1
    files = sorted(path for path in case.output.iterdir() if path.suffix != ".json")
    assert shards_of(report) == {
        file.name: (file.stat().st_size, sha256sum(file)) for file in files
    }
    assert len(files) == 2


@pytest.mark.parametrize("io", IO)
def test_another_digest_starts_over(io: str, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_run: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export_module._Run, "verify", stop)
        with pytest.raises(streammerge.InterruptedRunError):
            streammerge.export(settings(case, io=io))
    report = streammerge.export(settings(case, io=io, digest="sha256"))
    assert report.resumed_shards == 0
    for name, (_, digest) in shards_of(report).items():
        assert digest == sha256sum(case.output / name)


# rehearsals


def test_a_rehearsal_does_what_an_export_does_and_leaves_nothing(case: Any) -> None:
    seen: list[int] = []

    class Progress(export_module.Progress):  # type: ignore[misc]
        def advance(self, nbytes: int) -> None:
            seen.append(nbytes)

    rehearsed = rehearse(settings(case, digest="sha256"), progress=Progress())
    assert not case.output.exists()
    assert case.left_behind() == []
    exported = streammerge.export(settings(case, digest="sha256"))
    assert rehearsed.shards == exported.shards
    assert rehearsed.bytes_written == exported.bytes_written
    assert sum(seen) == sum(
        path.stat().st_size - data_start(path) for path in case.output.glob("*.safetensors")
    )


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_rehearsal_disturbs_no_interrupted_run(
    legacy: bool, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_run: Any) -> None:
        raise KeyboardInterrupt

    options = settings(case, export_legacy_format=legacy)
    with monkeypatch.context() as patch:
        patch.setattr(export_module._Run, "verify", stop)
        with pytest.raises(streammerge.InterruptedRunError):
            streammerge.export(options)
    before = case.left_behind()
    rehearsed = rehearse(options)
    assert case.left_behind() == before
    report = streammerge.export(options)
    assert report.resumed_shards == 2
    assert [(s["name"], s["bytes"]) for s in rehearsed.shards] == [
        (s["name"], s["bytes"]) for s in report.shards
    ]
    assert rehearsed.shards == report.shards


def test_a_rehearsal_that_fails_leaves_nothing(case: Any) -> None:
    key = next(key for key in case.factors if key.endswith("lora_B.weight"))
    case.factors[key][3, 1] = np.nan
    case.write_adapter()
    with pytest.raises(streammerge.NonFiniteError):
        rehearse(settings(case))
    assert case.left_behind() == []


def test_a_rehearsal_keeps_one_shard_at_a_time(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[list[str]] = []
    real = export_module._Rehearsal.on_shard

    def look(run: Any, shard: Any, nbytes: int, digest: str) -> None:
        real(run, shard, nbytes, digest)
        folder = run.staging.folder
        held.append([path.name for path in folder.iterdir() if path.suffix == ".safetensors"])

    monkeypatch.setattr(export_module._Rehearsal, "on_shard", look)
    rehearse(settings(case))
    assert held == [[], []]


# copies beside casts


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("threads", [1, 3])
def test_what_passes_through_beside_a_cast_is_kept(io: str, threads: int, case: Any) -> None:
    # tensors that are no floats are never cast, whatever stands beside them
    path = case.base / "model-00001-of-00002.safetensors"
    random = np.random.default_rng(1)
    weights = {
        "model.a_steps": np.arange(1000, 1077, dtype=np.int64),
        **load_file(path),
        "model.m_half": random.standard_normal((33, 5)).astype(np.float16),
        "model.z_steps": np.arange(77, dtype=np.int32),
    }
    save_file(weights, path, metadata={"format": "pt"})
    index = case.base / "model.safetensors.index.json"
    names = dict.fromkeys(weights, path.name)
    other = case.base / "model-00002-of-00002.safetensors"
    names.update(dict.fromkeys(load_file(other), other.name))
    case.write_json(index, {"weight_map": names})
    options = settings(
        case, infer_dtype="float16", export_size="5GB", adapter_name_or_path=[], io=io
    )
    report = streammerge.export({**options, "threads": threads})
    expected = {**weights, **load_file(other)}
    with safe_open(case.output / report.shards[0]["name"], "np") as merged:
        assert set(merged.keys()) == expected.keys()
        for name, values in expected.items():
            wanted = values.astype(np.float16) if values.dtype.kind == "f" else values
            got = merged.get_tensor(name)
            assert got.dtype == wanted.dtype, name
            assert np.array_equal(got, wanted), name
