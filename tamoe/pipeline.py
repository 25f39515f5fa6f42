"""Keeps the links between nodes busy while ranks work on what has arrived.

The parts of an exchange take turns on the slow links. Each is a generator that yields None when it
has rows ready for its next round between nodes, and then, when it is resumed, starts that round and
yields a function that waits for it. While one part's round is under way, the part before it copies,
adds up and moves rows inside its node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tamoe.solver.parts import turns
from tamoe.transfer import Waiting

Part = Iterator[Waiting | None]


def run_in_turns(
    parts: Sequence[Part], num_hops: int, num_rounds: int, meanwhile: Callable[[], None]
) -> None:
    """Run every part to its end, one round of one part between nodes at a time.

    Parameters
    ----------
    parts
        Generators as described above; all ranks have equally many.
    num_hops
        Hops between nodes of each part.
    num_rounds
        Rounds of each hop.
    meanwhile
        Called once, while the first rows are under way, or at the start where none are.
    """
    ready: set[int] = set()

    def prepare(part: int) -> None:
        """Let a part work until its next rows are ready, or it is done."""
        if part not in ready:
            ready.add(part)
            next(parts[part], None)

    order = turns(len(parts), num_hops)
    arrived: int | None = None
    if not order or not num_rounds:
        meanwhile()
    for turn, part in enumerate(order):
        for number in range(num_rounds):
            prepare(part)
            ready.discard(part)
            wait = next(parts[part])
            if turn == 0 and number == 0:
                meanwhile()
            if arrived is not None and arrived != part:
                prepare(arrived)
            if turn + 1 < len(order) and order[turn + 1] != part:
                prepare(order[turn + 1])
            assert wait is not None
            wait()
            del wait  # it holds rows
        arrived = part
    for rest in parts:
        for _ in rest:
            pass
