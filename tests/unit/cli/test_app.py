"""The command line: JSON, exit codes, overrides."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import xxhash
from typer.testing import CliRunner

import streammerge
from streammerge.cli.app import app
from streammerge.errors import (
    ConfigError,
    InterruptedRunError,
    MemoryBudgetError,
    PlanError,
    VerificationError,
)

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

# runs the command line, then says on stderr which of the slow packages it has loaded
PROBE = """
import sys
from streammerge.cli.app import main
try:
    main()
finally:
    slow = ("torch", "transformers", "peft", "numpy", "pydantic")
    print("loaded:", *[name for name in slow if name in sys.modules], file=sys.stderr)
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def probe(*arguments: object) -> tuple[int, str, set[str]]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("loaded:")]
    return done.returncode, done.stdout, set(line.split()[1:])


@pytest.fixture
def config(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    path = tmp_path / "export.yaml"
    path.write_text(
        f"model_name_or_path: {folders[0]}\nadapter_name_or_path: {folders[1]}\n"
        f"export_dir: {tmp_path / 'out'}\n"
    )
    return path


def test_plan_is_one_json_object_and_loads_no_torch(config: Path, tmp_path: Path) -> None:
    code, out, loaded = probe("plan", config, "--json")
    assert code == 0
    assert loaded.isdisjoint({"torch", "transformers", "peft"})
    plan = json.loads(out)
    assert plan["tensors_total"] == 4
    assert [target["name"] for target in plan["targets"]] == [
        target["name"] for target in streammerge.build_plan(config).describe()["targets"]
    ]
    assert plan["adapter_tensors_used"] == 3
    assert not (tmp_path / "out").exists()


def test_inspect_is_one_json_object_and_loads_no_torch(folders: tuple[Path, Path]) -> None:
    for folder, kind in zip(folders, ("checkpoint", "adapter"), strict=True):
        code, out, loaded = probe("inspect", folder, "--json")
        assert code == 0
        assert json.loads(out)["kind"] == kind
        assert loaded.isdisjoint({"torch", "transformers", "peft"})


def test_help_loads_nothing_slow() -> None:
    code, out, loaded = probe("--help")
    assert code == 0
    assert loaded == set()
    for word in ("export", "plan", "inspect", "version", "Exit codes"):
        assert word in out


@pytest.mark.parametrize("command", ["export", "plan", "inspect", "version"])
def test_every_command_has_help(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_no_command_shows_help() -> None:
    assert "Usage" in invoke().output


def test_version_is_that_of_the_package() -> None:
    result = invoke("version")
    assert result.exit_code == 0
    assert result.output.strip() == streammerge.__version__


def test_usage_errors_are_exit_2() -> None:
    assert probe("nonsense")[0] == 2
    assert probe("inspect")[0] == 2
    assert probe("inspect", "a", "--nonsense")[0] == 2


def test_export_gives_its_report_as_json(config: Path, tmp_path: Path) -> None:
    result = invoke("export", config, "--json", "threads=1")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["output_dir"] == str(tmp_path / "out")
    assert (report["tensors_total"], report["tensors_changed"]) == (4, 2)
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert report["digest"] == "xxh3-128"
    assert report["shards"] == [
        {
            "name": "model.safetensors",
            "bytes": len(content),
            "digest": xxhash.xxh3_128(content).hexdigest(),
        }
    ]


def test_what_a_person_reads(config: Path, folders: tuple[Path, Path]) -> None:
    planned = invoke("plan", config).output
    for word in ("4: 2 copied", "q_proj (1)", "3, each used once", "peak memory", "peft"):
        assert word in planned
    assert "q_proj" in invoke("inspect", folders[0]).output
    inspected = invoke("inspect", folders[1]).output
    for line in ("kind *LORA", r"merge *W \+ scaling \* B @ A", "whole tensors *1", "rank *2"):
        assert re.search(rf"^{line}$", inspected, re.MULTILINE), line
    exported = invoke("export", config, "threads=1").output
    assert "4: 2 changed, 2 copied byte for byte" in exported


def test_a_person_reads_what_is_special_about_an_adapter(folders: tuple[Path, Path]) -> None:
    path = folders[1] / "adapter_config.json"
    options = {
        "use_rslora": True,
        "target_parameters": ["experts.gate_up_proj"],
        "layer_replication": [[0, 2], [1, 3]],
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    output = invoke("inspect", folders[1]).output
    for line in (
        "kind *LORA, rsLoRA",
        r"parameters *experts\.gate_up_proj",
        "layers .*0 to 1, 1 to 2",
    ):
        assert re.search(rf"^{line}$", output, re.MULTILINE), line


def test_a_person_reads_why_an_adapter_cannot_be_merged(folders: tuple[Path, Path]) -> None:
    (folders[1] / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    result = invoke("inspect", folders[1])
    assert result.exit_code == 0
    assert re.search("^kind *PREFIX_TUNING$", result.output, re.MULTILINE)
    assert "not possible: adapter has no merged form" in result.output


@pytest.mark.parametrize(
    "overrides",
    [
        ["export_size=keep", "numerics=fp32", "max_memory=3GB"],
        ["--export_size", "keep", "--numerics", "fp32", "--max_memory", "3GB"],
        ["--export_size=keep", "--numerics=fp32", "--max_memory=3GB"],
        ["--export-size", "keep", "numerics=fp32", "--max-memory=3GB"],
    ],
)
def test_overrides_in_any_style(
    overrides: list[str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = streammerge.build_plan

    def watch(settings: Any) -> Any:
        seen.append(settings)
        return real(settings)

    monkeypatch.setattr("streammerge.engine.export.build_plan", watch)
    result = invoke("plan", config, *overrides, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["numerics"] == "fp32"
    assert (seen[0].export_size, seen[0].max_memory) == ("keep", 3 * 10**9)


def test_switches_and_json_may_stand_anywhere(config: Path) -> None:
    for arguments in (
        ["--json", config, "--overwrite"],
        [config, "--overwrite", "--json"],
        [config, "--json", "overwrite=true"],
    ):
        result = invoke("plan", *arguments)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["tensors_total"] == 4


@pytest.mark.parametrize("style", ["{}={}", "--{}={}", "--{} {}"])
def test_everything_on_the_command_line(
    style: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    values = {
        "model_name_or_path": folders[0],
        "adapter_name_or_path": folders[1],
        "export_dir": tmp_path / "out",
    }
    arguments = " ".join(style.format(*item) for item in values.items()).split()
    result = invoke("plan", *arguments, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["base"] == str(folders[0])
    assert plan["adapters"] == [str(folders[1])]
    assert plan["output_dir"] == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("command", "where"),
    [("plan", "build_plan"), ("export", "export"), ("inspect", "inspect_folder")],
)
@pytest.mark.parametrize(
    "error",
    [
        ConfigError("odd", hint="do this"),
        PlanError("odd", where="there"),
        MemoryBudgetError("odd"),
        VerificationError("odd"),
        InterruptedRunError("odd"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_are_a_line_an_object_and_an_exit_code(
    command: str,
    where: str,
    error: streammerge.StreamMergeError,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    module = "inspect" if command == "inspect" else "export"
    monkeypatch.setattr(f"streammerge.engine.{module}.{where}", fail)
    result = invoke(command, config, "--json")
    assert result.exit_code == error.exit_code
    assert result.stderr == f"error: {error}\n"
    assert json.loads(result.stdout) == {
        "error": type(error).__name__,
        "message": str(error),
        "exit_code": error.exit_code,
    }
    assert invoke(command, config).stdout == ""


def test_an_interrupt_is_exit_130(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("streammerge.engine.export.build_plan", fail)
    result = invoke("plan", config)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    missing = tmp_path / "absent.yaml"
    assert "Traceback" in invoke("plan", missing, "--debug").stderr
    assert "Traceback" not in invoke("plan", missing).stderr


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["export_sise=1"], 2, "ConfigError"),
        (["max_memory=lots"], 2, "ConfigError"),
        (["max_memory=50MB"], 4, "MemoryBudgetError"),
        (["export_device=cuda"], 2, "UnsupportedError"),
        (["stray"], 2, "ConfigError"),
    ],
)
def test_real_errors_have_their_exit_codes(
    arguments: list[str], code: int, kind: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streammerge.backends.select.missing_driver", lambda: "no driver")
    result = invoke("plan", config, *arguments, "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["error"] == kind
    assert len(result.stderr.splitlines()) == 1
