"""The simulation of flows on shared links against closed forms."""

import dataclasses
import itertools

import numpy as np
import pytest

from tamoe.solver import flows
from tamoe.solver.flows import SOCKET_BYTES, Step, fair_rates, run_steps, run_steps_together
from tamoe.topology import ClusterSpec, Topology


def tree(shape):
    return Topology.from_tree(shape, bandwidth_bytes_per_s=(1e9, 1e7))


def test_an_idle_bucket_gives_its_burst_once():
    topology = ClusterSpec.parse("2x1:200mbit").topology()
    rate = topology.uplink_bytes_per_s(0)[0]
    step = Step(((0, 1, 1e6),))
    once, twice = (run_steps(topology, [[step] * n, [step] * n]).time_s for n in (1, 2))
    assert once == pytest.approx((1e6 - 131072) / rate, rel=1e-6)
    assert twice == pytest.approx((2e6 - 131072) / rate, rel=1e-6)
    together = run_steps_together(topology, [[step] * 2] * 2).time_s
    assert together == pytest.approx(twice, rel=1e-6)


def test_a_bucket_fills_again_while_its_link_rests():
    topology = ClusterSpec.parse("2x1:200mbit").topology()
    rate = topology.uplink_bytes_per_s(0)[0]
    steps = [Step(((0, 1, 1e6),)), Step(work_s=1.0), Step(((0, 1, 1e6),))]
    assert run_steps(topology, [steps, steps]).time_s == pytest.approx(
        1.0 + 2 * (1e6 - 131072) / rate
    )


def test_flows_that_two_of_the_busiest_links_mix_are_slower():
    def time_s(shape, flows):
        topology = tree(shape)
        return run_steps(topology, [[Step(flows)]] * topology.num_ranks, crossing_share=0.8).time_s

    def all_to_all(num_ranks, size):
        return tuple((i, j, size) for i, j in itertools.permutations(range(num_ranks), 2))

    for size in (1e4, 1e6):
        head = min(flows.CROSSING_BYTES, size)  # what loses some of its rate
        expected = 2 * (head / 0.8 + size - head) / 1e7
        assert time_s("3x1", all_to_all(3, size)) == pytest.approx(expected)
        # On two nodes a link up and the one down carry the same flows.
        assert time_s("2x1", all_to_all(2, size)) == pytest.approx(size / 1e7)
    assert time_s("3x1", ((0, 1, 1e6), (0, 2, 1e6))) == pytest.approx(0.2)  # one busy link
    uneven = ((0, 1, 1e6), (0, 2, 1e6), (1, 2, 1e4))
    assert time_s("3x1", uneven) == pytest.approx(0.2, rel=0.01)


def test_a_burst_is_held_up_by_nothing():
    topology = ClusterSpec.parse("3x1:100mbit").topology()
    size, burst = 2e6, max(link.burst_bytes for link in topology.links)
    ends = tuple((i, j, size) for i, j in itertools.permutations(range(3), 2))
    rate = topology.uplink_bytes_per_s(0)[0]
    found = run_steps(topology, [[Step(ends)]] * 3, crossing_share=0.5).time_s
    slower = 1 + flows.CROSSING_BYTES / size
    alone = 2 * burst  # what is left of the second flow when the first, which began alone, ends
    expected_s = ((2 * size - burst - alone) * slower + alone) / rate
    assert found == pytest.approx(expected_s, rel=1e-3)


@pytest.mark.parametrize("in_steps", [False, True])
def test_the_node_written_to_first_takes_the_burst_of_an_idle_link(in_steps):
    def time_s(slow):
        topology = ClusterSpec.parse(f"4x1:100mbit;node{slow}=25mbit").topology()
        flows_of = [(0, to, 1e6) for to in (1, 2, 3)]
        steps = [Step((flow,)) for flow in flows_of] if in_steps else [Step(tuple(flows_of))]
        return run_steps(topology, [steps] * 4).time_s, topology

    (first_s, topology), (second_s, _) = time_s(slow=1), time_s(slow=2)
    uplink = topology.links[topology.route(0, 2)[1]]
    slow_rate = topology.links[topology.route(0, 1)[-2]].bandwidth_bytes_per_s
    assert first_s == pytest.approx((1e6 - uplink.burst_bytes) / slow_rate, rel=1e-3)
    # One burst is gone at once, and as much again waits at the link before rows for other nodes.
    waits_s = uplink.burst_bytes / uplink.bandwidth_bytes_per_s
    assert second_s - first_s == pytest.approx(waits_s, rel=0.05)


def test_flows_of_later_steps_and_of_later_ranks_take_less_of_a_link():
    topology = tree("2x2")  # both flows leave the first node, 1e7 bytes/s
    first, second = (0, 2, 1e6), (1, 3, 1e6)
    after = Step(work_s=1.0)  # of the rank that gets the first flow
    together = [[Step((first,))], [Step((second,))], [Step((first,)), after], [Step((second,))]]
    later = [together[0], [Step(), *together[1]], together[2], [Step(), *together[3]]]
    for behind in (1.0, 0.5):
        for steps, less in ((together, behind), (later, behind * flows.LATER)):
            found = run_steps(topology, steps, behind=behind)
            assert found.time_s == pytest.approx(0.1 * (1 + less) + 1.0)


def test_steps_count_on_their_own_links_alone():
    topology = tree("4x2")
    first, second, elsewhere = (0, 2, 1e6), (1, 3, 1e6), (4, 6, 1e6)
    steps = [[] for _ in range(8)]
    steps[0], steps[2] = [Step((first,))], [Step((first,)), Step(work_s=1.0)]
    steps[1] = steps[3] = [Step(), Step(), Step((second,))]
    for between in ([], [Step(), Step((elsewhere,))]):  # a step that none of their links sees
        steps[4] = steps[6] = between
        found = run_steps(topology, steps)
        assert found.time_s == pytest.approx(0.1 * (1 + flows.LATER) + 1.0)


def test_steps_without_flows_hold_up_nothing():
    topology = ClusterSpec.parse("3x1:80mbit;node2=8mbit").topology()
    first, second = Step(((0, 1, 9e5),)), Step(((0, 2, 9e5),))
    near, far = (
        run_steps(topology, [[first, *[Step()] * gap, second], [first], [Step()] * (gap + 2)])
        for gap in (0, 4)
    )
    # The second flow has a slow link to itself, and a share of the first one's that it can fill.
    assert near.time_s == pytest.approx(far.time_s)


def test_a_small_flow_ends_before_the_large_one_beside_it():
    topology = tree("2x2")
    small, large = 1e4, 1e6
    step = Step(((0, 2, small), (0, 3, large)))
    steps = [[step], [], [step, Step(work_s=1.0)], [step]]
    weights = [size + flows.HEAD_BYTES for size in (small, large)]
    small_s = small / 1e7 * sum(weights) / weights[0]
    assert run_steps(topology, steps).time_s == pytest.approx(small_s + 1.0)
    assert small_s < 0.5 * (small + large) / 1e7


def test_work_beside_flows_hides_behind_the_longer_of_both():
    topology = tree("2x1")
    for work_s, expected in ((0.05, 0.1), (0.3, 0.3)):
        steps = [Step(((0, 1, 1e6),), work_s)]
        assert run_steps(topology, [steps, steps]).time_s == pytest.approx(expected)
        assert run_steps_together(topology, [steps, steps]).time_s == pytest.approx(expected)


def test_ranks_that_work_at_the_same_time_share_the_cores():
    topology = tree("4x1")
    steps = [[Step(work_s=work_s)] for work_s in (1.0, 2.0, 3.0, 0.0)]
    assert run_steps(topology, steps).time_s == pytest.approx(3.0)
    # Two cores: two thirds of one for each of three ranks until 1.5 s, a whole one after it.
    assert run_steps(topology, steps, at_once=2).time_s == pytest.approx(3.5)
    assert run_steps(topology, steps, at_once=1).time_s == pytest.approx(6.0)
    for at_once, expected in ((None, 3.0), (2, 3.0), (1, 6.0)):
        together = run_steps_together(topology, steps, at_once=at_once)
        assert together.time_s == pytest.approx(expected)
    # A rank whose own work is done gets its rows, at the links' rate, while others work.
    flow = Step(((0, 1, 1e6),))
    steps = [[flow], [flow], [Step(work_s=1.0)], [Step(work_s=1.0)]]
    assert run_steps(topology, steps, at_once=1).time_s == pytest.approx(2.0)


@pytest.mark.parametrize(("ahead", "flows_one_by_one"), [(0, 2), (1, 1)])
def test_rows_of_rounds_come_early_and_are_waited_for_late(ahead, flows_one_by_one):
    topology = tree("3x1")
    size, working = 2 * SOCKET_BYTES, Step(work_s=10.0)
    expected = pytest.approx(10.0 + flows_one_by_one * size / 1e7, rel=1e-3)
    # Rank 0 works before it sends to rank 1, which gets rows of rank 2 in its next step, ...
    slow, early = Step(((0, 1, size),)), Step(((2, 1, size),), early=ahead)
    steps = [[working, slow], [Step(), slow, early], [Step(), Step(), early]]
    assert run_steps(topology, steps).time_s == expected
    # ... or sends its own to rank 2 there.
    late, back = Step(((0, 1, size),), late=ahead), Step(((1, 2, size),))
    steps = [[working, late], [Step(), late, back], [Step(), Step(), back]]
    assert run_steps(topology, steps).time_s == expected


def test_what_moves_inside_a_node_is_neither_early_nor_late():
    topology = tree("2x2")
    working, near = Step(work_s=1.0), Step(((0, 1, 1e9),), early=1, late=1)  # 1 s
    steps = [[Step(), near, Step()], [working, near, working], [], []]
    assert run_steps(topology, steps).time_s == pytest.approx(3.0, rel=1e-2)


def test_rows_that_come_after_the_last_step_are_waited_for():
    topology = tree("2x1")
    late = Step(((0, 1, 1e6),), late=2)
    assert run_steps(topology, [[late], [late]]).time_s == pytest.approx(0.1)
    assert run_steps_together(topology, [[late], [late]]).time_s == pytest.approx(0.1)
    large = Step(((0, 1, 3 * SOCKET_BYTES),))  # to a rank that has no steps, so nobody waits there
    assert run_steps(topology, [[large], []]).time_s == pytest.approx(2 * SOCKET_BYTES / 1e7)


def test_rounds_ahead_are_one_step_where_steps_begin_together():
    topology = tree("4x1")
    late = (2, 1, 0)
    rounds = [Step(((0, n, n * 1e6), (n, 0, (4 - n) * 1e6)), late=late[n - 1]) for n in (1, 2, 3)]
    waiting = [dataclasses.replace(step, late=0) for step in rounds]
    ahead_s = run_steps_together(topology, [rounds] * 4).time_s
    assert ahead_s == pytest.approx(0.6) == run_steps(topology, [rounds] * 4).time_s
    assert run_steps_together(topology, [waiting] * 4).time_s == pytest.approx(0.3 + 0.2 + 0.3)


def test_each_message_of_a_flow_has_a_beginning():
    topology, size = tree("3x1"), 1e6
    ends = tuple((i, j, size) for i, j in itertools.permutations(range(3), 2))
    for messages in (1, 4):
        steps = [[Step(ends, messages=messages)]] * 3
        slow = messages * flows.CROSSING_BYTES
        expected = 2 * (slow / 0.5 + size - slow) / 1e7
        assert run_steps(topology, steps, crossing_share=0.5).time_s == pytest.approx(expected)


@pytest.mark.parametrize("sockets", [0.5, 4])
def test_a_sender_goes_on_once_the_rest_is_in_the_socket(sockets):
    topology = ClusterSpec.parse("3x1:4gbit;node1=8mbit").topology()
    slow = topology.links[topology.route(0, 1)[-2]]
    size = sockets * SOCKET_BYTES
    left = max(size - SOCKET_BYTES - slow.burst_bytes, 0)
    to_slow, to_fast = Step(((0, 1, size),)), Step(((0, 2, size),))
    line = run_steps(topology, [[to_slow, to_fast], [to_slow], [Step(), to_fast, Step(work_s=10)]])
    # Rank 2 works for 10 s once it has its rows.
    assert line.time_s == pytest.approx(10 + left / slow.bandwidth_bytes_per_s, abs=0.05)


def test_fair_rates_leave_no_flow_that_could_have_more():
    generator = np.random.default_rng(0)
    for _ in range(50):
        incidence_FL = (generator.random((6, 4)) < 0.5) * 1.0
        incidence_FL[~incidence_FL.any(1), 0] = 1.0
        capacity_L, weight_F = generator.random(4) + 0.1, generator.random(6) + 0.1
        rate_F = fair_rates(incidence_FL, capacity_L, weight_F)
        load_L = rate_F @ incidence_FL
        assert (load_L <= capacity_L * (1 + 1e-9)).all()
        for flow, rate in enumerate(rate_F):  # on some full link no flow has more for its weight
            full = (incidence_FL[flow] > 0) & (load_L >= capacity_L * (1 - 1e-9))
            most = [
                (rate_F / weight_F)[incidence_FL[:, link] > 0].max()
                for link in np.flatnonzero(full)
            ]
            assert any(rate / weight_F[flow] >= value * (1 - 1e-9) for value in most)
