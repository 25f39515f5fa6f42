"""Pictures of a topology: bandwidth between ranks as a heatmap, the tree with its link rates."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tamoe.topology.completeness import what_is_missing
from tamoe.topology.errors import InputError
from tamoe.topology.graph import Topology
from tamoe.topology.link import Link
from tamoe.topology.units import counted, format_rate, format_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LABELLED_RANKS = 16  # above this the numbers in the cells no longer fit
MAX_DRAWN_DEVICES = 48  # above this the tree stops at the nodes
_KIND_COLOUR = {"switch": "#33658a", "nic": "#86bbd8", "device": "#f6ae2d"}


def save_figure(topology: Topology, path: str | os.PathLike[str]) -> None:
    """Write the heatmap and the tree side by side as PNG or SVG, by the name's ending.

    Raises
    ------
    InputError
        The ending is neither ``.png`` nor ``.svg``, or the file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() not in (".png", ".svg"):
        raise InputError(f"output is {str(path)!r}; allowed: a name ending in .png or .svg")
    figure = topology_figure(topology)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from None


def topology_figure(topology: Topology) -> Figure:
    """A matplotlib figure: heatmap of pair bandwidths and, for shared links, the tree."""
    from matplotlib.figure import Figure

    drawn = topology.num_ranks if topology.num_ranks <= MAX_DRAWN_DEVICES else topology.num_nodes
    tree_width = max(5.0, 0.8 * drawn)
    has_tree = topology.contention == "shared"
    width = 6.4 + (tree_width if has_tree else 0.0)
    figure = Figure(figsize=(width, 5.6), layout="constrained")
    if has_tree:
        ratios = [6.4, tree_width]
        heatmap_axes, tree_axes = figure.subplots(1, 2, width_ratios=ratios)
        draw_tree(tree_axes, topology)
    else:
        heatmap_axes = figure.subplots()
    draw_heatmap(heatmap_axes, topology)
    figure.suptitle(_title(topology), fontsize=11)
    return figure


def _title(topology: Topology) -> str:
    label = topology.provenance.get("label") or "given"
    ranks, nodes = counted(topology.num_ranks, "rank"), counted(topology.num_nodes, "node")
    title = f"{ranks} on {nodes} ({label})"
    if what_is_missing(topology) is None:
        return title
    return f"{title} – PARTIAL: the measurement ended early"


def draw_heatmap(axes: Axes, topology: Topology) -> None:
    """Bandwidth of one flow alone between every pair of ranks, on a logarithmic scale."""
    from matplotlib.colors import LogNorm

    num = topology.num_ranks
    rates_PP = np.array(1 / np.maximum(topology.beta_s_per_byte, 1e-30))
    np.fill_diagonal(rates_PP, np.nan)
    rates = rates_PP[np.isfinite(rates_PP)]
    low, high = (rates.min(), rates.max()) if rates.size else (1.0, 2.0)
    norm = LogNorm(low, high if high > low else 2 * low)
    image = axes.imshow(rates_PP, norm=norm, cmap="viridis")
    axes.set(xlabel="to rank", ylabel="from rank", title="bandwidth of one flow alone")
    step = max(1, num // 16)
    axes.set_xticks(range(0, num, step))
    axes.set_yticks(range(0, num, step))
    for boundary in np.cumsum([len(ranks) for ranks in topology.nodes])[:-1]:
        axes.axhline(boundary - 0.5, color="white", linewidth=1.5)
        axes.axvline(boundary - 0.5, color="white", linewidth=1.5)
    if num <= MAX_LABELLED_RANKS:
        _label_cells(axes, rates_PP, norm)
    if rates.size:
        _rate_colorbar(axes, image, low, high)


def _label_cells(axes: Axes, rates_PP: np.ndarray, norm: Any) -> None:
    size = 9 if len(rates_PP) <= 8 else 6
    for (i, j), rate in np.ndenumerate(rates_PP):
        if np.isfinite(rate):
            colour = "black" if norm(rate) > 0.6 else "white"
            number, unit = format_rate(rate).split()
            text = f"{number}\n{unit}"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=size - 2)


def _rate_colorbar(axes: Axes, image: Any, low: float, high: float) -> None:
    ticks = np.geomspace(low, high, 4) if high > 1.01 * low else np.array([low])
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, ticks=ticks)
    bar.ax.set_yticklabels([format_rate(tick) for tick in ticks])
    bar.ax.minorticks_off()


def draw_tree(axes: Axes, topology: Topology) -> None:
    """The graph as a tree, every uplink with its rate and latency."""
    position = _layout(topology)
    graph = topology.graph
    for link in topology.links:
        low, high = position.get(link.source), position.get(link.target)
        if low is None or high is None or low[1] >= high[1]:
            continue
        axes.plot([low[0], high[0]], [low[1], high[1]], color="#888888", linewidth=1.4, zorder=1)
        if link.level:
            _label_uplink(axes, link, graph.edges.get((link.target, link.source)), low, high)
    for name, (x, y) in position.items():
        kind = graph.nodes[name]["kind"]
        label = name.removeprefix("rank").replace("nic", "node ").replace("switch", "switch ")
        box = {"boxstyle": "round,pad=0.4", "facecolor": _KIND_COLOUR[kind], "edgecolor": "none"}
        colour = "white" if kind == "switch" else "black"
        axes.text(x, y, label, ha="center", va="center", color=colour, fontsize=8, bbox=box)
    xs, ys = zip(*position.values(), strict=True)
    axes.set(xlim=(min(xs) - 0.6, max(xs) + 0.6), ylim=(min(ys) - 0.3, max(ys) + 0.3))
    axes.set_axis_off()
    axes.set_title("links, with the payload rate of each uplink")


def _label_uplink(
    axes: Axes,
    link: Link,
    back: Mapping[str, Any] | None,
    low: tuple[float, float],
    high: tuple[float, float],
) -> None:
    text = format_rate(link.bandwidth_bytes_per_s)
    if back is not None:
        rates = (link.bandwidth_bytes_per_s, back["bandwidth_bytes_per_s"])
        if max(rates) > 1.1 * min(rates):
            text = f"out {format_rate(rates[0])}\nin {format_rate(rates[1])}"
    if link.latency_s:
        text += f"\n{format_time(link.latency_s)}"
    # Close to the lower end: siblings fan out there; near the switch their labels would meet.
    x, y = (a + 0.18 * (b - a) for a, b in zip(low, high, strict=True))
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"}
    axes.text(x, y, text, ha="center", va="center", fontsize=7, bbox=box)


def _layout(topology: Topology) -> dict[str, tuple[float, float]]:
    """Leaves from left to right, every other vertex above the middle of what hangs on it."""
    graph = topology.graph
    kinds = {name: data["kind"] for name, data in graph.nodes(data=True)}
    with_devices = topology.num_ranks <= MAX_DRAWN_DEVICES
    # Switches are listed from the root down; without any, the only node's NIC is the root.
    root = next(n for kind in ("switch", "nic", "device") for n in kinds if kinds[n] == kind)
    position: dict[str, tuple[float, float]] = {}
    next_x = 0.0

    def place(vertex: str, parent: str | None) -> None:
        nonlocal next_x
        below = [v for v in graph.successors(vertex) if v != parent and v not in position]
        below = [v for v in below if with_devices or kinds[v] != "device"]
        if kinds[vertex] == "device" or not below:
            position[vertex] = (next_x, 0.0 if kinds[vertex] == "device" else 1.0)
            next_x += 1.0
            return
        for child in below:
            place(child, vertex)
        if kinds[vertex] == "nic":
            next_x += 0.4
        xs = [position[child][0] for child in below]
        height = 1 + max(position[child][1] for child in below)
        position[vertex] = ((min(xs) + max(xs)) / 2, height)

    place(root, None)
    return position
