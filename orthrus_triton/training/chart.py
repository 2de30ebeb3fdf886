"""An evaluation as a picture: tokens per cycle by domain, and how far into the block drafts are accepted."""

from __future__ import annotations

from os import PathLike
from typing import Any


def save_chart(report: dict[str, Any], path: str | PathLike[str], title: str) -> None:
    """Draw a report of `evaluate` into a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=11)
    bars, curves = figure.subplots(1, 2)
    domains = report["domains"]
    drawn = bars.bar(list(domains), [domain["tokens_per_cycle"] for domain in domains.values()], color="#4878a8")
    bars.bar_label(drawn, fmt="%.2f")
    bars.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    widest = 1 + len(report["acceptance_by_position"])  # rows; the report's block size may be "auto"
    bars.set(ylabel="tokens per cycle", ylim=(0, widest + 1))  # a frozen view that reads the anchor gives one more
    for name, domain in domains.items():
        rates = domain["acceptance_by_position"]
        curves.plot(range(1, len(rates) + 1), rates, marker="o", markersize=3, label=name)
    curves.set(xlabel="draft position", ylabel="share of cycles accepted up to here", ylim=(0, 1))
    curves.legend(frameon=False)
    for axes in (bars, curves):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
