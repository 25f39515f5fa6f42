"""The phases of a probe: which orders are given, and what is cut when time is short.

Pairs inside nodes; pairs between nodes in node-disjoint rounds; all nodes loaded at once, to see
what they share; one pair at a time below every switch where flows may have met; suspects again,
alone; then flows out of and into every node and switch at the same time, for its capacity.
Knows nothing of processes: orders go to a runner, which a test can replace.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from tamoe.topology.contention import contention_rounds, flow_plan, load_rounds
from tamoe.topology.findings import suspects
from tamoe.topology.fit import PairSamples, fit_pair, median
from tamoe.topology.hierarchy import Group, members_of
from tamoe.topology.orders import Order, PairPlan
from tamoe.topology.schedule import (
    Round,
    group_rounds,
    in_turn,
    local_rounds,
)
from tamoe.topology.survey import SAME, Survey, Window
from tamoe.topology.switches import candidate_tree

RETEST_ROUNDS = 3
RETEST_PAIRS = 8  # most suspects that are measured again in a round
SHARED_CPU_PAIRS = 40  # most pairs inside the nodes of a machine whose ranks share processors
RESERVED = 0.3  # share of a time budget that is kept for flows at the same time
_CHEAPER = (1.0, 0.6, 0.35)  # time of a round: in full, with fewer repetitions, one way only

RankPair = tuple[int, int]
Progress = Callable[[str, int, int, float], None]


class Runner(Protocol):
    """Has orders carried out."""

    def samples(self, order: Order) -> dict[RankPair, PairSamples]:
        """Samples of an order that measures pairs, by (source, target)."""

    def run(self, order: Order) -> dict[int, Any]:
        """Results of an order, by rank."""


@dataclass(frozen=True)
class Site:
    """Where ranks run, as far as it decides what may be measured at the same time."""

    machine_of_rank: tuple[int, ...]  # ranks of a machine share its processors
    cores: tuple[int, ...]  # of each machine
    on_gpu: bool = False

    @property
    def shares_cpu(self) -> bool:
        """Whether some machine has more ranks than processors: times inside it are the CPU's."""
        ranks = [self.machine_of_rank.count(machine) for machine in range(len(self.cores))]
        return not self.on_gpu and any(r > c for r, c in zip(ranks, self.cores, strict=True))

    @property
    def pairs_at_once(self) -> int | None:
        """Most pairs inside nodes that a machine may measure at the same time."""
        return None if self.on_gpu else max(1, min(self.cores) // 2)


@dataclass
class Campaign:
    """One probe's measurement on rank 0: fills a survey, phase by phase."""

    runner: Runner
    survey: Survey
    site: Site
    seed: int = 0
    budget_s: float | None = None
    progress: Progress | None = None
    after_round: Callable[[], None] = lambda: None
    samples: dict[RankPair, PairSamples] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)  # phase to rounds left out
    economy: int = 0  # index into _CHEAPER
    retested: set[RankPair] = field(default_factory=set)
    _empty_exchange_s: float = 0.0
    clock: Callable[[], float] = time.monotonic
    _begun: float = 0.0

    def __post_init__(self) -> None:
        self._begun = self.clock()

    def run(self) -> None:
        """All phases."""
        self.alone_and_together()
        self.inside_nodes()
        if len(self.survey.nodes) > 1:
            self.between_nodes()
            self.load()
            self.between_switches()
            self.retest()
            self.contention()
        if self.survey.fits:
            # One latency is in an empty exchange whatever the number of its messages.
            latency = median([fit.alpha_s for fit in self.survey.fits.values()])
            messages = len(self.survey.node_of) - 1
            self.survey.overhead_s = max(0.0, self._empty_exchange_s - latency) / messages

    # ---- phases -------------------------------------------------------------------------------

    def alone_and_together(self) -> None:
        """A rank's own copy, and what a message costs a rank whatever its size."""
        ranks = tuple(rank for node in self.survey.nodes for rank in node)
        found = self.runner.run(Order("copy", ((ranks[0], ranks[0]),)))
        self.survey.copy_bytes_per_s = float(found[ranks[0]])
        if len(ranks) > 1:
            everyone = self.runner.run(Order("overhead", ((0, 0),)))
            self._empty_exchange_s = float(everyone[0])

    def inside_nodes(self) -> None:
        """Phase A: pairs inside nodes, all nodes at once unless they share processors."""
        machines = [self.site.machine_of_rank[ranks[0]] for ranks in self.survey.nodes]
        most = None
        if self.site.shares_cpu:
            most = max(1, SHARED_CPU_PAIRS // max(map(machines.count, machines)))
        rounds = local_rounds(self.survey.nodes, machines, self.site.pairs_at_once, most)
        plan = self._pair_plan(inside=True)
        until = None if self.budget_s is None else self.budget_s * RESERVED
        self._rounds("inside nodes", rounds, lambda pairs: self._pairs(pairs, plan), until)

    def between_nodes(self) -> None:
        """Phase B: every two nodes once, one active rank in each."""
        rounds = group_rounds(self.survey.nodes, self.seed)
        until = None if self.budget_s is None else self.budget_s * (1 - RESERVED)
        took: list[tuple[float, int]] = []

        def measure(pairs: Round) -> None:
            if took and until is not None:
                self._economise(*took[-1], len(rounds) - len(took), until - self._spent())
            begun = self._spent()
            self._pairs(pairs, self._pair_plan(), one_way=self.economy == 2)
            took.append((self._spent() - begun, self.economy))

        self._rounds("between nodes", rounds, measure, until, at_least=2)

    def between_switches(self) -> None:
        """Where flows of a round may have met above the nodes: again, one below each switch.

        Pairs that were held back are given the value of the pair that ran alone.
        """
        tree = candidate_tree(self.survey, met=True)
        groups = [group for group in tree.groups() if _flows_may_meet(group)]
        depths = sorted({group.depth for group in groups})
        for depth in depths:
            level = [group for group in groups if group.depth == depth]
            per_group = [group_rounds([self._ranks(c) for c in g.children]) for g in level]
            rounds = [
                tuple(itertools.chain.from_iterable(some))
                for some in itertools.zip_longest(*per_group, fillvalue=())
            ]
            self._rounds("between switches", rounds, self._pairs_alone, self.budget_s)
        for group in groups:
            self._copy_where_held_back(group)

    def retest(self) -> None:
        """Phase F: pairs that stand out are measured again, alone, before they are called slow."""
        for _ in range(RETEST_ROUNDS):
            tree = candidate_tree(self.survey)
            found = suspects(self.survey, tree, latency=not self.site.shares_cpu)[:RETEST_PAIRS]
            if not found:
                return
            self.retested.update(found)
            rounds = [(pair,) for pair in found]
            self._rounds("retest", rounds, lambda pairs: self._pairs(pairs, one_way=True),
                         self.budget_s)  # fmt: skip

    def load(self) -> None:
        """All ranks send and receive, node with node: oversubscribed switches slow some pairs."""
        if len(self.survey.nodes) < 4:
            return
        rounds = load_rounds(self.survey.nodes, self.seed)
        until = None if self.budget_s is None else self.budget_s * (1 - RESERVED / 2)
        self._rounds("load", rounds, lambda some: self._flows(some, "load"), until)

    def contention(self) -> None:
        """Phase D: all ranks of two nodes at once, then all nodes below each switch."""
        rounds = contention_rounds(self.survey.nodes, candidate_tree(self.survey))
        self._rounds("contention", rounds, self._flows, self.budget_s)

    # ---- rounds -------------------------------------------------------------------------------

    def _rounds(
        self,
        phase: str,
        rounds: Sequence[Any],
        measure: Callable[[Any], None],
        until_s: float | None = None,
        at_least: int = 1,
    ) -> None:
        begun = self._spent()
        for done, what in enumerate(rounds):
            mean_s = (self._spent() - begun) / done if done else 0.0
            if self.progress is not None:
                self.progress(phase, done, len(rounds), mean_s * (len(rounds) - done))
            late = until_s is not None and self._spent() + mean_s > until_s
            if late and done >= at_least:
                self.skipped[phase] = self.skipped.get(phase, 0) + len(rounds) - done
                break
            measure(what)
            self.after_round()
        if self.progress is not None and rounds:
            self.progress(phase, len(rounds), len(rounds), 0.0)

    def _spent(self) -> float:
        return self.clock() - self._begun

    def _economise(self, took_s: float, at: int, rounds_left: int, left_s: float) -> None:
        per_round = took_s / _CHEAPER[at]
        while self.economy < 2 and per_round * _CHEAPER[self.economy] * rounds_left > left_s:
            self.economy += 1

    def _pair_plan(self, *, inside: bool = False) -> PairPlan:
        plan = PairPlan(max_bytes=64 << 20 if self.site.on_gpu else 16 << 20)
        if self.site.shares_cpu:
            plan = replace(plan, max_bytes=4 << 20)
            if inside:
                plan = replace(plan, pings=11, sweeps=5, min_sweeps=3, pair_s=0.4)
        if self.economy:
            plan = replace(plan, pings=11, sweeps=3, min_sweeps=3)
        return plan

    def _pairs(
        self, pairs: Round, plan: PairPlan | None = None, *, one_way: bool = False, met: bool = True
    ) -> None:
        settings = asdict(plan or self._pair_plan())
        order = Order("one_way" if one_way else "pairs", pairs, settings)
        for pair, samples in self.runner.samples(order).items():
            self.samples[pair] = samples
            self.survey.add(pair, fit_pair(samples), met=met)

    def _pairs_alone(self, pairs: Round) -> None:
        # The first reading of a pair shows what flows that met left of the link.
        self._pairs(pairs, met=False)

    def _copy_where_held_back(self, group: Group) -> None:
        survey = self.survey
        child_of = {n: k for k, child in enumerate(group.children) for n in members_of(child)}
        alone: dict[tuple[int, int], RankPair] = {}
        crossing: list[tuple[RankPair, tuple[int, int]]] = []
        for i, j in survey.fits:
            a, b = (child_of.get(survey.node_of[rank], -1) for rank in (i, j))
            if a == b or -1 in (a, b):
                continue
            crossing.append(((i, j), (a, b)))
            if survey.fits[i, j] is not survey.met.get((i, j)):
                alone[a, b] = (i, j)
        for pair, ends in crossing:
            if ends not in alone or pair == alone[ends]:
                continue
            usual = survey.fits[alone[ends]]
            if survey.fits[pair].bandwidth_bytes_per_s < SAME * usual.bandwidth_bytes_per_s:
                survey.add(pair, usual, copied=True, met=False)

    def _flows(self, windows: list[Round], do: str = "flows") -> None:
        pairs = tuple(itertools.chain.from_iterable(windows))
        rates = self.runner.run(Order(do, pairs, asdict(flow_plan(self.survey, pairs))))
        kept = self.survey.loads if do == "load" else self.survey.windows
        for flows in windows:
            kept.append(Window(flows, tuple(rates[first] for first, _ in flows)))

    def _ranks(self, child: Group | int) -> list[int]:
        nodes = [self.survey.nodes[node] for node in members_of(child)]
        return in_turn(nodes)


def _flows_may_meet(group: Group) -> bool:
    """Whether two node-disjoint flows can cross the border of one of the group's children."""
    all_nodes = len(group.members)
    sizes = [len(members_of(child)) for child in group.children]
    return any(min(size, all_nodes - size) > 1 for size in sizes)
