"""How fast and how long the controllers of a TopologyBias keep a rank's dispatch at its target.

Run it (about ten minutes on two cores; ``--quick`` for a first look in one)::

    python -m tamoe.experiments.controller -o controller

It writes ``controller.json`` and ``controller.png``; the committed ones are of ``-o experiments``.

What is simulated: each rank draws Gaussian logits of one spread, shifted by a constant of each
expert so that experts would be uneven; no network, no training. The real biases of tamoe select.
Experts are kept even by an ExpertBias in every run, the one without steering too. Controllers start
from even dispatch, fixed prices where they stay. Shares and loads are counted.

A run has *reached* the target at the first step from which the share of choices in the node stays
within 2 points of it, in means of 10 steps, for 100 steps; *held* is the largest distance of such a
mean from step 200 on. Both are of the mean over ranks; *worst rank* is the largest distance of any
rank's own mean of 10 steps. The load's coefficient of variation is that of the experts' choices
over all ranks, a mean over the same steps; without steering it is the baseline. Allowed is 1.1
times that and 1/sqrt(choices of an expert), what even routing has by chance alone.

``sign 0.001`` adds DeepSeek-V3's step to the logits as they are. It was made for sigmoid scores in
(0, 1): in 1,000 steps it cannot move a logit by more than 1, so wide logits are out of its reach.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

from tamoe.bias import SignBias, TopologyBias
from tamoe.experiments.command import run_command
from tamoe.experiments.steering import node_share
from tamoe.expert_bias import ExpertBias
from tamoe.functional import expert_counts
from tamoe.progress import progress_line
from tamoe.solver import Plan, Workload, solve
from tamoe.topology import Topology
from tamoe.topology.documents import check_writable, write_document
from tamoe.topology.errors import whole

SCHEMA, SCHEMA_VERSION = "tamoe.experiment.controller", "1.0"
How = Literal["none", "gain", "sign", "sign 0.001", "prices, fixed"]
HOWS: tuple[How, ...] = ("none", "gain", "sign", "sign 0.001", "prices, fixed")
WITHIN = 0.02  # of the target
MEAN_STEPS = 10
STAYS_STEPS = 100
HELD_FROM = 200
POINTS = 200  # of a curve, kept in the file


@dataclass(frozen=True)
class Config:
    """Sizes of the experiment."""

    tree: str = "2x4"
    ratio: float = 5.0  # bandwidth inside a node over bandwidth between nodes, per pair
    kl: float = 0.5  # of the entropic plan, the one with prices
    experts_per_rank: int = 4
    tokens: int = 1024  # per rank and step
    steps: int = 1000
    spreads: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    top_ks: tuple[int, ...] = (1, 2, 8)
    offset: float = 0.5  # spread of the experts' constants, in spreads of the logits
    seed: int = 0


QUICK = Config(tokens=256, steps=300, spreads=(0.1, 1.0, 10.0), top_ks=(1, 2))


def make_plan(config: Config, top_k: int) -> Plan:
    """An entropic plan where every pair has its own link."""
    topology = Topology.from_tree(
        config.tree,
        bandwidth_bytes_per_s=(config.ratio * 1e10, 1e10),
        contention="pairwise",
    )
    workload = Workload(config.tokens, top_k, experts_per_rank=config.experts_per_rank)
    return solve(topology, workload, method="entropic", kl=config.kl)


def make_bias(how: How, plan: Plan, rank: int) -> TopologyBias | None:
    """A rank's steering, from even dispatch where it is a controller."""
    if how == "none":
        return None
    if how == "gain":
        return TopologyBias(plan, rank=rank, start="even")
    if how == "prices, fixed":
        return TopologyBias(plan, rank=rank, start="prices", fixed=True)
    if how == "sign":
        return SignBias(plan, rank=rank, start="even")
    return SignBias(plan, rank=rank, start="even", speed=0.001, decay=0.0)


@torch.no_grad()
def counts_by_step(config: Config, how: How, spread: float, top_k: int) -> np.ndarray:
    """Choices of every rank and step, ``[steps, P, N]``."""
    plan = make_plan(config, top_k)
    num_experts = plan.num_experts
    generator = torch.Generator().manual_seed(config.seed + round(1000 * spread) + 7 * top_k)
    biases = [make_bias(how, plan, rank) for rank in range(plan.num_ranks)]
    balance = ExpertBias(num_experts, speed=0.05 * spread, decay=0.02)
    offset_N = config.offset * spread * torch.randn(num_experts, generator=generator)
    history = []
    for _ in range(config.steps):
        counts = []
        for bias in biases:
            noise_TN = torch.randn(config.tokens, num_experts, generator=generator)
            logits_TN = spread * noise_TN + offset_N
            score_TN = logits_TN + balance.bias_N
            if bias is not None:
                score_TN += _scaled(how, bias, logits_TN, spread)
            counts.append(expert_counts(score_TN.topk(top_k, sorted=False).indices, num_experts))
        for bias, counts_N in zip(biases, counts, strict=True):
            if bias is not None:
                bias.update(counts_N)
        history.append(torch.stack(counts))
        balance.update(history[-1].sum(0))
    return torch.stack(history).numpy()


def _scaled(how: How, bias: TopologyBias, logits_TN: torch.Tensor, spread: float) -> torch.Tensor:
    bias_N = bias(logits_TN)
    # DeepSeek's step is in the scale of the scores, ours in spreads of them.
    return bias_N / spread if how == "sign 0.001" else bias_N


def summarise(config: Config, plan: Plan, counts: np.ndarray) -> dict[str, Any]:
    """What a run reached and held, from its choices."""
    target = float(node_share(plan, plan.target_PN).mean())
    wanted_P = node_share(plan, plan.target_PN)
    share_SP = np.array([node_share(plan, step) for step in counts])
    mean_of_10 = np.full(MEAN_STEPS, 1 / MEAN_STEPS)
    means = np.convolve(share_SP.mean(1), mean_of_10, "valid")
    mean_SP = np.stack([np.convolve(share_S, mean_of_10, "valid") for share_S in share_SP.T], 1)
    away = abs(means - target)
    held_from = min(HELD_FROM, len(away) // 2)
    load = counts[held_from:].sum(1).astype(float)
    cv = float((load.std(1) / load.mean(1)).mean())
    return {
        "target": target,
        "reached_step": _first_stay(away <= WITHIN),
        "held": float(away[held_from:].max()),
        "worst_rank": float(abs(mean_SP - wanted_P)[held_from:].max()),
        "load_cv": cv,
        "chance_cv": 1 / math.sqrt(load.mean()),
        "share_by_step": [round(float(s), 4) for s in means[:: max(1, config.steps // POINTS)]],
    }


def _first_stay(near: np.ndarray) -> int | None:
    """First step from which all of the next ones are near; None if there is none."""
    for step in np.flatnonzero(near).tolist():
        stays = near[step : step + STAYS_STEPS]
        if len(stays) == STAYS_STEPS and stays.all():
            return int(step + MEAN_STEPS)
    return None


def _one(task: tuple[Config, How, float, int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    config, how, spread, top_k = task
    counts = counts_by_step(config, how, spread, top_k)
    found = summarise(config, make_plan(config, top_k), counts)
    return {"how": how, "spread": spread, "top_k": top_k, **found}


def run(config: Config, processes: int, progress: Callable[..., None]) -> dict[str, Any]:
    """Every controller, spread and k, as JSON values."""
    began_s = time.monotonic()
    tasks = [
        (config, how, spread, top_k)
        for top_k, spread, how in itertools.product(config.top_ks, config.spreads, HOWS)
    ]
    rows: list[dict[str, Any]] = []
    with Pool(processes) as pool:
        for row in pool.imap_unordered(_one, tasks):
            rows.append(row)
            left_s = (time.monotonic() - began_s) / len(rows) * (len(tasks) - len(rows))
            progress("runs", len(rows), len(tasks), left_s)
    rows.sort(key=lambda row: (row["top_k"], row["spread"], HOWS.index(row["how"])))
    baseline = {(r["top_k"], r["spread"]): r["load_cv"] for r in rows if r["how"] == "none"}
    for row in rows:
        row["baseline_cv"] = baseline[row["top_k"], row["spread"]]
        row["cv_allowed"] = 1.1 * row["baseline_cv"] + row["chance_cv"]
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "label": "simulated ranks and logits; choices counted",
        "config": asdict(config),
        "rows": rows,
    }


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """A table of what was reached."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Controllers from even dispatch (simulated)", title_justify="left")
    for column in (
        "k",
        "spread",
        "controller",
        "reached at",
        "off by, held",
        "worst rank",
        "load CV",
        "allowed",
    ):
        table.add_column(column, justify="left" if column == "controller" else "right")
    for row in rows:
        if row["how"] == "none":
            continue
        reached = "–" if row["reached_step"] is None else f"step {row['reached_step']}"
        numbers = [f"{row[key]:.3f}" for key in ("held", "worst_rank", "load_cv", "cv_allowed")]
        table.add_row(f"{row['top_k']}", f"{row['spread']:g}", row["how"], reached, *numbers)
    Console(width=None if Console().is_terminal else 110).print(table)


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.")] = Path(
        "controller"
    ),
    quick: Annotated[bool, typer.Option(help="Fewer steps, spreads and tokens.")] = False,
    processes: Annotated[int, typer.Option(help="Runs at the same time.")] = 2,
) -> None:
    """Compare controllers on simulated ranks; writes controller.json and controller.png."""
    from tamoe.experiments.controller_figure import draw

    whole("--processes", processes, 1)
    for path in (out / "controller.json", out / "controller.png"):
        check_writable(path, "--out")
    results = run(QUICK if quick else Config(), processes, progress_line("controller"))
    write_document(out / "controller.json", results)
    draw(results, out / "controller.png")
    print_rows(results["rows"])
    print(f"wrote {out / 'controller.json'} and {out / 'controller.png'}")


if __name__ == "__main__":
    run_command(main)
