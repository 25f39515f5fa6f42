"""Metrics of dispatch: counted by hand, by levels, of all ranks, written and drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tamoe import MoE, SwitchGate
from tamoe.metrics import (
    dispatch_metrics,
    gather_counts,
    group_metrics,
    routing_metrics,
    save_heatmap,
    write_scalars,
)
from tamoe.solver import Workload, solve
from tamoe.topology import Topology
from tamoe.topology.errors import InputError
from tests.plan_rows import Rows, two_nodes


def plan_of(tree="[[2,2],[2]]", rates=(3e10, 1e10, 5e9), experts_per_rank=2):
    topology = Topology.from_tree(tree, bandwidth_bytes_per_s=rates)
    workload = Workload(tokens_per_rank=100, top_k=1, experts_per_rank=experts_per_rank)
    return solve(topology, workload, floor=0.25)


def test_levels_bytes_and_remote_share_counted_by_hand():
    plan = plan_of()
    # Experts 0 1 on rank 0, 2 3 in its node, 4 … 7 in the other node of the switch, 8 … 11 beyond.
    counts = torch.tensor([10, 0, 5, 5, 1, 2, 3, 4, 5, 6, 7, 2])
    numbers = dispatch_metrics(counts, plan, 0, dropped=5)
    assert numbers["choices"] == 50
    assert numbers["drop_rate"] == 0.1
    assert [numbers[f"level_{n}"] for n in ("self", 0, 1, 2)] == [0.2, 0.2, 0.2, 0.4]
    assert numbers["remote_share"] == pytest.approx(0.6)
    assert numbers["sent_bytes"] == 40 * plan.workload.token_bytes
    assert numbers["load_max_over_mean"] == pytest.approx(10 / (50 / 12))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_divergence_is_zero_at_the_target_alone(seed):
    plan = plan_of()
    at_target = dispatch_metrics(plan.target_N(2), plan, 2)
    assert at_target["target_divergence"] == pytest.approx(0, abs=1e-12)
    scaled = (dispatch_metrics(plan.target_N(2) / n, plan, 2) for n in range(1, 20))
    assert min(numbers["target_divergence"] for numbers in scaled) >= 0
    counts = np.random.default_rng(seed).integers(0, 50, 12)
    numbers = dispatch_metrics(counts, plan, 2)
    share, target = counts / max(counts.sum(), 1), plan.target_N(2) / plan.target_N(2).sum()
    expected = sum(s * np.log(s / t) for s, t in zip(share, target, strict=True) if s)
    assert numbers["target_divergence"] == pytest.approx(expected, abs=1e-12)
    assert numbers["target_divergence"] >= 0
    spread = counts.std() / max(counts.mean(), 1e-12)
    assert numbers["load_cv"] == pytest.approx(spread, abs=1e-12)
    assert dispatch_metrics(counts.tolist(), plan, 2) == numbers
    assert dispatch_metrics(torch.from_numpy(counts), plan, 2) == numbers
    levels = sum(value for key, value in numbers.items() if key.startswith("level_"))
    assert levels == pytest.approx(1.0 if counts.sum() else 0.0)


def test_a_choice_where_none_should_be_is_infinitely_far_from_the_target():
    rows = Rows(np.array([[2.0, 0.0], [0.0, 2.0]]))
    assert dispatch_metrics([3, 1], rows, 0)["target_divergence"] == np.inf
    assert dispatch_metrics([4, 0], rows, 0)["target_divergence"] == 0


def test_no_tokens_and_plans_without_nodes_give_numbers_too():
    assert dispatch_metrics(torch.zeros(8, dtype=torch.long), two_nodes(), 0) == {
        "choices": 0.0,
        "drop_rate": 0.0,
        "load_cv": 0.0,
        "load_max_over_mean": 0.0,
        "target_divergence": 0.0,
    }


def test_experts_balance_over_ranks_although_every_rank_is_uneven():
    plan = plan_of("2x2", (3e10, 1e10), 1)
    counts = np.array([[40, 40, 10, 10], [40, 40, 10, 10], [10, 10, 40, 40], [10, 10, 40, 40]])
    numbers = group_metrics(counts, plan)
    assert numbers["load_cv"] == 0.0
    assert numbers["mean_load_cv"] == pytest.approx(0.6)
    assert numbers["mean_remote_share"] == pytest.approx(0.2)
    assert gather_counts(torch.tensor([3, 4])).tolist() == [[3, 4]]


def test_scalars_are_written_one_by_one():
    written = []

    class Writer:
        def add_scalar(self, tag, scalar_value, global_step):
            written.append((tag, scalar_value, global_step))

    write_scalars(Writer(), {"a": 1.0, "b": 2.0}, 7)
    assert written == [("tamoe/a", 1.0, 7), ("tamoe/b", 2.0, 7)]


def test_a_heatmap_is_drawn(tmp_path):
    plan = plan_of("2x2", (3e10, 1e10), 1)
    save_heatmap(np.ones((4, 4)), plan, tmp_path / "map.png", title="even")
    assert (tmp_path / "map.png").stat().st_size > 5000


def test_wrong_shapes_say_what_is_allowed(tmp_path):
    plan = plan_of("2x2", (3e10, 1e10), 1)
    for bad in (
        torch.ones(3),
        torch.tensor(3),
        np.ones((1, 4)),
        [1, 2, -1, 0],
        [1, 2, np.nan, 0],
        [1, 2, np.inf, 0],
        [[1, 2], [3, 4], [5, 6], [7, 8]],
        "word",
    ):
        with pytest.raises(InputError, match=r"counts_N is .*; allowed: 4 finite numbers >= 0"):
            dispatch_metrics(bad, plan, 0)
    with pytest.raises(InputError, match=r"of shape \(1, 4\)"):
        dispatch_metrics(np.ones((1, 4)), plan, 0)
    for dropped in (-1, 5, np.nan):
        with pytest.raises(InputError, match=r"dropped is .*; allowed: 0 to 4, those counted"):
            dispatch_metrics([1, 1, 1, 1], plan, 0, dropped=dropped)
    routing = SwitchGate(8, 6)(torch.ones(5, 8))
    with pytest.raises(InputError, match=r"routing is over 6 experts; allowed: .* the plan, 4"):
        routing_metrics(routing, plan, 0)
    with pytest.raises(InputError, match=r"routing is a Tensor; allowed: a tamoe\.Routing"):
        routing_metrics(routing.expert_index_TK, plan, 0)
    routing = SwitchGate(8, 4)(torch.ones(5, 8))
    with pytest.raises(InputError, match=r"mask_T is \(4,\); allowed: \(5,\)"):
        routing_metrics(routing, plan, 0, torch.ones(4))
    with pytest.raises(InputError, match=r"counts_PN is \(2, 4\); allowed: \(4, 4\)"):
        group_metrics(np.ones((2, 4)), plan)
    with pytest.raises(InputError, match=r"counts_PN is \(2, 4\); allowed: \(4, 4\)"):
        save_heatmap(np.ones((2, 4)), plan, tmp_path / "map.png")
    with pytest.raises(InputError, match="step is -1; allowed: a whole number >= 0"):
        write_scalars(None, {}, -1)
    with pytest.raises(InputError, match=r"plan is 'plan.json'; allowed: a tamoe.solver.Plan"):
        dispatch_metrics(torch.ones(4), "plan.json", 0)


def test_what_a_layer_dropped_is_counted_and_padding_is_not():
    plan = plan_of("2x2", (3e10, 1e10), 1)
    gate = SwitchGate(8, 4, capacity=0.5, drop="position")
    layer = MoE(gate, lambda: torch.nn.Identity(), num_experts=4)
    x_TD = torch.ones(40, 8)  # all to one expert, which takes 5
    numbers = routing_metrics(layer(x_TD).routing, plan, 0)
    assert numbers["choices"] == 40 and numbers["drop_rate"] == 35 / 40
    mask_T = torch.arange(40) < 20
    routing = gate(x_TD)
    numbers = routing_metrics(routing, plan, 0, mask_T)
    assert numbers["choices"] == 20 and numbers["drop_rate"] == 15 / 20
