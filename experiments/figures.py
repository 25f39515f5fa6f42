"""The figures of the demo, drawn from its results document and nothing else.

Titles and colours are those of :mod:`tamoe.experiments.figure_parts`; curves differ in their line
too.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tamoe.experiments.exchanges_figure import exchanges_figure
from tamoe.experiments.figure_parts import (
    GREY,
    WIDTH,
    Setting,
    new_figure,
    plain,
    strategy_colour,
    wrap,
)
from tamoe.experiments.results import (
    all_settings,
    even_strategy,
    final_point,
    flat_exchange_s,
)
from tamoe.topology.formats import topology_from_document
from tamoe.topology.plot import draw_heatmap, draw_tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)), ":")
_SEQUENTIAL = "cividis"  # the same to colour-blind readers


def draw_all(document: dict[str, Any], folder: Path) -> list[dict[str, str]]:
    """Draw the figures of every setting and write them as SVG files.

    Parameters
    ----------
    document
        Results; a setting whose measurements are not complete gives the figures that it can.
    folder
        Where the files go.

    Returns
    -------
    list of dict
        For each figure ``setting``, ``name``, ``title``, ``caption``, ``path`` and ``data_uri``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for setting in all_settings(document):
        for name, title, caption, figure in _figures(setting):
            path = folder / f"{setting['setting'].replace(' ', '-')}-{name}.svg"
            svg = _svg(figure)
            path.write_bytes(svg)
            uri = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
            entry = {"setting": setting["setting"], "name": name, "title": title}
            drawn.append({**entry, "caption": caption, "path": str(path), "data_uri": uri})
    return drawn


def _figures(setting: Setting) -> Iterator[tuple[str, str, str, Figure]]:
    measured = [s for s in setting["strategies"] if s["tokens_per_s"]]
    if setting.get("topology"):
        yield (
            "links",
            "Measured links",
            "What the probe found: the rate of one flow alone between each pair of ranks (left), "
            "the links that they share (right). Rates inside a node are those of this machine's "
            "processors.",
            links_figure(setting),
        )
    if any(s["counts_PN"] for s in setting["strategies"]):
        yield (
            "dispatch",
            "Dispatch: wanted and reached",
            "Tokens that each rank (row) sends to each expert (column) a step, relative to "
            "even dispatch. Above: the target, even where there is no plan. Below: what the router "
            "did at the end of training, mean of the layers. White lines separate nodes.",
            dispatch_figure(setting),
        )
    if not measured or not even_strategy(setting)["tokens_per_s"]:
        return
    yield (
        "throughput",
        "Tokens per second",
        "Training throughput of all ranks together, with the exchange that auto takes. The line "
        "is the bound 1/(1 − f): the even run with its exchange removed.",
        throughput_figure(setting, measured),
    )
    if any(s.get("exchanges") for s in measured):
        yield (
            "exchanges",
            "Flat beside hierarchical",
            "One training, its steps with both exchanges in turns; the results are equal to the "
            "last bit. f is the exchange's share of the step: what it takes more than the even "
            "step with its exchange removed. “auto” stands at the one that auto takes.",
            exchanges_figure(setting, measured),
        )
    yield (
        "exchange",
        "Exchange time: predicted and measured",
        "Seconds a step in the flat exchange's dispatch and combine, forward and backward, of all "
        "layers, for the counts that were reached. Alone: exchanges one after another with "
        "nothing else running. In training: with the waits of ranks for one another, and with the "
        "burst credit that links regain while ranks compute.",
        exchange_figure(setting, measured),
    )
    curves = [s for s in measured if len(s["curve"]) > 1]
    if curves:
        yield (
            "loss",
            "Validation loss against steps and against time",
            "The same runs twice. The thin line is the even run's final loss: where a curve meets "
            "it on the right is the speed-up that contains the cost in quality.",
            loss_figure(setting, curves),
        )
    complete = [s for s in measured if s["val_loss_own"] is not None]
    if complete:
        yield (
            "quality",
            "What it costs in quality",
            "Validation loss after the same number of steps: on the rank's own held-out text, on "
            "foreign text (that of the next node's ranks), and on its own with all steering "
            "removed.",
            quality_figure(setting, complete),
        )


def links_figure(setting: Setting) -> Figure:
    """Heatmap of measured pair bandwidths and the tree of shared links."""
    topology = topology_from_document(dict(setting["topology"]), "results: topology")
    figure = new_figure(setting, WIDTH, 4.6, "measured links")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    draw_heatmap(left, topology)
    draw_tree(right, topology)
    return figure


def dispatch_figure(setting: Setting) -> Figure:
    """Target and reached dispatch of every strategy, rank × expert, on one colour scale."""
    strategies = setting["strategies"]
    width = max(WIDTH, 2.5 * len(strategies) + 1.2)
    figure = new_figure(setting, width, 5.0, "tokens from each rank to each expert")
    axes_grid = figure.subplots(2, len(strategies), squeeze=False, sharex=True, sharey=True)
    targets = [_share_of_even(s["target_PN"]) for s in strategies]
    reached = [_share_of_even(s["counts_PN"]) for s in strategies]
    shape = next(share.shape for share in reached if share is not None)
    even = np.ones(shape)  # what a balance loss alone aims at
    shares = [even if share is None else share for share in targets + reached]
    top = max(share.max() for share in shares)
    image: Any = None
    for axes, share in zip(axes_grid.flat, shares, strict=True):
        image = axes.imshow(share, vmin=0, vmax=top, cmap=_SEQUENTIAL, aspect="auto")
        _node_lines(axes, setting, share.shape[1])
    for axes, strategy in zip(axes_grid[0], strategies, strict=True):
        axes.set_title(wrap(strategy["name"]), fontsize=10)
    for axes, row in zip(axes_grid[:, 0], ("target", "reached"), strict=True):
        axes.set_ylabel(f"{row}\nfrom rank", fontsize=10)
    for axes in axes_grid[1]:
        axes.set_xlabel("to expert")
    bar = figure.colorbar(image, ax=axes_grid, fraction=0.03, pad=0.01)
    bar.set_label("tokens, relative to even")
    return figure


def throughput_figure(setting: Setting, strategies: Sequence[Mapping[str, Any]]) -> Figure:
    """Tokens per second as bars, with the bound of a free exchange."""
    figure = new_figure(setting, WIDTH, 0.5 * len(strategies) + 1.6, "training throughput")
    axes = figure.subplots()
    rates = [s["tokens_per_s"] / 1e3 for s in strategies]
    names = [s["name"] for s in strategies]
    bars = axes.barh(
        names, rates, color=[strategy_colour(i) for i in range(len(names))], height=0.62
    )
    labels = [
        f"{rate:.1f}  ({s['speedup_over_even']:.2f}×)"
        for rate, s in zip(rates, strategies, strict=True)
    ]
    axes.bar_label(bars, labels, padding=5, fontsize=10)
    limit = max(rates)
    if setting.get("speedup_bound"):
        bound = even_strategy(setting)["tokens_per_s"] / 1e3 * setting["speedup_bound"]
        limit = max(limit, bound)
        axes.axvline(bound, color=GREY, linestyle="--", linewidth=1.3)
        text = f"bound {setting['speedup_bound']:.2f}×\n(f = {setting['exchange_share']:.2f})"
        axes.text(bound, -0.75, text, color=GREY, ha="center", va="bottom", fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="thousand tokens per second (emulated)", xlim=(0, 1.22 * limit))
    axes.set_ylim(len(names) - 0.5, -0.65)
    plain(axes, grid="x")
    return figure


def exchange_figure(setting: Setting, strategies: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds a step of the flat exchange: predicted, alone, in training."""
    kinds = (
        ("predicted_alone_s", "alone: predicted (simulated)", "#f3cf8a"),
        ("exchange_alone_s", "alone: measured (emulated)", "#e69f00"),
        ("predicted_exchange_s", "in training: predicted (simulated)", "#9ecae9"),
        ("exchange_s", "in training: measured (emulated)", "#0072b2"),
    )
    figure = new_figure(setting, WIDTH, 3.8, "flat exchange, time per step")
    axes = figure.subplots()
    position = np.arange(len(strategies))
    for offset, (key, label, colour) in zip((-0.31, -0.11, 0.11, 0.31), kinds, strict=True):
        measured = [flat_exchange_s(s) if key == "exchange_s" else s[key] for s in strategies]
        values = [value or 0.0 for value in measured]
        bars = axes.bar(position + offset, values, width=0.19, color=colour, label=label)
        axes.bar_label(bars, [f"{v:.2f}" for v in values], fontsize=8, padding=2)
    axes.set_xticks(position, [wrap(s["name"]) for s in strategies])
    axes.set(ylabel="seconds a step")
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=9)
    plain(axes)
    return figure


def loss_figure(setting: Setting, strategies: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation loss against steps (left) and against training time (right)."""
    figure = new_figure(setting, WIDTH, 4.4, "validation loss")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for number, strategy in enumerate(strategies):
        losses = [point["val_loss"] for point in strategy["curve"]]
        style: dict[str, Any] = {
            "color": strategy_colour(number),
            "linestyle": _LINES[number % len(_LINES)],
        }
        style.update(linewidth=2, label=strategy["name"])
        by_step.plot([point["step"] for point in strategy["curve"]], losses, **style)
        by_time.plot([point["time_s"] for point in strategy["curve"]], losses, **style)
    end = final_point(even_strategy(setting))
    for axes, label in ((by_step, "steps"), (by_time, "seconds of training (emulated)")):
        if end is not None:
            axes.axhline(end["val_loss"], color=GREY, linewidth=0.8)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        plain(axes)
    by_step.set_ylabel("validation loss, nats a byte")
    by_time.legend(frameon=False, fontsize=9)
    return figure


def quality_figure(setting: Setting, strategies: Sequence[Mapping[str, Any]]) -> Figure:
    """The three validation losses of every strategy."""
    kinds = (
        ("val_loss_own", "own text", "o", "#0072b2"),
        ("val_loss_foreign", "foreign text", "s", "#d55e00"),
        ("val_loss_no_bias", "steering removed", "D", "#009e73"),
    )
    height = 0.5 * len(strategies) + 1.5
    figure = new_figure(setting, WIDTH, height, "validation loss at equal steps")
    axes = figure.subplots()
    for offset, (key, label, marker, colour) in zip((-0.2, 0.0, 0.2), kinds, strict=True):
        position = np.arange(len(strategies)) + offset
        values = [s[key] if s[key] is not None else np.nan for s in strategies]
        axes.scatter(values, position, marker=marker, color=colour, s=46, label=label, zorder=3)
    axes.set_yticks(range(len(strategies)), [s["name"] for s in strategies])
    axes.set_ylim(len(strategies) - 0.5, -0.5)
    axes.set_xlabel("validation loss, nats a byte (emulated; lower is better)")
    axes.grid(axis="y", visible=False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plain(axes, grid="x")
    return figure


# ---- shared pieces ----------------------------------------------------------------------------


def _svg(figure: Figure) -> bytes:
    import matplotlib as mpl

    content = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "tamoe", "font.size": 10}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def _share_of_even(counts_PN: Sequence[Sequence[float]] | None) -> np.ndarray | None:
    if counts_PN is None:
        return None
    counts = np.asarray(counts_PN, dtype=np.float64)
    return np.asarray(counts / max(counts.mean(), 1e-30))


def _node_lines(axes: Axes, setting: Setting, num_experts: int) -> None:
    num_ranks = sum(len(ranks) for ranks in setting["nodes"])
    rank = 0
    for ranks in setting["nodes"][:-1]:
        rank += len(ranks)
        axes.axhline(rank - 0.5, color="white", linewidth=1)
        axes.axvline(rank * num_experts / num_ranks - 0.5, color="white", linewidth=1)
    axes.set_yticks(range(0, num_ranks, max(1, num_ranks // 8)))
