"""Data parallelism around MoE layers: which gradients are averaged, how, and what that costs.

Each rank's loss is the mean over its own tokens, and training minimises the mean of the P losses.
Every parameter gets the mean of its gradients over the ranks whose losses it serves: dense ones
over all P ranks (all-reduce), experts over all P ranks too (the exchange has brought the sum, it is
divided by P), a per-rank gate over its own rank alone (left as it is). Then one learning rate fits
all, and dense and expert gradients equal those of one process with all tokens, if ranks have
equally many. Where they have not and the mean over tokens is wanted, multiply each rank's loss by
its tokens times P over all tokens.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from tamoe.groups import group_rank, group_size, process_group
from tamoe.reduction import Bucket, NodeReduction, Worker, make_buckets, node_partition
from tamoe.schedules import Nodes
from tamoe.scope import restore_scopes, scope_of
from tamoe.topology.errors import InputError, whole

if TYPE_CHECKING:
    from tamoe.groups import Group
    from tamoe.solver import Plan
    from tamoe.topology.graph import Topology

BUCKET_BYTES = 1 << 20  # small enough to start while backward still runs, large beside latencies


@dataclass(frozen=True)
class AllreduceTime:
    """Time of one step's gradient averaging on this rank.

    ``allreduce_s`` is the time during which a sum was in progress, waiting for late ranks
    included; ``exposed_s`` the part of it that backward did not hide.
    """

    allreduce_s: float
    exposed_s: float
    sum_bytes: int


class DenseGradients:
    """Averages the gradients of shared parameters over the ranks while backward still runs.

    Sums go to each node's first rank, over those ranks, and back, so that every uplink is crossed
    once whatever the number of ranks behind it. Parameters of scope ``"expert"`` are divided by
    the number of ranks, those of scope ``"rank"`` left alone (see the module's text).

    Use one object for the life of the model. Make it after marking scopes and on all ranks of the
    *job* at once, each with its own group, since it makes process groups of its own. Parameters
    that a rank did not use count as 0 there; those unused on all ranks keep no gradient.

    Parameters
    ----------
    model
        The same on all ranks, but for its experts and per-rank parameters.
    nodes
        Topology or Plan of the group, or tuples of ranks; None for one node (a flat all-reduce).
    group
        ProcessGroup, 1-D DeviceMesh or None for the default group.
    bucket_bytes
        Gradients are summed in pieces of about this size, > 0.

    Raises
    ------
    InputError
        ``nodes`` is no partition of the group, or the shared parameters differ between ranks
        in name, shape, dtype or order.

    Examples
    --------
    >>> model = nn.Linear(2, 1)
    >>> dense = DenseGradients(model)
    >>> for _ in range(2):
    ...     model.zero_grad()
    ...     model(torch.ones(3, 2)).mean().backward()
    ...     time_s = dense.finish().allreduce_s
    >>> model.weight.grad.tolist(), time_s
    ([[1.0, 1.0]], 0.0)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        nodes: Topology | Plan | Nodes | None = None,
        group: Group = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        if bucket_bytes <= 0:
            raise InputError(f"bucket_bytes is {bucket_bytes}; allowed: > 0")
        self.num_ranks = group_size(group)
        partition = node_partition(nodes, self.num_ranks)
        restore_scopes(model)  # a deep copy lost the marks, and its experts would be averaged
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        dense = [(name, p) for name, p in named if scope_of(p) == "shared"]
        self._bucket_bytes = bucket_bytes
        self._dense: list[nn.Parameter] = []
        self._buckets: list[Bucket] = []
        self._arrivals: list[nn.Parameter] | None = []  # until the order is settled
        self._launched = 0
        self._touched: set[nn.Parameter] = set()
        self._paused = False
        self._worker: Worker | None = None
        resolved = process_group(group)
        self._group = resolved
        if resolved is not None and self.num_ranks > 1:
            _require_same_layout(dense, resolved)
            self._reduction = NodeReduction(resolved, partition)
            self._worker = Worker()
            # A guess until the first backward has shown its order.
            self._set_buckets([p for _, p in reversed(dense)])
        experts = [p for _, p in named if scope_of(p) == "expert"]
        self._hooks = [
            *(p.register_post_accumulate_grad_hook(self._touched.add) for p in experts),
            *(p.register_post_accumulate_grad_hook(self._ready) for p in self._dense),
        ]

    def _set_buckets(self, parameters: list[nn.Parameter]) -> None:
        self._dense = parameters
        self._buckets = make_buckets(parameters, self._bucket_bytes)
        self._bucket_of = {id(p): bucket for bucket in self._buckets for p in bucket.parameters}

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let backward accumulate gradients without summing; leave it for the last backward."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def finish(self) -> AllreduceTime:
        """Wait for the averages; call it on all ranks after backward and before the optimizer.

        Returns
        -------
        AllreduceTime

        Raises
        ------
        RuntimeError
            From torch.distributed, when a rank died or did not answer in time.
        """
        began_s = time.perf_counter()
        self._launch(everything=True)
        jobs = [bucket.job for bucket in self._buckets if bucket.job is not None]
        for job in jobs:
            job.wait()
        exposed_s = time.perf_counter() - began_s if jobs else 0.0
        for bucket in self._buckets:
            bucket.unpack(self.num_ranks)
        self._launched = 0
        for parameter in self._touched:
            if parameter.grad is not None and self.num_ranks > 1:
                parameter.grad.div_(self.num_ranks)
        self._touched.clear()
        sum_bytes = sum(b.flat.numel() * b.flat.element_size() for b in self._buckets)
        if self._arrivals is not None:
            self._settle_order(self._arrivals)
        return AllreduceTime(sum((job.seconds for job in jobs), 0.0), exposed_s, sum_bytes)

    def _settle_order(self, arrivals: list[nn.Parameter]) -> None:
        """Fill buckets in the order in which rank 0 got its gradients; unused parameters last."""
        if self._group is None or not self._dense:
            return
        place = {id(parameter): index for index, parameter in enumerate(arrivals)}
        by_place = sorted(
            range(len(self._dense)), key=lambda i: place.get(id(self._dense[i]), len(place))
        )
        shared = [by_place if arrivals else None]
        dist.broadcast_object_list(shared, group=self._group, group_src=0)
        order = shared[0]
        self._arrivals = [] if order is None else None
        if order is not None:
            self._set_buckets([self._dense[index] for index in order])

    def close(self) -> None:
        """Remove the hooks, end the thread and give the process groups back."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._worker is not None:
            self._worker.close()
            self._reduction.close()
            self._worker, self._buckets, self._dense = None, [], []

    def _ready(self, parameter: nn.Parameter) -> None:
        if self._paused:
            return
        bucket = self._bucket_of[id(parameter)]
        if id(parameter) not in bucket.missing:
            raise InputError(
                "backward ran again before finish(); call finish() after each backward, or run "
                "all but the last inside no_sync()"
            )
        bucket.missing.remove(id(parameter))
        if self._arrivals is not None:
            self._arrivals.append(parameter)
        self._launch(everything=False)

    def _launch(self, everything: bool) -> None:
        """Start sums in the order of the buckets, which is the same on all ranks."""
        while self._launched < len(self._buckets):
            bucket = self._buckets[self._launched]
            if bucket.missing and not everything:
                return
            assert self._worker is not None
            bucket.pack()
            bucket.job = self._worker.submit(self._summing(bucket.flat))
            self._launched += 1

    def _summing(self, flat: torch.Tensor) -> Callable[[], None]:
        if not flat.is_cuda:
            return lambda: self._reduction.sum_(flat)
        packed = torch.cuda.current_stream(flat.device).record_event()

        def on_own_stream() -> None:
            stream = torch.cuda.Stream(flat.device)
            with torch.cuda.stream(stream):
                stream.wait_event(packed)
                self._reduction.sum_(flat)
            stream.synchronize()

        return on_own_stream


def _require_same_layout(named: list[tuple[str, nn.Parameter]], group: dist.ProcessGroup) -> None:
    layout = repr([(name, tuple(p.shape), str(p.dtype)) for name, p in named])
    digests: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(digests, hashlib.sha256(layout.encode()).hexdigest(), group=group)
    odd = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        raise InputError(
            f"model: the shared parameters of rank {', '.join(odd)} differ from those of rank 0 "
            f"in name, shape, dtype or order; allowed: the same model on all ranks. Mark what "
            f"differs with mark_scope(module, 'rank')"
        )


@torch.no_grad()
def broadcast_dense(model: nn.Module, *, group: Group = None, source: int = 0) -> None:
    """Give all ranks the shared parameters and buffers of one of them.

    Experts, per-rank parameters and the buffers of modules with ``tamoe_scope`` other than
    ``"shared"`` keep their values.

    Parameters
    ----------
    model
        The same on all ranks, but for its experts and per-rank parameters.
    group
        ProcessGroup, 1-D DeviceMesh or None for the default group.
    source
        Rank of the group to copy from.

    Raises
    ------
    InputError
        ``source`` is not in the group, or the shared parameters differ in name, shape or dtype.

    Examples
    --------
    >>> broadcast_dense(nn.Linear(2, 2))  # one rank: nothing to do
    """
    resolved, num_ranks = process_group(group), group_size(group)
    whole("source", source, 0, num_ranks - 1)
    if resolved is None or num_ranks == 1:
        return
    restore_scopes(model)
    dense = [(name, p) for name, p in model.named_parameters() if scope_of(p) == "shared"]
    _require_same_layout(dense, resolved)
    tensors = [p.data for _, p in dense]
    for module in model.modules():
        if getattr(module, "tamoe_scope", "shared") == "shared":
            tensors += [b for b in module.buffers(recurse=False) if b is not None]
    for tensor in tensors:
        dist.broadcast(tensor, group=resolved, group_src=source)


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float, *, group: Group = None) -> torch.Tensor:
    """Scale gradients so that the norm over the whole model, on all ranks, is at most ``max_norm``.

    Shared gradients count once, experts and per-rank gates of every rank count each. All ranks get
    the same factor to the bit, so shared weights stay equal. Call it after
    :meth:`DenseGradients.finish`.

    Parameters
    ----------
    model
        Its gradients are scaled in place.
    max_norm
        Largest Euclidean norm, > 0; infinite only measures.
    group
        ProcessGroup, 1-D DeviceMesh or None for the default group.

    Returns
    -------
    torch.Tensor
        The norm before clipping, float64 scalar. Not finite where a gradient is not.

    Raises
    ------
    InputError
        ``max_norm`` is not > 0.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> (4 * model(torch.ones(1, 1))).sum().backward()
    >>> clip_grad_norm(model, 1.0).item(), round(model.weight.grad.item(), 5)
    (4.0, 1.0)
    """
    if not max_norm > 0:
        raise InputError(f"max_norm is {max_norm}; allowed: > 0")
    restore_scopes(model)
    resolved = process_group(group)
    first = next(model.parameters(), None)
    square = torch.zeros((), dtype=torch.float64, device=None if first is None else first.device)
    for parameter in model.parameters():
        # Rank 0 speaks for what all ranks share.
        counts = scope_of(parameter) != "shared" or group_rank(group) == 0
        if parameter.grad is not None and counts:
            square += parameter.grad.double().square().sum()
    if resolved is not None:
        dist.all_reduce(square, group=resolved)
    norm = square.sqrt()
    factor = (max_norm / (norm + 1e-12)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.dtype))
    return norm
