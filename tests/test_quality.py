"""The quality run in one process learns what the ranks of the demo learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tamoe.exchange import Exchange
from tamoe.experiments.quality import Run, lr_factor, summary
from tamoe.experiments.strategies import default_strategies
from tamoe.experiments.text import load_text
from tamoe.experiments.trainee import TrainConfig, Trainee
from tamoe.solver import Plan, Workload, solve
from tamoe.topology.graph import Topology
from tamoe.topology.ranks import run_ranks

CONFIG = TrainConfig(
    hidden_size=32, intermediate_size=32, sequences=4, sequence_length=32, experts_per_rank=2
)
TOPOLOGY = Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e9, 1e7))
STEPS = 6
KINDS = ("own", "foreign", "unsteered")
HOW: dict[str, dict[str, bool]] = {
    "own": {},
    "foreign": {"foreign": True},
    "unsteered": {"steered": False},
}


def _plan(kl: float | None) -> Plan | None:
    workload = Workload(CONFIG.tokens_per_rank, 2, 32, 4, CONFIG.experts_per_rank)
    return None if kl is None else solve(TOPOLOGY, workload, method="entropic", kl=kl)


def on_ranks(rank: int) -> dict[str, Any]:
    """Train every strategy a little; its losses, and whether a gate came back after averaging."""
    found: dict[str, Any] = {}
    for strategy in default_strategies():
        exchange = Exchange(TOPOLOGY)
        trainee = Trainee(strategy, CONFIG, load_text(), exchange, _plan(strategy.kl))
        for _ in range(STEPS):
            trainee.train_step()
        before = [gate.weight.clone() for gate in trainee.gates]
        losses = {kind: trainee.validate([0], **HOW[kind]) for kind in KINDS}
        pairs = zip(before, trainee.gates, strict=True)
        found[strategy.name] = losses, all(torch.equal(a, gate.weight) for a, gate in pairs)
    return found


@pytest.fixture(scope="module")
def of_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, on_ranks, timeout_s=200)


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", default_strategies(), ids=lambda strategy: strategy.kind)
def test_one_process_reaches_the_losses_of_the_ranks(strategy, of_ranks) -> None:
    run = Run(strategy, CONFIG, load_text(), _plan(strategy.kl), TOPOLOGY.nodes)
    for step in range(STEPS):
        run.train_step(step, min(1.0, (step + 1) / CONFIG.warmup_steps))
    losses, _ = of_ranks[0][strategy.name]
    for kind in KINDS:
        expected = pytest.approx(run.validate([0], **HOW[kind]), rel=2e-5)
        assert losses[kind] == expected, kind


@pytest.mark.ranks
def test_the_three_losses_are_three_things(of_ranks) -> None:
    for strategy in default_strategies():
        losses, _ = of_ranks[0][strategy.name]
        assert (len(set(losses.values())) == 3) == (strategy.kl is not None), strategy.name


@pytest.mark.ranks
def test_losses_without_steering_give_every_rank_its_gate_back(of_ranks) -> None:
    for answer in of_ranks:
        assert all(restored for _, restored in answer.values())


def test_the_learning_rate_warms_up_stays_and_ends_near_zero() -> None:
    factors = [lr_factor(step, 100) for step in range(100)]
    assert factors[0] == 0.05 and factors[19:50] == [1.0] * 31
    assert factors[50:] == sorted(factors[50:], reverse=True) and factors[-1] == pytest.approx(0.02)


def test_the_summary_compares_runs_of_the_same_seed_text_and_length() -> None:
    def run(name: str, seed: int, own: float, **other: Any) -> dict[str, Any]:
        losses = dict.fromkeys(("val_loss_own", "val_loss_foreign", "val_loss_no_bias"), own)
        shares = {"in_node_share": 0.8, "mean_in_node_share": 0.8}
        return {
            "name": name,
            "seed": seed,
            "steps": 10,
            "text": "whole",
            **losses,
            **shares,
            **other,
        }

    rows = summary(
        [
            run("even", 0, 2.0),
            run("even", 1, 4.0),
            run("bias", 0, 2.02),
            run("bias", 1, 4.12),
            run("bias", 2, 9.0),  # no even run of this seed
            run("bias", 0, 9.0, steps=20),
        ]
    )
    bias = next(row for row in rows if row["name"] == "bias" and row["steps"] == 10)
    assert bias["seeds"] == 2
    assert bias["val_loss_own_over_even"] == pytest.approx(0.02)
    assert bias["val_loss_own_over_even_std"] == pytest.approx(0.01 * 2**0.5)
    other = next(row for row in rows if row["steps"] == 20)
    assert other["seeds"] == 0 and other["val_loss_own_over_even"] is None
