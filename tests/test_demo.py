"""The demo's chain: arguments, training in turns on real ranks, and what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tamoe.exchange import Exchange
from tamoe.experiments import demo
from tamoe.experiments.demo import run_demo
from tamoe.experiments.predict import (
    choose_exchanges,
    predict_exchanges,
    step_exchange_s,
    with_credit_of,
)
from tamoe.experiments.results import Document, all_settings, complete_setting, load_results
from tamoe.experiments.strategies import default_strategies
from tamoe.experiments.text import load_text
from tamoe.experiments.train import Job, _Run, train_rank
from tamoe.experiments.trainee import TrainConfig, Trainee
from tamoe.solver import Plan, Workload, solve
from tamoe.solver.choice import Choice
from tamoe.topology.errors import InputError, StoppedError
from tamoe.topology.graph import Link, Topology
from tamoe.topology.ranks import run_ranks
from tamoe.topology.spec import ClusterSpec

from .results_examples import example_setting

REQUIRED = {
    "name",
    "tokens_per_s",
    "step_s",
    "exchange_s",
    "predicted_exchange_s",
    "remote_share",
    "val_loss_own",
    "val_loss_foreign",
    "val_loss_no_bias",
    "allreduce_s",
    "speedup_over_even",
    "time_to_even_loss_s",
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"steps is 0; allowed: a whole number >= 12"),
        ({"steps": 2.5}, r"steps is 2.5"),
        ({"seed": -1}, r"seed is -1; allowed: a whole number from 0"),
        ({"cluster": "4x2:0mbit"}, r"0mbit"),
        ({"cluster": "4x"}, r"4x"),
        ({"cluster": "1x4"}, r"one node; allowed: two nodes or more"),
        ({"text": "no such file"}, r"cannot read no such file"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(
    arguments: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run_demo(**{"out": tmp_path / "demo", **arguments})  # type: ignore[arg-type]
    assert not (tmp_path / "demo").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with pytest.raises(InputError, match="a file; allowed: a folder"):
        run_demo(out=taken)
    assert taken.read_text() == "mine"


@pytest.mark.parametrize(
    ("probed", "message"),
    [
        (StoppedError("probe stopped"), r"before a step was timed: probe stopped$"),
        (KeyboardInterrupt(), r"before a step was timed: nothing was measured yet$"),
        (None, r"the links that were measured are in .*your-cluster/topology\.json$"),
    ],
)
def test_a_demo_that_is_stopped_early_says_what_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, probed: BaseException | None, message: str
) -> None:
    def probe(spec: str, output: Path) -> Topology:
        if probed is not None:
            raise probed
        topology = ClusterSpec.parse(spec).topology()
        topology.save(output)
        return topology

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tamoe.probe_command.run_probe", probe)
    monkeypatch.setattr("tamoe.topology.ranks.run_ranks", interrupted)
    with pytest.raises(StoppedError, match=message):
        run_demo("2x1:100mbit", tmp_path / "demo")
    assert (tmp_path / "demo" / "your-cluster" / "topology.json").exists() == (probed is None)


def test_the_settings_share_the_time_and_no_more() -> None:
    spent_s = 30.0
    for number, recipe in enumerate(demo.DEFAULT):
        budget_s = demo._budget_s(spent_s, recipe, demo.DEFAULT[number + 1 :])
        assert budget_s > 15
        spent_s += budget_s + demo._NEXT_S
    assert spent_s == pytest.approx(demo.TOTAL_S - demo._REPORT_S + demo._NEXT_S)
    assert demo.TOTAL_S <= 360


def test_the_last_setting_is_one_where_the_hierarchical_exchange_pays() -> None:
    gains = {}
    for recipe in demo.DEFAULT:
        topology = with_credit_of(ClusterSpec.parse(recipe.cluster).topology(), 0.0)
        workload = recipe.config(0).workload
        plans = {kl: solve(topology, workload, method="entropic", kl=kl) for kl in recipe.kls}
        choices = choose_exchanges(topology, workload, recipe.strategies(), plans)
        gains[recipe.name] = {
            k: c.seconds["flat rounds"] / c.seconds["hierarchical"] for k, c in choices.items()
        }
    even, gentle, strong = gains["top-8"].values()
    assert even > 3 and gentle > 1.2 and strong < 1.1
    for name in ("steep", "published share"):
        assert len(gains[name]) == 5 and max(gains[name].values()) < 1.2


# ---- training on real ranks -------------------------------------------------------------------


RELAYED = "bias kl=0.5"  # trains with the hierarchical exchange, the others with the flat one


def _job(path: Path) -> Job:
    """Two plain ranks, each its own node, a small model, a few steps."""
    topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e9, 1e7))
    config = TrainConfig(
        hidden_size=32, intermediate_size=32, sequences=4, sequence_length=32, learning_rate=1e-2
    )
    workload = Workload(config.tokens_per_rank, 2, 32, 4, config.experts_per_rank)
    plans = {kl: solve(topology, workload, method="entropic", kl=kl) for kl in (0.5, 0.3)}
    strategies = default_strategies()
    choices = {
        s.name: Choice("hierarchical" if s.name == RELAYED else "flat", None, f"given {s.name}", {})
        for s in strategies
    }
    setting = {"setting": "test", "cluster": "2x1", "nodes": [[0], [1]], "complete": False}
    return Job(
        setting=setting,
        before=(example_setting(),),
        about={"command": "test"},
        results_path=path,
        topology=topology,
        strategies=strategies,
        plans=plans,
        choices=choices,
        config=config,
        steps=28,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Document, Path]:
    path = tmp_path_factory.mktemp("demo") / "results.json"
    return run_ranks(2, train_rank, _job(path), timeout_s=240)[0], path


@pytest.mark.ranks
def test_every_strategy_starts_alike_and_learns(trained: tuple[Document, Path]) -> None:
    setting, _ = trained
    starts = {strategy["curve"][0]["val_loss"] for strategy in setting["strategies"]}
    assert len(starts) == 1 and starts.pop() == pytest.approx(math.log(80), rel=1e-5)
    for strategy in setting["strategies"]:
        assert strategy["val_loss_own"] < math.log(80) - 0.8
        assert strategy["curve"][0]["time_s"] == 0.0
        times = [point["time_s"] for point in strategy["curve"]]
        assert times == sorted(times)


@pytest.mark.ranks
def test_steering_keeps_tokens_in_the_node(trained: tuple[Document, Path]) -> None:
    setting, _ = trained
    even, capacity, *steered = setting["strategies"]
    assert even["remote_share"] == pytest.approx(0.5, abs=0.1)
    assert capacity["remote_share"] == pytest.approx(0.5, abs=1e-6)
    for strategy in steered:
        target_PN = np.array(strategy["target_PN"])
        wanted = target_PN[0, 4:].sum() / target_PN[0].sum()
        assert strategy["remote_share"] == pytest.approx(wanted, abs=0.1)
        assert strategy["remote_share"] < 0.35


@pytest.mark.ranks
def test_counts_are_what_ranks_sent(trained: tuple[Document, Path]) -> None:
    setting, _ = trained
    choices = 2 * 4 * 32  # top-2 of each rank's tokens
    for strategy in setting["strategies"]:
        counts_PN = np.array(strategy["counts_PN"])
        assert counts_PN.shape == (2, 8)
        if strategy["kind"] == "capacity":
            assert np.allclose(counts_PN, math.ceil(1.25 * choices / 8))
        else:
            assert np.allclose(counts_PN.sum(1), choices, rtol=1e-4)
            assert strategy["dropped_share"] == 0


@pytest.mark.ranks
def test_the_ranks_write_what_they_return_behind_earlier_settings(
    trained: tuple[Document, Path],
) -> None:
    setting, path = trained
    document = load_results(path)
    first, second = all_settings(document)
    assert first["setting"] == "steep" and document["command"] == "test"
    assert second["strategies"] == setting["strategies"]
    assert setting["complete"] and setting["steps"] == 28
    for strategy in complete_setting(setting)["strategies"]:
        assert strategy.keys() >= REQUIRED
    even = setting["strategies"][0]
    assert even["name"].startswith("even") and even["speedup_to_even_loss"] == 1.0
    assert even["val_loss_own"] == even["val_loss_foreign"] == even["val_loss_no_bias"]


@pytest.mark.ranks
def test_times_fit_together(trained: tuple[Document, Path]) -> None:
    setting, _ = trained
    assert 0 < setting["compute_step_s"] < setting["strategies"][0]["step_s"]
    assert setting["memory_bytes"] is None or 1e7 < setting["memory_bytes"] < 6e9
    for strategy in setting["strategies"]:
        assert 0 < strategy["exchange_s"] < strategy["step_s"]
        assert 0 < strategy["allreduce_s"] < strategy["step_s"]
        assert strategy["tokens_per_s"] == pytest.approx(256 / strategy["step_s"])


@pytest.mark.ranks
def test_every_strategy_is_timed_with_both_exchanges(trained: tuple[Document, Path]) -> None:
    setting = complete_setting(trained[0])
    for strategy in setting["strategies"]:
        auto = "hierarchical" if strategy["name"] == RELAYED else "flat"
        assert strategy["auto_exchange"] == auto
        assert strategy["auto_reason"] == f"given {strategy['name']}"
        assert strategy["exchanges"].keys() == {"flat", "hierarchical"}
        flat, relayed = strategy["exchanges"].values()
        assert flat["step_s"] != relayed["step_s"]
        for timed in (flat, relayed):
            assert 0 < timed["exchange_s"] < timed["step_s"]
            assert timed["tokens_per_s"] == pytest.approx(256 / timed["step_s"])
            share = max(0.0, 1 - setting["compute_step_s"] / timed["step_s"])
            assert timed["exchange_share"] == pytest.approx(share)
        assert strategy["step_s"] == strategy["exchanges"][auto]["step_s"]
        assert strategy["exchange_s"] == strategy["exchanges"][auto]["exchange_s"]


def _one_turn(rank: int, job: Job) -> tuple[list[str], list[str]]:
    """The exchanges that dispatched in a turn, and those that its times are booked on."""
    run, used = _Run(rank, job), []
    for kind, exchange in run.exchanges.items():

        def noted(*args: Any, kind: str = kind, real: Any = exchange.dispatch, **more: Any) -> Any:
            used.append(kind)
            return real(*args, **more)

        exchange.dispatch = noted  # type: ignore[method-assign]
    times = run._turn(run.trainees[0], ["hierarchical", "flat", "hierarchical"])
    return used, [kind for kind, _ in times]


@pytest.mark.ranks
def test_times_are_booked_on_the_exchange_that_ran(tmp_path: Path) -> None:
    for used, booked in run_ranks(2, _one_turn, _job(tmp_path / "results.json"), timeout_s=120):
        assert used[:: TrainConfig.num_blocks] == booked == ["hierarchical", "flat", "hierarchical"]


SMALL = TrainConfig(
    hidden_size=32, intermediate_size=32, sequences=2, sequence_length=32, learning_rate=1e-2
)


def _alternating(rank: int, plan: Plan) -> tuple[str, str, bool, bool, float]:
    """Train with one exchange and with both in turns; also what auto takes of the plan."""
    strategy, corpus = default_strategies()[-1], load_text()
    flat, relayed = (Exchange(plan.topology, kind=kind) for kind in ("flat", "hierarchical"))
    alone = Trainee(strategy, SMALL, corpus, flat, plan)
    mixed = Trainee(strategy, SMALL, corpus, flat, plan)
    own_s, restored = 0.0, True
    for step in range(4):
        alone.train_step()
        times = mixed.train_step(relayed if step % 2 else flat)
        own_s += 0.0 if step % 2 else times.step_s
        restored &= all(layer.exchange is flat for layer in mixed.layers)
    pairs = zip(alone.model.state_dict().values(), mixed.model.state_dict().values(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    auto = Exchange(plan)
    return auto.kind, auto.reason, same, restored, mixed.seconds / (2 * own_s)


@pytest.mark.ranks
def test_training_does_not_depend_on_the_exchange_and_auto_is_that_of_the_plan() -> None:
    topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(1e9, 1e7))
    strategies = default_strategies()
    kls = {s.kl for s in strategies if s.kl is not None}
    plans = {kl: solve(topology, SMALL.workload, method="entropic", kl=kl) for kl in kls}
    choice = choose_exchanges(topology, SMALL.workload, strategies, plans)["bias kl=0.3"]
    for kind, reason, same, restored, seconds in run_ranks(
        4, _alternating, plans[0.3], timeout_s=200
    ):
        assert (kind, reason) == (choice.kind, choice.reason)
        assert same and restored
        assert seconds == pytest.approx(1.0)  # over twice the time of the flat half


# ---- predictions ------------------------------------------------------------------------------


def test_a_pause_gives_back_at_most_the_burst() -> None:
    topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e9, 1e6))
    graph = topology.graph.copy()
    graph.edges["nic0", "switch0"]["burst_bytes"] = 1000.0
    topology = Topology(graph, topology.nodes)

    def burst(pause_s: float) -> float:
        links: tuple[Link, ...] = with_credit_of(topology, pause_s).links
        return next(link.burst_bytes for link in links if link.source == "nic0" and link.level)

    assert burst(0.0) == 0.0
    assert burst(5e-4) == pytest.approx(500.0)
    assert burst(1.0) == 1000.0


def test_a_step_exchanges_four_times_a_layer() -> None:
    # One rank a node, all of the 100 tokens of 40 bytes cross the 1 MB/s uplinks: 4 ms a way.
    topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e12, 1e6))
    workload = Workload(tokens_per_rank=100, top_k=1, hidden_size=10, element_bytes=4)
    counts_PN = np.array([[0.0, 100.0], [100.0, 0.0]])
    predicted = step_exchange_s(topology, workload, counts_PN, layers=3, pause_s=0.0)
    assert predicted == pytest.approx(4 * 3 * 0.004)


def test_predictions_fall_with_the_traffic() -> None:
    setting = example_setting()
    predict_exchanges(setting)
    predicted = [strategy["predicted_exchange_s"] for strategy in setting["strategies"]]
    assert predicted[0] == pytest.approx(predicted[1])
    assert sorted(predicted, reverse=True) == predicted
    # Even: two ranks of a node send 3/4 of 2048 rows of 256 bytes over 6 MB/s, eight times a step.
    assert predicted[0] == pytest.approx(8 * 2 * 0.75 * 2048 * 256 / 6e6, rel=0.01)


# ---- the whole chain --------------------------------------------------------------------------


@pytest.mark.emulated
@pytest.mark.ranks
@pytest.mark.slow
def test_the_chain_runs_from_links_to_page(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    document = run_demo("2x2:100mbit", tmp_path, steps=12)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["strategies"] == document["strategies"]
    assert written["cluster"] == "2x2:100mbit" and written["steps"] == 12
    assert set(written["workload"]) >= {"tokens_per_rank", "top_k", "hidden_size", "num_experts"}
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 7
    even, *_, strong = written["strategies"]
    assert strong["remote_share"] < even["remote_share"]
    assert strong["step_s"] < even["step_s"]
    out, err = capfd.readouterr()
    assert out.count("auto takes") == 5
    assert "emulated" in out and "report.html" in out
    assert "Traceback" not in err and "s left" in err
