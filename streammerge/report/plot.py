"""Plots of reports, drawn by matplotlib where it is installed."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from streammerge.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["plot_bars", "require_matplotlib"]


def require_matplotlib() -> None:
    """Make sure, before anything is measured, that a plot can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "a plot needs matplotlib, which is not installed",
            hint="pip install 'streammerge[bench]', or take the numbers from --json",
        )


def plot_bars(path: Path, values: Sequence[tuple[str, float]], *, title: str, unit: str) -> None:
    """Draw one bar for each value to an SVG file.

    Args:
        path: The file; its folder is there.
        values: What each bar is called, and its length.
        title: Of the plot.
        unit: What the lengths are.

    Raises:
        ConfigError: The file cannot be written.
    """
    # not pyplot, which would look for a screen
    from matplotlib.figure import Figure  # noqa: PLC0415 (half a second)

    figure = Figure(figsize=(8, 1.2 + 0.45 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh([label for label, _ in values], [value for _, value in values], height=0.6)
    axes.bar_label(bars, fmt="%.2f", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.grid(visible=True, axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    try:
        figure.savefig(path, format="svg", metadata={"Date": None})
    except OSError as error:
        raise ConfigError(f"plot cannot be written ({error.strerror})", where=path) from error
