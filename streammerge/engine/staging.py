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
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

from streammerge.checkpoint.sidecars import write_durably
from streammerge.checkpoint.writer import writing
from streammerge.errors import OutputExistsError, ResourceError
from streammerge.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
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
    if output.is_mount():
        # the finished folder takes its name by a rename, which cannot replace a mount point
        raise OutputExistsError(
            "export_dir is a mount point", where=output, hint="choose a folder below it"
        )
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


def fingerprint(plan: MergePlan, *, allow_nonfinite: bool = False, device: str = "cpu") -> str:
    """Identify a plan and its inputs: equal only if every output shard would be equal.

    Inputs are known by path, inode, size and times.

    Args:
        plan: The plan.
        allow_nonfinite: Whether NaN and Inf pass.
        device: The kind of device that merges, whose sums may round otherwise.
    """
    digest = hashlib.sha256()
    files = {path for tensor in plan.tensors for path in tensor.source.paths}
    for tensor in plan.tensors:
        files.update(factor.path for term in tensor.terms for factor in term.factors)
    for path in sorted(files):
        status = path.stat()
        known = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        digest.update(repr((str(path), known)).encode())
    digest.update(
        repr(
            (__version__, plan.layout, plan.numerics, plan.io.digest, allow_nonfinite, device)
        ).encode()
    )
    for shard in plan.shards:
        digest.update(repr((shard.name, shard.tensors)).encode())
    return digest.hexdigest()


class Staging:
    """The staging folder of one run, held under a lock."""

    def __init__(self, output: Path, *, keeps: frozenset[str] = frozenset()) -> None:
        """Name the folder; `open` creates it.

        Args:
            output: The folder that it becomes when it is complete.
            keeps: Further files that a rerun of the same plan goes on with.
        """
        self.output = output
        self._keeps = keeps
        self.folder = output.with_name(f".{output.name}.streammerge")
        self._replaced = output.with_name(f".{output.name}.streammerge-replaced")
        self._lock: int | None = None
        self.finished: dict[str, tuple[int, str]] = {}
        """Shards that an interrupted run of the same plan has finished: their sizes and digests."""

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
        self._remove_all_but({*self.finished, *(self._keeps if self.finished else ()), _LOCK})
        lines: list[dict[str, object]] = [{"plan": identity}]
        lines += [_line(name, *known) for name, known in self.finished.items()]
        write_durably(self.folder / _JOURNAL, "".join(json.dumps(line) + "\n" for line in lines))

    def record(self, name: str, nbytes: int, digest: str) -> None:
        """Note a finished, durable shard."""
        with writing(self.folder), (self.folder / _JOURNAL).open("a") as journal:
            journal.write(json.dumps(_line(name, nbytes, digest)) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def publish(self, *, overwrite: bool) -> None:
        """Turn the folder into the output; what `overwrite` replaces goes last.

        Signals wait until it is done.

        Raises:
            OutputExistsError: Something was put into the output folder during the run.
            ResourceError: A rename failed; the finished folder and the old output are as they were.
        """
        with _signals_held(), writing(self.output):
            is_taken = self.output.exists() and any(self.output.iterdir())
            if is_taken and not overwrite:
                raise OutputExistsError(
                    "export_dir was filled during the run",
                    where=self.output,
                    hint="empty it and run the same command again, which goes on from here",
                )
            if is_taken:
                self.output.replace(self._replaced)
            try:
                self.folder.replace(self.output)
            except OSError:
                if is_taken:
                    self._replaced.replace(self.output)
                raise
            (self.output / _JOURNAL).unlink(missing_ok=True)
            (self.output / _LOCK).unlink(missing_ok=True)
            _sync_folder(self.output)
            _sync_folder(self.output.parent)
            self.release()
            shutil.rmtree(self._replaced, ignore_errors=True)

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

    def _read_journal(self, identity: str) -> dict[str, tuple[int, str]]:
        """Return the shards that are there and whole, up to a line that was cut off."""
        found: dict[str, tuple[int, str]] = {}
        try:
            first, *shards = (self.folder / _JOURNAL).read_text().splitlines()
            if json.loads(first) != {"plan": identity}:
                return {}
            for line in shards:
                entry = json.loads(line)
                found[str(entry["shard"])] = int(entry["bytes"]), str(entry["digest"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # what was read until here is as good as ever
        return {
            name: known
            for name, known in found.items()
            if (self.folder / name).is_file() and (self.folder / name).stat().st_size == known[0]
        }

    def _remove_all_but(self, kept: set[str]) -> None:
        for entry in self.folder.iterdir():
            if entry.name in kept:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _line(name: str, nbytes: int, digest: str) -> dict[str, object]:
    return {"shard": name, "bytes": nbytes, "digest": digest}


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait; they arrive afterwards."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
