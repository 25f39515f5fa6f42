"""The figure of :mod:`tamoe.experiments.controller`, from its data.

Draw it again without running anything::

    python -m tamoe.experiments.controller_figure experiments/controller.json controller.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tamoe.experiments.command import run_command
from tamoe.experiments.controller import MEAN_STEPS, POINTS
from tamoe.topology.documents import read_document

# Okabe and Ito's colours: told apart by colour-blind readers too.
COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00")
MARKS = {
    "gain": ("o", "#0072B2"),
    "sign": ("s", "#E69F00"),
    "sign 0.001": ("v", "#999999"),
    "prices, fixed": ("x", "#CC79A7"),
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the figure of the results as PNG (or what the suffix says)."""
    from matplotlib.figure import Figure

    top_ks = results["config"]["top_ks"]
    figure = Figure(figsize=(5 * len(top_ks), 8.4), layout="constrained")
    axes = figure.subplots(2, len(top_ks), squeeze=False, height_ratios=(1.2, 1))
    for number, top_k in enumerate(top_ks):
        rows = [row for row in results["rows"] if row["top_k"] == top_k]
        _draw_steps(axes[0][number], rows, top_k, results["config"]["steps"])
        _draw_ends(axes[1][number], rows)
    config = results["config"]
    figure.suptitle(
        f"Controllers from even dispatch on {config['tree']}, ratio {config['ratio']:g}: "
        f"{config['tokens']} tokens a rank and step (simulated)",
        fontsize=12,
    )
    figure.savefig(path, dpi=120)


def _draw_steps(axes: Any, rows: list[dict[str, Any]], top_k: int, steps: int) -> None:
    for how, line in (("gain", "-"), ("sign", ":")):
        mine = [row for row in rows if row["how"] == how]
        for row, color in zip(mine, COLORS, strict=False):
            share = np.array(row["share_by_step"])
            label = f"spread {row['spread']:g}" if how == "gain" else None
            ends = MEAN_STEPS + max(1, steps // POINTS) * np.arange(len(share))
            axes.plot(ends, share, line, color=color, lw=1.3, label=label)
    target = rows[0]["target"]
    axes.axhspan(target - 0.02, target + 0.02, color="#DDDDDD", zorder=0)
    axes.axhline(target, color="black", ls="--", lw=1)
    axes.set(
        title=f"top-{top_k}: gain (solid), annealed sign (dotted)",
        xlabel="last of 10 steps",
        ylabel="share of choices in the rank's node",
        xscale="log",
    )
    axes.legend(loc="lower right", fontsize=8.5, title="of the logits", title_fontsize=8.5)
    axes.grid(alpha=0.25)


def _draw_ends(axes: Any, rows: list[dict[str, Any]]) -> None:
    spreads = sorted({row["spread"] for row in rows})
    for how, (marker, color) in MARKS.items():
        mine = [row for row in rows if row["how"] == how]
        away = [max(row["held"], 1e-4) for row in mine]
        axes.plot([row["spread"] for row in mine], away, marker=marker, color=color, label=how)
    axes.axhline(0.02, color="black", ls="--", lw=1)
    axes.set(
        xlabel="spread of the logits",
        ylabel="most off the target from step 200",
        xscale="log",
        yscale="log",
    )
    axes.set_xticks(spreads, [f"{spread:g}" for spread in spreads])
    axes.minorticks_off()
    axes.legend(fontsize=8.5)
    axes.grid(alpha=0.25)


def main(data: Path, figure: Path) -> None:
    """Draw the figure of a controller.json."""
    draw(read_document(data, "tamoe.experiment.controller", "1.0"), figure)


if __name__ == "__main__":
    run_command(main)
