"""How rows get from rank to rank: all at once, or in rounds of disjoint node pairs.

Both move the same bytes and give the same result. ``single`` starts everything at once.
``rounds`` pairs every node with one node to send to at a time, so that an uplink is shared by flows
to few nodes. Only sending goes round by round, on gloo: a rank takes what comes in any round from
the start, so that where a peer is slow, or has many rows for it, it keeps its own rows back only
once it is ``ROUNDS_AHEAD`` rounds ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import Literal

import torch
import torch.distributed as dist

from tamoe.groups import works_by_gloo
from tamoe.node_memory import NodeMemory, node_memory
from tamoe.record import Phase, note_bytes, recording, timed
from tamoe.solver.constants import ROUNDS_AHEAD
from tamoe.waiting import Patience

Schedule = Literal["single", "rounds"]
Nodes = tuple[tuple[int, ...], ...]
Waiting = Callable[[], None]
# Rows inside a node go through shared memory so many at a time: few enough to stay in a cache and
# to take little memory, enough to hide the message that goes with them.
SLICE_BYTES = 2**21
# Messages of a pair of ranks and a tag arrive in the order in which both ends started them; what is
# taken ahead is started in another order than words that travel between rounds.
_AHEAD_TAG = 1


@dataclass(frozen=True)
class Round:
    """Ranks that one rank sends to and receives from in one round."""

    targets: tuple[int, ...]
    sources: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Mover:
    """Moves rows between the ranks of a group, by one schedule, and keeps the record.

    Parameters
    ----------
    group
        The ranks; None: nothing to move, there is one.
    nodes, rank
        Ranks of each node, and this one.
    schedule
        ``"single"`` or ``"rounds"``.
    patience
        How long to wait for other ranks.
    """

    group: dist.ProcessGroup | None
    nodes: Nodes
    rank: int
    schedule: Schedule
    patience: Patience

    @cached_property
    def _rounds(self) -> tuple[Round, ...]:
        return rounds_of(self.nodes, self.rank)

    @cached_property
    def _near(self) -> frozenset[int]:
        return frozenset(next(ranks for ranks in self.nodes if self.rank in ranks))

    def transfer(
        self,
        row_nD: torch.Tensor,
        send_splits: Sequence[int],
        receive_splits: Sequence[int],
        what: str,
        into_RD: torch.Tensor | None = None,
    ) -> Transfer:
        """Rows to be sent as the caller starts them; not recorded. Errors call it ``what``.

        What is received goes into ``into_RD``, contiguous, if it is given.
        """
        assert self.group is not None
        if into_RD is None:
            into_RD = row_nD.new_empty(sum(receive_splits), row_nD.shape[1])
        return Transfer(
            row_nD,
            into_RD,
            send_splits,
            receive_splits,
            self.group,
            self._rounds,
            self.patience,
            what,
        )

    def inside(
        self,
        row_nD: torch.Tensor,
        index_m: torch.Tensor,
        send_splits: Sequence[int],
        receive_splits: Sequence[int],
        most_rows: int,
        phase: Phase,
        weight_n: torch.Tensor | None = None,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Send chosen rows inside the node, times their weights.

        Through shared memory where the node's ranks have it, then some at a time.

        Parameters
        ----------
        row_nD, index_m
            Rows, and which of them to send, sorted by the rank that they go to.
        send_splits, receive_splits
            Rows for each rank and from each rank; 0 outside the node.
        most_rows
            The most that a rank of the node sends or gets.
        phase
            What an error calls it.
        weight_n
            Factor of each row.

        Yields
        ------
        begin, rows
            Rows that arrived, and the place of their first among all that arrive, by source. To be
            read before the next ones are asked for.
        """
        near = sorted(self._near)
        sends, receives = (
            [splits[rank] for rank in near] for splits in (send_splits, receive_splits)
        )
        memory = self._memory if row_nD.device.type == "cpu" else None
        row_bytes = row_nD.shape[1] * row_nD.element_size()
        num_slices = 1 if memory is None else max(1, -(-most_rows * row_bytes // SLICE_BYTES))
        index_P = index_m.split(sends)
        for number in range(num_slices):
            sent, received = (_slices(c, number, num_slices) for c in (sends, receives))
            index = torch.cat([index_P[p][part] for p, part in enumerate(sent)])
            send, receive = (
                self._spread([p.stop - p.start for p in way]) for way in (sent, received)
            )
            if memory is None:
                rows = row_nD.index_select(0, index)
            else:
                rows = memory.outbox(len(index), row_nD.shape[1], row_nD.dtype)
                torch.index_select(row_nD, 0, index, out=rows)
            if weight_n is not None:
                torch.mul(rows, weight_n[index].unsqueeze(1), out=rows)
            if memory is None:
                transfer = self.transfer(rows, send, receive, phase)
                transfer.start(0)()
                yield 0, transfer.received_RD
                return
            arrived = memory.swap(rows, send, receive, self.patience, phase)
            starts = accumulate(receives, initial=0)
            for start, part, block in zip(starts, received, arrived, strict=False):
                yield start + part.start, block

    def _spread(self, rows_p: Sequence[int]) -> list[int]:
        """Rows for ranks of this node as rows for all ranks."""
        rows_P = [0] * sum(map(len, self.nodes))
        for rank, rows in zip(sorted(self._near), rows_p, strict=True):
            rows_P[rank] = rows
        return rows_P

    @cached_property
    def _memory(self) -> NodeMemory | None:
        assert self.group is not None
        if not works_by_gloo(self.group):
            return None
        return node_memory(self.group, self.rank, sorted(self._near), self.patience)

    @contextmanager
    def recorded(
        self, phase: Phase, like: torch.Tensor, sends: Callable[[], Iterable[Sequence[int]]]
    ) -> Iterator[None]:
        """Record a block that sends rows like ``like`` as one phase.

        How many go to each rank is asked for at the end.
        """
        with timed(phase, like.device):
            yield
        if recording():
            rows = [sum(column) for column in zip(*sends(), strict=True)]
            self._note(phase, rows, like.shape[1] * like.element_size())

    def _note(self, phase: Phase, rows_P: Sequence[int], row_bytes: int) -> None:
        away = sum(count for rank, count in enumerate(rows_P) if rank != self.rank)
        far = sum(count for rank, count in enumerate(rows_P) if rank not in self._near)
        note_bytes(phase, away * row_bytes, far * row_bytes)

    def tell(
        self, word_W1: torch.Tensor, send_splits: Sequence[int], receive_splits: Sequence[int]
    ) -> tuple[Waiting, torch.Tensor]:
        """Send words to every rank at once: how to wait for those from all, and where they come.

        Recorded as bytes of counts.
        """
        assert self.group is not None
        transfer = self.transfer(word_W1, send_splits, receive_splits, "counts")
        self._note("counts", send_splits, word_W1.element_size())
        return transfer.start_singly(), transfer.received_RD

    def move(
        self,
        row_nD: torch.Tensor,
        send_splits: Sequence[int],
        receive_splits: Sequence[int],
        phase: Phase,
        into_RD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Send rows to every rank; received rows, in ``into_RD`` if given, are in order of rank."""
        if self.group is None:
            return row_nD
        with self.recorded(phase, row_nD, lambda: [send_splits]):
            transfer = self.transfer(row_nD, send_splits, receive_splits, phase, into_RD)
            if self.schedule == "single":
                transfer.start_at_once()()
                return transfer.received_RD
            # Round 0 runs beside the others: it stays inside the node and must not keep the uplink
            # idle (0.92 to 0.96 of the bound with it first, 0.93 to 0.98 so; emulated, gloo, 4x2
            # at 50 and 200 Mbit/s).
            wait_inside = transfer.start(0)
            for number in range(1, len(self.nodes)):
                transfer.start(number)()
            wait_inside()
            return transfer.received_RD


def _slices(counts: Sequence[int], number: int, num_slices: int) -> list[slice]:
    """Which of so many things each are dealt with in a turn.

    >>> _slices([4, 1], 0, 2), _slices([4, 1], 1, 2)
    ([slice(0, 2, None), slice(0, 0, None)], [slice(2, 4, None), slice(0, 1, None)])
    """
    return [slice(c * number // num_slices, c * (number + 1) // num_slices) for c in counts]


def rounds_of(nodes: Nodes, rank: int) -> tuple[Round, ...]:
    """Rounds of one rank: in round r, node n sends to node n + r and receives from node n - r.

    Round 0 stays inside the node. Over all rounds a rank meets every other rank once in each
    direction.

    Examples
    --------
    >>> rounds_of(((0, 1), (2,), (3,)), 0)[1]
    Round(targets=(2,), sources=(3,))
    """
    number = next(index for index, ranks in enumerate(nodes) if rank in ranks)
    rounds = []
    for step in range(len(nodes)):
        targets = nodes[(number + step) % len(nodes)]
        sources = nodes[(number - step) % len(nodes)]
        rounds.append(
            Round(
                tuple(peer for peer in targets if peer != rank),
                tuple(peer for peer in sources if peer != rank),
            )
        )
    return tuple(rounds)


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
        self._kept = self._wanted[rank], self._sent_nD.split(self._splits[0])[rank]
        self._incoming = self._wanted
        if row_nD.device.type != "cpu" and works_by_gloo(group, row_nD.device):
            self._sent_nD = self._sent_nD.cpu()
            self._incoming = torch.empty_like(received_RD, device="cpu").split(self._splits[1])
        self._outgoing = self._sent_nD.split(self._splits[0])
        # Elsewhere a queue serves what was started first, and rows that one takes before it sends
        # its own would wait for rows that wait behind them.
        self._takes_ahead = self._sent_nD.device.type == "cpu" and works_by_gloo(group)
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
        return lambda: self._patience.wait([(work, peers)], where)

    def start(self, number: int) -> Waiting:
        """Start a round; returns a function that waits for it. Each is begun and ended in order.

        Round 0 stays inside the node and also copies the rows that this rank keeps. On gloo a round
        ends when its rows have left, and those of the round ``ROUNDS_AHEAD`` before it have come;
        the last one ends when all have come.
        """
        step = self._rounds[number]
        if number == 0:
            self._keep()
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
        self._keep()
        targets, sources = ([*chain.from_iterable(way)] for way in zip(*self._ways(), strict=True))
        return self._start(Round(tuple(targets), tuple(sources)), f"{self._what}, all ranks")

    def _ways(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [(step.targets, step.sources) for step in self._rounds]

    def _keep(self) -> None:
        to, rows = self._kept
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
            self._patience.wait(started, where)
            if self._incoming is not self._wanted:
                for peer in step.sources:
                    self._wanted[peer].copy_(self._incoming[peer])

        return wait
