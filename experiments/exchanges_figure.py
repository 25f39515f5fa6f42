"""The demo's figure of both exchanges: tokens per second and the exchange's share of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tamoe.experiments.figure_parts import WIDTH, Setting, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"flat": "#0072b2", "hierarchical": "#e69f00"}
_HEIGHT = 0.36  # of a bar; two of them for each strategy


def exchanges_figure(setting: Setting, strategies: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars for each strategy: flat above hierarchical, tokens/s on the left, f on the right.

    The right half is left out where no share is known: a run that ended early.
    """
    known = [
        timed.get("exchange_share") for s in strategies for timed in s.get("exchanges", {}).values()
    ]
    shares = bool(known) and None not in known
    height = 0.62 * len(strategies) + 1.5
    figure = new_figure(setting, WIDTH, height, "flat beside hierarchical")
    axes_row = figure.subplots(1, 1 + shares, sharey=True, squeeze=False)[0]
    _draw(axes_row[0], strategies, "tokens_per_s", 1e-3, "{:.1f}", mark_auto=True)
    axes_row[0].set_xlabel("thousand tokens per second (emulated)")
    axes_row[0].margins(x=0.2)
    axes_row[0].set_yticks(range(len(strategies)), [s["name"] for s in strategies])
    axes_row[0].set_ylim(len(strategies) - 0.5, -0.5)
    if shares:
        _draw(axes_row[1], strategies, "exchange_share", 1.0, "{:.2f}", mark_auto=False)
        axes_row[1].set(xlabel="f: the exchange's share of the step (emulated)", xlim=(0, 1))
        axes_row[1].tick_params(axis="y", length=0)
    handles, labels = axes_row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _draw(
    axes: Axes,
    strategies: Sequence[Mapping[str, Any]],
    key: str,
    scale: float,
    label: str,
    *,
    mark_auto: bool,
) -> None:
    for offset, (kind, colour) in zip((-_HEIGHT / 2, _HEIGHT / 2), _COLOURS.items(), strict=True):
        timed = [s.get("exchanges", {}).get(kind, {}).get(key) for s in strategies]
        values = [np.nan if value is None else scale * value for value in timed]
        texts = ["" if value is None else label.format(scale * value) for value in timed]
        if mark_auto:
            texts = [
                text + "  auto" * (s.get("auto_exchange") == kind)
                for text, s in zip(texts, strategies, strict=True)
            ]
        position = np.arange(len(strategies)) + offset
        bars = axes.barh(position, values, height=_HEIGHT, color=colour, label=kind)
        axes.bar_label(bars, texts, padding=4, fontsize=9)
    plain(axes, grid="x")
