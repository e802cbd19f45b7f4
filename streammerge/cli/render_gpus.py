"""What was measured on GPUs, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.config.profile import MachineProfile

__all__ = ["show_gpus"]


def show_gpus(profile: MachineProfile, *, path: Path | None) -> None:
    """Print the rates of each kind of GPU, its kernels, and where it was written."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("GPU", "link GB/s", "CPU GB/s", "auto merges on"):
        table.add_column(column)
    for name, gpu in profile.gpus.items():
        faster = "the GPU" if gpu.link_gbps > gpu.cpu_gbps else "the CPU"
        table.add_row(name, f"{gpu.link_gbps:.2f}", f"{gpu.cpu_gbps:.2f}", faster)
    console.print(table)
    cells = [cell for cell in profile.measurements["gpus"] if cell["is_chosen"]]
    if cells:
        kernels = Table(box=None, pad_edge=False)
        for column in ("GPU", "kernel", "GB/s", "tile", "warps", "stages"):
            kernels.add_column(column)
        for cell in cells:
            shape = cell["shape"]
            shown = ("its own", "", "")
            if shape is not None:
                tile = f"{shape['block_n']} x {shape['block_k']} x {shape['block_r']}"
                shown = (tile, str(shape["num_warps"]), str(shape["num_stages"]))
            kernels.add_row(cell["gpu"], cell["kernel"], f"{cell['gbps']:.0f}", *shown)
        console.print(kernels)
    where = "nowhere: STREAMMERGE_PROFILE is empty" if path is None else str(path)
    console.print(f"written to  {where}")
