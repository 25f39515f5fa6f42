"""The probe: measure the links of a running job and return them as a Topology.

A collective call; every rank of the group makes it. Rank 0 leads (see
:mod:`tamoe.topology.campaign` for what is measured, :mod:`tamoe.topology.rounds` for how ranks
follow), keeps a partial file while it measures, and names a rank that dies.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tamoe.topology.assembly import build_topology, without_samples
from tamoe.topology.campaign import Campaign, Progress, Site, nodes_from_times
from tamoe.topology.errors import InputError, ProbeError
from tamoe.topology.formats import save_topology, topology_from_document, topology_to_document
from tamoe.topology.graph import Topology
from tamoe.topology.inventory import RankFacts, partition_by, rank_facts
from tamoe.topology.orders import Order
from tamoe.topology.provenance import describe
from tamoe.topology.survey import Survey
from tamoe.topology.switches import judged_tree

if TYPE_CHECKING:
    import torch

    from tamoe.topology.rounds import Conductor

_calls: dict[tuple[int, ...], int] = {}  # probes made so far by these ranks; names their keys


def probe(
    *,
    group: Any = None,
    device: torch.device | str | None = None,
    budget_s: float | None = None,
    timeout_s: float = 60.0,
    seed: int = 0,
    use_hosts: bool = True,
    redact_hosts: bool = False,
    progress: Progress | None = None,
    partial_path: str | os.PathLike[str] | None = None,
) -> Topology:
    """Measure the links between the ranks of a job.

    Latency is half of a small round trip; bandwidth the slope between the two largest messages;
    capacities of uplinks come from flows that run at the same time on purpose. Levels are found
    by single linkage on the time of one message size. Every rank of the group must call it.

    Parameters
    ----------
    group
        ProcessGroup, 1-D DeviceMesh or None (the default group). Ranks of the topology are its
        group ranks. Only its members and its store are used, never the group itself.
    device
        Where messages live; the rank's GPU if the group has NCCL, else the CPU.
    budget_s
        Time to spend, in seconds, > 0. When short, repetitions are cut first, then the second
        direction, then rounds; what was left out is interpolated and marked. None: no limit.
    timeout_s
        Longest time for one message, in seconds, > 0. A dead rank is named within 5 s after it.
    seed
        Order in which nodes meet; recorded.
    use_hosts
        Take ranks of one host for a node. False: find nodes by a cheap tournament first.
    redact_hosts
        Leave host names out of the result; their hashes stay.
    progress
        Called on rank 0 as ``progress(phase, done, total, seconds_left)``. None: a line on
        standard error if that is a terminal.
    partial_path
        File that rank 0 rewrites after every round, so that an early end leaves a valid topology
        with ``provenance["status"]`` other than "complete".

    Returns
    -------
    Topology
        The same on every rank, but raw samples (``provenance["samples"]``) on rank 0 alone.

    Raises
    ------
    InputError
        An argument is out of range, or ``device`` does not fit the group.
    ProbeError
        A rank died, stopped or failed; ``rank`` names it. All ranks raise.

    Examples
    --------
    >>> topology = probe()  # no job: one rank, its own copying rate
    >>> topology.num_ranks, topology.provenance["status"]
    (1, 'complete')
    """
    for name, value in (("budget_s", budget_s), ("timeout_s", timeout_s)):
        if value is not None and not value > 0:
            raise InputError(f"{name} is {value}; allowed: > 0 seconds")
    members, rank = _members(group)
    job = _Job(
        members=members,
        rank=rank,
        device=_device(device, group),
        timeout_s=timeout_s,
        redact_hosts=redact_hosts,
    )
    make = _Maker(job, budget_s, seed, use_hosts, progress, partial_path)
    if rank == 0 and len(members) == 1:
        return make.alone()
    return job.with_heartbeat(make.lead if rank == 0 else job.follow)


def _members(group: Any) -> tuple[list[int], int]:
    """Global ranks of the group, and the own position among them."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [0], 0
    if hasattr(group, "get_group"):
        group = group.get_group()
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    me = dist.get_rank()
    if me not in members:
        raise InputError(f"group has the ranks {members}; rank {me} is none of them")
    return list(members), members.index(me)


def _device(device: torch.device | str | None, group: Any) -> torch.device:
    import torch
    import torch.distributed as dist

    if device is not None:
        return torch.device(device)
    if dist.is_available() and dist.is_initialized() and torch.cuda.is_available():
        if hasattr(group, "get_group"):
            group = group.get_group()
        if "nccl" in str(dist.get_backend(group)):
            return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class _Job:
    """What every rank needs: who takes part, the store, the device."""

    def __init__(
        self,
        members: list[int],
        rank: int,
        device: torch.device,
        timeout_s: float,
        redact_hosts: bool,
    ) -> None:
        self.members = members
        self.rank = rank
        self.device = device
        self.timeout_s = timeout_s
        self.redact_hosts = redact_hosts
        self.store: Any = None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backend(self) -> str:
        """Of the group that carries the data."""
        import torch.distributed as dist

        if len(self.members) == 1:
            return "none"
        if self.on_gpu:
            return "nccl"
        return "mpi" if dist.get_backend() == "mpi" else "gloo"

    def facts(self) -> RankFacts:
        index = (self.device.index or 0) if self.on_gpu else None
        return rank_facts(index, redact_hosts=self.redact_hosts)

    def with_heartbeat(self, work: Callable[[], Topology]) -> Topology:
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        from tamoe.topology.heartbeat import Heartbeat

        key = tuple(self.members)
        number = _calls[key] = _calls.get(key, -1) + 1
        name = f"tamoe/probe/{'-'.join(map(str, _ends(key)))}/{number}"
        self.store = PrefixStore(name, _get_default_store())
        with Heartbeat(self.store, f"heart/{self.rank}"):
            self.store.set(f"facts/{self.rank}", json.dumps(self.facts().to_json()))
            return work()

    def wire(self) -> Any:
        from tamoe.topology.wire import Wire

        return Wire(self.members, self.backend, self.device, self.timeout_s)

    def follow(self) -> Topology:
        """What ranks other than 0 do."""
        from tamoe.topology.rounds import Follower

        follower = Follower(self.store, self.rank, self.timeout_s)
        follower.next_order()  # "go": all have joined
        wire = self.wire()
        stop = follower.follow(wire)
        text = wire.broadcast(None, stop.settings["size_bytes"])
        wire.close()
        return topology_from_document(json.loads(zlib.decompress(text)), "probe")


def _ends(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """A short name for a set of ranks that two groups at work at the same time cannot share."""
    return (ranks[0], ranks[-1], len(ranks), hash(ranks) & 0xFFFF)


class _Maker:
    """Rank 0's part: leads the campaign and makes the topology, partial and complete."""

    def __init__(
        self,
        job: _Job,
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
        return self._topology("complete", None)

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
