"""What an export did, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["ExportReport", "peak_rss_bytes", "rss_bytes"]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """The result of an export."""

    output_dir: str
    tensors_total: int
    tensors_changed: int
    tensors_copied: int
    adapter_tensors_used: int
    bytes_read: int
    bytes_written: int
    seconds: float
    read_seconds: float
    """Busy time of the read stage, over its threads; the stages overlap."""
    compute_seconds: float
    write_seconds: float
    predicted_peak_bytes: int
    peak_rss_bytes: int
    """VmHWM of the process."""
    shards: list[dict[str, Any]]
    """Name, bytes and digest of each."""
    digest: str
    """Kind of the digests."""
    resumed_shards: int
    """Shards that an interrupted run had already finished."""
    config_edits: dict[str, Any]
    not_copied: list[str]
    notes: list[str]
    hub_url: str | None = None
    quantization: dict[str, Any] | None = None
    """Method, bits, what was calibrated on, and the relative error of each linear's outputs."""

    deltas: dict[str, dict[str, float]] | None = None
    """By kind of module, what share of the adapters' deltas the written codes hold (`kept`), and
    the codes' error in units of the delta (`noise`); None if no merged weight is stored as codes.
    """

    def to_dict(self) -> dict[str, Any]:
        """Give the report as JSON types."""
        return asdict(self)


def peak_rss_bytes() -> int:
    """Return the most resident memory that the process has had (VmHWM)."""
    return _status_bytes("VmHWM:")


def rss_bytes() -> int:
    """Return the resident memory of the process now (VmRSS)."""
    return _status_bytes("VmRSS:")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    msg = f"/proc/self/status has no {field}"
    raise RuntimeError(msg)
