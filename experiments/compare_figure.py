"""The figure of :mod:`tamoe.experiments.compare`, from its data: quality against traffic and time.

Draw it again without running anything::

    python -m tamoe.experiments.compare_figure experiments/compare.json compare.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tamoe.experiments.command import run_command
from tamoe.experiments.compare import SCHEMA, SCHEMA_VERSION
from tamoe.topology.documents import read_document

# Okabe and Ito's colours by family; the marker tells the members apart.
STYLE = {
    "even": ("#000000", "o"),
    "even, FastMoE's scale": ("#000000", "s"),
    "capacity 1.25": ("#999999", "D"),
    "group limit, one node": ("#CC79A7", "P"),
    "FasterMoE's gate": ("#E69F00", "X"),
    "locality loss": ("#56B4E9", "^"),
    "ta-moe loss kl=1": ("#0072B2", "v"),
    "ta-moe loss kl=0.5": ("#0072B2", "<"),
    "bias kl=1": ("#009E73", "o"),
    "bias kl=0.5": ("#009E73", "s"),
    "bias kl=0.3": ("#009E73", "*"),
}


def draw(document: dict[str, Any], path: Path) -> None:
    """Write the figure as PNG (or what the suffix says)."""
    from matplotlib.figure import Figure

    rows = document["summary"]
    clusters = list(dict.fromkeys(row["cluster"] for row in rows))
    figure = Figure(figsize=(11, 4.6 * len(clusters) + 0.8), layout="constrained")
    axes = figure.subplots(len(clusters), 2, squeeze=False)
    for (by_traffic, by_time), spec in zip(axes, clusters, strict=True):
        mine = [row for row in rows if row["cluster"] == spec]
        _draw_panel(by_traffic, mine, "remote_share", 100, "choices that leave the node (%)")
        _draw_panel(by_time, mine, "step_s", 1e3, "time of a step (ms)")
        even = next(row for row in mine if row["name"] == "even")
        least_ms = even["step_s"] / even["speedup_bound"] * 1e3
        by_time.axvline(least_ms, color="black", lw=1, ls=":", label="no exchange at all")
        by_traffic.set_title(f"{spec}: quality against traffic", fontsize=10.5)
        by_time.set_title(f"{spec}: quality against time", fontsize=10.5)
    handles, labels = axes[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    seeds, steps = rows[0]["seeds"], document["runs"][0]["steps"]
    figure.suptitle(
        f"Every way to steer after {steps} steps (emulated; mean and deviation of {seeds} seeds; "
        f"the line joins what nothing else beats)",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)


def _draw_panel(
    axes: Any, rows: Sequence[dict[str, Any]], key: str, scale: float, label: str
) -> None:
    points = []
    for row in rows:
        color, marker = STYLE.get(row["name"], ("#D55E00", "."))
        x, y = row[key] * scale, row["val_loss_own_over_even"] * 100
        axes.errorbar(
            x,
            y,
            xerr=(row[f"{key}_std"] or 0.0) * scale,
            yerr=(row["val_loss_own_over_even_std"] or 0.0) * 100,
            color=color,
            marker=marker,
            ms=8,
            lw=1,
            capsize=2,
            ls="none",
            label=row["name"],
        )
        points.append((x, y))
    best = pareto(points)
    axes.plot([x for x, _ in best], [y for _, y in best], color="#D55E00", lw=1, zorder=0)
    axes.axhline(0.0, color="black", lw=0.8, ls="--")
    axes.set(xlabel=label, ylabel="validation loss over even (%)")
    axes.grid(alpha=0.25)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other one beats in both, less being better.

    >>> pareto([(1.0, 3.0), (2.0, 1.0), (2.5, 2.0), (3.0, 0.5)])
    [(1.0, 3.0), (2.0, 1.0), (3.0, 0.5)]
    """
    best: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def main(data: Path, figure: Path) -> None:
    """Draw the figure of a compare.json."""
    draw(read_document(data, SCHEMA, SCHEMA_VERSION), figure)


if __name__ == "__main__":
    run_command(main)
