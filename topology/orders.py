"""What rank 0 tells the ranks to do, and how a pair or a flow is to be measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

BUCKET_BYTES = 131072  # assumed token bucket; cloud links have larger ones, which are not seen

RankPair = tuple[int, int]


@dataclass(frozen=True)
class PairPlan:
    """How a pair is measured. Repetitions are odd, so that a median is a sample."""

    max_bytes: int = 16 << 20  # largest stream
    pings: int = 21  # round trips for each small size
    sweeps: int = 9  # streams of each size, at most
    min_sweeps: int = 5
    target_s: float = 5e-3  # the largest stream takes at least this, unless max_bytes is reached
    pair_s: float = 2.0  # sweeps are cut to min_sweeps, then to 3, to stay near this time


@dataclass(frozen=True)
class FlowPlan:
    """How flows that run at the same time are measured."""

    message_bytes: int = 65536
    head_s: float = 0.05  # not counted: bursts, and flows that begin a little later
    window_s: float = 0.2


@dataclass(frozen=True)
class Order:
    """One thing that ranks do at the same time. Of a pair, the first sends first."""

    do: str  # "pairs", "one_way", "flows", "load", "copy", "overhead", "go", "stop", "abort"
    pairs: tuple[RankPair, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def to_text(self) -> str:
        """The order as JSON."""
        return json.dumps({"do": self.do, "pairs": self.pairs, "settings": self.settings})

    @staticmethod
    def from_text(text: str | bytes) -> Order:
        """The order that :meth:`to_text` wrote."""
        document = json.loads(text)
        pairs = tuple((int(i), int(j)) for i, j in document["pairs"])
        return Order(document["do"], pairs, document["settings"])

    def answering(self) -> tuple[int, ...]:
        """Ranks that post a result."""
        if self.do == "pairs":
            return tuple(rank for pair in self.pairs for rank in pair)
        return tuple(first for first, _ in self.pairs)


def stream_bytes(bytes_per_s: float, plan: PairPlan) -> int:
    """Largest stream: a power of two that takes ``target_s`` and is 16 buckets if time allows.

    A quarter of it is the other point of the slope, and must exceed the bucket.

    >>> stream_bytes(24e6, PairPlan()) >> 20, stream_bytes(1e6, PairPlan()) >> 10
    (2, 512)
    >>> stream_bytes(1e9, PairPlan()) >> 20, stream_bytes(1e11, PairPlan()) >> 20
    (8, 16)
    """
    size = 16 * BUCKET_BYTES
    while size > 4 * BUCKET_BYTES and size / bytes_per_s > plan.pair_s / 4:
        size //= 2
    while size < plan.max_bytes and size / bytes_per_s < plan.target_s:
        size *= 2
    return min(size, max(plan.max_bytes, 4 * BUCKET_BYTES))


def sweep_count(sweep_s: float, plan: PairPlan) -> int:
    """Sweeps that fit into the time of a pair: an odd number, at least 3 (or all, if fewer).

    >>> sweep_count(0.01, PairPlan()), sweep_count(0.35, PairPlan()), sweep_count(9.0, PairPlan())
    (9, 5, 3)
    """
    fitting = int(plan.pair_s / max(sweep_s, 1e-9)) - 1 | 1
    return min(plan.sweeps, max(3, fitting))
