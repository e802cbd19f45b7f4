"""Folders are used as they are; hub ids are fetched; faults say what to check."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from streammerge.checkpoint.hub import HubOptions, push_folder, resolve_folder
from streammerge.errors import InputError, ResourceError

# what the hub's own HTTP library raises when there is no connection
TransportError = HfHubHTTPError.__bases__[0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The calls of `snapshot_download`, which does not reach the network."""
    seen: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **options: Any) -> str:
        seen.append((name, options))
        return str(tmp_path / "snapshot")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return seen


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(_name: str, **_options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_folder_is_used_as_it_is(calls: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_folder("owner/name", options=HubOptions()) == Path("owner/name")
    assert resolve_folder(str(tmp_path), options=HubOptions()) == tmp_path
    assert calls == []


def test_home_is_expanded(
    calls: list[tuple[str, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert resolve_folder("~/m", options=HubOptions()) == tmp_path / "m"
    assert calls == []


def test_hub_id_is_fetched_without_other_formats(
    calls: list[tuple[str, dict[str, Any]]], tmp_path: Path
) -> None:
    options = HubOptions(revision="v1", cache_dir=tmp_path, token="t", local_files_only=True)
    assert resolve_folder("owner/na.me-1", options=options, skip=["*.bin"]) == tmp_path / "snapshot"
    ((name, given),) = calls
    patterns = given.pop("ignore_patterns")
    assert name == "owner/na.me-1"
    assert given == {
        "revision": "v1",
        "cache_dir": tmp_path,
        "token": "t",
        "local_files_only": True,
    }
    assert patterns == [
        "*.gguf",
        "*.h5",
        "*.msgpack",
        "*.ot",
        "*.onnx",
        "*.onnx_data",
        "*.pth",
        "consolidated*",
        "original/*",
        "metal/*",
        "onnx/*",
        "*.bin",
    ]


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "0wner/n_1"])
def test_hub_ids_are_recognised(calls: list[tuple[str, dict[str, Any]]], name: str) -> None:
    resolve_folder(name, options=HubOptions())
    assert [call[0] for call in calls] == [name]


@pytest.mark.parametrize(
    "name",
    [
        "/absolute/none",
        "saves/llama3/lora",
        "./x",
        "../x",
        "a//b",
        "owner/",
        "-x",
        "a b",
        "~no-such-user/x",
        "y" * 300 + "/z/w",
    ],
)
def test_what_can_be_no_hub_id_is_never_looked_up(
    calls: list[tuple[str, dict[str, Any]]], name: str
) -> None:
    with pytest.raises(InputError) as caught:
        resolve_folder(name, options=HubOptions())
    assert str(caught.value) == f"folder does not exist, in {name}; check the path"
    assert calls == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LocalEntryNotFoundError("first line\nsecond"), "first line"),
        (OSError("  offline  "), "offline"),
        (ValueError(), "ValueError"),
        (TransportError("no route"), "no route"),
    ],
)
@pytest.mark.parametrize(
    ("local", "hint"),
    [
        (False, "check the path, the hub id, hf_hub_token and the network"),
        (True, "check the path, or fetch it into the cache first (export does)"),
    ],
)
def test_failed_fetch_says_what_to_check(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str, *, local: bool, hint: str
) -> None:
    fail_with(monkeypatch, error)
    with pytest.raises(InputError) as caught:
        resolve_folder("owner/none", options=HubOptions(local_files_only=local))
    assert str(caught.value) == (
        f"neither a folder nor a hub id that can be read ({reason}), in owner/none; {hint}"
    )
    assert caught.value.__cause__ is error


class _Api:
    error: Exception | None = None
    calls: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, token: str | None) -> None:
        self.calls.append(("token", token))

    def create_repo(self, repo_id: str, *, exist_ok: bool) -> None:
        self.calls.append(("create", repo_id, exist_ok))
        if self.error is not None:
            raise self.error

    def upload_folder(self, *, repo_id: str, folder_path: Path) -> str:
        self.calls.append(("upload", repo_id, folder_path))
        return f"https://hub/{repo_id}"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[_Api]:
    monkeypatch.setattr(huggingface_hub, "HfApi", _Api)
    monkeypatch.setattr(_Api, "error", None)
    monkeypatch.setattr(_Api, "calls", [])
    return _Api


def test_push_uploads_the_folder(api: type[_Api], tmp_path: Path) -> None:
    assert push_folder(tmp_path, repo_id="o/n", token="t") == "https://hub/o/n"
    assert api.calls == [("token", "t"), ("create", "o/n", True), ("upload", "o/n", tmp_path)]


@pytest.mark.parametrize(
    "error",
    [OSError("offline"), ValueError("offline"), TransportError("offline")],
)
def test_failed_push_says_where_the_checkpoint_is(
    api: type[_Api], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(api, "error", error)
    with pytest.raises(ResourceError) as caught:
        push_folder(tmp_path, repo_id="o/n", token=None)
    assert str(caught.value) == (
        "cannot push to the hub (offline), in o/n; the merged checkpoint is complete in "
        f"{tmp_path}: push it from there"
    )
