"""What every rank of the demo runs: train all strategies in turns and measure each.

Strategies take turns of a few steps, in an order that rotates, so that noise of the machine hits
all alike. The steps of a turn take the flat and the hierarchical exchange by turns, which give the
same bits: so one training times both. One more trainee has its exchange removed: it gives the step
that is left, hence the exchange's share f and the bound 1/(1 − f).

Rank 0 writes the results file after every round, so a run that is stopped keeps what it measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tamoe.exchange import Exchange
from tamoe.experiments.results import (
    Document,
    assemble,
    empty_strategy,
    median_and_spread,
    save_results,
)
from tamoe.experiments.strategies import Strategy
from tamoe.experiments.text import load_text
from tamoe.experiments.trainee import StepTimes, TrainConfig, Trainee
from tamoe.progress import progress_line
from tamoe.record import record_exchanges
from tamoe.solver.choice import Choice
from tamoe.solver.plan import Plan
from tamoe.topology.graph import Topology

KINDS = ("flat", "hierarchical")  # exchanges that are timed
TURN_STEPS = 4  # of one strategy before the next one's turn
CURVE_BATCHES = (0,)  # held-out batches of the points of a curve
FINAL_BATCHES = (0, 1)  # and of the three losses at the end
ROUNDS_TO_ESTIMATE = 3  # turns of every strategy before the number of steps is fixed
ROUNDS_A_POINT = 2  # turns of every strategy between two points of the curves
END_ROUNDS = 1.5  # what the measurements at the end take, in rounds
SETTLE_STEPS = 16  # at most, and half of all, are not timed: biases are still on their way
# At most, up to the next point of the curves, for what has not reached the even run's final loss.
MORE_STEPS = 0.5
ALONE_REPEATS = 3
_Timed = tuple[str, StepTimes]  # a step, and the exchange that it took


@dataclass(frozen=True)
class Job:
    """What the ranks get."""

    setting: Document  # the entry that this job fills
    before: tuple[Document, ...]  # settings that are done; they stand before it in the file
    about: Document  # how the file was made
    results_path: Path
    topology: Topology
    strategies: tuple[Strategy, ...]
    plans: dict[float, Plan]  # by kl
    choices: dict[str, Choice]  # by strategy: what exchange="auto" takes, and why
    config: TrainConfig = field(default_factory=TrainConfig)
    text: Path | None = None
    steps: int | None = None  # None: as many as fit the budget
    budget_s: float = 120.0
    reach_even_loss: bool = True  # train on those that have not, at the end
    progress_name: str = "train"


def train_rank(rank: int, job: Job) -> Document:
    """Train and measure all strategies; the job's setting, filled in."""
    return _Run(rank, job).run()


class _Run:
    """The state of one rank's run."""

    def __init__(self, rank: int, job: Job) -> None:
        self.began_s = time.perf_counter()
        self.rank, self.job = rank, job
        corpus = load_text(job.text)
        self.exchanges: dict[str, Exchange] = {
            "flat": Exchange(job.topology, kind="flat"),
            "hierarchical": Exchange(job.topology, kind="hierarchical"),
            "none": Exchange(job.topology, kind="none"),
        }
        self.nodes, self.num_ranks = job.topology.nodes, job.topology.num_ranks

        def trainee(strategy: Strategy, kind: str) -> Trainee:
            plan = None if strategy.kl is None else job.plans[strategy.kl]
            return Trainee(strategy, job.config, corpus, self.exchanges[kind], plan)

        self.trainees = [trainee(s, job.choices[s.name].kind) for s in job.strategies]
        self.compute = trainee(job.strategies[0], "none")
        self.times: dict[str, list[_Timed]] = {t.strategy.name: [] for t in self.trainees}
        self.compute_times: list[_Timed] = []
        self.setting = job.setting
        self.entries = [_entry(strategy, job) for strategy in job.strategies]
        self.setting["strategies"] = self.entries
        self.show = progress_line(job.progress_name)

    def run(self) -> Document:
        self._measure_curves()
        asked = self.job.steps
        self.rounds = ROUNDS_TO_ESTIMATE if asked is None else -(-asked // TURN_STEPS)
        number = 0
        while number < self.rounds:
            began_s = time.perf_counter()
            done = number * TURN_STEPS
            self._round(number, TURN_STEPS if asked is None else min(TURN_STEPS, asked - done))
            number += 1
            round_s = time.perf_counter() - began_s
            if number == ROUNDS_TO_ESTIMATE and asked is None:
                self.rounds = self._rounds_in_budget(number, round_s)
            if number % ROUNDS_A_POINT == 0 or number == self.rounds:
                self._measure_curves()
            self.setting["steps"] = self.trainees[0].steps
            self._save()
            left_s = round_s * (self.rounds - number + END_ROUNDS)
            total = self.rounds * TURN_STEPS if asked is None else asked
            if asked is None and number < ROUNDS_TO_ESTIMATE:  # how many there will be is not known
                self._progress("timing, step", self.trainees[0].steps, total, None)
            else:
                self._progress("steps", self.trainees[0].steps, total, left_s)
        self._measure_quality()
        self._measure_alone()
        self._save()
        # What follows only lengthens the curves: times and counts stay those of equal steps.
        if self.job.reach_even_loss:
            self._reach_even_loss()
        self.setting["complete"] = True
        self.setting["memory_bytes"] = _memory_of_all_ranks()
        self.setting["training_s"] = time.perf_counter() - self.began_s
        self._write()
        return self.setting

    # ---- turns --------------------------------------------------------------------------------

    def _round(self, number: int, steps: int) -> None:
        """A turn of every strategy, and one without exchange."""
        shift = number % len(self.trainees)
        kinds = [KINDS[(number + step) % len(KINDS)] for step in range(steps)]
        for trainee in self.trainees[shift:] + self.trainees[:shift]:
            self.times[trainee.strategy.name] += self._turn(trainee, kinds)
        self.compute_times += self._turn(self.compute, ["none"] * steps)

    def _turn(self, trainee: Trainee, kinds: Sequence[str]) -> list[_Timed]:
        """A step with each of these exchanges; the times are means over the ranks."""
        dist.barrier()
        times = torch.tensor([trainee.train_step(self.exchanges[kind]) for kind in kinds])
        rows = trainee.mean_of_ranks(times).tolist()
        return [(kind, StepTimes(*row)) for kind, row in zip(kinds, rows, strict=True)]

    def _rounds_in_budget(self, done: int, round_s: float) -> int:
        """How many rounds there will be in all, by rank 0's clock."""
        left_s = self.job.budget_s - (time.perf_counter() - self.began_s)
        # Every second round ends with a point of the curves, which takes a tenth of it.
        rounds = done + int(left_s / (1.1 * round_s) - END_ROUNDS)
        chosen = torch.tensor(max(rounds, done))
        dist.broadcast(chosen, 0)
        return int(chosen)

    # ---- measurements -------------------------------------------------------------------------

    def _measure_curves(self) -> None:
        for trainee, entry in zip(self.trainees, self.entries, strict=True):
            self._measure_point(trainee, entry)

    def _measure_point(self, trainee: Trainee, entry: Document) -> None:
        loss = trainee.validate(CURVE_BATCHES)
        time_s = float(trainee.mean_of_ranks(torch.tensor(trainee.seconds)))
        entry["curve"].append({"step": trainee.steps, "time_s": time_s, "val_loss": loss})

    def _measure_quality(self) -> None:
        """The three validation losses, at equal steps."""
        for number, (trainee, entry) in enumerate(zip(self.trainees, self.entries, strict=True)):
            own = trainee.validate(FINAL_BATCHES)
            entry["val_loss_own"] = entry["val_loss_foreign"] = entry["val_loss_no_bias"] = own
            steered = trainee.strategy.kl is not None
            if steered or len({len(ranks) for ranks in self.nodes}) > 1:
                # Else ranks route alike, and alike nodes only swap what they validate on.
                entry["val_loss_foreign"] = trainee.validate(FINAL_BATCHES, foreign=True)
            if steered:
                entry["val_loss_no_bias"] = trainee.validate(FINAL_BATCHES, steered=False)
            self._progress("validated", number + 1, len(self.entries), None)

    def _measure_alone(self) -> None:
        """The flat exchange with the counts that were reached and nothing else running."""
        for trainee, entry in zip(self.trainees, self.entries, strict=True):
            self._measure_alone_of(trainee, entry)

    def _measure_alone_of(self, trainee: Trainee, entry: Document) -> None:
        counts_N = trainee.counts_N.round().long()
        index_T1 = torch.repeat_interleave(torch.arange(len(counts_N)), counts_N)[:, None]
        x_TD = torch.ones(len(index_T1), self.job.config.hidden_size)
        with torch.no_grad():
            self._there_and_back(x_TD, index_T1, len(counts_N))  # drains the links' credit
            dist.barrier()
            began_s = time.perf_counter()
            with record_exchanges() as record:
                for _ in range(ALONE_REPEATS):
                    self._there_and_back(x_TD, index_T1, len(counts_N))
            pause_s = time.perf_counter() - began_s - record.exchange_s + record.phase_s("counts")
        moved_s = record.exchange_s - record.phase_s("counts")
        slowest = torch.tensor(moved_s / ALONE_REPEATS)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)  # an exchange ends with its last rank
        passes = 2 * self.job.config.num_blocks  # forward and backward, each layer
        entry["exchange_alone_s"] = passes * float(slowest)
        mean_pause_s = trainee.mean_of_ranks(torch.tensor(pause_s / ALONE_REPEATS))
        entry["alone_pause_s"] = float(mean_pause_s) / 2  # before each of the two ways

    def _there_and_back(self, x_TD: torch.Tensor, index_T1: torch.Tensor, num: int) -> None:
        row_RD, handle = self.exchanges["flat"].dispatch(x_TD, index_T1, num_experts=num)
        self.exchanges["flat"].combine(row_RD, handle)

    def _reach_even_loss(self) -> None:
        """Train on, in turns as before, those that have not reached the even run's final loss."""
        goal = self.entries[0]["curve"][-1]["val_loss"]
        start, stride = self.trainees[0].steps, ROUNDS_A_POINT * TURN_STEPS
        limit = start + math.ceil(start * MORE_STEPS / stride) * stride

        def behind() -> list[tuple[Trainee, Document]]:
            both = zip(self.trainees[1:], self.entries[1:], strict=True)
            return [(t, e) for t, e in both if e["curve"][-1]["val_loss"] > goal]

        while (left := behind()) and left[0][0].steps < limit:
            for _ in range(ROUNDS_A_POINT):
                for trainee, _entry_of in left:
                    self._turn(trainee, [trainee.exchange.kind] * TURN_STEPS)
            for trainee, entry in left:
                self._measure_point(trainee, entry)
            self._progress("to even's loss, step", left[0][0].steps, limit, None)

    # ---- writing ------------------------------------------------------------------------------

    def _save(self) -> None:
        for trainee, entry in zip(self.trainees, self.entries, strict=True):
            counts_PN = self._gather(trainee.counts_N)
            chosen_PLN = self._gather(trainee.chosen_LN)
            if self.rank == 0:
                self._fill(entry, self._settled(self.times[entry["name"]]), counts_PN)
                entry["chosen_LPN"] = chosen_PLN.transpose(0, 1).tolist()
            dropped = trainee.mean_of_ranks(torch.tensor(trainee.dropped_share))
            entry["dropped_share"] = float(dropped)
        step_s, _ = median_and_spread([t.step_s for _, t in self._settled(self.compute_times)])
        self.setting["compute_step_s"] = step_s
        self._write()

    def _write(self) -> None:
        if self.rank == 0:
            document = assemble([*self.job.before, self.setting], self.job.about)
            save_results(self.job.results_path, document)

    def _settled(self, times: list[_Timed]) -> list[_Timed]:
        """The steps that count: after settling, and at least the later half."""
        return times[min(SETTLE_STEPS, len(times) // 2) :]

    def _fill(self, entry: Document, times: Sequence[_Timed], counts_PN: torch.Tensor) -> None:
        entry["counts_PN"] = counts_PN.tolist()
        entry["remote_share"] = _remote_share(counts_PN, self.nodes)
        load_N = counts_PN.sum(0)
        entry["busiest_expert"] = float(load_N.max() / load_N.mean().clamp_min(1e-9))
        for kind in KINDS:
            entry["exchanges"][kind] = self._medians([t for used, t in times if used == kind])
        entry.update(entry["exchanges"][entry["auto_exchange"]])

    def _medians(self, times: Sequence[StepTimes]) -> Document:
        step_s, spread_s = median_and_spread([t.step_s for t in times])
        tokens = self.job.config.tokens_per_rank * self.num_ranks
        found = {"step_s": step_s, "step_spread_s": spread_s, "tokens_per_s": tokens / step_s}
        for key in ("exchange_s", "counts_s", "allreduce_s"):
            found[key], _ = median_and_spread([getattr(t, key) for t in times])
        return found

    def _gather(self, counts_N: torch.Tensor) -> torch.Tensor:
        rows = [torch.zeros_like(counts_N) for _ in range(self.num_ranks)]
        dist.all_gather(rows, counts_N)
        return torch.stack(rows)

    def _progress(self, phase: str, done: int, total: int, left_s: float | None) -> None:
        if self.rank == 0:
            self.show(phase, done, total, left_s)


def _entry(strategy: Strategy, job: Job) -> Document:
    entry = empty_strategy(strategy.name, strategy.kind, strategy.kl, strategy.router)
    choice = job.choices[strategy.name]
    entry["auto_exchange"], entry["auto_reason"] = choice.kind, choice.reason
    if strategy.kl is not None:
        entry["target_PN"] = job.plans[strategy.kl].target_PN.tolist()
    return entry


def _remote_share(counts_PN: torch.Tensor, nodes: Sequence[Sequence[int]]) -> float:
    """Part of the dispatched rows whose expert is on another node."""
    num_ranks, num_experts = counts_PN.shape
    node_of = {rank: number for number, ranks in enumerate(nodes) for rank in ranks}
    node_P = torch.tensor([node_of[rank] for rank in range(num_ranks)])
    node_N = node_P.repeat_interleave(num_experts // num_ranks)
    remote_PN = node_P[:, None] != node_N[None, :]
    return float(counts_PN[remote_PN].sum() / counts_PN.sum().clamp_min(1e-9))


def _memory_of_all_ranks() -> float | None:
    """Sum of the ranks' proportional set sizes in bytes; None where the kernel does not tell."""
    try:
        lines: list[Any] = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        lines = []
    own = next((float(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), -1.0)
    total = torch.tensor([own, float(own < 0)], dtype=torch.float64)
    dist.all_reduce(total)
    return None if total[1] else float(total[0])
