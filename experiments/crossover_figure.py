"""The figure of where the hierarchical exchange overtakes: a panel for each cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tamoe.experiments.figure_parts import plain, strategy_colour


def save_figure(clusters: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel for each cluster: gain over bytes, a colour for each top-k."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(max(7.0, 1.5 + 3.5 * len(clusters)), 4.2), layout="constrained")
    figure.suptitle("Better flat exchange over hierarchical, dispatch and combine", fontsize=12)
    panels = figure.subplots(1, len(clusters), sharey=True, squeeze=False)[0]
    every_k = sorted({row["top_k"] for one in clusters for row in one["simulated"]})
    colour = {top_k: strategy_colour(number) for number, top_k in enumerate(every_k)}
    for axes, one in zip(panels, clusters, strict=True):
        axes.axhline(1, color="black", linewidth=0.8)
        for top_k in every_k:
            for kind, look in (("simulated", "-"), ("emulated", "o")):
                mine = [row for row in one[kind] if row["top_k"] == top_k]
                sizes_kib = [row["bytes_per_rank"] / 1024 for row in mine]
                axes.plot(sizes_kib, [row["gain"] for row in mine], look, color=colour[top_k], ms=5)
        spec, ranks = one["cluster"].split(":")[1], one["ranks"] // one["nodes"]
        axes.set_title(f"{one['nodes']} nodes x {ranks} ranks, {spec}", fontsize=10)
        axes.set_xscale("log", base=4)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_locator(
            FixedLocator([0.1, 0.2, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8])
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("KiB of tokens per rank")
        plain(axes)
    panels[0].set_ylabel("gain (above 1: hierarchical faster)")
    handles = [Line2D([], [], color=colour[top_k], label=f"top-{top_k}") for top_k in every_k]
    handles += [
        Line2D([], [], color="black", label="simulated"),
        Line2D([], [], color="black", marker="o", ms=5, linestyle="", label="emulated"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=130)
