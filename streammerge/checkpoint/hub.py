"""Checkpoints and adapters that are named by a hub id instead of a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.errors import InputError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["HubOptions", "push_folder", "resolve_folder"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# never needed for a merge, and often larger than the model itself
_NOT_FETCHED = ("*.gguf", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.pth",
                "consolidated*", "original/*", "metal/*", "onnx/*")  # fmt: skip


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How to reach the hub."""

    revision: str | None = None
    cache_dir: Path | None = None
    token: str | None = None
    local_files_only: bool = False
    """Look in the local cache alone."""


def resolve_folder(name: str, *, options: HubOptions, skip: Sequence[str] = ()) -> Path:
    """Find the folder of a model or an adapter, fetching it from the hub if need be.

    Args:
        name: A folder, or a hub id (`owner/name`).
        options: How to reach the hub.
        skip: Further file name patterns not to fetch.

    Raises:
        InputError: It is neither a folder nor a reachable hub id.
    """
    folder = _find_folder(name)
    if folder is not None:
        return folder
    if Path(name).is_absolute() or not _HUB_ID.fullmatch(name):
        raise InputError("folder does not exist", where=name, hint="check the path")
    from huggingface_hub import snapshot_download  # noqa: PLC0415 (slow import, rarely needed)

    try:
        return Path(
            snapshot_download(
                name,
                revision=options.revision,
                cache_dir=options.cache_dir,
                token=options.token,
                local_files_only=options.local_files_only,
                ignore_patterns=[*_NOT_FETCHED, *skip],
            )
        )
    except Exception as error:
        hint = "check the path, the hub id, hf_hub_token and the network"
        if options.local_files_only:
            hint = "check the path, or fetch it into the cache first (export does)"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"neither a folder nor a hub id that can be read ({reason})", where=name, hint=hint
        ) from error


def _find_folder(name: str) -> Path | None:
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError):
        # no such user's home, or a name longer than a file system takes
        return None


def push_folder(folder: Path, *, repo_id: str, token: str | None) -> str:
    """Upload a finished checkpoint to the hub and return its address.

    Raises:
        ResourceError: The upload failed; the local checkpoint is complete.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415 (slow import, rarely needed)

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
    except Exception as error:
        raise ResourceError(
            f"cannot push to the hub ({error})",
            where=repo_id,
            hint=f"the merged checkpoint is complete in {folder}: push it from there",
        ) from error
