"""Names that transformers gives, or the note that it gives none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streammerge.engine import renames
from streammerge.engine.renames import transformers_renames

FOLDER = Path("base")


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the subprocess print something, or fail."""

    def set_answer(stdout: str = "", *, error: Exception | None = None) -> list[Any]:
        calls: list[Any] = []

        def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
            calls.append((command, options))
            if error is not None:
                raise error
            return subprocess.CompletedProcess(command, 0, stdout, "")

        monkeypatch.setattr(renames.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(renames.subprocess, "run", run)
        return calls

    return set_answer


def test_without_transformers_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renames.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(renames.subprocess, "run", None)
    names, note = transformers_renames(FOLDER, ["a"])
    assert names == {}
    assert note is not None
    assert "not installed" in note


def test_the_last_line_is_the_answer(answer: Any) -> None:
    calls = answer('some noise\n{"b": "a"}\n')
    assert transformers_renames(FOLDER, iter(["a", "c"])) == ({"b": "a"}, None)
    ((command, options),) = calls
    assert command == [
        sys.executable,
        "-m",
        "streammerge.engine.inmemory_names",
        str(FOLDER.resolve()),
    ]
    assert json.loads(options["input"]) == ["a", "c"]
    assert options["timeout"] == renames.TIMEOUT_SECONDS
    assert options["check"] is True


@pytest.mark.parametrize("stdout", ["", "not json", '{"a": '])
def test_an_answer_that_is_none_is_noted(stdout: str, answer: Any) -> None:
    answer(stdout)
    names, note = transformers_renames(FOLDER, [])
    assert names == {}
    assert note is not None
    assert note.startswith("transformers could not name the layers (")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            subprocess.CalledProcessError(1, "python", stderr="Traceback\nValueError: odd\n"),
            "ValueError: odd",
        ),
        (
            subprocess.CalledProcessError(3, "python", stderr=""),
            "Command 'python' returned non-zero exit status 3.",
        ),
        (subprocess.TimeoutExpired("python", 9), "Command 'python' timed out after 9 seconds"),
    ],
)
def test_a_failure_is_noted_with_its_last_line(error: Exception, reason: str, answer: Any) -> None:
    answer(error=error)
    note = f"transformers could not name the layers ({reason})"
    assert transformers_renames(FOLDER, []) == ({}, note)


def test_what_a_slow_process_said_is_not_shown_as_bytes(answer: Any) -> None:
    # subprocess gives bytes here even where text was asked for
    answer(error=subprocess.TimeoutExpired("python", 9, stderr=b"a warning\n"))
    _, note = transformers_renames(FOLDER, [])
    assert note is not None
    assert "b'" not in note
