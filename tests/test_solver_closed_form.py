"""The row rule: the table and the closed forms of the paper's model, and its limits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tamoe.solver import Workload, exchange_time_s, solve
from tamoe.topology.build import from_matrices
from tamoe.topology.errors import InfeasibleError, InputError
from tamoe.topology.graph import Topology

# One token of one byte a rank, one expert a rank, top-1: times are in units of the inner β.
UNIT = Workload(tokens_per_rank=1, top_k=1, hidden_size=1, element_bytes=1)

# tree, β of the levels, even time, optimum, row rule's time, column error of the row rule
TABLE = [
    ("[2,2]", (1, 10), 2.5, 0.4545, 0.4545, 0.0),
    ("[8,8]", (1, 10), 0.625, 0.1136, 0.1136, 0.0),
    ("[8,8,8,8]", (1, 10), 0.3125, 0.0962, 0.0962, 0.0),
    ("8x8", (1, 10), 0.1562, 0.0735, 0.0735, 0.0),
    ("[8,4]", (1, 10), 0.8333, 0.2083, 0.2083, 0.071),
    ("[4,4,2]", (1, 10), 1.0, 0.3571, 0.3571, 0.112),
    ("[[2,2],[2]]", (1, 4, 10), 1.6667, 0.4167, 0.4167, 0.019),
]


def pairwise(tree: str, beta: tuple[float, ...]) -> Topology:
    rates = tuple(1 / value for value in beta)
    return Topology.from_tree(tree, bandwidth_bytes_per_s=rates, contention="pairwise")


@pytest.mark.parametrize(("tree", "beta", "even", "optimum", "rule", "error"), TABLE)
def test_table_of_the_pairwise_model(
    tree: str, beta: tuple[float, ...], even: float, optimum: float, rule: float, error: float
) -> None:
    topology = pairwise(tree, beta)
    exact, closed = solve(topology, UNIT), solve(topology, UNIT, method="closed_form")
    assert exact.even_time_s == pytest.approx(even, abs=6e-5)
    assert exact.time_s == pytest.approx(optimum, abs=6e-5)
    assert exact.lower_bound_s == pytest.approx(optimum, abs=6e-5)
    assert closed.time_s == pytest.approx(rule, abs=6e-5)
    assert closed.column_error == pytest.approx(error, abs=6e-4)
    assert exact.column_error < 1e-12
    # Where the rule is exact the even-most optimum is the rule.
    if error == 0:
        np.testing.assert_allclose(exact.target_PN, closed.target_PN, rtol=1e-5)
        assert not closed.notes
    else:
        assert "loads experts unevenly" in closed.notes[0]


def test_table_of_the_pairwise_model_merged_tree() -> None:
    # [[2,2],[2]] as [2,2,2] with the mean inter β, (8·4 + 16·10)/24 = 8: time .5, balanced.
    topology = pairwise("[[2,2],[2]]", (1, 4, 10))
    merged = topology.beta_s_per_byte.copy()
    between = topology.level_PP > 0
    merged[between] = merged[between].mean()
    assert merged[0, 2] == pytest.approx(8)
    plan = solve(
        from_matrices(np.zeros((6, 6)), merged, topology.nodes), UNIT, method="closed_form"
    )
    assert plan.column_error < 1e-12
    assert exchange_time_s(topology, UNIT, plan.target_PN) == pytest.approx(0.5)
    even_s = exchange_time_s(topology, UNIT, np.full((6, 6), 1 / 6))
    assert even_s / 0.5 == pytest.approx(3.33, abs=5e-3)


@pytest.mark.parametrize("ratio", [5, 10, 20])
@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_two_levels_speed_up_by_the_closed_form(nodes: int, ratio: float) -> None:
    # n nodes of 8, ρ = β_inter/β_intra: speed-up 1 + (ρ-1)/n, share in the node ρ/(ρ+n-1).
    topology = pairwise(f"{nodes}x8", (1, ratio))
    for method in ("exact", "closed_form"):
        plan = solve(topology, UNIT, method=method)  # type: ignore[arg-type]
        assert plan.even_time_s / plan.time_s == pytest.approx(1 + (ratio - 1) / nodes, rel=2e-6)
        inside = plan.level_shares()[:2].sum()
        assert inside == pytest.approx(ratio / (ratio + nodes - 1), rel=2e-6)


@pytest.mark.parametrize("seed", range(5))
def test_harmonic_over_arithmetic_mean_is_the_loss_at_the_target(seed: int) -> None:
    # L = N·Σ w·m·c/(kS) with m = c/(kS) = ĉ/(kS) is HM(ĉ)/AM(ĉ) <= 1; at even routing it is 1.
    rng = np.random.default_rng(seed)
    topology = Topology.from_matrices(np.zeros((5, 5)), 10 ** -rng.uniform(8, 9, size=(5, 5)))
    workload = Workload(tokens_per_rank=100, top_k=2, experts_per_rank=2)
    plan = solve(topology, workload, floor=0.05)
    for rank in range(5):
        target_N, penalty_N = plan.target_N(rank), plan.penalty_N(rank)
        share_N = target_N / target_N.sum()
        harmonic = 1 / (1 / target_N).mean()
        loss = len(target_N) * (penalty_N * share_N * share_N).sum()
        assert loss == pytest.approx(harmonic / target_N.mean()) and loss <= 1
        assert len(target_N) * (penalty_N / len(target_N) ** 2).sum() == pytest.approx(1)


def test_noise_inside_a_level_is_averaged() -> None:
    rng = np.random.default_rng(0)
    clean = pairwise("[2,2]", (1, 10)).beta_s_per_byte
    noisy = clean * (1 + 0.2 * (rng.random((4, 4)) - 0.5))
    topology = from_matrices(np.zeros((4, 4)), noisy, nodes=((0, 1), (2, 3)))
    plan = solve(topology, UNIT, method="closed_form")
    assert plan.column_error < 1e-12
    inner, outer = noisy[clean == 1].mean(), noisy[clean == 10].mean()
    assert plan.target_PN[0, 2] / plan.target_PN[0, 0] == pytest.approx(inner / outer)


def test_cap_and_floor_bound_the_rule() -> None:
    topology = pairwise("[2,2]", (1, 100))
    three = Workload(tokens_per_rank=100, top_k=3)
    plan = solve(topology, three, method="closed_form")
    assert plan.target_PN.max() == 100
    np.testing.assert_allclose(plan.target_N(0), [100, 100, 50, 50])
    assert "was capped" in plan.notes[-1]
    floored = solve(
        topology, Workload(tokens_per_rank=100, top_k=1), method="closed_form", floor=0.4
    )
    np.testing.assert_allclose(floored.target_N(0), [40, 40, 10, 10])


def test_self_sends() -> None:
    topology = pairwise("[2,2]", (1, 10))
    with pytest.raises(InputError, match="self_send is 'free' with method 'closed_form'"):
        solve(topology, UNIT, method="closed_form", self_send="free")
    fast = dataclasses.replace(topology, copy_bytes_per_s=1e6)
    with pytest.raises(InfeasibleError, match="Give floor > 0"):
        solve(fast, UNIT, method="closed_form", self_send="copy")
    like_inside = dataclasses.replace(topology, copy_bytes_per_s=1.0)
    plan = solve(like_inside, UNIT, method="closed_form", self_send="copy")
    np.testing.assert_allclose(plan.target_N(0), np.array([10, 10, 1, 1]) / 22)
