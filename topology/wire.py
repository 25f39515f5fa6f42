"""Point-to-point messages for the probe, on gloo, NCCL and what else torch.distributed has.

Loaded in ranks only: it needs torch.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from typing import Any

import torch
import torch.distributed as dist

from tamoe.topology.errors import RankTimeoutError

HEADER_WORDS = 3


class Wire:
    """Blocking sends and receives between ranks of a group, each with a deadline.

    It owns its process group, so that a timeout here never poisons the caller's: after one, every
    further operation of a group fails. On NCCL all traffic goes through ``batch_isend_irecv``;
    plain sends would make a communicator for every pair.

    Parameters
    ----------
    ranks
        Global ranks of the group, in the order of its group ranks.
    backend
        Of the new group: the one that carries the data.
    device
        Where the messages live.
    timeout_s
        Longest time for one message.
    """

    def __init__(
        self, ranks: list[int], backend: str, device: torch.device, timeout_s: float
    ) -> None:
        self.ranks = ranks
        self.device = device
        self.timeout_s = timeout_s
        self.batched = backend == "nccl"
        self.group = dist.new_group(
            ranks,
            timeout=datetime.timedelta(seconds=timeout_s),
            backend=backend,
            use_local_synchronization=len(ranks) < dist.get_world_size(),
            device_id=device if self.batched else None,
        )
        self._small = torch.zeros(1, dtype=torch.int64, device=device)
        self._header = torch.zeros(HEADER_WORDS, dtype=torch.int64, device=device)
        self._payload = torch.zeros(0, dtype=torch.uint8, device=device)
        if self.batched:
            dist.barrier(group=self.group, device_ids=[device.index or 0])

    def payload(self, size_bytes: int) -> torch.Tensor:
        """The first bytes of the one buffer of this rank; it grows when needed, pages touched."""
        if len(self._payload) < size_bytes:
            self._payload = torch.ones(size_bytes, dtype=torch.uint8, device=self.device)
            self.synchronize()
        return self._payload[:size_bytes]

    @property
    def acknowledgement(self) -> torch.Tensor:
        """The 8 bytes that say that a message arrived."""
        return self._small

    def send(self, tensor: torch.Tensor, peer: int) -> None:
        """Send to a group rank and wait until the tensor may change."""
        self._run([(dist.isend, tensor, peer)])

    def receive(self, tensor: torch.Tensor, peer: int) -> None:
        """Receive from a group rank."""
        self._run([(dist.irecv, tensor, peer)])

    def send_then_receive(self, out: torch.Tensor, into: torch.Tensor, peer: int) -> None:
        """Send, then wait for the answer, whose receive is posted before."""
        if self.batched:
            # Two kernels: one fused batch would not wait for the message before the answer.
            self._enqueue([(dist.isend, out, peer)])
            self._run([(dist.irecv, into, peer)])
        else:
            self._run([(dist.irecv, into, peer), (dist.isend, out, peer)])

    def exchange(self, out: torch.Tensor, into: torch.Tensor, peer: int) -> None:
        """Send and receive at the same time."""
        self._run([(dist.irecv, into, peer), (dist.isend, out, peer)])

    def start_exchange(self, out: torch.Tensor, into: torch.Tensor, peer: int) -> list[Any]:
        """Begin to send and receive at the same time; :meth:`finish` what it returns."""
        return self._enqueue([(dist.irecv, into, peer), (dist.isend, out, peer)])

    def finish(self, works: list[Any]) -> None:
        """Wait for what was begun."""
        for work in works:
            work.wait()
        self.synchronize()

    def send_header(self, words: list[int], peer: int) -> None:
        """Tell the peer what comes next."""
        padded = words + [0] * (HEADER_WORDS - len(words))
        self._header.copy_(torch.tensor(padded, dtype=torch.int64))
        self.send(self._header, peer)

    def receive_header(self, peer: int) -> list[int]:
        """What the peer says comes next."""
        self.receive(self._header, peer)
        return [int(word) for word in self._header.tolist()]

    def empty_all_to_all(self) -> None:
        """Exchange one element with every rank of the group."""
        count = len(self.ranks)
        sent = torch.zeros(count, dtype=torch.int64, device=self.device)
        dist.all_to_all_single(torch.empty_like(sent), sent, group=self.group)
        self.synchronize()

    def broadcast(self, data: bytes | None, size_bytes: int) -> bytes:
        """Bytes of the group's rank 0, on every rank."""
        if data is None:
            tensor = torch.empty(size_bytes, dtype=torch.uint8, device=self.device)
        else:
            tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        dist.broadcast(tensor, self.ranks[0], group=self.group)
        self.synchronize()
        dist.barrier(group=self.group)  # afterwards the sender knows that all have it
        return bytes(tensor.cpu().numpy().tobytes())

    def synchronize(self) -> None:
        """Wait for the device; raises when it does not come back in time."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        deadline = time.monotonic() + self.timeout_s
        while not event.query():
            if time.monotonic() > deadline:
                raise RankTimeoutError(f"no message within {self.timeout_s:g} s")

    def close(self) -> None:
        """Give the group back; not after a failure, when its peers may be gone."""
        with contextlib.suppress(Exception):
            dist.destroy_process_group(self.group)

    def _run(self, operations: list[tuple[Any, torch.Tensor, int]]) -> None:
        self.finish(self._enqueue(operations))

    def _enqueue(self, operations: list[tuple[Any, torch.Tensor, int]]) -> list[Any]:
        calls = [(call, tensor, self.ranks[peer]) for call, tensor, peer in operations]
        if self.batched:
            return dist.batch_isend_irecv(
                [dist.P2POp(call, tensor, rank, self.group) for call, tensor, rank in calls]
            )
        return [call(tensor, rank, group=self.group) for call, tensor, rank in calls]
