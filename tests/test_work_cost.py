"""Work of the cost model: what each constant costs, alone and beside rows that are under way."""

import dataclasses
import itertools

import numpy as np
import pytest

from tamoe.solver import exchange_cost
from tamoe.solver.constants import Constants
from tamoe.solver.exchange_cost import predict
from tamoe.solver.exchange_rows import EXCHANGES, WAYS, Rows
from tamoe.topology import ClusterSpec, Topology


def tree(shape):
    return Topology.from_tree(shape, bandwidth_bytes_per_s=(1e9, 1e7))


def test_constants_add_up():
    topology = tree("2x1")
    rows = [Rows((0, 1), [np.array([[0.0, 1e6], [0.0, 0.0]])])]
    constants = Constants(start_s=1.0, message_s=0.25, work_s_per_byte=1e-6, at_once=1)
    # Packing, sockets and placing, of 2 ranks on one core; the message has two ends, and its rows
    # are under way meanwhile.
    predicted = predict(topology, "flat single", "dispatch", rows, constants)
    assert predicted.time_s == pytest.approx(1.0 + 0.5 + 2 * 1.0)
    own = predict(
        topology, "flat single", "dispatch", rows, dataclasses.replace(constants, at_once=None)
    )
    assert own.time_s == pytest.approx(1.0 + 0.25 + 1.0)
    cheap = dataclasses.replace(constants, message_s=0.01)
    apart = dataclasses.replace(cheap, at_once=None)
    apart_s = predict(topology, "flat single", "dispatch", rows, apart).time_s
    assert apart_s == pytest.approx(1.0 + 0.01 + 1.0)  # sockets take longer than links
    fast = dataclasses.replace(apart, work_s_per_byte=1e-7)
    fast_s = predict(topology, "flat single", "dispatch", rows, fast).time_s
    assert fast_s == pytest.approx(1.2 - 0.1 * exchange_cost.ALONG * (1 - exchange_cost.PLANNED))
    # The one core is never idle: the sender, whose rows are in the socket, arranges meanwhile.
    hidden = predict(topology, "flat single", "dispatch", rows, cheap)
    assert hidden.time_s == pytest.approx(1.0 + 2 * 0.01 + 2 * 1.0)
    tokens = dataclasses.replace(cheap, work_s_per_own_byte=1e-6)
    with_tokens = dataclasses.replace(rows[0], own_bytes_p=[4e5, 0.0])
    counted = predict(topology, "flat single", "dispatch", [with_tokens], tokens)
    assert counted.time_s == pytest.approx(hidden.time_s + 0.4)


def test_positions_and_weights_are_messages_of_a_dispatch():
    topology = tree("3x1")
    near_pp = np.zeros((3, 3))
    hop_pp = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    constants = Constants(message_s=1.0, at_once=1)
    # Two ends of each: of one row and its position; of weights for every rank that has rows.
    for targets in ([], [1], [1, 2]):
        weights_pp = np.zeros((3, 3), dtype=bool)
        weights_pp[0, [0, *targets]] = True  # those that a rank keeps are no message
        rows = Rows((0, 1, 2), [hop_pp, near_pp], [1.0, 0.0, 0.0], weights_pp)
        told = predict(topology, "hierarchical", "dispatch", [rows], constants)
        assert told.time_s == pytest.approx(2 + 2 + 2 * len(targets), rel=1e-6)
        back = predict(topology, "hierarchical", "dispatch_backward", [rows], constants)
        assert back.time_s == pytest.approx(2 + 2 * len(targets), rel=1e-6)
    rows = dataclasses.replace(rows, weights_pp=None)
    back = predict(topology, "hierarchical", "combine", [rows], constants)
    assert back.time_s == pytest.approx(2, rel=1e-6)


def test_part_of_the_work_is_done_while_rows_are_under_way():
    topology = tree("2x1")
    hop_pp = np.array([[0.0, 1e6], [1e6, 0.0]])
    rows = Rows((0, 1), [hop_pp, 1e6 * np.eye(2)], [1e6, 1e6], hop_pp > 0)
    bare, planned = Constants(), Constants(work_s_per_own_byte=1e-6)
    times = {
        way: [predict(topology, "hierarchical", way, [rows], c).time_s for c in (bare, planned)]
        for way, rows in (
            ("dispatch", rows),
            ("combine", dataclasses.replace(rows, weights_pp=None)),
        )
    }
    for links_s, time_s in times.values():
        assert time_s == pytest.approx(links_s + 1.0)
    # Of two parts, one is worked on while the other is on the link; a dispatch does half of the
    # work on tokens, and some of that on rows, before its first rows.
    for way, (links_s, _) in times.items():
        told_pp = hop_pp > 0 if way == "dispatch" else None
        parts = dataclasses.replace(rows, weights_pp=told_pp, parts=(0.5, 0.5))
        for much, (name, share) in itertools.product(
            (1.0, 1e-2),  # work takes longer than links, or less
            (
                ("work_s_per_own_byte", exchange_cost.PLANNED_FIRST),
                ("work_s_per_byte", exchange_cost.PLANNED),  # each row is counted at both ends
            ),
        ):
            given = Constants(**{name: much * (1e-6 if "own" in name else 5e-7)})
            found = predict(topology, "hierarchical", way, [parts], given)
            alone = share if way == "dispatch" else 0.0
            each_s = (1 - alone) * much / 2  # of a part, beside the other's rows
            expected = alone * much + links_s / 2 + max(each_s, links_s / 2) + each_s
            assert found.time_s == pytest.approx(expected, rel=1e-3)


def test_ranks_of_a_node_wait_for_the_last_that_is_relayed_there():
    topology = tree("2x2")
    hop_pp, inside_pp = np.zeros((2, 4, 4))
    hop_pp[0, 2] = 1e6  # 0.1 s of the link between nodes
    inside_pp[3, 3] = 1e6  # counted at both ends; in two slices
    constants = Constants(work_s_per_byte=1e-7)
    planned_s = exchange_cost.PLANNED * 0.2
    for relayed, waits_s in ((0.0, planned_s), (1.0, 0.1)):
        inside_pp[2, 3] = relayed
        rows = Rows((0, 1, 2, 3), [hop_pp, inside_pp])
        predicted = predict(topology, "hierarchical", "dispatch", [rows], constants)
        alone_s = exchange_cost.INSIDE_ALONE / 2 * (0.2 - planned_s)
        expected_s = max(waits_s, planned_s + alone_s) + 0.2 - planned_s - alone_s
        assert predicted.time_s == pytest.approx(expected_s, rel=1e-3)


def test_rows_that_a_rank_keeps_cost_as_much_as_those_it_sends_and_gets():
    topology = tree("2x2")
    for exchange, way in itertools.product(EXCHANGES, WAYS):
        times = []
        for kept in (0.0, 1.0):
            hop_pp = np.diag([kept * 1e6] * 4) + (1 - kept) * 1e6 * np.eye(4)[[1, 0, 3, 2]]
            hops_pp = [hop_pp] if exchange.startswith("flat") else [np.zeros((4, 4)), hop_pp]
            rows = Rows((0, 1, 2, 3), hops_pp)
            given = Constants(work_s_per_byte=1e-5)
            times.append(predict(topology, exchange, way, [rows], given).time_s)
        assert times == pytest.approx([20.0, 20.0], rel=1e-3)


@pytest.mark.parametrize(("exchange", "way"), list(itertools.product(EXCHANGES[:2], WAYS)))
def test_buckets_refill_while_slices_are_packed(exchange, way):
    topology = ClusterSpec.parse("2x1:80mbit").topology()
    link = topology.links[topology.route(0, 1)[1]]
    whole = Rows((0, 1), [np.array([[0.0, 8e6], [0.0, 0.0]])])
    time_s = {}
    for slices in (1, 2, 4):
        rows = dataclasses.replace(whole, parts=(1 / slices,) * slices)
        # Packing a slice takes 20 ms or more, in which a bucket gets a burst's bytes again.
        for work_s_per_byte in (0.0, 8e-8):
            given = Constants(work_s_per_byte=work_s_per_byte)
            time_s[slices, work_s_per_byte] = predict(topology, exchange, way, [rows], given).time_s
    burst_s = link.burst_bytes / link.bandwidth_bytes_per_s
    assert time_s[1, 0.0] == pytest.approx(8e6 / link.bandwidth_bytes_per_s - burst_s, rel=1e-3)
    for slices in (1, 2, 4):
        assert time_s[slices, 0.0] == pytest.approx(time_s[1, 0.0], rel=1e-3)
        along = exchange_cost.ALONG * (1 - exchange_cost.PLANNED * (way == "dispatch"))
        expected_s = time_s[1, 0.0] + (1 - along) * 0.64 - (slices - 1) * burst_s
        assert time_s[slices, 8e-8] == pytest.approx(expected_s, rel=1e-3)
