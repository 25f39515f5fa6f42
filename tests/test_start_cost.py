"""When the ranks of a dispatch begin by the model: at once on cores of their own, else in turn."""

import numpy as np
import pytest

from tamoe.solver.constants import Constants
from tamoe.solver.exchange_cost import APART, predict
from tamoe.solver.exchange_rows import EXCHANGES, Rows
from tamoe.topology import Topology

TREE = Topology.from_tree("8x2", bandwidth_bytes_per_s=(1e9, 1e7))
START_S, LINK_S = 0.08, 0.2


def one_hot(exchange, way, at_once, start_s=START_S):
    """Seconds when every rank sends as much to rank 0, or gets it back, over the link of node 0."""
    bytes_pp = np.zeros((16, 16))
    bytes_pp[2:, 0] = LINK_S * 1e7 / 14
    hops = [bytes_pp] if exchange.startswith("flat") else [bytes_pp, np.zeros((16, 16))]
    rows = Rows(tuple(range(16)), hops)
    given = Constants(start_s=start_s, at_once=at_once)
    return predict(TREE, exchange, way, [rows], given).time_s


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_rows_of_the_first_ranks_are_under_way_while_others_plan(exchange):
    link_s = one_hot(exchange, "dispatch", 2, start_s=0.0)
    assert link_s == pytest.approx(LINK_S, rel=0.02)
    in_turn_s = one_hot(exchange, "dispatch", 2)
    apart_s = APART * START_S * (1 - 2 / 16)
    assert in_turn_s == pytest.approx(link_s + START_S - apart_s, rel=0.02)
    # With cores of their own all begin at once; so they do where nothing is planned.
    for way, at_once in (("dispatch", None), ("dispatch", 16), ("combine", 2)):
        together_s = one_hot(exchange, way, at_once)
        assert together_s == pytest.approx(link_s + START_S, rel=0.02)
        assert together_s > 1.05 * in_turn_s


@pytest.mark.parametrize("at_once", [1, 2, 5, 8, 12, 15, 16, None])
@pytest.mark.parametrize("num_groups", [1, 2, 16])
def test_a_dispatch_of_nothing_takes_its_start(num_groups, at_once):
    given = Constants(start_s=START_S, at_once=at_once)
    each = 16 // num_groups
    groups = [
        Rows(tuple(range(first, first + each)), [np.zeros((each, each))])
        for first in range(0, 16, each)
    ]
    time_s = predict(TREE, "flat rounds", "dispatch", groups, given).time_s
    expected_s = START_S * (1 + 1 / num_groups) / 2
    assert time_s == pytest.approx(expected_s, rel=0.05)


def test_one_group_alone_has_the_cores_to_itself():
    rows = Rows((0, 1, 2, 3), [np.zeros((4, 4))])
    for at_once in (4, 8, 12):
        given = Constants(start_s=START_S, at_once=at_once)
        time_s = predict(TREE, "flat rounds", "dispatch", [rows], given).time_s
        assert time_s == pytest.approx(START_S * (1 + 4 / 16) / 2, rel=0.01)
