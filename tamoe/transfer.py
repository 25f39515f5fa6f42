"""Rows on their way between ranks: what one rank sends and takes, at once or in rounds.

Shape suffixes: n rows sent, R rows received, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist

from tamoe.groups import works_by_gloo
from tamoe.solver.constants import ROUNDS_AHEAD
from tamoe.waiting import Patience

Waiting = Callable[[], None]
# Messages of a pair of ranks and a tag arrive in the order in which both ends started them; what is
# taken ahead is started in another order than words that travel between rounds.
_AHEAD_TAG = 1


@dataclass(frozen=True)
class Round:
    """Ranks that one rank sends to and receives from in one round."""

    targets: tuple[int, ...]
    sources: tuple[int, ...]


class Transfer:
    """Rows on their way, at once or in rounds, each of which the caller starts and waits for.

    Rows on a GPU whose group works by gloo go through the host's memory, which waits for the GPU.

    Parameters
    ----------
    row_nD
        Rows sorted by the rank that they go to.
    received_RD
        Room for the rows that come, by the rank that they come from; contiguous.
    send_splits, receive_splits
        Rows for each rank and from each rank.
    group, rounds
        The ranks, and the rounds of this one.
    patience, what
        How long to wait for other ranks, and what an error calls this transfer.
    """

    def __init__(
        self,
        row_nD: torch.Tensor,
        received_RD: torch.Tensor,
        send_splits: Sequence[int],
        receive_splits: Sequence[int],
        group: dist.ProcessGroup,
        rounds: Sequence[Round],
        patience: Patience,
        what: str,
    ) -> None:
        self.received_RD = received_RD
        self._group, self._rounds = group, rounds
        self._patience, self._what = patience, what
        self._splits = list(send_splits), list(receive_splits)
        self._sent_nD = row_nD.contiguous()
        rank = dist.get_rank(group)
        self._wanted = self.received_RD.split(self._splits[1])
        self._kept = [(self._wanted[rank], self._sent_nD.split(self._splits[0])[rank])]
        self._incoming = self._wanted
        if row_nD.device.type != "cpu" and works_by_gloo(group, row_nD.device):
            self._sent_nD = self._sent_nD.cpu()
            self._incoming = torch.empty_like(received_RD, device="cpu").split(self._splits[1])
        self._outgoing = self._sent_nD.split(self._splits[0])
        self._by_host = self._sent_nD.device.type == "cpu"
        # Elsewhere a queue serves what was started first, and rows that one takes before it sends
        # its own would wait for rows that wait behind them.
        self._takes_ahead = self._by_host and works_by_gloo(group)
        self._arriving: list[Waiting] = []

    def start_at_once(self) -> Waiting:
        """Start everything; returns a function that waits for it.

        It is one uneven all-to-all, but on gloo a message for each rank: gloo's own all-to-all came
        to .62 to 1.0 of the bound at random, messages to .98 (emulated, 2x2 at 100 Mbit/s).
        """
        if self._takes_ahead:
            return self.start_singly()
        send_splits, receive_splits = self._splits
        rank, where = dist.get_rank(self._group), f"{self._what}, all ranks at once"
        peers = tuple(peer for peer in range(len(send_splits)) if peer != rank)
        with self._patience.trying(peers, where):
            work = dist.all_to_all_single(
                self.received_RD,
                self._sent_nD,
                receive_splits,
                send_splits,
                group=self._group,
                async_op=True,
            )
        return lambda: self._patience.wait([(work, peers)], where, by_host=self._by_host)

    def start(self, number: int) -> Waiting:
        """Start a round; returns a function that waits for it. Each is begun and ended in order.

        Round 0 stays inside the node; what a rank keeps is left to :meth:`keep`. On gloo a round
        ends when its rows have left, and those of the round ``ROUNDS_AHEAD`` before it have come;
        the last one ends when all have come.
        """
        step = self._rounds[number]
        if number == 0:
            return self._start(step, f"{self._what}, inside the node")
        if not self._takes_ahead:
            return self._start(step, self._where(number))
        if number == 1:
            self._arriving = [
                self._start(Round((), coming.sources), self._where(1 + later), _AHEAD_TAG)
                for later, coming in enumerate(self._rounds[1:])
            ]
        sent = self._start(Round(step.targets, ()), self._where(number), _AHEAD_TAG)
        last = len(self._rounds) - 1
        due = last if number == last else number - ROUNDS_AHEAD

        def wait() -> None:
            sent()
            while last - len(self._arriving) < due:
                self._arriving.pop(0)()

        return wait

    def _where(self, number: int) -> str:
        return f"{self._what}, round {number} between nodes"

    def start_singly(self) -> Waiting:
        """Start everything, one message for each rank that gets or sends some."""
        targets, sources = ([*chain.from_iterable(way)] for way in zip(*self._ways(), strict=True))
        wait = self._start(Round(tuple(targets), tuple(sources)), f"{self._what}, all ranks")
        self.keep()
        return wait

    def _ways(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [(step.targets, step.sources) for step in self._rounds]

    def keep(self) -> None:
        """Copy the rows that this rank keeps, once; best while others are under way."""
        while self._kept:
            to, rows = self._kept.pop()
            to.copy_(rows)

    def _start(self, step: Round, where: str, tag: int = 0) -> Waiting:
        transfers = [
            *((dist.irecv, self._incoming[peer], peer) for peer in step.sources),
            *((dist.isend, self._outgoing[peer], peer) for peer in step.targets),
        ]
        operations = [
            dist.P2POp(call, rows, group=self._group, group_peer=peer, tag=tag)
            for call, rows, peer in transfers
            if rows.numel()
        ]
        peers = [operation.group_peer for operation in operations]
        with self._patience.trying(dict.fromkeys(peers), where):
            works = dist.batch_isend_irecv(operations) if operations else []
        joined = len(works) != len(peers)  # as NCCL does
        peers_of = [tuple(dict.fromkeys(peers))] * len(works) if joined else [(p,) for p in peers]
        started = list(zip(works, peers_of, strict=True))

        def wait() -> None:
            self._patience.wait(started, where, by_host=self._by_host)
            if self._incoming is not self._wanted:
                for peer in step.sources:
                    self._wanted[peer].copy_(self._incoming[peer])

        return wait
