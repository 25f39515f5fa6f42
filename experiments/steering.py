"""Does steering reach the target? Losses and biases on simulated ranks, in one process.

Run it (a few minutes on one core; ``--quick`` for a first look in under one)::

    python -m tamoe.experiments.steering -o steering

It writes ``steering.json`` (all numbers, with the configuration) and ``steering.png``. The
committed pair beside this file came from ``-o experiments``.

What is simulated: each rank is a gate and a stream of Gaussian tokens; no network and no task, the
auxiliary loss alone trains the gates. The real losses, biases and gates of tamoe do the routing.
The share of choices that stay in their rank's node is counted, not modelled. "Reached" is the mean
over the last quarter of the steps and over ranks.

1. Two nodes of four ranks, inside a node five times faster than between nodes, every pair its own
   link: the target keeps 0.833 of the choices in the node. Per-rank gates with the topology loss
   reach it; the softmax norm of the original code does not; one gate shared by all ranks stays at
   0.5 under the same loss and reaches the target with a TopologyBias, while it trains.
2. A shared gate that does not train, its logits of spread 0.1 to 10: the controller reaches the
   target for every spread, log(target/even) added to the logits only by luck.
3. The trap: nodes of eight and four ranks, one shared gate, topology loss. Nothing becomes local
   and the experts become uneven: load of expert e ∝ 1/mean_i w_ie.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

from tamoe.bias import TopologyBias
from tamoe.experiments.command import run_command
from tamoe.functional import balance_loss, expert_counts
from tamoe.gates import Gate, NaiveGate
from tamoe.loss import TopologyLoss
from tamoe.solver import Plan, Workload, solve
from tamoe.topology import Topology
from tamoe.topology.documents import write_document

How = Literal["balance", "sum", "softmax", "bias"]


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment."""

    tree: str = "2x4"
    ratio: float = 5.0  # bandwidth inside a node over bandwidth between nodes, per pair
    trap_tree: str = "[8,4]"
    trap_ratio: float = 10.0
    hidden_size: int = 64
    tokens: int = 1024  # per rank and step
    train_steps: int = 600
    bias_steps: int = 200
    spreads: tuple[float, ...] = (0.1, 0.3, 1.0, 2.0, 5.0, 10.0)
    learning_rate: float = 0.003  # Adam
    seed: int = 0


QUICK = Config(tokens=512, train_steps=200, spreads=(0.1, 1.0, 10.0))


def make_plan(tree: str, ratio: float, tokens: int, *, top_k: int = 1) -> Plan:
    """The exact target where every pair has its own link, one expert a rank."""
    depth_bytes_per_s = (ratio * 1e10, 1e10)
    topology = Topology.from_tree(
        tree, bandwidth_bytes_per_s=depth_bytes_per_s, contention="pairwise"
    )
    return solve(topology, Workload(tokens_per_rank=tokens, top_k=top_k))


def node_share(plan: Plan, counts_PN: np.ndarray) -> np.ndarray:
    """Share of each rank's choices that stay in its node, ``[P]``."""
    node_P = np.array(plan.topology.node_of)
    inside_PN = np.array([node_P[plan.expert_rank_N(i)] == node_P[i] for i in range(len(node_P))])
    return (counts_PN * inside_PN).sum(1) / counts_PN.sum(1)


def make_gates(
    plan: Plan, config: Config, *, scope: Literal["shared", "rank"], how: How
) -> list[Gate]:
    """One gate a rank; with a shared scope all use one weight."""

    def steer(rank: int) -> TopologyLoss | TopologyBias | None:
        if how == "bias":
            return TopologyBias(plan, rank=rank)
        return None if how == "balance" else TopologyLoss(plan, rank=rank, norm=how)

    with _expected_warnings():
        gates: list[Gate] = [
            NaiveGate(
                config.hidden_size,
                plan.num_experts,
                top_k=plan.workload.top_k,
                scope=scope,
                steer=steer(rank),
                aux_weight=0.0 if how == "bias" else 1.0,
            )
            for rank in range(plan.num_ranks)
        ]
    if scope == "shared":
        for gate in gates[1:]:
            gate.weight = gates[0].weight
    return gates


def train_gates(
    plan: Plan, config: Config, *, scope: Literal["shared", "rank"], how: How
) -> np.ndarray:
    """Train gates with the auxiliary loss alone; choices of every step, ``[steps, P, N]``."""
    torch.manual_seed(config.seed)
    gates = make_gates(plan, config, scope=scope, how=how)
    parameters = {id(gate.weight): gate.weight for gate in gates}.values()
    optimizer = torch.optim.Adam(list(parameters), lr=config.learning_rate)
    history = []
    for _ in range(config.train_steps):
        routings = [gate(torch.randn(config.tokens, config.hidden_size)) for gate in gates]
        loss = torch.stack([routing.aux_loss for routing in routings]).sum()
        if how == "bias":  # all ranks' tokens in one batch: what balance_over="group" computes
            probs = torch.cat([routing.probs_TN for routing in routings])
            loss = balance_loss(probs, torch.cat([r.expert_index_TK for r in routings]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(_counts_PN(plan, [routing.expert_index_TK for routing in routings]))
    return np.stack(history)


@torch.no_grad()
def hold_spread(plan: Plan, config: Config, spread: float, *, fixed: bool) -> np.ndarray:
    """Route with one untrained gate of the given spread of logits; choices, ``[steps, P, N]``.

    The gate's rows are orthogonal, so that logits of Gaussian tokens are independent.
    """
    # Other tokens for each spread: with the same ones the controller, which counts in spreads,
    # would make the same choices for all of them.
    torch.manual_seed(config.seed + round(1000 * spread))
    gates = make_gates(plan, config, scope="shared", how="bias")
    torch.nn.init.orthogonal_(gates[0].weight, gain=spread)
    if fixed:
        for rank, gate in enumerate(gates):
            gate.steer = TopologyBias(plan, rank=rank, fixed=True)
    history = []
    for _ in range(config.bias_steps):
        routings = [gate(torch.randn(config.tokens, config.hidden_size)) for gate in gates]
        history.append(_counts_PN(plan, [routing.expert_index_TK for routing in routings]))
    return np.stack(history)


def run(config: Config, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Everything, as JSON values."""
    started = time.perf_counter()
    plan = make_plan(config.tree, config.ratio, config.tokens)
    target = float(node_share(plan, plan.target_PN).mean())
    report(f"target {target:.3f} of choices in their node ({config.tree}, ratio {config.ratio:g})")
    trained: list[dict[str, Any]] = []
    cases: list[tuple[Literal["shared", "rank"], How]] = [
        ("rank", "balance"),
        ("rank", "sum"),
        ("rank", "softmax"),
        ("shared", "sum"),
        ("shared", "bias"),
    ]
    for scope, how in cases:
        counts = train_gates(plan, config, scope=scope, how=how)
        trained.append({"scope": scope, "how": how, **_summary(plan, counts)})
        trained[-1]["share_by_step"] = _by_step(plan, counts)
        report(f"trained  {scope:>6} gate, {how:<8} reached {trained[-1]['reached']:.3f}")
    held: list[dict[str, Any]] = []
    for top_k in (1, 2):
        plan_k = make_plan(config.tree, config.ratio, config.tokens, top_k=top_k)
        for spread in config.spreads:
            for fixed in (False, True):
                # A fixed bias does not move: some steps are enough to count it.
                short = replace(config, bias_steps=60) if fixed else config
                counts = hold_spread(plan_k, short, spread, fixed=fixed)
                row = {"top_k": top_k, "spread": spread, "fixed": fixed}
                held.append({**row, **_summary(plan_k, counts)})
            report(
                f"held     k={top_k} spread {spread:<4g} controller {held[-2]['reached']:.3f}, "
                f"fixed log-prior {held[-1]['reached']:.3f}"
            )
    trap = _trap(config)
    report(f"trap     loads {trap['load_big_node']:.2f} and {trap['load_small_node']:.2f} of even")
    return {
        "schema": "tamoe.experiment.steering",
        "schema_version": "1.0",
        "label": "simulated ranks in one process; shares counted",
        "config": asdict(config),
        "torch": torch.__version__,
        "target": target,
        "trained": trained,
        "held": held,
        "trap": trap,
        "wall_s": round(time.perf_counter() - started, 1),
    }


def _trap(config: Config) -> dict[str, Any]:
    plan = make_plan(config.trap_tree, config.trap_ratio, config.tokens)
    counts = train_gates(plan, config, scope="shared", how="sum")
    load_N = _tail(counts).sum((0, 1))
    load_N = load_N / load_N.mean()
    weight_PN = np.stack([plan.penalty_N(rank) for rank in range(plan.num_ranks)])
    expected_N = 1 / weight_PN.mean(0)
    expected_N = expected_N / expected_N.mean()
    big, small = (list(ranks) for ranks in plan.topology.nodes)
    return {
        **_summary(plan, counts),
        "target": float(node_share(plan, plan.target_PN).mean()),
        "even": float(node_share(plan, np.ones_like(plan.target_PN)).mean()),
        "load_N": load_N.round(4).tolist(),
        "load_big_node": float(load_N[big].mean()),
        "load_small_node": float(load_N[small].mean()),
        "expected_big_node": float(expected_N[big].mean()),
        "expected_small_node": float(expected_N[small].mean()),
    }


def _summary(plan: Plan, counts: np.ndarray) -> dict[str, float]:
    tail = _tail(counts)
    share_P = node_share(plan, tail.sum(0))
    load_N = tail.sum((0, 1))
    return {
        "reached": round(float(share_P.mean()), 5),
        "worst_rank": round(float(share_P[abs(share_P - share_P.mean()).argmax()]), 5),
        "largest_load": round(float(load_N.max() / load_N.mean()), 4),
    }


def _by_step(plan: Plan, counts: np.ndarray) -> list[float]:
    return [round(float(node_share(plan, step).mean()), 4) for step in counts]


def _tail(counts: np.ndarray) -> np.ndarray:
    return counts[-max(1, len(counts) // 4) :]


def _counts_PN(plan: Plan, indices: list[torch.Tensor]) -> np.ndarray:
    return torch.stack([expert_counts(index, plan.num_experts) for index in indices]).numpy()


@contextmanager
def _expected_warnings() -> Iterator[None]:
    # Two of the cases do what tamoe warns of; that they fail is the result.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.")] = Path(
        "steering"
    ),
    quick: Annotated[bool, typer.Option(help="Fewer steps and spreads.")] = False,
) -> None:
    """Compare losses and biases on simulated ranks; writes steering.json and steering.png."""
    from tamoe.experiments.steering_figure import draw

    torch.set_num_threads(1)
    results = run(QUICK if quick else Config(), report=lambda line: print(line, flush=True))
    write_document(out / "steering.json", results)
    draw(results, out / "steering.png")
    print(f"wrote {out / 'steering.json'} and {out / 'steering.png'}")


if __name__ == "__main__":
    run_command(main)
