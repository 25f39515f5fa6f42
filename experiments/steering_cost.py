"""What steering and its metrics cost: steps of the demo's model with and without them, in turns.

Run it (about two minutes on one core)::

    python -m tamoe.experiments.steering_cost -o steering_cost.json

One process with one thread trains the demo's model without a network, so that the step is as short
as it gets and the share as large. The plan is even and the gain next to nothing: the controller
does all its work, and choices stay those of the model without it, so that experts have the same to
do. Measured: medians of steps in turns, and of the parts alone.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tamoe.bench_kernels import machine
from tamoe.bias import TopologyBias
from tamoe.experiments.model import GPT, initialise
from tamoe.experiments.text import load_text, train_batch
from tamoe.experiments.trainee import TrainConfig
from tamoe.functional import expert_counts
from tamoe.gates import Gate, GShardGate
from tamoe.metrics import dispatch_metrics
from tamoe.moe import MoE
from tamoe.progress import progress_line
from tamoe.solver import Plan, Workload, solve
from tamoe.topology import Topology
from tamoe.topology.documents import check_writable, write_document
from tamoe.topology.errors import InputError

SCHEMA, SCHEMA_VERSION = "tamoe.experiment.steering_cost", "1.0"
RANKS = 8  # whose experts there are
VARIANTS = ("plain", "steered", "steered, metrics")


def even_plan(config: TrainConfig) -> Plan:
    """A plan whose target is even."""
    topology = Topology.from_tree("4x2", bandwidth_bytes_per_s=(1e9, 1e9), contention="pairwise")
    workload = Workload(
        config.tokens_per_rank, config.top_k, experts_per_rank=config.experts_per_rank
    )
    return solve(topology, workload, method="entropic", kl=100.0)


class Trained:
    """The demo's model on one rank with all experts, and its next step."""

    def __init__(self, config: TrainConfig, plan: Plan | None, metrics: bool) -> None:
        self.config, self.plan, self.metrics = config, plan, metrics
        self.corpus = load_text(None)
        num_experts = RANKS * config.experts_per_rank

        def make_moe(_: int) -> torch.nn.Module:
            steer = None if plan is None else TopologyBias(plan, rank=0, gain=1e-9)
            gate = GShardGate(
                config.hidden_size,
                num_experts,
                top_k=config.top_k,
                aux_weight=0.1,
                steer=steer,
                balance_over="rank",
            )
            return MoE(gate, config.make_expert, num_experts=num_experts)

        self.model = GPT(config.model(self.corpus.vocabulary_size), make_moe)
        initialise(self.model, seed=config.seed)
        self.gates = [part for part in self.model.modules() if isinstance(part, Gate)]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.steps = 0

    def step_s(self) -> float:
        """Seconds of one step."""
        config = self.config
        tokens = train_batch(
            self.corpus,
            seed=config.seed,
            step=self.steps,
            rank=0,
            sequences=config.sequences,
            length=config.sequence_length,
        )
        began_s = time.perf_counter()
        out = self.model(torch.from_numpy(tokens))
        (out.loss + out.aux_loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.metrics:
            assert self.plan is not None
            for routing in out.routings:
                counts_N = expert_counts(routing.expert_index_TK, self.gates[0].num_experts)
                dispatch_metrics(counts_N, self.plan, 0)
        self.steps += 1
        return time.perf_counter() - began_s


def parts_s(config: TrainConfig, plan: Plan, repetitions: int) -> dict[str, float]:
    """Seconds of what one layer adds to a step, each alone: medians."""
    bias = TopologyBias(plan, rank=0)
    logits_TN = torch.randn(config.tokens_per_rank, plan.num_experts)
    index_TK = logits_TN.topk(config.top_k).indices
    counts_N = expert_counts(index_TK, plan.num_experts)

    def median_s(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(repetitions):
            began_s = time.perf_counter()
            call()
            times.append(time.perf_counter() - began_s)
        return statistics.median(times)

    return {
        "bias": median_s(lambda: bias(logits_TN)),
        "count": median_s(lambda: expert_counts(index_TK, plan.num_experts)),
        "update": median_s(lambda: bias.update(counts_N)),
        "metrics": median_s(lambda: dispatch_metrics(counts_N, plan, 0)),
    }


def tensors_of_logits(trained: Trained) -> int:
    """Tensors of a number for each token and expert that are alive between two steps."""
    trained.step_s()
    gc.collect()
    shape = (trained.config.tokens_per_rank, trained.gates[0].num_experts)
    alive = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return sum(tuple(tensor.shape) == shape for tensor in alive)


def run(steps: int, config: TrainConfig, progress: Callable[..., None]) -> dict[str, Any]:
    """Everything, as JSON values."""
    plan = even_plan(config)
    variants = dict(
        zip(
            VARIANTS,
            (
                Trained(config, None, False),
                Trained(config, plan, False),
                Trained(config, plan, True),
            ),
            strict=True,
        )
    )
    times: dict[str, list[float]] = {name: [] for name in variants}
    began_s = time.monotonic()
    for step in range(steps + 3):
        names = VARIANTS[step % 3 :] + VARIANTS[: step % 3]
        for name in names:
            seconds = variants[name].step_s()
            if step >= 3:  # the first ones load code
                times[name].append(seconds)
        left_s = (time.monotonic() - began_s) / (step + 1) * (steps + 2 - step)
        progress("steps", step + 1, steps + 3, left_s)
    plain = times["plain"]
    layers = config.num_blocks
    parts = parts_s(config, plan, 200)
    plain_s = statistics.median(plain)
    return {
        "step_s": {name: statistics.median(values) for name, values in times.items()},
        # Of steps that ran one after another: what the machine does meanwhile hits both alike.
        "share": {
            name: statistics.median(s / p for s, p in zip(values, plain, strict=True)) - 1
            for name, values in times.items()
        },
        "parts_s": parts,
        "parts_share": layers * sum(parts.values()) / plain_s,
        "tensors_of_logits": {name: tensors_of_logits(one) for name, one in variants.items()},
        "steps": steps,
    }


def main(
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("steering_cost.json"),
    steps: Annotated[int, typer.Option(help="Timed steps of each variant.")] = 150,
) -> None:
    """Time steps with and without steering; prints the shares, writes JSON (measured)."""
    check_writable(output)
    if steps < 1:
        raise InputError(f"--steps is {steps}; allowed: a whole number >= 1")
    torch.set_num_threads(1)
    config = TrainConfig()
    found = run(steps, config, progress_line("steering cost"))
    head = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "label": "measured"}
    write_document(output, {**head, "machine": machine(), **found})
    for name in VARIANTS:
        print(
            f"{name:<17} {found['step_s'][name] * 1e3:7.2f} ms a step, "
            f"{found['share'][name]:+.2%} over plain"
        )
    parts = ", ".join(f"{name} {s * 1e6:.0f} us" for name, s in found["parts_s"].items())
    print(f"parts alone, a layer: {parts}; together {found['parts_share']:.2%} of a plain step")


if __name__ == "__main__":
    typer.run(main)
