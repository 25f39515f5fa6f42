"""Sum over the ranks of a group that crosses each node's uplink once: inside nodes, then between.

Runs on process groups of its own, so it may overlap with an exchange whatever the order in which
the two are issued.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tamoe.schedules import Nodes
from tamoe.topology.errors import InputError


def node_partition(nodes: Any, num_ranks: int) -> Nodes:
    """The ranks of each node, from a Topology, a Plan, tuples of ranks, or None for one node.

    Raises
    ------
    InputError
        Not every rank of the group is in exactly one node.

    Examples
    --------
    >>> node_partition([(0, 2), (1,)], 3), node_partition(None, 2)
    (((0, 2), (1,)), ((0, 1),))
    """
    if nodes is None:
        return (tuple(range(num_ranks)),)
    topology = getattr(nodes, "topology", nodes)
    partition = tuple(tuple(ranks) for ranks in getattr(topology, "nodes", topology))
    if sorted(rank for ranks in partition for rank in ranks) != list(range(num_ranks)):
        raise InputError(
            f"nodes is {partition}; allowed: every rank of the group, 0 to {num_ranks - 1}, in "
            f"exactly one node"
        )
    return partition


class NodeReduction:
    """Sums tensors over the group: to each node's first rank, over those, back into the nodes.

    Making one is a call of all ranks of the job, as making any process group is.
    """

    def __init__(self, group: dist.ProcessGroup, nodes: Nodes) -> None:
        ranks, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
        is_flat = len(nodes) == 1 or len(nodes) == len(ranks)
        mine = next(node for node in nodes if rank in node)
        node = () if is_flat else tuple(ranks[r] for r in mine)
        firsts = tuple(ranks) if is_flat else tuple(ranks[node[0]] for node in nodes)
        self._leader = ranks[mine[0]]
        wanted = [node] if len(node) > 1 else []
        if dist.get_rank() in firsts:
            wanted.append(firsts)
        groups = _make_groups(wanted)
        self._node, self._top = groups.get(node), groups.get(firsts)

    def sum_(self, flat: torch.Tensor) -> None:
        """Replace the tensor by its sum over the group, the same bits on every rank."""
        if self._node is not None:
            dist.reduce(flat, self._leader, group=self._node)
        if self._top is not None:
            dist.all_reduce(flat, group=self._top)
        if self._node is not None:
            dist.broadcast(flat, self._leader, group=self._node)

    def close(self) -> None:
        """Give the process groups back."""
        for group in (self._node, self._top):
            if group is not None:
                dist.destroy_process_group(group)
        self._node = self._top = None


def _make_groups(wanted: list[tuple[int, ...]]) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """Process groups of these ranks of the job; every rank of the job says what it wants.

    Not with ``use_local_synchronization``: its names depend on how many groups a process has, and
    members that have made different numbers of groups wait for each other for ever.
    """
    by_rank: list[list[tuple[int, ...]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, wanted)
    every = sorted({ranks for wishes in by_rank for ranks in wishes})
    groups = {ranks: dist.new_group(list(ranks)) for ranks in every}
    return {ranks: groups[ranks] for ranks in wanted}


class Job:
    """A call that runs on the worker, its error and how long it took."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._done = threading.Event()
        self._error: BaseException | None = None
        self.seconds = 0.0

    def run(self) -> None:
        """Called by the worker."""
        began_s = time.perf_counter()
        try:
            self._call()
        except BaseException as error:
            self._error = error
        self.seconds = time.perf_counter() - began_s
        self._done.set()

    def wait(self) -> None:
        """Block until the call has run; raise what it raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error


class Worker:
    """One daemon thread that runs jobs in the order in which they were given.

    A thread, because a sum has several steps and each must wait for the one before; and a daemon,
    because a step may wait for a rank that has died when this process wants to end.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        threading.Thread(target=_work, args=(self._jobs,), daemon=True, name="tamoe-sum").start()

    def submit(self, call: Callable[[], None]) -> Job:
        """Queue a call."""
        job = Job(call)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """End the thread after the jobs that it has."""
        self._jobs.put(None)


def _work(jobs: queue.SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()


class Bucket:
    """Gradients that are summed as one tensor, with a flag each: how many ranks have one."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        first = parameters[0]
        size = sum(parameter.numel() for parameter in parameters) + len(parameters)
        self.flat = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.missing = set(map(id, parameters))
        self.job: Job | None = None

    def pack(self) -> None:
        """Copy the gradients in."""
        parts = self.flat[: -len(self.parameters)].split([p.numel() for p in self.parameters])
        for index, (parameter, part) in enumerate(zip(self.parameters, parts, strict=True)):
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad.flatten())
            self.flat[index - len(self.parameters)] = float(parameter.grad is not None)

    @torch.no_grad()
    def unpack(self, num_ranks: int) -> None:
        """Write the means back and be ready for the next step."""
        used = self.flat[-len(self.parameters) :].tolist()
        parts = self.flat[: -len(self.parameters)].split([p.numel() for p in self.parameters])
        for parameter, part, ranks in zip(self.parameters, parts, used, strict=True):
            if not ranks:  # unused on every rank: no gradient, as in one process
                continue
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(part.view_as(parameter)).div_(num_ranks)
        self.missing = set(map(id, self.parameters))
        self.job = None


def make_buckets(parameters: list[nn.Parameter], bucket_bytes: int) -> list[Bucket]:
    """Buckets of about a size, each of one dtype and device, in the order given."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        grad_bytes = parameter.numel() * parameter.element_size()
        last = buckets[-1][-1] if buckets else None
        same = last is not None and (last.dtype, last.device) == (parameter.dtype, parameter.device)
        if not same or size + grad_bytes > bucket_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += grad_bytes
    return [Bucket(bucket) for bucket in buckets]
