"""The staging folder beside `export_dir`: where an export grows until it is complete.

It is locked against a second run, keeps a journal of finished shards so that a rerun of the same
plan goes on where the last one stopped, and becomes `export_dir` by a rename. A different plan
(another adapter, another base, other options) never mixes with what is there: the folder is emptied
first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from typing import TYPE_CHECKING

from streammerge.checkpoint.sidecars import write_durably
from streammerge.checkpoint.writer import writing
from streammerge.errors import OutputExistsError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from streammerge.plan.merge_plan import MergePlan

__all__ = ["Staging", "check_output", "fingerprint"]

_LOCK = ".lock"
_JOURNAL = ".journal"


def check_output(output: Path, *, base: Path, adapters: Iterable[Path], overwrite: bool) -> None:
    """Refuse an output folder that is taken, holds an input, or lies inside the base.

    Raises:
        OutputExistsError: The folder cannot be used.
    """
    for source in (base, *adapters):
        is_inside = source is base and source in output.parents
        if output == source or output in source.parents or is_inside:
            raise OutputExistsError(
                "export_dir and an input share a folder: the inputs are never written to",
                where=output,
                got=source,
                hint="choose another export_dir",
            )
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputExistsError(
            "export_dir is a file", where=output, hint="choose another export_dir"
        )
    if any(output.iterdir()) and not overwrite:
        raise OutputExistsError(
            "export_dir is not empty",
            where=output,
            hint="choose another export_dir, or set overwrite: true to replace it",
        )


def fingerprint(plan: MergePlan) -> str:
    """Identify a plan and its inputs: equal only if every output shard would be equal.

    Inputs are known by path, size and modification time.
    """
    digest = hashlib.sha256()
    files = {tensor.source.path for tensor in plan.tensors}
    for tensor in plan.tensors:
        files.update(factor.path for term in tensor.terms for factor in term.factors)
    for path in sorted(files):
        status = path.stat()
        digest.update(repr((str(path), status.st_size, status.st_mtime_ns)).encode())
    digest.update(repr((plan.layout, plan.numerics)).encode())
    for shard in plan.shards:
        digest.update(repr((shard.name, shard.tensors)).encode())
    return digest.hexdigest()


class Staging:
    """The staging folder of one run, held under a lock."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f".{output.name}.streammerge")
        self._replaced = output.with_name(f".{output.name}.streammerge-replaced")
        self._lock: int | None = None
        self.finished: dict[str, int] = {}
        """Shards that an interrupted run of the same plan has finished, and their sizes."""

    def open(self, identity: str) -> None:
        """Create or take over the folder.

        Args:
            identity: The plan's fingerprint.

        Raises:
            ResourceError: Another run holds it, or the place cannot be written to.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            self._lock = None
            raise ResourceError(
                "another export writes to this folder",
                where=self.output,
                hint="wait for it, or choose another export_dir",
            ) from error
        self._recover_replaced()
        self.finished = self._read_journal(identity)
        self._remove_all_but({*self.finished, _LOCK, _JOURNAL} if self.finished else {_LOCK})
        if not self.finished:
            write_durably(self.folder / _JOURNAL, json.dumps({"plan": identity}) + "\n")

    def record(self, name: str, nbytes: int) -> None:
        """Note a finished, durable shard."""
        with writing(self.folder), (self.folder / _JOURNAL).open("a") as journal:
            journal.write(json.dumps({"shard": name, "bytes": nbytes}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def publish(self) -> None:
        """Turn the folder into the output; what `overwrite` replaces goes last."""
        with writing(self.output):
            (self.folder / _JOURNAL).unlink(missing_ok=True)
            (self.folder / _LOCK).unlink(missing_ok=True)
            _sync_folder(self.folder)
            if self.output.exists() and any(self.output.iterdir()):
                self.output.replace(self._replaced)
            self.folder.replace(self.output)
            _sync_folder(self.output.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Give up the lock; the folder stays, for a rerun."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Remove the folder."""
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.release()

    def _recover_replaced(self) -> None:
        """Finish, or take back, a publication that was cut off between its two renames."""
        if not self._replaced.exists():
            return
        with writing(self.output):
            if self.output.exists():
                shutil.rmtree(self._replaced)
            else:
                self._replaced.replace(self.output)

    def _read_journal(self, identity: str) -> dict[str, int]:
        try:
            lines = (self.folder / _JOURNAL).read_text().splitlines()
            first, *shards = [json.loads(line) for line in lines]
            if first != {"plan": identity}:
                return {}
            found = {str(entry["shard"]): int(entry["bytes"]) for entry in shards}
        except (OSError, ValueError, KeyError, TypeError):
            # a journal that was cut off says nothing: start over
            return {}
        return {
            name: nbytes
            for name, nbytes in found.items()
            if (self.folder / name).is_file() and (self.folder / name).stat().st_size == nbytes
        }

    def _remove_all_but(self, kept: set[str]) -> None:
        for entry in self.folder.iterdir():
            if entry.name in kept:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
