"""What `streammerge tune` measured on this machine, kept for the runs that follow.

A profile changes the speed of a run and never its output, so one that cannot be used is left aside
with a note, and the defaults are used.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, get_args, get_type_hints

from streammerge.config.tuning import (
    KIB,
    MIB,
    ComputeTuning,
    DiskTuning,
    GpuTuning,
    KernelShape,
)
from streammerge.errors import ConfigError

__all__ = ["PROFILE_VERSION", "MachineProfile", "load_profile", "profile_path", "save_profile"]

PROFILE_VERSION = 1
_VARIABLE = "STREAMMERGE_PROFILE"
_MAX_FILE_BYTES = 4 * MIB
_PAGE = 4096
_BLOCK_BYTES = range(64 * KIB, 256 * MIB + 1, _PAGE)
_THREADS = range(1, 17)
_SCRATCH_BYTES = range(64 * KIB, 256 * MIB + 1, _PAGE)
_MOST_GBPS = 10**6
_KERNEL_SHAPES = {
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (16, 32, 64, 128, 256),
    "block_r": (16, 32, 64, 128),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5),
}
# of the last bucket at least: more than the rank of any adapter
_ANY_RANK = 1 << 30


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """How files and tiles are best handled on one machine."""

    disks: dict[str, DiskTuning] = field(default_factory=dict)
    """By `major:minor mount-point`."""
    compute: ComputeTuning | None = None
    """None if it was not measured."""
    gpus: dict[str, GpuTuning] = field(default_factory=dict)
    """By the name of the device."""
    measurements: dict[str, Any] = field(default_factory=dict)
    """What the choice is based on, as JSON types; to be shown, not to be computed with."""
    created: str = ""
    """ISO date of the last measurement."""
    version: int = PROFILE_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Give the profile as JSON types."""
        return {
            "version": self.version,
            "created": self.created,
            "disks": {key: asdict(disk) for key, disk in self.disks.items()},
            "compute": self.compute
            and {"scratch_bytes": [list(pair) for pair in self.compute.scratch_bytes]},
            "gpus": {name: asdict(gpu) for name, gpu in self.gpus.items()},
            "measurements": self.measurements,
        }

    def over(self, older: MachineProfile) -> MachineProfile:
        """Return this profile, with what only the older one knows."""
        measurements = {**older.measurements, **self.measurements}
        ours, theirs = (part.measurements.get("disks") for part in (self, older))
        if isinstance(ours, dict) and isinstance(theirs, dict):
            measurements["disks"] = {**theirs, **ours}
        return MachineProfile(
            disks={**older.disks, **self.disks},
            compute=self.compute or older.compute,
            gpus={**older.gpus, **self.gpus},
            measurements=measurements,
            created=self.created or older.created,
        )


def profile_path() -> Path | None:
    """Return where the profile is, or None if there shall be none.

    `STREAMMERGE_PROFILE` names another file, or none if it is empty.
    """
    named = os.environ.get(_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:  # a user without a home
            return None
    return cache / "streammerge" / "machine.json"


def load_profile(path: Path | None = None) -> tuple[MachineProfile, str | None]:
    """Read the profile.

    Args:
        path: Another file than `profile_path()`.

    Returns:
        The profile, an empty one if there is none; and a note if the file cannot be used.
    """
    path = path or profile_path()
    if path is None:
        return MachineProfile(), None
    try:
        return _parse(_read(path)), None
    except FileNotFoundError:
        return MachineProfile(), None
    except OSError as error:
        why = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        why = str(error)
    note = f"machine profile {path} is not used: {why}; `streammerge tune` writes it anew"
    return MachineProfile(), "".join(char if char.isprintable() else " " for char in note)


def save_profile(profile: MachineProfile, path: Path | None = None) -> Path | None:
    """Write the profile, as a whole or not at all.

    Args:
        profile: What was measured.
        path: Another file than `profile_path()`.

    Returns:
        Where it was written; None if there shall be no profile.

    Raises:
        ConfigError: The file cannot be written.
    """
    path = path or profile_path()
    if path is None:
        return None
    text = json.dumps(profile.to_dict(), indent=1, allow_nan=False) + "\n"
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(number)
        Path(temporary).replace(path)
    except OSError as error:
        raise ConfigError(
            f"cannot write the machine profile ({error.strerror})",
            where=path,
            hint=f"set {_VARIABLE} to another file",
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path


def _read(path: Path) -> Any:
    if not path.stat().st_size <= _MAX_FILE_BYTES or not path.is_file():
        raise ValueError("it is no regular file of a sensible size")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError("it is not valid JSON") from error


def _parse(value: Any) -> MachineProfile:
    """Check a profile.

    Raises:
        ValueError: Something in it cannot be used.
    """
    found = _object(value, "the file")
    version = found.get("version")
    if version != PROFILE_VERSION or isinstance(version, bool):
        raise ValueError(f"its version is not {PROFILE_VERSION}")
    created = found.get("created", "")
    if not isinstance(created, str):
        raise ValueError("created is no date")
    if created:
        date.fromisoformat(created)
    disks = _object(found.get("disks", {}), "disks")
    compute = found.get("compute")
    return MachineProfile(
        disks={key: _parse_disk(_object(disk, key), key) for key, disk in disks.items()},
        compute=None if compute is None else _parse_compute(_object(compute, "compute")),
        gpus={
            name: _parse_gpu(_object(gpu, name), name)
            for name, gpu in _object(found.get("gpus", {}), "gpus").items()
        },
        measurements=_object(found.get("measurements", {}), "measurements"),
        created=created,
    )


def _parse_disk(found: dict[str, Any], key: str) -> DiskTuning:
    where = f"the disk {key!r}"
    hints = get_type_hints(DiskTuning)
    if found.keys() != hints.keys():
        raise ValueError(f"{where} has other keys than {', '.join(hints)}")
    for name in ("read_mode", "write_mode"):
        if found[name] not in get_args(hints[name]):
            raise ValueError(f"{where} has an unknown {name}")
    _integer(found["block_bytes"], _BLOCK_BYTES, f"block_bytes of {where}")
    _integer(found["readers"], _THREADS, f"readers of {where}")
    _integer(found["writers"], _THREADS, f"writers of {where}")
    return DiskTuning(**found)


def _parse_compute(found: dict[str, Any]) -> ComputeTuning:
    pairs = found.get("scratch_bytes")
    if found.keys() != {"scratch_bytes"} or not isinstance(pairs, list) or not pairs:
        raise ValueError("compute has no list of scratch_bytes alone")
    buckets, above = [], 0
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("scratch_bytes holds something else than pairs")
        highest = _integer(pair[0], range(above, _ANY_RANK + 1), "a rank of scratch_bytes")
        buckets.append((highest, _integer(pair[1], _SCRATCH_BYTES, "a size of scratch_bytes")))
        above = highest + 1
    if buckets[-1][0] != _ANY_RANK:
        raise ValueError(f"scratch_bytes does not end with rank {_ANY_RANK}")
    return ComputeTuning(tuple(buckets))


def _parse_gpu(found: dict[str, Any], name: str) -> GpuTuning:
    where = f"the GPU {name!r}"
    if found.keys() != {field.name for field in fields(GpuTuning)}:
        raise ValueError(f"{where} has other keys than it should")
    rates = [found["link_gbps"], found["cpu_gbps"]]
    if not all(isinstance(r, (int, float)) and not isinstance(r, bool) for r in rates):
        raise ValueError(f"a rate of {where} is no number")
    if not all(0 < rate < _MOST_GBPS for rate in rates):
        raise ValueError(f"a rate of {where} is not in 0 .. {_MOST_GBPS}")
    kernels = {
        key: _parse_kernel(_object(shape, key), f"the kernel {key!r} of {where}")
        for key, shape in _object(found["kernels"], f"kernels of {where}").items()
    }
    return GpuTuning(link_gbps=float(rates[0]), cpu_gbps=float(rates[1]), kernels=kernels)


def _parse_kernel(found: dict[str, Any], where: str) -> KernelShape:
    if found.keys() != _KERNEL_SHAPES.keys():
        raise ValueError(f"{where} has other keys than {', '.join(_KERNEL_SHAPES)}")
    for name, allowed in _KERNEL_SHAPES.items():
        if found[name] not in allowed or isinstance(found[name], bool):
            raise ValueError(f"{name} of {where} is not one of {', '.join(map(str, allowed))}")
    return KernelShape(**found)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no JSON object")
    return value


def _integer(value: Any, allowed: range, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        steps = f" in steps of {allowed.step}" if allowed.step > 1 else ""
        raise ValueError(f"{what} is not in {allowed.start} .. {allowed.stop - 1}{steps}")
    return value
