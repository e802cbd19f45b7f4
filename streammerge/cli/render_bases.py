"""Render the comparison of the two bases that an adapter can be merged onto."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from streammerge.cli.render import print_table

if TYPE_CHECKING:
    from streammerge.engine.compare import BasesReport, KindReport

__all__ = ["show_bases"]


def show_bases(report: BasesReport) -> None:
    """Print how far the bases are apart, and what each merge holds of the adapters' deltas."""
    console = Console(highlight=False)
    for name, value in (("base", report.base), *(("adapter", a) for a in report.adapters)):
        console.print(f"{name:<8}  {value}", markup=False, soft_wrap=True)
    kinds = (*report.kinds.items(), ("all", report.all_kinds))
    print_table(
        ("module", "weights", "base error", "kept on original", "noise", "kept on NF4", "noise"),
        [(kind, *_cells(found)) for kind, found in kinds],
    )
    console.print(
        "base error: distance of the two bases, kept: share of the delta after rounding, noise: "
        "error of the rounding; distances in units of the delta",
        markup=False,
        soft_wrap=True,
    )
    for name, merge in (("original", report.original), ("dequantized-nf4", report.dequantized)):
        if merge is not None:
            console.print(
                f"perplexity onto {name:<15}  {merge.perplexity:.4f}  ({merge.tokens} tokens)",
                markup=False,
                soft_wrap=True,
            )


def _cells(found: KindReport) -> tuple[str, ...]:
    return (
        str(found.weights),
        f"{found.base_error:.3g}",
        f"{found.kept_original:.2%}",
        f"{found.noise_original:.2g}",
        f"{found.kept_dequantized:.2%}",
        f"{found.noise_dequantized:.2g}",
    )
