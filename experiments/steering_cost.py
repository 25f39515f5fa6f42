"""What steering and its metrics cost a step of the demo's model.

Run it (about four minutes on two cores)::

    python -m tamoe.experiments.steering_cost -o steering_cost.json

In the demo (emulated): every rank sums the processor time of steering and metrics inside its steps,
where what they need has left the caches. All ranks share the machine's cores, so the share of the
step is that of what the cores could do in it. The balance loss needs the choices counted anyway, so
that this is not part of steering here.

Alone (measured): one process with one thread trains the same model without a network, so that the
step is as short as it gets and the share as large. One model takes all steps; its steering is
switched off for some, since two equal models in other memory differ by more than what is sought.
The plan is even and the gain next to nothing: the controller does all its work, and choices stay
those of the model without it, so that experts have the same to do.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from scipy.stats import trim_mean

from tamoe.bench_kernels import machine
from tamoe.bias import TopologyBias
from tamoe.exchange import Exchange
from tamoe.experiments.command import run_command
from tamoe.experiments.model import GPT, initialise
from tamoe.experiments.strategies import Strategy
from tamoe.experiments.text import load_text, train_batch
from tamoe.experiments.trainee import TrainConfig, Trainee
from tamoe.gates import Gate, GShardGate, steering
from tamoe.metrics import dispatch_metrics
from tamoe.moe import MoE
from tamoe.progress import progress_line
from tamoe.record import record_exchanges
from tamoe.solver import Plan, Workload, solve
from tamoe.topology import Topology
from tamoe.topology.documents import check_writable, write_document
from tamoe.topology.errors import InputError
from tamoe.topology.ranks import run_ranks
from tamoe.topology.spec import ClusterSpec

SCHEMA, SCHEMA_VERSION = "tamoe.experiment.steering_cost", "2.1"
RANKS = 8  # whose experts there are
VARIANTS = ("plain", "steered", "steered, metrics")
PARTS = ("bias", "update", "metrics")
WARM_UP = 20  # turns that load code and end the controller's first steps
SETTLE = 40  # steps in which the bias is still on its way
DEMO_KL = 0.45  # of the demo's plan
DEMO_STEPS = ("even", "steered")


def even_plan(config: TrainConfig) -> Plan:
    """A plan whose target is even."""
    topology = Topology.from_tree("4x2", bandwidth_bytes_per_s=(1e9, 1e9), contention="pairwise")
    workload = Workload(
        config.tokens_per_rank, config.top_k, experts_per_rank=config.experts_per_rank
    )
    return solve(topology, workload, method="entropic", kl=100.0)


class Watch:
    """Seconds of a step that gates spend on steering, and of the metrics after it."""

    def __init__(self, model: torch.nn.Module, clock: Callable[[], float]) -> None:
        self.clock, self.seconds = clock, dict.fromkeys(PARTS, 0.0)
        for gate in model.modules():
            if isinstance(gate, Gate):
                gate._biased = self._timed("bias", gate._biased)  # type: ignore[method-assign]
                gate._update = self._timed("update", gate._update)  # type: ignore[method-assign]

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began_s = self.clock()
            result = call(*args)
            self.seconds[part] += self.clock() - began_s
            return result

        return timed

    def measure(self, counts_LN: Sequence[Sequence[int]], plan: Plan, rank: int) -> None:
        """The metrics of every layer."""
        began_s = self.clock()
        for counts_N in counts_LN:
            dispatch_metrics(counts_N, plan, rank)
        self.seconds["metrics"] += self.clock() - began_s

    def take(self) -> dict[str, float]:
        """Seconds since it was last asked."""
        taken, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return taken


# ---- in the demo --------------------------------------------------------------------------------


def in_demo(spec: str, steps: int, config: TrainConfig) -> dict[str, Any]:
    """Shares of the steps of an emulated cluster's ranks, even and steered ones in turns."""
    topology = ClusterSpec.parse(spec).topology()
    plan = solve(topology, config.workload, method="entropic", kl=DEMO_KL)
    times_PS = run_ranks(spec, _demo_rank, topology, plan, steps, config, timeout_s=1800.0)

    def step_s(name: str) -> float:
        last_S = [max(ranks_s) for ranks_s in zip(*(one[name] for one in times_PS), strict=True)]
        return statistics.median(last_S)

    cores = min(len(os.sched_getaffinity(0)), len(times_PS))
    parts_s = {part: sum(statistics.mean(one[part]) for one in times_PS) / cores for part in PARTS}
    together_s = sum(parts_s.values())
    return {
        "label": "emulated",
        "cluster": spec,
        "step_s": {name: step_s(name) for name in DEMO_STEPS},
        "parts_s": parts_s,
        "parts_share": {name: together_s / step_s(name) for name in DEMO_STEPS},
        "steps": steps,
    }


def _demo_rank(
    rank: int, topology: Topology, plan: Plan, steps: int, config: TrainConfig
) -> dict[str, list[float]]:
    exchange, corpus = Exchange(topology, kind="flat"), load_text(None)
    steered = Trainee(Strategy("bias", "bias", DEMO_KL), config, corpus, exchange, plan)
    even = Trainee(Strategy("even", "even"), config, corpus, exchange, None)
    watch = Watch(steered.model, time.thread_time)
    times: dict[str, list[float]] = {part: [] for part in (*DEMO_STEPS, *PARTS)}
    show, began_s = progress_line("in the demo"), time.monotonic()
    for step in range(SETTLE + steps):
        dist.barrier()
        even_s = even.train_step().step_s
        dist.barrier()
        with record_exchanges() as record:
            steered_s = steered.train_step().step_s
        watch.measure(record.sent_counts_N, plan, rank)
        measured = {"even": even_s, "steered": steered_s, **watch.take()}
        if step >= SETTLE:
            for part, seconds in measured.items():
                times[part].append(seconds)
        if rank == 0:
            left_s = (time.monotonic() - began_s) / (step + 1) * (SETTLE + steps - 1 - step)
            show("steps", step + 1, SETTLE + steps, left_s)
    return times


# ---- alone --------------------------------------------------------------------------------------


class Trained:
    """The demo's model on one rank with all experts, and its next step."""

    def __init__(self, config: TrainConfig, plan: Plan) -> None:
        self.config, self.plan = config, plan
        self.corpus = load_text(None)
        num_experts = RANKS * config.experts_per_rank

        def make_moe(_: int) -> torch.nn.Module:
            gate = GShardGate(
                config.hidden_size,
                num_experts,
                top_k=config.top_k,
                aux_weight=0.1,
                steer=TopologyBias(plan, rank=0, gain=1e-9),
                balance_over="rank",
            )
            return MoE(gate, config.make_expert, num_experts=num_experts)

        self.model = GPT(config.model(self.corpus.vocabulary_size), make_moe)
        initialise(self.model, seed=config.seed)
        self.gates = [part for part in self.model.modules() if isinstance(part, Gate)]
        self.watch = Watch(self.model, time.perf_counter)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.steps = 0

    def step_s(self, variant: str) -> dict[str, float]:
        """Seconds of one step, and of the parts in it over all layers."""
        config = self.config
        tokens = train_batch(
            self.corpus,
            seed=config.seed,
            step=self.steps,
            rank=0,
            sequences=config.sequences,
            length=config.sequence_length,
        )
        with steering(self.model, variant != "plain"), record_exchanges() as record:
            began_s = time.perf_counter()
            out = self.model(torch.from_numpy(tokens))
            (out.loss + out.aux_loss).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if variant == "steered, metrics":
            self.watch.measure(record.sent_counts_N, self.plan, 0)
        step_s = time.perf_counter() - began_s
        self.steps += 1
        return {**self.watch.take(), "step": step_s}


def tensors_of_logits(trained: Trained) -> int:
    """Tensors of a number for each token and expert that are alive between two steps."""
    trained.step_s("steered, metrics")
    gc.collect()
    shape = (trained.config.tokens_per_rank, trained.gates[0].num_experts)
    alive = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return sum(tuple(tensor.shape) == shape for tensor in alive)


def alone(steps: int, config: TrainConfig, progress: Callable[..., None]) -> dict[str, Any]:
    """Shares of the steps of one process."""
    trained = Trained(config, even_plan(config))
    times: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    order = random.Random(0)  # a fixed one would go in step with what every fourth batch measures
    began_s = time.monotonic()
    for step in range(WARM_UP + steps):
        for name in order.sample(VARIANTS, len(VARIANTS)):
            measured = trained.step_s(name)
            if step >= WARM_UP:
                times[name].append(measured)
        left_s = (time.monotonic() - began_s) / (step + 1) * (WARM_UP + steps - 1 - step)
        progress("steps", step + 1, WARM_UP + steps, left_s)
    plain_s = statistics.median(one["step"] for one in times["plain"])

    def over_plain(name: str) -> tuple[float, float]:
        """Mean of the ratios of steps of one turn, without the outer tenths, and its error.

        Not the median, which leaves out what only every fourth batch does.
        """
        both = zip(times[name], times["plain"], strict=True)
        ratios = [one["step"] / plain["step"] - 1 for one, plain in both]
        low, _, high = statistics.quantiles(ratios)
        return float(trim_mean(ratios, 0.1)), 0.76 * (high - low) / math.sqrt(len(ratios))

    parts_s = {part: statistics.mean(one[part] for one in times[VARIANTS[-1]]) for part in PARTS}
    return {
        "label": "measured",
        "step_s": {
            name: statistics.median(one["step"] for one in ones) for name, ones in times.items()
        },
        "over_plain": {name: over_plain(name) for name in VARIANTS[1:]},
        "parts_s": parts_s,
        "parts_share": sum(parts_s.values()) / plain_s,
        "tensors_of_logits": tensors_of_logits(trained),
        "steps": steps,
    }


def main(
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("steering_cost.json"),
    cluster: Annotated[str, typer.Option(help="For the demo's steps.")] = "4x2:160mbit",
    steps: Annotated[int, typer.Option(help="Timed steps alone, of each variant.")] = 600,
    demo_steps: Annotated[int, typer.Option(help="Timed steps in the demo.")] = 150,
) -> None:
    """Time steps with and without steering; prints the shares, writes JSON."""
    check_writable(output)
    for name, value in (("steps", steps), ("demo-steps", demo_steps)):
        if value < 2:
            raise InputError(f"--{name} is {value}; allowed: a whole number >= 2")
    torch.set_num_threads(1)
    config = TrainConfig()
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "machine": machine(),
        "layers": config.num_blocks,
        "in_demo": in_demo(cluster, demo_steps, config),
        "alone": alone(steps, config, progress_line("alone")),
    }
    write_document(output, found)
    demo, one = found["in_demo"], found["alone"]
    print(f"in the demo on {cluster}: {_in_words(demo)} (emulated)")
    for name, share in demo["parts_share"].items():
        print(f"  {share:.2%} of {name} steps of {demo['step_s'][name] * 1e3:.0f} ms")
    plain_ms = one["step_s"]["plain"] * 1e3
    print(f"alone: {_in_words(one)} (measured)")
    print(f"  {one['parts_share']:.2%} of plain steps of {plain_ms:.1f} ms")
    for name, (share, error) in one["over_plain"].items():
        print(f"  {name}: {share:+.2%} ± {error:.2%} over the plain step of its turn")


def _in_words(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {s * 1e6:.0f} us" for name, s in found["parts_s"].items())


if __name__ == "__main__":
    run_command(main)
