"""Plan: rows, prices and limits follow from the target; files come back whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tamoe.solver import Plan, Workload, solve
from tamoe.solver.plan_file import plan_to_document
from tamoe.topology.errors import InputError
from tamoe.topology.graph import Topology
from tamoe.topology.link import Pair
from tests.solver_cases import random_case, time_of

TREE = Topology.from_tree("[[2,2],[2]]", bandwidth_bytes_per_s=(1e10, 1e9, 4e8), latency_s=1e-6)
WORKLOAD = Workload(tokens_per_rank=1000, top_k=2, experts_per_rank=2)
ARRAYS = ("target_PN", "link_prices", "rank_price_P", "expert_price_GN")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return solve(TREE, WORKLOAD, method="entropic", kl=0.05)


def assert_same(one: Plan, other: Plan) -> None:
    for spec in dataclasses.fields(Plan):
        if spec.name in ARRAYS:
            assert np.array_equal(getattr(one, spec.name), getattr(other, spec.name)), spec.name
        elif spec.name != "topology":
            assert getattr(one, spec.name) == getattr(other, spec.name), spec.name
    assert one.topology.links == other.topology.links
    assert one.topology.nodes == other.topology.nodes


# ---- the exchange ------------------------------------------------------------------------------


def test_the_exchange_is_the_one_asked_for_or_the_faster_one(tmp_path: Path) -> None:
    topology = Topology.from_tree("2x4", bandwidth_bytes_per_s=(1e11, 1e9))
    for top_k, faster, slower in ((1, "flat", "hierarchical"), (8, "hierarchical", "flat")):
        workload = Workload(tokens_per_rank=1024, top_k=top_k, experts_per_rank=8)
        plan = solve(topology, workload, floor=0.9)
        assert plan.exchange == faster and plan.exchange_reason.startswith(f"{faster}: dispatch")
        other = solve(topology, workload, floor=0.9, exchange=slower)  # type: ignore[arg-type]
        assert np.array_equal(other.target_PN, plan.target_PN)
        other.save(tmp_path / "plan.json")
        for again in (other, Plan.load(tmp_path / "plan.json"), copy.deepcopy(other)):
            assert again.exchange == slower
            assert again.exchange_reason == f"{slower}: what the plan was solved with"


# ---- rows -------------------------------------------------------------------------------------


def test_rows_follow_from_the_target(plan: Plan) -> None:
    for rank in range(6):
        target_N, penalty_N = plan.target_N(rank), plan.penalty_N(rank)
        assert target_N.sum() == pytest.approx(2000, rel=1e-12)
        assert penalty_N.mean() == pytest.approx(1)
        assert np.ptp(penalty_N * target_N) == pytest.approx(0, abs=1e-9 * target_N.max())
        np.testing.assert_allclose(np.exp(plan.log_prior_N(rank)) * plan.even_tokens, target_N)
        soft_N = plan.penalty_N(rank, norm="softmax")
        assert soft_N.mean() == pytest.approx(1)
        np.testing.assert_allclose(np.log(soft_N / soft_N[0]), penalty_N - penalty_N[0], atol=1e-12)


def test_rows_are_copies(plan: Plan) -> None:
    plan.target_N(0)[:] = 0
    assert plan.target_N(0).sum() == pytest.approx(2000)
    with pytest.raises(ValueError, match="read-only"):
        plan.target_PN[0, 0] = 1


def test_price_is_the_sum_over_the_route(plan: Plan) -> None:
    token_bytes = 2048
    for rank in range(6):
        price_N = plan.price_N(rank)
        for expert in range(12):
            route = TREE.route(rank, expert // 2)
            expected = sum(
                plan.link_prices[index] * token_bytes / TREE.links[index].bandwidth_bytes_per_s
                for index in route
            )
            assert price_N[expert] == pytest.approx(expected)


def test_price_includes_slow_flows_and_copies() -> None:
    slow = Pair(0.0, 1e-6)
    topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e10, 1e8))
    topology = dataclasses.replace(topology, pairs={(0, 1): slow}, copy_bytes_per_s=1e7)
    workload = Workload(tokens_per_rank=100, top_k=1)
    plan = solve(topology, workload, self_send="copy")
    assert [(i, j) for i, j, _ in plan.pair_prices] == [(0, 0), (1, 1), (0, 1)]
    (_, _, price) = plan.pair_prices[2]
    assert price > 0 and plan.price_N(0)[1] == pytest.approx(price * 1e-6 * 2048)
    assert "flow rank0 -> rank1" in {limit.name for limit in plan.bottlenecks}
    assert "rank0 copies to itself" in {limit.name for limit in plan.bottlenecks}


def test_zero_targets_have_no_penalty_and_no_prior(plan: Plan) -> None:
    target_PN = plan.target_PN.copy()
    target_PN[3, 0] = 0
    zero = dataclasses.replace(plan, target_PN=target_PN)
    for call in (zero.penalty_N, zero.log_prior_N):
        with pytest.raises(InputError, match=r"of rank 3: 1 of its 12 targets are 0.*floor > 0"):
            call(3)
    assert zero.penalty_N(2).mean() == pytest.approx(1)
    assert np.isfinite(zero.divergence)


def test_unknown_ranks_and_norms_are_refused(plan: Plan) -> None:
    for call in (plan.target_N, plan.penalty_N, plan.log_prior_N, plan.price_N, plan.group_of):
        for rank in (-1, 6):
            with pytest.raises(InputError, match=f"rank is {rank}; allowed: 0 to 5"):
                call(rank)
    with pytest.raises(InputError, match="norm is 'max'; allowed: sum, softmax"):
        plan.penalty_N(0, norm="max")  # type: ignore[arg-type]


# ---- what the target does -----------------------------------------------------------------------


def test_level_shares_count_own_rank_apart(plan: Plan) -> None:
    shares, even = plan.level_shares(), plan.level_shares(even=True)
    assert shares.sum() == pytest.approx(1)
    # Six ranks: itself, one neighbour; ranks 0-3 have 2 at level 1 and 2 at level 2, 4-5 have 4.
    np.testing.assert_allclose(even, [1 / 6, 1 / 6, 8 / 36, 16 / 36])
    kept = sum(plan.target_PN[rank, 2 * rank : 2 * rank + 2].sum() for rank in range(6))
    assert shares[0] == pytest.approx(kept / 12_000)
    assert shares[:2].sum() > even[:2].sum()


def test_loads_of_links_are_sums_over_pairs(plan: Plan) -> None:
    for index in range(len(TREE.links)):
        load_bytes = sum(
            plan.target_PN[i, expert] * 2048
            for i in range(6)
            for expert in range(12)
            if index in TREE.route(i, expert // 2)
        )
        assert plan.link_loads[index] == pytest.approx(load_bytes)


@pytest.mark.parametrize("seed", range(0, 42, 2))
def test_bottlenecks_end_with_the_exchange_and_carry_the_prices(seed: int) -> None:
    case = random_case(seed)
    plan = solve(case.topology, case.workload, floor=case.floor, self_send=case.self_send)
    assert time_of(case, plan.target_PN) == pytest.approx(plan.time_s, rel=1e-12)
    if plan.time_s == 0:
        assert plan.bottlenecks == ()
        return
    assert plan.bottlenecks
    for limit in plan.bottlenecks:
        assert limit.time_s == pytest.approx(plan.time_s, rel=1.1e-5)
    # Complementary slackness: only what is tight has a price, and prices share out the time.
    assert sum(limit.price for limit in plan.bottlenecks) == pytest.approx(1, abs=1e-5)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 3, 5, 7, 11, 22])
def test_files_come_back_bit_by_bit(seed: int, tmp_path: Path) -> None:
    case = random_case(seed)
    plan = solve(case.topology, case.workload, floor=case.floor, self_send=case.self_send)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert_same(plan, loaded)
    assert loaded.bottlenecks == plan.bottlenecks
    assert np.array_equal(loaded.price_N(0), plan.price_N(0))
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_unknown_keys_are_kept(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    document = json.loads(path.read_text())
    document["comment"] = {"by": "hand"}
    path.write_text(json.dumps(document))
    loaded = Plan.load(path)
    assert loaded.extra["comment"] == {"by": "hand"}
    loaded.save(path)
    assert json.loads(path.read_text())["comment"] == {"by": "hand"}


def test_plans_pickle(plan: Plan) -> None:
    assert_same(plan, pickle.loads(pickle.dumps(plan)))
    assert_same(plan, copy.deepcopy(plan))


def broken(document: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy of a document with one value replaced; None removes it."""
    document = copy.deepcopy(document)
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split("/")]
    inner: Any = document
    for key in parents:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", "tamoe.topology", "schema is 'tamoe.topology', expected 'tamoe.plan'"),
        ("schema_version", "2.0", "schema_version is 2.0, this tamoe reads 1.x"),
        ("target_tokens", None, "missing field 'target_tokens'"),
        ("target_tokens/1", None, r"target_tokens has shape \(5, 12\); allowed: \(6, 12\)"),
        ("target_tokens/1/3", None, "target_tokens is not an array of numbers"),
        ("target_tokens/1/3", -1.0, r"target_tokens\[1\]\[3\] is -1.0; allowed: finite and >= 0"),
        ("target_tokens/1/3", float("nan"), r"target_tokens\[1\]\[3\] is nan"),
        ("target_tokens/1/3", "many", "target_tokens is not an array of numbers"),
        ("target_tokens/1/3", 9e9, r"target_tokens\[1\] sums to 9e\+09; allowed: .* = 2000"),
        ("time_s", float("inf"), "time_s is inf; allowed: a finite number >= 0"),
        ("time_s", "1", "time_s is '1'; allowed"),
        ("lower_bound_s", -1, "lower_bound_s is -1; allowed"),
        ("floor", 1.5, "floor is 1.5; allowed: 0 to 1"),
        ("kl", float("nan"), "kl is nan; allowed"),
        ("link_prices/0", -0.5, r"link_prices\[0\] is -0.5; allowed"),
        ("link_prices", [], r"link_prices has shape \(0,\)"),
        ("pair_prices", {}, "pair_prices is {}; allowed: a list"),
        ("pair_prices", [{"source_rank": 9, "target_rank": 0, "price": 0}], "rank 9; allowed"),
        ("rank_prices_s_per_token", "all", "rank_prices_s_per_token is not an array"),
        ("expert_prices_s_per_token/0/0", float("nan"), r"expert_prices_s_per_token\[0\]\[0\]"),
        ("self_send", "no", "self_send is 'no'; allowed: intra, copy, free"),
        ("asked_exchange", "fast", "asked_exchange is 'fast'; allowed: auto, flat, hierarchical"),
        ("method", 3, "method is 3; allowed: a string"),
        ("notes", "none", "notes is 'none'; allowed: a list of strings"),
        ("workload", 3, "workload: expected an object, got 3"),
        ("workload/top_k", 0, "workload: top_k is 0; allowed"),
        ("workload/top_k", 99, "top_k is 99; allowed: 1 to the number of experts"),
        ("workload/hidden_size", None, "workload: missing field 'hidden_size'"),
        ("topology", None, "missing field 'topology'"),
        ("topology/links/0/bandwidth_bytes_per_s", 0, r"topology: links\[0\]"),
    ],
)
def test_broken_files_are_refused_by_field(
    plan: Plan, tmp_path: Path, path: str, value: object, message: str
) -> None:
    file = tmp_path / "plan.json"
    plan.save(file)
    file.write_text(json.dumps(broken(json.loads(file.read_text()), path, value)))
    with pytest.raises(InputError, match=message) as caught:
        Plan.load(file)
    assert str(file) in str(caught.value)


def test_files_of_older_versions_asked_for_no_exchange(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    document = broken(plan_to_document(plan), "asked_exchange", None)
    file.write_text(json.dumps(document | {"exchange": "flat", "exchange_reason": "the only one"}))
    loaded = Plan.load(file)
    assert loaded.asked_exchange == "auto" and not loaded.extra


def test_truncated_and_missing_files_are_refused(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan.save(file)
    file.write_text(file.read_text()[:1000])
    with pytest.raises(InputError, match="the file is truncated or not JSON"):
        Plan.load(file)
    with pytest.raises(InputError, match="cannot read"):
        Plan.load(tmp_path / "none.json")


def test_a_plan_shows_itself_in_a_line() -> None:
    topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(1e9, 1e8))
    plan = solve(topology, Workload(tokens_per_rank=1000, top_k=1), floor=0.1)
    assert repr(plan).startswith("Plan(exact, 4 ranks, 4 experts, floor 0.1, kl 0, time_s ")
    assert len(repr(plan)) < 120
