"""Small JSON files: an object, or the caller's error that names the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streammerge.checkpoint import jsonfile
from streammerge.checkpoint.jsonfile import read_json_object
from streammerge.errors import AdapterError, CheckpointError, InputError

if TYPE_CHECKING:
    from pathlib import Path


def test_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes('{"é": [1, null]}'.encode())
    assert read_json_object(path, error=CheckpointError) == {"é": [1, None]}


@pytest.mark.parametrize("error", [CheckpointError, AdapterError])
@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", "file is not valid JSON"),
        (b"{", "file is not valid JSON"),
        (b'{"a": "\xff"}', "file is not valid JSON"),
        (b"[" * 100_000, "file is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "file is not valid JSON"),
        (b"[]", "JSON file does not hold an object"),
        (b"null", "JSON file does not hold an object"),
    ],
)
def test_anything_else_is_the_callers_error(
    tmp_path: Path, error: type[InputError], raw: bytes, what: str
) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(raw)
    with pytest.raises(error) as caught:
        read_json_object(path, error=error)
    assert (caught.value.what, caught.value.where) == (what, str(path))
    assert len(str(caught.value).splitlines()) == 1


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        read_json_object(tmp_path / "none", error=AdapterError)
    assert str(caught.value) == f"file is missing, in {tmp_path / 'none'}"
    with pytest.raises(AdapterError, match="not a regular file"):
        read_json_object(tmp_path, error=AdapterError)


def test_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.json"
    path.write_text('{"a": 1}')
    monkeypatch.setattr(jsonfile, "MAX_JSON_BYTES", 7)
    with pytest.raises(CheckpointError) as caught:
        read_json_object(path, error=CheckpointError)
    assert str(caught.value) == f"JSON file is too large, in {path}; expected 7; got 8"
