"""What exchanges cost: time and bytes by phase, recorded while a block of code runs."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

Phase = Literal["counts", "dispatch", "combine", "dispatch_backward", "combine_backward"]
PHASES: tuple[Phase, ...] = (
    "counts",
    "dispatch",
    "combine",
    "dispatch_backward",
    "combine_backward",
)


@dataclass(eq=False)
class ExchangeRecord:
    """Sums over all exchanges of this process while the record is open.

    Times are of moving data: sorting is not in them, nor are packing and summing in a flat
    exchange; a hierarchical one does those between its hops. They include waiting for ranks that
    come late; the wait before a dispatch falls into ``counts``.
    """

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # by phase
    sent_bytes: Counter[str] = field(default_factory=Counter)  # to other ranks, by phase
    cross_node_bytes: Counter[str] = field(default_factory=Counter)  # to other nodes, by phase
    sent_counts_N: list[list[int]] = field(default_factory=list)  # a forward dispatch each
    _events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @property
    def exchange_s(self) -> float:
        """Seconds in all phases; on a GPU this waits for the exchanges to end."""
        return sum(self.phase_s(phase) for phase in PHASES)

    def phase_s(self, phase: Phase) -> float:
        """Seconds in one phase."""
        for name, start, end in self._events:
            end.synchronize()
            self.seconds[name] += start.elapsed_time(end) / 1e3
        self._events.clear()
        return self.seconds[phase]

    @property
    def remote_bytes(self) -> int:
        """Payload bytes sent to other ranks."""
        return sum(self.sent_bytes.values())

    def reset(self) -> None:
        """Forget everything, for example after warm-up steps."""
        self.seconds.clear()
        self.sent_bytes.clear()
        self.cross_node_bytes.clear()
        self.sent_counts_N.clear()
        self._events.clear()


_open: list[ExchangeRecord] = []


@contextmanager
def record_exchanges() -> Iterator[ExchangeRecord]:
    """Record every exchange of this process, forward and backward, inside the block.

    Examples
    --------
    >>> from tamoe.exchange import Exchange
    >>> with record_exchanges() as record:
    ...     rows, handle = Exchange().dispatch(
    ...         torch.ones(3, 2), torch.tensor([[0], [1], [1]]), num_experts=2
    ...     )
    >>> record.sent_counts_N, record.remote_bytes
    ([[1, 2]], 0)
    """
    record = ExchangeRecord()
    _open.append(record)
    try:
        yield record
    finally:
        _open.remove(record)


def note_counts(sent_counts_N: list[int]) -> None:
    """Add the counts of a forward dispatch to the open records."""
    for record in _open:
        record.sent_counts_N.append(list(sent_counts_N))


def recording() -> bool:
    """Whether a record is open."""
    return bool(_open)


def note_bytes(phase: Phase, sent_bytes: int, cross_node_bytes: int) -> None:
    """Add bytes sent to other ranks, and those of them to other nodes, to the open records."""
    for record in _open:
        record.sent_bytes[phase] += sent_bytes
        record.cross_node_bytes[phase] += cross_node_bytes


@contextmanager
def timed(phase: Phase, device: torch.device) -> Iterator[None]:
    """Add the block's time to the open records."""
    if not _open:
        yield
        return
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        for record in _open:
            record._events.append((phase, start, end))
        return
    began_s = time.perf_counter()
    yield
    elapsed_s = time.perf_counter() - began_s
    for record in _open:
        record.seconds[phase] += elapsed_s
