"""Rank 0's part of a probe: lead the campaign, make the topology, keep a partial file."""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from typing import TYPE_CHECKING, Any

from tamoe.topology.assembly import build_topology, without_samples
from tamoe.topology.campaign import Campaign, Progress, Site
from tamoe.topology.errors import ProbeError
from tamoe.topology.formats import save_topology, topology_to_document
from tamoe.topology.graph import Topology
from tamoe.topology.inventory import RankFacts, partition_by
from tamoe.topology.job import Job
from tamoe.topology.orders import Order
from tamoe.topology.provenance import describe
from tamoe.topology.survey import Survey
from tamoe.topology.switches import judged_tree
from tamoe.topology.tournament import nodes_from_times

if TYPE_CHECKING:
    from tamoe.topology.rounds import Conductor


class Leader:
    """Leads the campaign and makes the topology, partial and complete."""

    def __init__(
        self,
        job: Job,
        budget_s: float | None,
        seed: int,
        use_hosts: bool,
        progress: Progress | None,
        partial_path: str | os.PathLike[str] | None,
    ) -> None:
        self.job = job
        self.budget_s = budget_s
        self.seed = seed
        self.use_hosts = use_hosts
        self.progress = progress or (_line_on_stderr if sys.stderr.isatty() else None)
        self.partial_path = partial_path
        self.started = time.time()
        self.saved_until = 0.0
        self.campaign: Campaign | None = None
        self.facts: list[RankFacts] = []

    def alone(self) -> Topology:
        """The topology of one rank."""
        from tamoe.topology.measure import measure_copy

        self.facts = [self.job.facts()]
        survey = Survey(((0,),), copy_bytes_per_s=measure_copy(self.job.device))
        site = Site((0,), (self.facts[0].cores,), self.job.on_gpu)
        self.campaign = Campaign(_NoRunner(), survey, site, seed=self.seed)
        topology = self._topology("complete", None)
        if self.partial_path is not None:
            save_topology(topology, self.partial_path)
        return topology

    def lead(self) -> Topology:
        """The topology of all ranks; tells all why if it cannot be had."""
        from tamoe.topology.rounds import Conductor

        conductor = Conductor(self.job.store, len(self.job.members), self.job.timeout_s)
        try:
            return self._lead(conductor)
        except ProbeError as error:
            self._save("timeout", str(error))
            conductor.abort(str(error), error.rank)
            raise
        except BaseException as error:
            what = "interrupted" if isinstance(error, KeyboardInterrupt) else repr(error)
            self._save("partial", what)
            conductor.abort(f"rank 0 gave up: {what}", 0)
            raise

    def _lead(self, conductor: Conductor) -> Topology:
        self.facts = [RankFacts(**found) for found in conductor.gather("facts")]
        conductor.post(Order("go"))
        wire = self.job.wire()
        conductor.use(wire)
        machines = partition_by([facts.machine for facts in self.facts])
        site = Site(
            tuple(_position(machines, rank) for rank in range(len(self.facts))),
            tuple(min(self.facts[rank].cores for rank in ranks) for ranks in machines),
            self.job.on_gpu,
        )
        hosts = partition_by([facts.host for facts in self.facts])
        nodes = hosts if self.use_hosts else nodes_from_times(conductor, site)
        stated = tuple(self.facts[ranks[0]].interface_bytes_per_s for ranks in nodes)
        self.campaign = Campaign(
            conductor,
            Survey(nodes, cpu_bound=site.shares_cpu, interface_bytes_per_s=stated),
            site,
            seed=self.seed,
            budget_s=self.budget_s,
            progress=self.progress,
            after_round=self._after_round,
        )
        self._save("partial", "nothing measured yet")
        self.campaign.run()
        cut = f"cut short by budget_s = {self.budget_s:g}" if self.campaign.skipped else None
        topology = self._topology("partial" if cut else "complete", cut)
        if self.partial_path is not None:
            save_topology(topology, self.partial_path)
        text = zlib.compress(json.dumps(topology_to_document(without_samples(topology))).encode())
        conductor.post(Order("stop", settings={"size_bytes": len(text)}))
        wire.broadcast(text, len(text))
        conductor.forget_orders()
        wire.close()
        return topology

    def _after_round(self) -> None:
        begun = time.monotonic()
        # On large clusters a file takes a while; it may cost a tenth of the time at most.
        if begun < self.saved_until:
            return
        self._save("partial", "still measuring")
        took = time.monotonic() - begun
        self.saved_until = time.monotonic() + 10 * took - min(10 * took, 0.5)

    def _save(self, status: str, reason: str) -> None:
        if self.partial_path is not None and self.campaign is not None:
            save_topology(self._topology(status, reason), self.partial_path)

    def _topology(self, status: str, reason: str | None) -> Topology:
        assert self.campaign is not None
        tree = judged_tree(self.campaign.survey)
        provenance = describe(
            self.campaign,
            tree,
            self.facts,
            status=status,
            reason=reason,
            started=self.started,
            backend=self.job.backend,
            device=str(self.job.device),
            use_hosts=self.use_hosts,
        )
        return build_topology(self.campaign.survey, tree, provenance)


def _position(groups: tuple[tuple[int, ...], ...], member: int) -> int:
    return next(k for k, group in enumerate(groups) if member in group)


class _NoRunner:
    """A single rank has nobody to give orders to."""

    def samples(self, order: Order) -> dict[tuple[int, int], Any]:
        raise AssertionError("one rank has no pairs")

    def run(self, order: Order) -> dict[int, Any]:
        raise AssertionError("one rank has no orders")


def _line_on_stderr(phase: str, done: int, total: int, seconds_left: float) -> None:
    end = "\n" if done == total else ""
    left = f", {seconds_left:.0f} s left" if seconds_left else ""
    print(
        f"\r\x1b[Kprobe: {phase}, round {done}/{total}{left}", end=end, file=sys.stderr, flush=True
    )
