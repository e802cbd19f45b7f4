"""Every error that streammerge raises on purpose, each with the exit code of its family.

```
StreamMergeError                  1
├── ConfigError (ValueError)      2   bad YAML, key, value or combination
│   ├── OutputExistsError         2   export_dir is taken, or is one of the inputs
│   └── UnsupportedError          2   asked for something this version does not do
├── InputError (ValueError)       3   the files are damaged or do not fit together
│   ├── CheckpointError           3   a shard, a header, an index, config.json
│   ├── AdapterError              3   adapter_config.json or the adapter's tensors
│   ├── PlanError                 3   base and adapter do not fit
│   ├── NonFiniteError            3   a merged tensor holds NaN or Inf
│   └── QuantizationError         3   calibration data or weights that cannot be quantized
├── ResourceError (RuntimeError)  4   not enough of something
│   ├── MemoryBudgetError         4
│   └── DiskSpaceError            4
├── VerificationError             5   written bytes differ from the planned ones
└── InterruptedRunError           130 SIGINT or SIGTERM
```

A message is one line, in a fixed order: what, where, expected, got, next step.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DiskSpaceError",
    "InputError",
    "InterruptedRunError",
    "MemoryBudgetError",
    "NonFiniteError",
    "OutputExistsError",
    "PlanError",
    "QuantizationError",
    "ResourceError",
    "StreamMergeError",
    "UnsupportedError",
    "VerificationError",
]


class StreamMergeError(Exception):
    """Root of all errors raised on purpose.

    Args:
        what: The fault, as a sentence without its full stop.
        where: File, key or tensor in which it was found.
        expected: What would have been right.
        got: What was found instead.
        hint: What the user can do next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.expected = None if expected is None else str(expected)
        self.got = None if got is None else str(got)
        self.hint = hint

    def __str__(self) -> str:
        parts = [self.what if self.where is None else f"{self.what}, in {self.where}"]
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.got is not None:
            parts.append(f"got {self.got}")
        if self.hint is not None:
            parts.append(self.hint)
        text = "; ".join(parts)
        # one line, and nothing that a terminal would take for a command
        return "".join(char if char.isprintable() else " " for char in text)


class ConfigError(StreamMergeError, ValueError):
    """The configuration cannot be used as it stands."""

    exit_code = 2


class OutputExistsError(ConfigError):
    """The output folder is taken, or is one of the inputs."""


class UnsupportedError(ConfigError):
    """The configuration asks for something that this version does not do."""


class InputError(StreamMergeError, ValueError):
    """An input file is damaged, or the inputs do not fit together."""

    exit_code = 3


class CheckpointError(InputError):
    """A checkpoint's shard, header, index or config.json is damaged or hostile."""


class AdapterError(InputError):
    """An adapter is damaged, or of a kind that cannot be merged."""


class PlanError(InputError):
    """The base and the adapters do not fit together."""


class NonFiniteError(InputError):
    """A merged tensor holds NaN or Inf."""


class QuantizationError(InputError):
    """Calibration data, or weights on it, that cannot be quantized."""


class ResourceError(StreamMergeError, RuntimeError):
    """The machine or the budget is too small."""

    exit_code = 4


class MemoryBudgetError(ResourceError):
    """`max_memory` is below what the plan needs."""


class DiskSpaceError(ResourceError):
    """The disk cannot take the output."""


class VerificationError(StreamMergeError):
    """What was written differs from what was planned."""

    exit_code = 5


class InterruptedRunError(StreamMergeError):
    """The run was stopped by a signal."""

    exit_code = 130
