"""What the probe makes of clusters whose truth is known, without processes: flows are computed.

Contention, slow nodes, oversubscribed switches and several rails can be had so at any size.
"""

import dataclasses
import itertools

import networkx as nx
import numpy as np
import pytest

from tamoe.topology import Topology
from tamoe.topology.assembly import build_topology
from tamoe.topology.campaign import Campaign, Site
from tamoe.topology.findings import asymmetric_pairs, slow_links, slow_nodes
from tamoe.topology.orders import Order
from tamoe.topology.survey import Survey
from tamoe.topology.switches import judged_tree
from tamoe.topology.tournament import nodes_from_times
from tests.simulated_ranks import SimulatedRanks

BURST = 131072


def cluster(tree, rates, node_rates=None, burst=BURST):
    """A tree with shaped uplinks; ``node_rates``: (node, "out" or "into") to bytes per second."""
    truth = Topology.from_tree(tree, bandwidth_bytes_per_s=rates, latency_s=1e-5)
    graph = nx.DiGraph(truth.graph)
    for source, target, data in graph.edges(data=True):
        for end, way in ((source, "out"), (target, "into")):
            node = int(end[3:]) if end.startswith("nic") and data["level"] == 1 else None
            if (node, way) in (node_rates or {}):
                data["bandwidth_bytes_per_s"] = node_rates[node, way]
        if data["level"]:
            data["burst_bytes"] = burst
    return dataclasses.replace(truth, graph=graph)


def surveyed(truth, *, budget_s=None, **runner_settings):
    runner = SimulatedRanks(truth, **runner_settings)
    site = Site(truth.node_of, (64,) * truth.num_nodes)
    campaign = Campaign(runner, Survey(truth.nodes), site, budget_s=budget_s)
    campaign.run()
    tree = judged_tree(campaign.survey)
    return campaign, tree, build_topology(campaign.survey, tree, {})


def assert_uplinks(found, truth, rel=0.03):
    for node in range(truth.num_nodes):
        expected = truth.uplink_bytes_per_s(node)
        assert found.uplink_bytes_per_s(node) == pytest.approx(expected, rel=rel), f"node {node}"


def switch_uplinks(topology):
    """Sets of ranks below each switch that has an uplink, with its two rates."""
    found = {}
    graph = topology.graph
    for link in topology.links:
        if link.level >= 2:
            low, high = (link.source, link.target)
            up = graph.nodes[low]["kind"] == "switch" and depth(graph, low) < depth(graph, high)
            below = low if up else high
            found.setdefault(ranks_below(graph, below), {})[up] = link.bandwidth_bytes_per_s
    return {ranks: (rates[True], rates[False]) for ranks, rates in found.items()}


def depth(graph, switch):
    """Longest way down from a switch: a lower switch has fewer ranks below."""
    return len(ranks_below(graph, switch))


def ranks_below(graph, switch):
    number = int(switch.removeprefix("switch"))
    # Switches are numbered in preorder: what hangs below has no way up through a smaller number.
    seen, queue = {switch}, [switch]
    while queue:
        for near in graph.successors(queue.pop()):
            upper = near.startswith("switch") and int(near.removeprefix("switch")) < number
            if near not in seen and not upper:
                seen.add(near)
                queue.append(near)
    return tuple(sorted(graph.nodes[v]["rank"] for v in seen if graph.nodes[v]["kind"] == "device"))


def test_uniform_cluster_is_flat_and_nothing_stands_out():
    truth = cluster("8x4", (1e9, 25e6))
    campaign, tree, found = surveyed(truth)
    assert (found.level_PP == truth.level_PP).all()
    assert_uplinks(found, truth)
    assert not slow_nodes(campaign.survey, tree)
    assert not slow_links(campaign.survey, tree)
    assert not asymmetric_pairs(campaign.survey)


def test_bursts_and_latencies_are_those_of_the_links():
    truth = cluster("4x2", (1e9, 25e6))
    _, _, found = surveyed(truth, noise=0.002)
    uplinks = [link for link in found.links if link.level == 1]
    assert all(link.burst_bytes == pytest.approx(BURST, rel=0.1) for link in uplinks)
    assert all(link.origin == "measured" for link in found.links)
    assert found.alpha_s[0, 2] == pytest.approx(5e-5, rel=0.05)


def test_one_slow_node_is_named_and_nothing_else():
    slow = {(2, "out"): 6e6, (2, "into"): 6e6}
    truth = cluster("4x2", (1e9, 24e6), slow)
    campaign, tree, found = surveyed(truth)
    assert {(s.node, s.direction) for s in slow_nodes(campaign.survey, tree)} == {
        (2, "out"), (2, "into"),
    }  # fmt: skip
    assert not slow_links(campaign.survey, tree)
    assert (found.level_PP == truth.level_PP).all()
    assert_uplinks(found, truth)


def test_two_nodes_against_two_leave_open_who_is_slow():
    slow = {(node, way): 6e6 for node in (2, 3) for way in ("out", "into")}
    truth = cluster("4x2", (1e9, 24e6), slow)
    campaign, tree, found = surveyed(truth)
    assert not slow_nodes(campaign.survey, tree)
    assert_uplinks(found, truth)


def test_one_way_slow_node_is_slow_in_that_direction_and_asymmetric():
    truth = cluster("5x2", (1e9, 24e6), {(1, "into"): 6e6})
    campaign, tree, found = surveyed(truth)
    assert [(s.node, s.direction) for s in slow_nodes(campaign.survey, tree)] == [(1, "into")]
    assert {truth.node_of[j] for _, j in asymmetric_pairs(campaign.survey)} == {1}
    assert_uplinks(found, truth)


def test_one_bad_pair_is_a_slow_link_and_no_level():
    truth = cluster("6x1", (1e9, 24e6))
    campaign, tree, found = surveyed(truth, slow_pairs={(1, 4): 0.4})
    (slow,) = slow_links(campaign.survey, tree)
    assert (slow.source_rank, slow.target_rank) == (1, 4)
    assert slow.bandwidth_bytes_per_s == pytest.approx(0.4 * slow.expected_bytes_per_s, rel=0.05)
    assert not slow_nodes(campaign.survey, tree)
    assert (found.level_PP == truth.level_PP).all()
    assert_uplinks(found, truth)
    assert (1, 4) in campaign.retested


def test_glitches_are_measured_again_before_anything_is_called_slow():
    truth = cluster("6x2", (1e9, 24e6))
    runner = SimulatedRanks(truth)
    campaign = Campaign(runner, Survey(truth.nodes), Site(truth.node_of, (64,) * 6))
    campaign.inside_nodes()
    runner.glitches = 3
    campaign.between_nodes()
    campaign.retest()
    assert campaign.retested
    assert not slow_links(campaign.survey, judged_tree(campaign.survey))


TREES = [
    ("[[2,2],[2,2]]", (1e9, 48e6, 12e6)),  # one flow already sees the switch
    ("[[2,2],[2,2]]", (1e9, 12e6, 12e6)),  # only many flows do
    ("[[2,2,2,2],[2,2,2,2]]", (1e9, 12e6, 18e6)),
    ("[[1,1],[1,1],[1,1]]", (1e9, 48e6, 12e6)),
    ("[[[2,2],[2,2]],[[2,2],[2,2]]]", (1e9, 96e6, 40e6, 15e6)),
    ("[[4,4,4],[4,4],[4,4,4,4]]", (1e9, 48e6, 20e6)),
]


@pytest.mark.parametrize(("tree", "rates"), TREES)
def test_switches_and_their_uplinks_are_found(tree, rates):
    truth = cluster(tree, rates)
    _, _, found = surveyed(truth)
    assert (found.level_PP == truth.level_PP).all()
    assert_uplinks(found, truth)
    expected, measured = switch_uplinks(truth), switch_uplinks(found)
    assert measured.keys() == expected.keys()
    for ranks, both in measured.items():
        assert both == pytest.approx(expected[ranks], rel=0.03), ranks


def test_two_nodes_against_one_keep_their_switch_and_the_lone_node_its_effective_uplink():
    truth = cluster("[[2,2],[2]]", (1e9, 48e6, 12e6))
    campaign, tree, found = surveyed(truth)
    assert (found.level_PP == truth.level_PP).all()
    assert found.uplink_bytes_per_s(0) == pytest.approx((48e6, 48e6), rel=0.03)
    assert found.uplink_bytes_per_s(2) == pytest.approx((12e6, 12e6), rel=0.03)
    assert switch_uplinks(found)[0, 1, 2, 3] == pytest.approx((12e6, 12e6), rel=0.03)
    assert not slow_nodes(campaign.survey, tree)


def test_switch_that_holds_nothing_back_is_left_out():
    truth = cluster("[[2,2],[2,2]]", (1e9, 24e6, 1e9))
    _, _, found = surveyed(truth)
    assert (found.level_PP <= 1).all()
    assert_uplinks(found, truth)


def test_pairs_of_a_contended_switch_carry_what_one_flow_alone_gets():
    truth = cluster("[[2,2,2,2],[2,2,2,2]]", (1e9, 48e6, 12e6))
    _, _, found = surveyed(truth)
    for (i, j), pair in found.pairs.items():
        assert 1 / pair.beta_s_per_byte == pytest.approx(
            min(truth.links[k].bandwidth_bytes_per_s for k in truth.route(i, j)), rel=0.05
        ), (i, j)
    assert {pair.origin for pair in found.pairs.values()} == {"measured", "interpolated"}


def test_several_rails_show_in_the_capacity_and_not_in_a_pair():
    """Four flows of 25 MB/s through an uplink of 100: one flow alone cannot fill it."""
    truth = cluster("4x4", (25e6, 100e6))
    _, _, found = surveyed(truth)
    assert_uplinks(found, truth)
    assert 1 / found.pair(0, 4).beta_s_per_byte == pytest.approx(25e6, rel=0.05)


def test_random_trees_are_recovered():
    rng = np.random.default_rng(5)
    for seed in range(12):
        leaves = rng.integers(2, 5)
        sizes = [[int(rng.integers(1, 4))] * int(rng.integers(2, 4)) for _ in range(leaves)]
        node, switch = float(rng.uniform(20e6, 60e6)), float(rng.uniform(8e6, 15e6))
        truth = cluster(sizes, (1e9, node, switch))
        _, _, found = surveyed(truth, seed=seed)
        assert (found.level_PP == truth.level_PP).all(), sizes
        assert_uplinks(found, truth)


def test_no_round_puts_two_flows_on_a_node_but_on_purpose():
    truth = cluster("[[2,2,2],[2,2]]", (1e9, 48e6, 12e6))
    campaign, _, _ = surveyed(truth)
    for order in campaign.runner.orders:
        if order.do not in ("pairs", "one_way"):
            continue
        ends = [truth.node_of[rank] for pair in order.pairs for rank in pair]
        between = [pair for pair in order.pairs if truth.node_of[pair[0]] != truth.node_of[pair[1]]]
        if between:
            assert len(ends) == len(set(ends))


def test_ranks_that_share_processors_measure_few_pairs_at_once():
    truth = cluster("8x8", (1e9, 24e6))
    runner = SimulatedRanks(truth)
    site = Site((0,) * 64, (2,))
    assert site.shares_cpu
    campaign = Campaign(runner, Survey(truth.nodes, cpu_bound=True), site)
    campaign.inside_nodes()
    assert all(len(order.pairs) == 1 for order in runner.orders)
    assert len(runner.orders) <= 40
    found = build_topology(campaign.survey, judged_tree(campaign.survey), {})
    rates = {link.bandwidth_bytes_per_s for link in found.links if link.target == "nic0"}
    assert len(rates - {found.uplink_bytes_per_s(0)[1]}) == 1  # one value for a node's devices


def test_network_as_fast_as_shared_processors_is_flat_whatever_they_seem_to_read():
    truth = cluster("[[2,2],[2,2]]", (4e9, 6e9, 3.5e9), {(1, "out"): 2e9})
    runner = SimulatedRanks(truth, noise=0.1)
    campaign = Campaign(runner, Survey(truth.nodes, cpu_bound=True), Site((0,) * 8, (2,)))
    campaign.run()
    tree = judged_tree(campaign.survey)
    assert tree.depth == 1
    assert not slow_nodes(campaign.survey, tree)
    assert not slow_links(campaign.survey, tree)
    assert not campaign.retested


class SlowRunner(SimulatedRanks):
    """Takes its time, by a clock of its own."""

    now = 0.0

    def samples(self, order):
        SlowRunner.now += 1.0 if order.do == "pairs" else 0.5
        return super().samples(order)

    def run(self, order):
        SlowRunner.now += 0.2
        return super().run(order)


@pytest.mark.parametrize("budget_s", [8.0, 20.0, 300.0])
def test_budget_is_kept_and_what_is_left_out_is_interpolated(budget_s):
    SlowRunner.now = 0.0
    truth = cluster("16x2", (1e9, 24e6))
    campaign = Campaign(
        SlowRunner(truth),
        Survey(truth.nodes),
        Site(truth.node_of, (64,) * 16),
        budget_s=budget_s,
        clock=lambda: SlowRunner.now,
    )
    campaign.run()
    assert SlowRunner.now <= max(budget_s * 1.25, 6.0)
    found = build_topology(campaign.survey, judged_tree(campaign.survey), {})
    assert found.nodes == truth.nodes
    assert_uplinks(found, truth)
    assert bool(campaign.economy) == (budget_s < 300)
    assert bool(campaign.skipped) == (budget_s < 10)
    measured = {(truth.node_of[i], truth.node_of[j]) for i, j in found.pairs}
    assert (len(measured) == 16 * 16) == (budget_s == 300)  # every two nodes both ways, and inside


def test_nothing_measured_yet_is_still_a_valid_topology():
    survey = Survey(((0, 1), (2, 3)), interface_bytes_per_s=(1.25e8, None))
    found = build_topology(survey, judged_tree(survey), {"status": "partial"})
    assert {link.origin for link in found.links} == {"static"}
    assert found.uplink_bytes_per_s(0) == (1.25e8, 1.25e8)


def test_unmeasured_nodes_take_the_usual_uplink_and_say_so():
    truth = cluster("4x1", (1e9, 24e6))
    survey = Survey(truth.nodes)
    campaign = Campaign(SimulatedRanks(truth), survey, Site(truth.node_of, (64,) * 4))
    campaign._pairs(((0, 1),))
    found = build_topology(survey, judged_tree(survey), {})
    assert found.uplink_bytes_per_s(3) == pytest.approx((24e6, 24e6), rel=0.03)
    origins = {link.source: link.origin for link in found.links if link.level == 1}
    assert origins["nic3"] == "interpolated"
    assert origins["nic0"] == "measured"


def test_progress_counts_every_phase_to_its_end():
    truth = cluster("4x2", (1e9, 24e6))
    told = []
    site = Site(truth.node_of, (64,) * 4)
    Campaign(
        SimulatedRanks(truth), Survey(truth.nodes), site, progress=lambda *args: told.append(args)
    ).run()
    for phase, steps in itertools.groupby(told, key=lambda args: args[0]):
        done = [(step[1], step[2]) for step in steps]
        assert done == [(k, done[0][1]) for k in range(done[0][1] + 1)], phase
    assert {args[0] for args in told} >= {"inside nodes", "between nodes", "load", "contention"}


def test_nodes_without_host_names_are_found_by_a_tournament():
    truth = cluster("4x4", (1e9, 24e6))
    assert nodes_from_times(SimulatedRanks(truth), Site(truth.node_of, (64,) * 4)) == truth.nodes


def test_orders_survive_their_text():
    order = Order("pairs", ((0, 3), (2, 1)), {"sweeps": 3})
    assert Order.from_text(order.to_text()) == order
    assert order.answering() == (0, 3, 2, 1)
    assert dataclasses.replace(order, do="flows").answering() == (0, 2)
