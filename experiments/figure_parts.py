"""What the demo's figures have in common: size, title, colours, axes.

Every figure says in its title that the cluster is emulated. Colours are those of Okabe and Ito,
told apart by colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Setting = Mapping[str, Any]
WIDTH = 11.0  # inches, of every figure, so that all letters on the page have one size
GREY = "#5f6368"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def new_figure(setting: Setting, width: float, height: float, title: str) -> Figure:
    """An empty figure of so many inches, titled with the setting's cluster."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{title} ({setting['cluster']}, emulated)", fontsize=12)
    return figure


def plain(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """Two spines and a light grid across one of the axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e4e6e8", linewidth=0.8)
    axes.set_axisbelow(True)


def strategy_colour(number: int) -> str:
    """Of a strategy, by its place among them."""
    return _COLOURS[number % len(_COLOURS)]


def wrap(name: str) -> str:
    """A strategy's name on two lines.

    >>> wrap("bias kl=0.3")
    'bias\\nkl=0.3'
    """
    return name.replace(" ", "\n", 1)
