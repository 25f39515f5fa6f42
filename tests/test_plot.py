"""Pictures: every vertex and every rate is on them, whatever the shape."""

from __future__ import annotations

from pathlib import Path

import pytest

from tamoe.topology import InputError, Topology
from tamoe.topology.plot import save_figure, topology_figure
from tamoe.topology.units import format_bytes, format_rate, format_time


def texts(topology: Topology) -> list[list[str]]:
    figure = topology_figure(topology)
    return [[text.get_text() for text in axes.texts] for axes in figure.axes]


def test_the_tree_shows_every_vertex_and_uplink_rate() -> None:
    bandwidths = (2e9, 48e6, 12e6)
    topology = Topology.from_tree("[[2,2],[2]]", bandwidth_bytes_per_s=bandwidths)
    cells, tree = texts(topology)[:2]
    assert len(cells) == 6 * 5
    assert {"switch 0", "switch 1", "switch 2", "node 0", "node 1", "node 2"} <= set(tree)
    assert tree.count("48.0 MB/s") == 3
    assert tree.count("12.0 MB/s") == 2


@pytest.mark.parametrize("tree", [1, 4, "2x1", "8x8", "[[[2,2],[2]],[4,1]]"])
def test_any_shape_draws(tree: str | int, tmp_path: Path) -> None:
    topology = Topology.from_tree(tree, bandwidth_bytes_per_s=_rates(tree))
    save_figure(topology, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000


def _rates(tree: str | int) -> list[float]:
    from tamoe.topology.tree import parse_tree, tree_depth

    return [1e9 / 10**level for level in range(1 + tree_depth(parse_tree(tree)))]


def test_pairwise_topologies_have_only_the_heatmap() -> None:
    topology = Topology.from_matrices([[0, 0], [0, 0]], [[1, 2], [2, 1]])
    assert len(texts(topology)) == 2  # heatmap and its colour bar


def test_another_ending_is_refused(tmp_path: Path) -> None:
    topology = Topology.from_tree(2, bandwidth_bytes_per_s=[1e9])
    with pytest.raises(InputError, match=r"ending in \.png or \.svg"):
        save_figure(topology, tmp_path / "a.pdf")


def test_units_round_to_three_digits() -> None:
    assert [format_rate(x) for x in (999.6e6, 999.4e6, 5.98e6, 12.0)] == [
        "1.00 GB/s",
        "999 MB/s",
        "5.98 MB/s",
        "12.0 B/s",
    ]
    assert [format_time(x) for x in (0, 1.5e-6, 0.0444, 120)] == [
        "0 s",
        "1.50 µs",
        "44.4 ms",
        "120 s",
    ]
    assert format_bytes(4e9) == "4.00 GB"
