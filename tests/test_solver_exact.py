"""The exact target: feasible, certified, as fast as an independent LP says, and unique."""

from __future__ import annotations

import dataclasses

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tamoe.solver import Workload, exchange_time_s, link_times_s, solve
from tamoe.solver.certificate import lower_bound_s
from tamoe.solver.exact import _interior, _simplex, even_most, least_time
from tamoe.solver.problem import make_problem
from tamoe.topology.errors import InfeasibleError
from tamoe.topology.graph import Topology
from tests.solver_cases import Case, oracle, random_case, time_of

PAPER = Workload(tokens_per_rank=1, top_k=1, hidden_size=1, element_bytes=1)


def check_feasible(case: Case, target_PN: np.ndarray) -> None:
    """Sums over rows and columns, floor and cap, expert by expert."""
    workload, num = case.workload, case.topology.num_ranks
    tokens = workload.top_k * workload.tokens_per_rank
    num_experts = target_PN.shape[1]
    np.testing.assert_allclose(target_PN.sum(axis=1), tokens, rtol=1e-12)
    for group in workload.ep_groups or (range(num),):
        columns = target_PN[list(group)].sum(axis=0)
        np.testing.assert_allclose(columns, tokens * len(group) / num_experts, rtol=1e-12)
    assert target_PN.max() <= workload.tokens_per_rank
    assert target_PN.min() >= case.floor * tokens / num_experts * (1 - 1e-15)


@pytest.mark.parametrize("block", range(12))
def test_feasible_certified_and_as_fast_as_an_independent_lp(block: int) -> None:
    for seed in range(block * 21, block * 21 + 21):  # 252 topologies, all kinds in every block
        case = random_case(seed)
        plan = solve(case.topology, case.workload, floor=case.floor, self_send=case.self_send)
        check_feasible(case, plan.target_PN)
        assert -1e-12 <= plan.gap <= 1e-6, seed
        assert plan.time_s == pytest.approx(time_of(case, plan.target_PN), rel=1e-12, abs=1e-15)
        assert plan.lower_bound_s <= plan.even_time_s * (1 + 1e-12)
        if plan.even_time_s == 0:
            continue
        scale_s = max(plan.time_s, 1e-6 * plan.even_time_s)
        best, _ = oracle(case, scale_s)
        assert best == pytest.approx(plan.time_s / scale_s, abs=3e-6), (seed, case.kind)


@pytest.mark.parametrize("seed", range(3, 45, 3))
def test_second_stage_is_the_even_most_of_the_optima(seed: int) -> None:
    case = random_case(seed)
    plan = solve(case.topology, case.workload, floor=case.floor, self_send=case.self_send)
    if plan.time_s == 0 or plan.divergence == 0:
        pytest.skip("even is optimal")
    # The oracle gets ten times the slack: it is no good at sets a millionth thin.
    least, _ = oracle(case, plan.time_s, time_limit=1 + 1e-5)
    assert least <= plan.divergence + 1e-7
    assert plan.divergence == pytest.approx(least, rel=2e-3, abs=1e-5)


def test_target_does_not_depend_on_how_ranks_are_numbered() -> None:
    topology = Topology.from_tree("[[3,2],[1,2]]", bandwidth_bytes_per_s=(1e10, 1e9, 5e8))
    workload = Workload(tokens_per_rank=500, top_k=1)
    target_PN = solve(topology, workload).target_PN
    order = np.random.default_rng(0).permutation(8)
    renumbered = solve(topology.subset(order.tolist()), workload).target_PN
    np.testing.assert_allclose(renumbered, target_PN[np.ix_(order, order)], rtol=1e-6)
    # Ranks 3 and 4 share a node, so nothing tells them apart.
    np.testing.assert_allclose(target_PN[3, [4, 3]], target_PN[4, [3, 4]], rtol=1e-6)


def test_even_is_exactly_even_on_a_homogeneous_cluster() -> None:
    topology = Topology.from_tree(4, bandwidth_bytes_per_s=(1e9,))
    plan = solve(topology, Workload(tokens_per_rank=100, top_k=2))
    assert (plan.target_PN == 50).all()
    assert plan.notes == ("even dispatch is already the fastest: steering cannot help",)


@pytest.mark.parametrize("seed", range(40))
def test_simplex_and_interior_point_agree(seed: int) -> None:
    case = random_case(seed)
    problem = make_problem(case.topology, case.workload, case.floor, case.self_send)
    if not problem.has_choice or problem.even_time_s == 0:
        return
    scale_s = least_time(problem).time_s
    if scale_s < 1e-9 * problem.even_time_s:
        return
    one, other = _simplex(problem, scale_s), _interior(problem, scale_s)
    assert one.lower_bound_s == pytest.approx(other.lower_bound_s, rel=1e-7)
    assert one.time_s == pytest.approx(other.time_s, rel=1e-7)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 139), data=st.data())
def test_bound_holds_for_any_prices(seed: int, data: st.DataObject) -> None:
    case = random_case(seed)
    problem = make_problem(case.topology, case.workload, case.floor, case.self_send)
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    scale = 10 ** data.draw(st.floats(-3, 3))
    price_R = rng.standard_normal(len(problem.cost.const_R)) * scale
    column_price_GJ = rng.standard_normal(problem.shape[::2]) * scale * problem.even_time_s
    best = least_time(problem)
    assert lower_bound_s(problem, price_R, column_price_GJ) <= best.time_s * (1 + 1e-12) + 1e-18


def test_bound_is_tight_only_at_optimal_prices() -> None:
    topology = Topology.from_tree("[4,2]", bandwidth_bytes_per_s=(1.0, 0.1), contention="pairwise")
    problem = make_problem(topology, PAPER, 0.0, "intra")
    best = least_time(problem)
    found = lower_bound_s(problem, best.price_R, best.column_price_GJ)
    assert found == pytest.approx(best.time_s, rel=1e-12)
    same_for_all = np.ones(len(best.price_R))
    assert lower_bound_s(problem, same_for_all, best.column_price_GJ) < 0.99 * found


def test_price_is_what_bandwidth_saves() -> None:
    # Sensitivity: 1 % more bandwidth on l saves price_l · (T - A_l) · 1 %.
    def at(rate: float) -> object:
        topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e9, 1e8), latency_s=1e-5)
        graph = nx.DiGraph(topology.graph)
        graph.edges["nic0", "switch0"]["bandwidth_bytes_per_s"] = rate
        return dataclasses.replace(topology, graph=graph)

    workload = Workload(tokens_per_rank=1000, top_k=2, experts_per_rank=1)
    plan = solve(at(5e7), workload)  # type: ignore[arg-type]
    faster = solve(at(5.05e7), workload)  # type: ignore[arg-type]
    [limit] = [b for b in plan.bottlenecks if b.price > 1e-6]
    assert limit.name == "nic0 -> switch0"
    latency_s = 4e-5  # rank, node, node, rank
    saved_s = limit.price * (plan.time_s - latency_s) * (1 - 1 / 1.01)
    assert plan.lower_bound_s - faster.lower_bound_s == pytest.approx(saved_s, rel=1e-6)


def test_groups_share_links() -> None:
    # Two groups across the same two nodes: twice the load of one, so half of it is not faster.
    topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(1e10, 1e8))
    both = Workload(tokens_per_rank=1000, top_k=1, ep_groups=((0, 2), (1, 3)))
    one = Workload(tokens_per_rank=1000, top_k=1)
    alone = solve(topology.subset([0, 2]), one).even_time_s
    assert solve(topology, both).even_time_s == pytest.approx(2 * alone)
    plan = solve(topology, both)
    assert plan.target_PN.shape == (4, 2)
    assert plan.expert_rank_N(1).tolist() == [1, 3]
    assert plan.time_s == pytest.approx(solve(topology.subset([0, 2]), one).time_s, rel=1e-5)


def test_rank_without_experts_sends_and_gets_nothing() -> None:
    topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(1e10, 1e8))
    workload = Workload(tokens_per_rank=100, top_k=1, placement=(0, 2, 2))
    plan = solve(topology, workload)
    assert plan.target_PN.shape == (4, 3)
    np.testing.assert_allclose(plan.target_PN.sum(axis=0), 400 / 3)
    np.testing.assert_allclose(plan.target_N(3)[1], plan.target_N(3)[2])


def test_cap_makes_the_plan_routable() -> None:
    # k = 2 with one expert a rank: at most half of a rank's tokens can go to its own expert.
    topology = Topology.from_tree("4x1", bandwidth_bytes_per_s=(1e12, 1e6))
    plan = solve(topology, Workload(tokens_per_rank=100, top_k=2))
    assert plan.target_PN.max() <= 100
    np.testing.assert_allclose(plan.target_PN.diagonal(), 100, rtol=1e-5)


@pytest.mark.parametrize("self_send", ["free", "copy"])
def test_all_local_is_refused_with_advice(self_send: str) -> None:
    topology = Topology.from_tree("4x1", bandwidth_bytes_per_s=(1e10, 1e8))
    topology = dataclasses.replace(topology, copy_bytes_per_s=1e12)
    workload = Workload(tokens_per_rank=100, top_k=1)
    with pytest.raises(InfeasibleError, match="floor > 0, or method 'entropic' with kl > 0"):
        solve(topology, workload, self_send=self_send)
    plan = solve(topology, workload, self_send=self_send, floor=0.2)
    assert plan.level_shares()[0] == pytest.approx(1 - 3 * 0.2 / 4, rel=1e-5)
    entropic = solve(topology, workload, method="entropic", kl=0.1, self_send=self_send)
    assert 0.25 < entropic.level_shares()[0] < 1


def test_latency_bound_is_said() -> None:
    topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e12, 1e12), latency_s=1.0)
    plan = solve(topology, Workload(tokens_per_rank=1, top_k=1))
    assert plan.time_s == pytest.approx(4.0)
    assert plan.link_prices.max() < 1e-9 or plan.even_time_s > 4.0
    graph = nx.DiGraph(topology.graph)
    for _, _, data in graph.edges(data=True):
        data["burst_bytes"] = 1e6
    covered = solve(dataclasses.replace(topology, graph=graph), Workload(1, 1))
    assert covered.link_prices.tolist() == [0.0] * len(topology.links)
    assert "latency-bound, steering cannot help" in covered.notes[0]
    assert covered.bottlenecks[0].name == "latency"
    assert covered.bottlenecks[0].price == 1.0


def test_burst_is_a_credit_on_every_link() -> None:
    topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e9, 1e6))
    graph = nx.DiGraph(topology.graph)
    graph.edges["nic0", "switch0"]["burst_bytes"] = 20_000.0
    bursty = dataclasses.replace(topology, graph=graph)
    workload = Workload(tokens_per_rank=1000, top_k=1, hidden_size=50)
    times = link_times_s(bursty, workload, np.full((2, 2), 500))
    by_name = {(a.source, a.target): t for a, t in zip(bursty.links, times, strict=True)}
    # 500 tokens of 100 bytes leave each node.
    assert by_name["nic1", "switch0"] == pytest.approx(50_000 / 1e6)
    assert by_name["nic0", "switch0"] == pytest.approx((50_000 - 20_000) / 1e6)
    few = link_times_s(bursty, workload, np.full((2, 2), 1))
    assert few.min() == 0  # the credit is larger than the load, and no link ends before it begins


def test_combine_is_dispatch_of_the_reversed_traffic() -> None:
    rng = np.random.default_rng(1)
    topology = Topology.from_matrices(np.zeros((3, 3)), 10 ** -rng.uniform(6, 9, size=(3, 3)))
    workload = Workload(tokens_per_rank=100, top_k=1)
    counts_PN = rng.random((3, 3))
    back = exchange_time_s(topology, workload, counts_PN, direction="combine")
    assert back == exchange_time_s(topology, workload, counts_PN.T)
    assert back != exchange_time_s(topology, workload, counts_PN)


@pytest.mark.parametrize("seed", range(10))
def test_sums_are_restored_within_the_bounds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    topology = Topology.from_tree(6, bandwidth_bytes_per_s=(1e9,))
    workload = Workload(tokens_per_rank=100, top_k=2, placement=(0, 0, 1, 2, 4, 4, 5))
    problem = make_problem(topology, workload, 0.1, "intra")
    x_GIJ = even_most(problem, problem.even_time_s) * (1 + 0.3 * (rng.random((1, 6, 5)) - 0.5))
    x_GIJ[0, 0, 0] = 0.1
    restored = problem.onto_sums(problem.onto_sums(x_GIJ))
    np.testing.assert_allclose(restored.mean(axis=1), 1, rtol=1e-13)
    np.testing.assert_allclose((problem.share_J * restored).sum(axis=2), 1, rtol=1e-13)
    assert restored[0, 0, 0] == 0.1 and restored.min() >= 0.1 and restored.max() <= problem.cap


def test_even_most_refuses_nothing_it_cannot_reach() -> None:
    topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e9, 1e6))
    problem = make_problem(topology, Workload(100, 1), 0.0, "intra")
    assert (even_most(problem, problem.even_time_s) == 1).all()
