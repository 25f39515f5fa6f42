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
from itertools import accumulate
from typing import Literal

import torch
import torch.distributed as dist

from tamoe.groups import works_by_gloo
from tamoe.node_memory import NodeMemory, node_memory
from tamoe.record import Phase, note_bytes, recording, timed
from tamoe.solver.parts import inside_slice_bytes
from tamoe.transfer import Round, Transfer, Waiting
from tamoe.waiting import Patience

Schedule = Literal["single", "rounds"]
Nodes = tuple[tuple[int, ...], ...]


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
        largest_rows: int,
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
        largest_rows
            The same of the largest part of the exchange, to which the slices of all are cut.
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
        # Each slice may have a row more for every rank, where rows do not divide.
        rows_each = inside_slice_bytes(largest_rows * row_bytes) // max(row_bytes, 1) - len(near)
        rows_each = max(rows_each, len(near))
        num_slices = 1 if memory is None else max(1, -(-most_rows // rows_each))
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
                wait = transfer.start(0)
                transfer.keep()
                wait()
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

    def leave_node(self) -> None:
        """End this rank's part in its node: peers that wait for rows of it hear so at once."""
        memory: NodeMemory | None = vars(self).get("_memory")  # asking for it would connect
        if memory is not None:
            memory.close()

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
                wait = transfer.start(number)
                transfer.keep()
                wait()
            transfer.keep()
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
