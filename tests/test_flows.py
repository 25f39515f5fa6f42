"""The simulation of flows on shared links against closed forms."""

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

    def all_to_all(num_ranks):
        return tuple((i, j, 1e6) for i, j in itertools.permutations(range(num_ranks), 2))

    assert time_s("3x1", all_to_all(3)) == pytest.approx(0.2 / 0.8)
    assert time_s("2x1", all_to_all(2)) == pytest.approx(0.1)  # a link up and the one down are one
    assert time_s("3x1", ((0, 1, 1e6), (0, 2, 1e6))) == pytest.approx(0.2)  # one busy link
    uneven = ((0, 1, 1e6), (0, 2, 1e6), (1, 2, 1e4))
    assert time_s("3x1", uneven) == pytest.approx(0.2, rel=0.01)


def test_a_burst_is_held_up_by_nothing():
    topology = ClusterSpec.parse("3x1:100mbit").topology()
    size, burst = 2e6, max(link.burst_bytes for link in topology.links)
    flows = tuple((i, j, size) for i, j in itertools.permutations(range(3), 2))
    rate = topology.uplink_bytes_per_s(0)[0]
    found = run_steps(topology, [[Step(flows)]] * 3, crossing_share=0.5).time_s
    assert found == pytest.approx((2 * size - burst) / (0.5 * rate), rel=1e-3)


def test_flows_of_later_steps_and_of_later_ranks_take_less_of_a_link():
    topology = tree("2x2")  # both flows leave the first node, 1e7 bytes/s
    first, second = (0, 2, 1e6), (1, 3, 1e6)
    after = Step(work_s=1.0)  # of the rank that gets the first flow
    together = [[Step((first,))], [Step((second,))], [Step((first,)), after], [Step((second,))]]
    later = [together[0], [Step(), *together[1]], together[2], [Step(), *together[3]]]
    behind, later_behind = flows.BEHIND, flows.BEHIND * flows.LATER
    assert run_steps(topology, together).time_s == pytest.approx(0.1 * (1 + behind) + 1.0)
    assert run_steps(topology, later).time_s == pytest.approx(0.1 * (1 + later_behind) + 1.0)


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
