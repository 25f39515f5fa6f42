"""The entropic target: certified, equal to Clarabel's, of its form, with the right limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tamoe.solver import Plan, Workload, solve
from tamoe.solver.entropic import objective, objective_bound
from tamoe.solver.exact import least_time
from tamoe.solver.problem import make_problem
from tamoe.topology.graph import Topology
from tests.solver_cases import Case, oracle, random_case


def entropic(case: Case, kl: float) -> Plan:
    return solve(
        case.topology,
        case.workload,
        method="entropic",
        kl=kl,
        floor=case.floor,
        self_send=case.self_send,
    )


@pytest.mark.parametrize("seed", range(300, 384))
def test_certified_and_equal_to_an_independent_solver(seed: int) -> None:
    case = random_case(seed)
    kl = float(10 ** np.random.default_rng(seed).uniform(-2, 1))
    plan = entropic(case, kl)
    assert abs(plan.objective_gap) <= 1e-8
    assert plan.column_error < 1e-12
    assert plan.target_PN.min() > 0 and plan.target_PN.max() <= case.workload.tokens_per_rank
    if plan.even_time_s == 0:
        return
    scale_s = plan.even_time_s
    best, target_PN = oracle(case, scale_s, kl=kl, even_time_s=plan.even_time_s)
    reached = plan.time_s / plan.even_time_s + kl * plan.divergence
    assert reached == pytest.approx(best, rel=1e-6, abs=1e-7)
    # Strict convexity: an objective this close leaves room for this much in the target.
    room = math.sqrt(2e-6 * max(1, best) / kl * plan.num_ranks) * plan.even_tokens * 10
    np.testing.assert_allclose(plan.target_PN, target_PN, atol=max(room, 1e-6))


@pytest.mark.parametrize("seed", range(63))
def test_small_and_large_kl_have_their_limits(seed: int) -> None:
    case = random_case(seed)
    exact = solve(case.topology, case.workload, floor=case.floor, self_send=case.self_send)
    even_s, num_experts = exact.even_time_s, exact.num_experts
    last = math.inf
    for kl in (1e4, 10.0, 1.0, 0.1, 1e-3, 1e-6):
        plan = entropic(case, kl)
        # Comparing with the exact target and with even gives these two bounds.
        assert plan.time_s - exact.lower_bound_s <= (kl * math.log(num_experts) + 1e-7) * even_s
        assert plan.divergence <= (even_s - plan.time_s) / (kl * even_s or 1) + 1e-7
        assert plan.time_s <= last * (1 + 1e-7)
        last = plan.time_s
    assert plan.time_s == pytest.approx(exact.lower_bound_s, rel=1e-4, abs=1e-5 * even_s)
    far = entropic(case, 1e7)
    np.testing.assert_allclose(far.target_PN, far.even_tokens, rtol=1e-3)


def test_small_kl_tends_to_the_target_of_the_second_stage() -> None:
    topology = Topology.from_tree("[[2,2],[2]]", bandwidth_bytes_per_s=(1e10, 1e9, 4e8))
    workload = Workload(tokens_per_rank=1000, top_k=2)
    exact = solve(topology, workload)
    errors = []
    for kl in (1e-1, 1e-2, 1e-3, 1e-4):
        plan = solve(topology, workload, method="entropic", kl=kl)
        errors.append(abs(plan.target_PN - exact.target_PN).max() / exact.even_tokens)
    assert errors[-1] < 1e-4
    assert errors == sorted(errors, reverse=True) or errors[0] < 1e-4


@pytest.mark.parametrize("seed", [0, 1, 2, 4, 7, 8, 9, 10, 16, 17, 31, 36])
def test_target_has_the_clipped_exponential_form(seed: int) -> None:
    # ĉ = clip(even · exp((u + v - π) · PkS / (kl · T_even)), f·even, S), from the plan alone.
    case, kl = random_case(seed), 0.3
    plan = entropic(case, kl)
    workload, num = case.workload, plan.num_ranks
    if plan.divergence == 0:
        pytest.skip("nothing to choose")
    scale = num * workload.top_k * workload.tokens_per_rank / (kl * plan.even_time_s)
    for rank in range(num):
        v_N = plan.expert_price_GN[plan.group_of(rank)]
        power_N = (plan.rank_price_P[rank] + v_N - plan.price_N(rank)) * scale
        form_N = plan.even_tokens * np.exp(power_N)
        form_N = np.clip(form_N, case.floor * plan.even_tokens, workload.tokens_per_rank)
        np.testing.assert_allclose(plan.target_N(rank), form_N, rtol=1e-5, atol=1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 139), data=st.data())
def test_objective_bound_holds_for_any_prices(seed: int, data: st.DataObject) -> None:
    case = random_case(seed)
    problem = make_problem(case.topology, case.workload, case.floor, case.self_send)
    if problem.even_time_s == 0:
        return
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    kl, scale = 10 ** data.draw(st.floats(-3, 2)), 10 ** data.draw(st.floats(-3, 1))
    bound = objective_bound(
        problem,
        kl,
        rng.standard_normal(len(problem.cost.const_R)) * scale,
        rng.standard_normal(problem.shape[:2]) * scale * problem.even_time_s,
        rng.standard_normal(problem.shape[::2]) * scale * problem.even_time_s,
    )
    for x_GIJ in (problem.even_GIJ, least_time(problem).x_GIJ):
        assert bound <= objective(problem, kl, x_GIJ) * (1 + 1e-12) + 1e-12


def test_extreme_kl_is_still_certified() -> None:
    topology = Topology.from_tree("4x2", bandwidth_bytes_per_s=(1e12, 1e6))
    for kl in (1e-12, 1e-9, 1e6, 1e9):
        plan = solve(topology, Workload(tokens_per_rank=64), method="entropic", kl=kl)
        assert abs(plan.objective_gap) < 1e-6 and plan.target_PN.min() > 0
