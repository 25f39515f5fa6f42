"""Does steering cost quality? A longer run without a network, with several seeds.

What a strategy learns does not depend on how fast its links are. So one process holds the experts
of all ranks, and every rank's tokens pass that rank's own gate or bias: the demo's strategies, at
the speed of one process. Plans are made for the links that the demo's steep cluster is given.

Ranks train on the whole text, or with ``--sharded`` each on its own stretch of it. Then text of
another node is foreign to a rank, and local experts can gain from knowing their own.

    python -m tamoe.experiments.quality -o experiments/quality.json --steps 1500 --seeds 3

An existing file is continued: runs that it has are not repeated. Losses are in nats a byte, on
emulated routing: real training, no real links.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tamoe.exchange import Exchange
from tamoe.experiments.command import one_message
from tamoe.experiments.model import GPT, initialise
from tamoe.experiments.predict import with_credit_of
from tamoe.experiments.results import Document
from tamoe.experiments.strategies import Strategy, default_strategies, make_gate
from tamoe.experiments.text import Corpus, load_text, train_batch, validation_batch
from tamoe.experiments.trainee import TrainConfig
from tamoe.functional import balance_loss, expert_counts
from tamoe.gates import Gate, steering
from tamoe.moe import MoE
from tamoe.routing import Routing
from tamoe.solver import Plan, solve
from tamoe.topology.documents import read_document, write_document
from tamoe.topology.errors import InputError
from tamoe.topology.spec import ClusterSpec

SCHEMA, SCHEMA_VERSION = "tamoe.quality", "1.0"
CLUSTER = "4x2:50mbit"
WARMUP_STEPS = 20
VALIDATION_BATCHES = range(12)
CURVE_BATCHES = range(3)
CURVE_POINTS = 15


class GateOfRanks(nn.Module):
    """The gates of all ranks in one process: a batch holds the tokens of rank 0, then 1, and so on.

    A gate that is shared by all ranks has one weight here too; biases and targets are the ranks'.
    """

    def __init__(self, gates: Sequence[Gate]) -> None:
        super().__init__()
        self.num_experts = gates[0].num_experts
        self.pooled_weight = 0.0
        if gates[0].scope == "shared":
            for gate in gates[1:]:
                gate.weight = gates[0].weight
        if gates[0].balance_over == "group":  # the group's loss needs all ranks' tokens at once
            self.pooled_weight = gates[0].aux_weight
            for gate in gates:
                gate.aux_weight = 0.0
        self.each = list(gates)
        self.gates = nn.ModuleList(gates)
        self.first_rank = 0  # whose gate the first tokens get; other than 0: foreign tokens
        self.counts_PN = torch.zeros(len(gates), self.num_experts)

    def average(self) -> None:
        """Give every rank the mean of all gates."""
        mean_ND = torch.stack([gate.weight for gate in self.each]).mean(0)
        for gate in self.each:
            gate.weight.copy_(mean_ND)

    def forward(self, x_TD: torch.Tensor) -> Routing:
        """Each rank's tokens through its own gate."""
        parts: list[Routing] = []
        for rank, part_TD in enumerate(x_TD.chunk(len(self.each))):
            parts.append(self.each[(rank + self.first_rank) % len(self.each)](part_TD))
        index_TK = torch.cat([part.expert_index_TK for part in parts])
        probs_TN = torch.cat([part.probs_TN for part in parts])
        weight_TK = torch.cat([part.weight_TK for part in parts])
        aux_loss = torch.stack([part.aux_loss for part in parts]).mean()
        if self.pooled_weight:
            aux_loss = aux_loss + self.pooled_weight * balance_loss(probs_TN, index_TK)
        counts = [expert_counts(part.expert_index_TK, self.num_experts) for part in parts]
        self.counts_PN = torch.stack(counts).float()
        return Routing(index_TK, weight_TK, probs_TN, aux_loss)


class Run:
    """One strategy and seed."""

    def __init__(
        self,
        strategy: Strategy,
        config: TrainConfig,
        corpus: Corpus,
        plan: Plan | None,
        nodes: Sequence[Sequence[int]],
        sharded: bool = False,
    ) -> None:
        self.only_part_of = sum(map(len, nodes)) if sharded else None
        self.strategy, self.config, self.corpus, self.nodes = strategy, config, corpus, nodes
        self.num_ranks = sum(map(len, nodes))
        num_experts = self.num_ranks * config.experts_per_rank
        exchange = Exchange()

        def make_moe(_: int) -> nn.Module:
            gates = [
                make_gate(
                    strategy,
                    hidden_size=config.hidden_size,
                    num_experts=num_experts,
                    top_k=config.top_k,
                    plan=plan,
                    rank=rank,
                )
                for rank in range(self.num_ranks)
            ]
            # Padding to the capacity changes no result, so every strategy is a plain MoE here.
            gate = GateOfRanks(gates)
            return MoE(gate, config.make_expert, num_experts=num_experts, exchange=exchange)

        self.model = GPT(config.model(corpus.vocabulary_size), make_moe)
        initialise(self.model, seed=config.seed)
        self.gates = [m for m in self.model.modules() if isinstance(m, GateOfRanks)]
        weights = {id(p): p for gate in self.gates for p in gate.parameters()}
        others = [p for p in self.model.parameters() if id(p) not in weights]
        groups = [
            {"params": others, "factor": 1.0},
            {"params": list(weights.values()), "factor": strategy.gate_lr_factor},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))

    def train_step(self, step: int, lr_factor: float) -> float:
        """One step of all ranks together; the task loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * group["factor"] * lr_factor
        out = self.model(
            self._batch(
                train_batch, seed=self.config.seed, step=step, only_part_of=self.only_part_of
            )
        )
        (out.loss + out.aux_loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(out.loss.detach())

    def follow(self, plan: Plan) -> None:
        """Steer towards another plan from now on."""
        for gate in self.gates:
            for of_rank in gate.each:
                assert of_rank.steer is not None
                of_rank.steer.set_plan(plan)

    @torch.no_grad()
    def validate(
        self, batches: Sequence[int], *, foreign: bool = False, steered: bool = True
    ) -> float:
        """Mean loss on held-out text: each rank's own, or that of the next node's ranks."""
        self.model.eval()
        for gate in self.gates:
            gate.first_rank = len(self.nodes[0]) if foreign else 0
        kept = {name: value.clone() for name, value in self.model.state_dict().items()}
        if not steered:
            for gate in self.gates:
                gate.average()
        with steering(self.model, steered):
            losses = [
                self.model(self._batch(validation_batch, index=i, num_ranks=self.num_ranks)).loss
                for i in batches
            ]
        self.model.load_state_dict(kept)
        for gate in self.gates:
            gate.first_rank = 0
        self.model.train()
        return float(torch.stack(losses).mean())

    def in_node_share(self) -> float:
        """Part of the latest batch's choices whose expert is on the token's node."""
        counts_PN = torch.stack([gate.counts_PN for gate in self.gates]).mean(0)
        node_P = torch.zeros(self.num_ranks, dtype=torch.int64)
        for number, ranks in enumerate(self.nodes):
            node_P[list(ranks)] = number
        node_N = node_P.repeat_interleave(counts_PN.shape[1] // self.num_ranks)
        inside = counts_PN[node_P[:, None] == node_N[None, :]].sum()
        return float(inside / counts_PN.sum())

    def _batch(self, draw: Callable[..., np.ndarray], **which: int | None) -> torch.Tensor:
        parts = [
            draw(
                self.corpus,
                rank=rank,
                sequences=self.config.sequences,
                length=self.config.sequence_length,
                **which,
            )
            for rank in range(self.num_ranks)
        ]
        return torch.from_numpy(np.concatenate(parts))


# ---- what is compared -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trial:
    """A strategy, with a kl that may change on the way."""

    name: str
    strategy: Strategy
    later_kl: float | None = None  # the bias follows this kl's plan in the last part of the run
    later_from: float = 0.6  # where that part begins

    @property
    def kls(self) -> list[float]:
        """Every kl that the trial needs a plan of."""
        return [kl for kl in (self.strategy.kl, self.later_kl) if kl is not None]


def trials() -> tuple[Trial, ...]:
    """The strategies of the demo, a gentler bias, and biases that let go towards the end."""
    demo = default_strategies()
    bias = demo[-1]
    return (
        *(Trial(strategy.name, strategy) for strategy in demo),
        Trial("bias kl=1", dataclasses.replace(bias, kl=1.0)),
        Trial(f"{bias.name}, then 1", bias, later_kl=1.0),
    )


def run_trial(
    trial: Trial,
    config: TrainConfig,
    steps: int,
    plans: Mapping[float, Plan],
    sharded: bool = False,
) -> Document:
    """Train and validate; one entry of the file."""
    began_s = time.perf_counter()
    strategy = trial.strategy
    nodes = ClusterSpec.parse(CLUSTER).nodes
    plan = None if strategy.kl is None else plans[strategy.kl]
    run = Run(strategy, config, load_text(), plan, nodes, sharded)
    shares, curve = [], []
    for step in range(steps):
        if trial.later_kl is not None and step == int(trial.later_from * steps):
            run.follow(plans[trial.later_kl])
        run.train_step(step, lr_factor(step, steps))
        shares.append(run.in_node_share())
        if (step + 1) % max(1, steps // CURVE_POINTS) == 0:
            curve.append({"step": step + 1, "val_loss": run.validate(CURVE_BATCHES)})
            print(f"{trial.name} seed {config.seed}: {curve[-1]}", file=sys.stderr, flush=True)
    return {
        "name": trial.name,
        "seed": config.seed,
        "steps": steps,
        "text": "by rank" if sharded else "whole",
        "in_node_share": statistics.mean(shares[-steps // 10 :]),
        "mean_in_node_share": statistics.mean(shares),
        "val_loss_own": run.validate(VALIDATION_BATCHES),
        "val_loss_foreign": run.validate(VALIDATION_BATCHES, foreign=True),
        "val_loss_no_bias": run.validate(VALIDATION_BATCHES, steered=False),
        "curve": curve,
        "seconds": time.perf_counter() - began_s,
    }


def lr_factor(step: int, steps: int) -> float:
    """Warm up, stay, and go down to nothing in the second half."""
    return min(1.0, (step + 1) / WARMUP_STEPS, 2 * (1 - step / steps))


def summary(runs: Sequence[Mapping[str, Any]]) -> list[Document]:
    """Each trial against the even run of the same seed: mean and standard deviation over seeds."""

    def alike(run: Mapping[str, Any]) -> tuple[Any, ...]:
        return (run["steps"], run["text"], run["seed"])

    even = {alike(run): run for run in runs if run["name"].startswith("even")}
    rows = []
    for kind in dict.fromkeys((run["steps"], run["text"], run["name"]) for run in runs):
        own = [run for run in runs if (run["steps"], run["text"], run["name"]) == kind]
        own = [run for run in own if alike(run) in even]
        row: Document = dict(zip(("steps", "text", "name"), kind, strict=True))
        row["seeds"] = len(own)
        for key in ("val_loss_own", "val_loss_foreign", "val_loss_no_bias"):
            over = [run[key] / even[alike(run)]["val_loss_own"] - 1 for run in own]
            row[f"{key}_over_even"] = statistics.mean(over) if over else None
            row[f"{key}_over_even_std"] = statistics.stdev(over) if len(over) > 1 else None
        for key in ("in_node_share", "mean_in_node_share", "val_loss_own"):
            row[key] = statistics.mean(run[key] for run in own) if own else None
        rows.append(row)
    return rows


def plans_for(kls: Sequence[float], config: TrainConfig) -> dict[float, Plan]:
    """Entropic plans on the links that the cluster is given, at the rates that they sustain."""
    topology = with_credit_of(ClusterSpec.parse(CLUSTER).topology(), pause_s=0.0)
    workload = config.workload
    return {kl: solve(topology, workload, method="entropic", kl=kl) for kl in set(kls)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, default=Path("quality.json"))
    parser.add_argument("--steps", type=int, default=1500, help="of each run (default 1500)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each trial (default 3)")
    parser.add_argument("--only", nargs="*", help="names of trials (default all)")
    parser.add_argument("--sharded", action="store_true", help="each rank trains on its stretch")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    chosen = [t for t in trials() if not options.only or t.name in options.only]
    document: Document = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "label": "emulated routing: real training, no real links",
        "command": shlex.join(["python", "-m", "tamoe.experiments.quality", *given]),
        "cluster": CLUSTER,
        "config": {**dataclasses.asdict(TrainConfig()), "warmup_steps": WARMUP_STEPS},
        "learning_rate_schedule": "warm up, constant, linear to 0 in the second half",
        "runs": [],
    }
    if options.output.exists():
        before = read_document(options.output, SCHEMA, SCHEMA_VERSION)
        if before["config"] != document["config"]:
            raise InputError(
                f"{options.output} holds runs of another configuration; name a new file"
            )
        document["runs"] = before["runs"]
    plans = plans_for([kl for trial in chosen for kl in trial.kls], TrainConfig())
    for seed in range(options.seeds):
        for trial in chosen:
            have = {(r["name"], r["seed"], r["steps"], r["text"]) for r in document["runs"]}
            text = "by rank" if options.sharded else "whole"
            if (trial.name, seed, options.steps, text) in have:
                continue
            config = TrainConfig(seed=seed)
            run = run_trial(trial, config, options.steps, plans, options.sharded)
            document["runs"].append(run)
            document["summary"] = summary(document["runs"])
            write_document(options.output, document)
    for row in document.get("summary", []):
        print(row)


if __name__ == "__main__":
    with one_message():
        main()
