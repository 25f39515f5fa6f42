"""The figure of :mod:`tamoe.experiments.steering`, from its data.

Draw it again without running anything::

    python -m tamoe.experiments.steering_figure experiments/steering.json steering.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tamoe.experiments.command import run_command
from tamoe.topology.documents import read_document

# Okabe and Ito's colours: told apart by colour-blind readers too.
STYLE = {
    ("rank", "sum"): ("per-rank gate, sum norm", "#0072B2"),
    ("rank", "softmax"): ("per-rank gate, softmax norm", "#E69F00"),
    ("rank", "balance"): ("per-rank gate, balance loss", "#999999"),
    ("shared", "sum"): ("shared gate, sum norm", "#D55E00"),
    ("shared", "bias"): ("shared gate, controller", "#009E73"),
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the figure of the results as PNG (or what the suffix says)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    trained, held, trap = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 1))
    _draw_trained(trained, results)
    _draw_held(held, results)
    _draw_trap(trap, results)
    config = results["config"]
    figure.suptitle(
        f"Steering on simulated ranks: {config['tokens']} Gaussian tokens a rank and step, linear "
        f"gates, auxiliary loss only",
        fontsize=12,
    )
    figure.savefig(path, dpi=130)


def _draw_trained(axes: Any, results: dict[str, Any]) -> None:
    for case in results["trained"]:
        label, color = STYLE[case["scope"], case["how"]]
        share = np.array(case["share_by_step"])
        axes.plot(share, color=color, lw=1.4, label=f"{label}: {case['reached']:.3f}")
    axes.axhline(results["target"], color="black", ls="--", lw=1)
    axes.annotate(
        f"target {results['target']:.3f}",
        (1.0, results["target"]),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
    )
    config = results["config"]
    axes.set(
        title=f"Gates that train ({config['tree']}, ratio {config['ratio']:g}, top-1)",
        xlabel="step",
        ylabel="share of choices in the rank's node",
        ylim=(0.0, 1.02),
    )
    axes.legend(loc="lower right", fontsize=8.5, title="reached", title_fontsize=8.5)
    axes.grid(alpha=0.25)


def _draw_held(axes: Any, results: dict[str, Any]) -> None:
    for top_k, marker, line in ((1, "o", "-"), (2, "s", ":")):
        for fixed, color, name in (
            (False, "#009E73", "controller"),
            (True, "#CC79A7", "fixed log-prior"),
        ):
            rows = [r for r in results["held"] if (r["top_k"], r["fixed"]) == (top_k, fixed)]
            x, y = [r["spread"] for r in rows], [r["reached"] for r in rows]
            axes.plot(x, y, marker=marker, ls=line, color=color, ms=5, label=f"{name}, k = {top_k}")
    axes.axhline(results["target"], color="black", ls="--", lw=1)
    axes.set(
        title=f"Shared gate, not trained, after {results['config']['bias_steps']} steps",
        xlabel="spread of the logits (standard deviation)",
        ylabel="share of choices in the rank's node",
        xscale="log",
        ylim=(0.0, 1.02),
    )
    spreads = results["config"]["spreads"]
    axes.set_xticks(spreads, [f"{spread:g}" for spread in spreads])
    axes.minorticks_off()
    axes.legend(loc="lower left", fontsize=8.5)
    axes.grid(alpha=0.25)


def _draw_trap(axes: Any, results: dict[str, Any]) -> None:
    trap, config = results["trap"], results["config"]
    load_N = trap["load_N"]
    axes.bar(range(len(load_N)), load_N, color="#D55E00", width=0.75, label="load of the expert")
    for name, experts in (("expected_big_node", (0, 7)), ("expected_small_node", (8, 11))):
        label = "expected, 1/mean penalty" if experts[0] == 0 else None
        x = (experts[0] - 0.45, experts[1] + 0.45)
        axes.plot(x, (trap[name], trap[name]), color="black", lw=2, label=label)
    axes.axhline(1.0, color="black", ls="--", lw=1)
    axes.set(
        title=f"The trap: shared gate with the loss on {config['trap_tree']}\n"
        f"in node {trap['reached']:.2f} (even {trap['even']:.2f}, target {trap['target']:.2f})",
        xlabel="expert: 0-7 on the large node, 8-11 on the small",
        ylabel="load over even load",
        xlim=(-0.7, 11.7),
        ylim=(0.0, 1.7),
    )
    axes.legend(loc="upper right", fontsize=8.5)
    axes.grid(alpha=0.25, axis="y")


def main(data: Path, figure: Path) -> None:
    """Draw the figure of a steering.json."""
    draw(read_document(data, "tamoe.experiment.steering", "1.0"), figure)


if __name__ == "__main__":
    run_command(main)
