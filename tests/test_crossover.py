"""Where the hierarchical exchange overtakes: ranges, choices and figure, without ranks."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tamoe.experiments.crossover import (
    Grid,
    choices,
    crossovers,
    faster_ranges,
    in_words,
    row,
    simulated_rows,
)
from tamoe.experiments.crossover_figure import save_figure
from tamoe.solver.constants import Constants, with_constants
from tamoe.solver.exchange_rows import EXCHANGES, WAYS
from tamoe.topology import Topology

SIZES = [1024.0 * 4**power for power in range(4)]  # 1, 4, 16 and 64 KiB


@pytest.mark.parametrize(
    ("gains", "ends", "words"),
    [
        # A power law is a straight line between logarithms: 1 where 8 KiB are.
        ([size / 8192 for size in SIZES], [(8192, None)], "from 8 KiB"),
        ([8192 / size for size in SIZES], [(None, 8192)], "up to 8 KiB"),
        ([0.5, 2, 2, 0.5], [(2048, 32768)], "2 to 32 KiB"),
        ([2, 0.5, 0.5, 2], [(None, 2048), (32768, None)], "up to 2 KiB, from 32 KiB"),
        ([1, 2, 2, 2], [(1024, None)], "from 1 KiB"),
        ([2, 1.1, 1.1, 2], [(None, None)], "always"),
        ([0.5, 0.9, 1, 0.9], [], "never"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ranges_end_where_the_gain_is_one(gains, ends, words) -> None:
    ranges = faster_ranges(SIZES, gains)
    assert len(ranges) == len(ends)
    for found, expected in zip(ranges, ends, strict=True):
        assert found == pytest.approx(expected)
    assert in_words(ranges) == words


def test_choices_are_scored_by_what_was_measured_from_5_ms_on() -> None:
    def seconds(*values: float) -> dict[str, float]:
        return dict(zip(EXCHANGES, values, strict=True))

    simulated = [row(16, k, seconds(0.02, 0.01, 0.03)) for k in (1, 2, 4)]  # prefers rounds
    near, wrong = seconds(0.01, 0.0104, 0.02), seconds(0.03, 0.03, 0.02)
    emulated = [row(16, 1, near), row(16, 2, wrong), row(16, 4, seconds(0.004, 0.9, 0.9))]
    assert emulated[0]["gain"] == pytest.approx(0.01 / 0.02)  # the better flat one counts
    found = choices(emulated, simulated)
    assert found["worst_choice"] == pytest.approx(0.5)
    assert (found["settings"], found["near_best"], found["left_out"]) == (2, 0.5, 1)
    assert choices(emulated[2:], simulated)["near_best"] is None


def test_simulated_gain_is_the_share_of_copies_spared_and_the_figure_has_it(tmp_path: Path) -> None:
    topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(1e11, 1e7))
    bare = {key: Constants() for key in itertools.product(EXCHANGES, WAYS)}
    grid = Grid(tokens=(256, 1024), top_k=(1, 16))
    rows = simulated_rows(with_constants(topology, bare), grid)
    gains = {(row["tokens"], row["top_k"]): row["gain"] for row in rows}
    assert gains[1024, 1] == pytest.approx(1, rel=0.1)  # one expert: nothing is spared
    assert gains[1024, 16] == pytest.approx(8, rel=0.1)  # 8 experts of the other node, one copy
    assert [found["top_k"] for found in crossovers(rows)] == [1, 16]
    assert crossovers(rows)[1]["words"] == "always"
    one = {"cluster": "2x2:80mbit", "nodes": 2, "ranks": 4, "emulated": rows, "simulated": rows}
    save_figure([one, one], tmp_path / "crossover.png")
    assert (tmp_path / "crossover.png").stat().st_size > 10_000
