"""Controllers and their experiment; the arithmetic of the comparison of strategies."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tamoe.bias import SignBias, TopologyBias
from tamoe.experiments import controller, steering_cost
from tamoe.experiments.compare import measures, summary
from tamoe.experiments.compare_figure import draw as draw_comparison, pareto
from tamoe.experiments.controller import Config, counts_by_step, make_plan, summarise
from tamoe.experiments.controller_figure import draw
from tamoe.experiments.strategies import Strategy, all_strategies
from tamoe.experiments.trainee import TrainConfig
from tamoe.solver import Workload, solve
from tamoe.topology import Topology
from tamoe.topology.errors import InputError

SMALL = Config(tokens=512, steps=300, spreads=(0.1, 10.0), top_ks=(1,))


@pytest.mark.parametrize(
    ("how", "spread", "top_k", "experts_per_rank"),
    [("gain", 0.1, 1, 1), ("gain", 10.0, 8, 4), ("sign", 10.0, 1, 1), ("sign", 0.1, 1, 1)],
)
def test_controllers_reach_the_target_from_even_and_keep_experts_even(
    how, spread, top_k, experts_per_rank
):
    config = dataclasses.replace(SMALL, experts_per_rank=experts_per_rank)
    plan = make_plan(config, top_k)
    found = summarise(config, plan, counts_by_step(config, how, spread, top_k))
    assert found["reached_step"] <= 200
    assert found["held"] <= 0.02
    baseline = summarise(config, plan, counts_by_step(config, "none", spread, top_k))
    assert baseline["held"] > 0.1
    assert found["load_cv"] <= 1.1 * baseline["load_cv"] + found["chance_cv"]


def test_deepseeks_step_reaches_the_target_where_logits_are_narrow():
    plan = make_plan(SMALL, 1)
    found = summarise(SMALL, plan, counts_by_step(SMALL, "sign 0.001", 0.1, 1))
    assert found["reached_step"] <= 200
    assert found["held"] <= found["worst_rank"] <= 0.04


def test_a_run_that_leaves_the_target_again_has_not_reached_it():
    plan = make_plan(SMALL, 1)
    target_PN = plan.target_PN
    even_PN = np.full_like(target_PN, target_PN.mean())
    steps = [target_PN] * 60 + [even_PN] * 60 + [target_PN] * 180
    found = summarise(SMALL, plan, np.stack(steps))
    assert found["reached_step"] > 120
    assert found["target"] == pytest.approx(0.83, abs=0.1)


def test_opposite_errors_of_ranks_do_not_cancel_in_the_worst_rank():
    plan = make_plan(SMALL, 1)
    moved_PN = plan.target_PN.copy()
    half = plan.num_experts // 2
    moved_PN[0, :half] *= 1.2  # more in its node
    moved_PN[-1, half:] *= 0.8  # less in its own
    found = summarise(SMALL, plan, np.stack([moved_PN] * 300))
    assert found["worst_rank"] > 2 * found["held"]


def entropic(kl: float = 0.5):
    # Where every pair has its own link the prices are unique.
    topology = Topology.from_tree("2x4", bandwidth_bytes_per_s=(5e10, 1e10), contention="pairwise")
    return solve(topology, Workload(512, 1, experts_per_rank=2), method="entropic", kl=kl)


def test_prices_are_the_log_prior_where_ranks_are_alike():
    plan = entropic()
    by_price, by_target = (
        TopologyBias(plan, rank=3, start=start, fixed=True).bias_N for start in ("prices", "target")
    )
    target = by_target - by_target.mean()
    torch.testing.assert_close(by_price, target, atol=2e-3, rtol=0)
    assert target.std() > 0.5


def test_prices_leave_out_what_keeps_experts_even():
    topology = Topology.from_tree("[4,2]", bandwidth_bytes_per_s=(5e10, 1e10))
    plan = solve(topology, Workload(512, 1), method="entropic", kl=0.5)
    share_PN = np.stack(
        [
            torch.softmax(TopologyBias(plan, rank=r, start="prices", fixed=True).bias_N, 0)
            for r in range(6)
        ]
    )
    load_N = share_PN.sum(0)
    assert load_N[:4].mean() > 1.05 * load_N[4:].mean()
    assert plan.target_PN.sum(0) == pytest.approx(np.full(6, 512.0), rel=1e-3)


def test_starts_and_speeds_that_are_refused():
    plan = entropic()
    with pytest.raises(InputError, match="start is 'far'; allowed: 'target', 'prices', 'even'"):
        TopologyBias(plan, rank=0, start="far")
    exact = solve(plan.topology, plan.workload, floor=0.2)
    with pytest.raises(InputError, match="kl of the plan is 0; allowed: > 0"):
        TopologyBias(exact, rank=0, start="prices")
    for options, message in (
        ({"speed": 0.0}, "speed is 0.0; allowed: finite and > 0"),
        ({"decay": -1.0}, "decay is -1.0; allowed: finite and >= 0"),
    ):
        with pytest.raises(InputError, match=message):
            SignBias(plan, rank=0, **options)


def test_a_plan_that_is_refused_changes_nothing():
    plan = entropic()
    bias = TopologyBias(plan, rank=0, start="prices")
    share_N, unit_N = bias.share_N.copy(), bias.unit_bias_N.clone()
    with pytest.raises(InputError, match="kl of the plan is 0; allowed: > 0"):
        bias.set_plan(solve(plan.topology, plan.workload, floor=0.2))
    assert np.array_equal(bias.share_N, share_N)
    assert torch.equal(bias.unit_bias_N, unit_N)


def test_a_sign_update_without_tokens_moves_nothing_and_state_goes_on():
    bias = SignBias(entropic(), rank=0, start="even")
    bias(torch.randn(64, 16))
    bias.update(torch.zeros(16))
    assert not bias.unit_bias_N.any()
    for seed in range(3):
        bias(torch.randn(64, 16, generator=torch.Generator().manual_seed(seed)))
        bias.update(torch.full((16,), 4))
    twin = SignBias(entropic(), rank=0, start="even")
    twin.load_state_dict(bias.state_dict())
    for one in (bias, twin):
        one(torch.ones(64, 16).cumsum(0))
        one.update(torch.full((16,), 4))
    assert torch.equal(bias.unit_bias_N, twin.unit_bias_N)


# ---- experiments --------------------------------------------------------------------------------


def test_the_controllers_figure_and_rows(tmp_path):
    tiny = dataclasses.replace(SMALL, tokens=64, steps=30, spreads=(0.1, 1.0))
    results = controller.run(tiny, 1, lambda *_: None)
    assert len(results["rows"]) == 2 * len(controller.HOWS)
    assert all(row["cv_allowed"] > 0 for row in results["rows"])
    draw(results, tmp_path / "controller.png")
    controller.print_rows(results["rows"])
    assert (tmp_path / "controller.png").stat().st_size > 10_000


def measured(strategy: Strategy, seed: int, away: float, **more: object) -> dict:
    layer_PN = np.array([[70.0, 30.0], [30.0, 70.0]])
    one = {"exchange_share": 0.4 + seed / 100, "step_s": 0.5 - away}
    return measures(
        {
            "name": strategy.name,
            "chosen_LPN": [layer_PN, layer_PN],
            "target_PN": [[80.0, 20.0], [20.0, 80.0]],
            "auto_exchange": "flat",
            "exchanges": {"flat": one, "hierarchical": one | {"step_s": 0.25}},
            "remote_share": 0.3,
            "dropped_share": 0.0,
            "val_loss_own": 2.0 + away,
            "val_loss_foreign": 2.1 + away,
            "val_loss_no_bias": 2.2 + away,
        }
        | more,
        strategy,
    )


def test_a_comparison_is_over_the_even_run_of_its_seed(tmp_path):
    even, bias = Strategy("even", "even"), Strategy("bias kl=0.3", "bias", 0.3)
    runs = [
        {
            "cluster": "4x2:1mbit",
            "seed": seed,
            "steps": 12,
            "compute_step_s": 0.2,
            "strategies": [
                measured(even, seed, 0.1 * seed),
                measured(bias, seed, 0.1 * seed + 0.1),
            ],
        }
        for seed in range(2)
    ]
    base, steered = summary(runs)
    assert base["val_loss_own_over_even"] == 0 and base["speedup"] == 1
    assert base["target_distance"] is None and base["load_cv"] == 0
    assert steered["target_distance"] == pytest.approx(0.1)
    assert steered["val_loss_own_over_even"] == pytest.approx((0.1 / 2.0 + 0.1 / 2.1) / 2)
    assert steered["speedup"] == pytest.approx((0.5 / 0.4 + 0.4 / 0.3) / 2)
    assert steered["step_s_std"] > 0
    assert base["speedup_bound"] == pytest.approx((0.5 / 0.2 + 0.4 / 0.2) / 2)
    # Two layers with opposite loads are both uneven, and each has a distance of its own.
    layers = {"chosen_LPN": [[[90.0, 10.0], [90.0, 10.0]], [[10.0, 90.0], [10.0, 90.0]]]}
    assert measured(bias, 0, 0.0, **layers)["load_cv"] == pytest.approx(0.8)
    assert measured(bias, 0, 0.0, **layers)["target_distance"] == pytest.approx(0.4)
    # A strategy that has no target to choose by is timed by the faster exchange.
    faster = Strategy("FasterMoE's gate", "faster", 1.0)
    assert measured(faster, 0, 0.0)["exchange"] == "hierarchical"
    assert measured(bias, 0, 0.0)["exchange"] == "flat"
    draw_comparison({"summary": [base, steered], "runs": runs}, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    assert pareto([]) == []


def test_every_strategy_has_a_name_and_a_plan_where_it_needs_one():
    strategies = all_strategies(8)
    assert len({strategy.name for strategy in strategies}) == len(strategies)
    with pytest.raises(InputError, match=r"kind 'faster'; allowed: none for 'even' and 'capacity'"):
        Strategy("x", "faster")


def test_steering_keeps_no_copy_of_the_logits():
    config = TrainConfig(sequences=1, sequence_length=32)
    found = steering_cost.alone(2, config, lambda *_: None)
    assert found["tensors_of_logits"] == 0
    assert all(seconds > 0 for seconds in found["parts_s"].values())
    kept = steering_cost.Trained(config, steering_cost.even_plan(config))
    bias = kept.gates[0].steer
    for variant, steps in (("plain", 0), ("steered", 1), ("steered, metrics", 2)):
        kept.step_s(variant)
        assert int(bias.steps) == steps
    kept.gates[0].steer.register_buffer("logits_TN", torch.zeros(32, 32))
    assert steering_cost.tensors_of_logits(kept) == 1
