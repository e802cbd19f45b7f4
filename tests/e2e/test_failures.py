"""Every failure is one line, has its exit code, and leaves nothing under export_dir."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import streammerge

if TYPE_CHECKING:
    from collections.abc import Callable

export_module: Any = import_module("streammerge.engine.export")
Run = Any


def shard(case: Any, number: int = 1) -> Any:
    return case.base / f"model-{number:05d}-of-00002.safetensors"


def edit_header(path: Any, edit: Callable[[dict[str, Any]], None]) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def unknown_key(case: Any) -> None:
    case.factors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = np.ones(
        (4, 32), np.float32
    )
    case.factors["base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight"] = np.ones(
        (32, 4), np.float32
    )
    case.write_adapter()


def other_base(case: Any) -> None:
    for key in list(case.factors):
        if key.endswith("lora_A.weight"):
            case.factors[key] = np.ones((4, 48), np.float32)
    case.write_adapter()


def truncated(case: Any) -> None:
    path = shard(case)
    path.write_bytes(path.read_bytes()[:-100])


def lying_offsets(case: Any) -> None:
    def edit(header: dict[str, Any]) -> None:
        header["model.embed_tokens.weight"]["data_offsets"][0] += 4

    edit_header(shard(case), edit)


def escaping_index(case: Any) -> None:
    path = case.base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.embed_tokens.weight"] = "../../etc/passwd"
    case.write_json(path, index)


def missing_shard(case: Any) -> None:
    shard(case, 2).unlink()


def not_finite(case: Any) -> None:
    key = next(key for key in case.factors if key.endswith("lora_B.weight"))
    case.factors[key][3, 1] = np.nan
    case.write_adapter()


def stray(case: Any) -> None:
    (case.base / "model-old.safetensors").write_bytes(shard(case).read_bytes())


def quantized(case: Any) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    case.write_json(case.base / "config.json", config)


def other_tuner(case: Any) -> None:
    case.write_json(case.adapter / "adapter_config.json", {"peft_type": "LOHA", "r": 4})


def unmergeable_tuner(case: Any) -> None:
    case.write_json(case.adapter / "adapter_config.json", {"peft_type": "XLORA"})


def unknown_tuner(case: Any) -> None:
    case.write_json(case.adapter / "adapter_config.json", {"peft_type": "TOMORROW"})


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (unknown_key, "model.layers.9.self_attn.q_proj"),
        (other_base, "another base?"),
        (truncated, "truncated"),
        (lying_offsets, "lies about offsets"),
        (escaping_index, "outside its folder"),
        (missing_shard, "shard is missing"),
        (not_finite, "NaN or Inf"),
        (stray, "stray weight file"),
        (quantized, "awq"),
        (other_tuner, "of another kind of adapter than its peft_type says"),
        (unmergeable_tuner, "no merged form"),
        (unknown_tuner, "TOMORROW"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_bad_input_is_one_line_and_exit_3(
    break_it: Callable[[Any], None], said: str, case: Any, run_cli: Run
) -> None:
    break_it(case)
    code, out, err = run_cli("export", case.config)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 3
    assert out == ""
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in err
    assert case.left_behind() == []


def test_nan_passes_when_asked(case: Any, run_cli: Run) -> None:
    not_finite(case)
    code, _, _ = run_cli("export", case.config, "allow_nonfinite=true")
    assert code == 0
    assert case.left_behind() == ["merged"]


def test_budget_too_small_names_the_least_that_works(case: Any, run_cli: Run) -> None:
    code, _, err = run_cli("export", case.config, "max_memory=50MB")
    assert code == 4
    assert case.left_behind() == []
    least = err.split("at least ")[1].split(";")[0]
    code, out, _ = run_cli("export", case.config, f"max_memory={int(least[:-2]) + 40}MB", "--json")
    assert code == 0
    assert json.loads(out)["peak_rss_bytes"] <= (int(least[:-2]) + 40) * 10**6


def test_no_space_is_exit_4(case: Any, run_cli: Run) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    code, _, err = run_cli("export", case.config, preexec_fn=limit)
    assert code == 4
    assert "no space" in err
    assert not case.output.exists()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_and_a_rerun_goes_on(
    kind: signal.Signals, case: Any, run_cli: Run, tmp_path: Any
) -> None:
    # a writer that waits after its first shard, so that the signal comes in the middle
    program = tmp_path / "slow.py"
    program.write_text(
        "import signal, sys, time\n"
        # in the background of a shell it would be ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import streammerge.engine.export as export\n"
        "real = export._Run.on_shard\n"
        "def slow(self, shard, nbytes, digest):\n"
        "    real(self, shard, nbytes, digest)\n"
        "    print('shard', flush=True)\n"
        "    time.sleep(3)\n"
        "export._Run.on_shard = slow\n"
        "from streammerge.cli.app import main\n"
        "sys.argv[0] = 'streammerge'\n"
        "main()\n"
    )
    command = [sys.executable, str(program), "export", str(case.config), "export_size=0.000009"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().strip() == "shard"
        time.sleep(0.2)
        process.send_signal(kind)
        err = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert "interrupted" in err
    assert not case.output.exists()
    code, out, _ = run_cli("export", case.config, "export_size=0.000009", "--json")
    assert code == 0
    assert json.loads(out)["resumed_shards"] >= 1
    fresh = case.output.with_name("fresh")
    run_cli("export", case.config, "export_size=0.000009", f"export_dir={fresh}")
    for path in fresh.iterdir():
        assert (case.output / path.name).read_bytes() == path.read_bytes()


def test_output_is_never_an_input_or_taken(case: Any, run_cli: Run) -> None:
    for folder in (case.base, case.base / "below", case.base.parent):
        code, _, err = run_cli("export", case.config, f"export_dir={folder}", "overwrite=true")
        assert code == 2
        assert "share a folder" in err
    case.output.mkdir(parents=True)
    (case.output / "mine.txt").write_text("keep")
    code, _, err = run_cli("export", case.config)
    assert code == 2
    assert "not empty" in err
    assert (case.output / "mine.txt").read_text() == "keep"
    assert run_cli("export", case.config, "--overwrite")[0] == 0
    assert not (case.output / "mine.txt").exists()
    assert case.left_behind() == ["merged"]


def test_a_pipe_in_place_of_a_shard_is_refused(case: Any, run_cli: Run) -> None:
    shard(case).unlink()
    os.mkfifo(shard(case))
    code, _, err = run_cli("export", case.config)
    assert code == 3
    assert "not a regular file" in err


def test_a_base_that_changes_during_the_run_is_refused(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export_module._Run.write_rest

    def change(run: Any) -> None:
        real(run)
        shard(case).touch()

    monkeypatch.setattr(export_module._Run, "write_rest", change)
    with pytest.raises(streammerge.InputError, match="changed during the run"):
        streammerge.export(case.config)
    assert case.left_behind() == []


def test_a_folder_filled_during_the_run_is_not_replaced(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export_module._Run.verify

    def fill(run: Any) -> None:
        real(run)
        case.output.mkdir()
        (case.output / "mine.txt").write_text("keep")

    monkeypatch.setattr(export_module._Run, "verify", fill)
    with pytest.raises(streammerge.OutputExistsError, match="filled during the run"):
        streammerge.export(case.config)
    assert (case.output / "mine.txt").read_text() == "keep"
    monkeypatch.undo()
    (case.output / "mine.txt").unlink()
    # the finished shards were kept
    assert streammerge.export(case.config).resumed_shards == 1


def test_what_a_resume_depends_on_is_part_of_the_plan(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_finite(case)

    def stop(_run: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module._Run, "verify", stop)
    settings = {
        "model_name_or_path": str(case.base),
        "adapter_name_or_path": str(case.adapter),
        "export_dir": str(case.output),
    }
    with pytest.raises(streammerge.InterruptedRunError):
        streammerge.export({**settings, "allow_nonfinite": True})
    monkeypatch.undo()
    # shards with NaN, written where they were allowed, are not taken over where they are not
    with pytest.raises(streammerge.NonFiniteError):
        streammerge.export(settings)


def test_legacy_format_that_cannot_hold_a_dtype_is_refused_before_any_write(
    case: Any, run_cli: Run
) -> None:
    save_file(
        {"model.steps": np.ones(3, np.uint32)},
        shard(case),
    )
    index = case.base / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["model.embed_tokens.weight"]
    case.write_json(index, {"weight_map": {**weight_map, "model.steps": shard(case).name}})
    code, _, err = run_cli("export", case.config, "export_legacy_format=true")
    assert code == 2
    assert "U32" in err
    assert case.left_behind() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_mount_point_is_refused_before_any_write(case: Any, run_cli: Run) -> None:
    case.output.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "none", str(case.output)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this sandbox does not mount")
    try:
        code, _, err = run_cli("export", case.config)
    finally:
        subprocess.run(["umount", str(case.output)], check=True)
    assert code == 2
    assert "mount point" in err


def test_a_small_disk_is_refused_before_any_write(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _path: type("Usage", (), {"free": 10**6, "total": 1, "used": 1})
    )
    with pytest.raises(streammerge.DiskSpaceError, match="not enough free disk space"):
        streammerge.export(case.config)
    assert case.left_behind() == []
