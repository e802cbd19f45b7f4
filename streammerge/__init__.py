"""Merge LoRA adapters into a checkpoint as a stream of tiles, in a memory ceiling of your choice.

```python
import streammerge

plan = streammerge.build_plan("llama3_lora_sft.yaml")   # no weight is read, nothing is written
report = streammerge.export("llama3_lora_sft.yaml")     # or a dict with the same keys
print(report.peak_rss_bytes, report.output_dir)
```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from streammerge.version import __version__

if TYPE_CHECKING:
    from streammerge.config import ExportConfig, load_config
    from streammerge.engine.export import Progress, build_plan, export
    from streammerge.errors import (
        AdapterError,
        CheckpointError,
        ConfigError,
        DiskSpaceError,
        InputError,
        InterruptedRunError,
        MemoryBudgetError,
        NonFiniteError,
        OutputExistsError,
        PlanError,
        QuantizationError,
        ResourceError,
        StreamMergeError,
        UnsupportedError,
        VerificationError,
    )
    from streammerge.plan.merge_plan import MergePlan
    from streammerge.report.export_report import ExportReport

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DiskSpaceError",
    "ExportConfig",
    "ExportReport",
    "InputError",
    "InterruptedRunError",
    "MemoryBudgetError",
    "MergePlan",
    "NonFiniteError",
    "OutputExistsError",
    "PlanError",
    "Progress",
    "QuantizationError",
    "ResourceError",
    "StreamMergeError",
    "UnsupportedError",
    "VerificationError",
    "__version__",
    "build_plan",
    "export",
    "load_config",
]

# imported on first use, so that the command line answers --help before pydantic and numpy are
# loaded
_HOMES = {
    "ExportConfig": "streammerge.config",
    "ExportReport": "streammerge.report.export_report",
    "MergePlan": "streammerge.plan.merge_plan",
    "Progress": "streammerge.engine.export",
    "build_plan": "streammerge.engine.export",
    "export": "streammerge.engine.export",
    "load_config": "streammerge.config",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        msg = f"module 'streammerge' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(_HOMES.get(name, "streammerge.errors")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
