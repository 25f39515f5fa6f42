"""The probe: measure the links of a running job and return them as a Topology.

A collective call; every rank of the group makes it. Rank 0 leads (see
:mod:`tamoe.topology.campaign` for what is measured, :mod:`tamoe.topology.rounds` for how ranks
follow), keeps a partial file while it measures, and names a rank that dies.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tamoe.topology.campaign import Progress
from tamoe.topology.errors import InputError
from tamoe.topology.graph import Topology
from tamoe.topology.job import Job
from tamoe.topology.leading import Leader

if TYPE_CHECKING:
    import torch


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
    if hasattr(group, "get_group"):
        group = group.get_group()  # a DeviceMesh
    members, rank = _members(group)
    job = Job(
        members=members,
        rank=rank,
        device=_device(device, group),
        timeout_s=timeout_s,
        redact_hosts=redact_hosts,
    )
    if rank != 0:
        return job.with_heartbeat(job.follow)
    leader = Leader(job, budget_s, seed, use_hosts, progress, partial_path)
    return leader.alone() if len(members) == 1 else job.with_heartbeat(leader.lead)


def _members(group: Any) -> tuple[list[int], int]:
    """Global ranks of the group, and the own position among them."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [0], 0
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    me = dist.get_rank()
    if me not in members:
        raise InputError(f"group has the ranks {members}; rank {me} is none of them")
    return list(members), members.index(me)


def _device(device: torch.device | str | None, group: Any) -> torch.device:
    import torch
    import torch.distributed as dist

    if device is not None:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            raise InputError(f"device is {device!r}; allowed: 'cpu', 'cuda' or 'cuda:INDEX'")
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device is {device!r} and torch sees no GPU; allowed here: 'cpu'")
        if chosen == torch.device("cuda"):
            return torch.device("cuda", torch.cuda.current_device())
        return chosen
    in_job = dist.is_available() and dist.is_initialized()
    if in_job and torch.cuda.is_available() and "nccl" in str(dist.get_backend(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
