"""A fair start for what is timed: all ranks together, and no link's token bucket half empty."""

from __future__ import annotations

import time

import torch.distributed as dist

from tamoe.topology.graph import Topology

# Where ranks share cores, the first to leave a barrier would take those that the last one needs.
_LEAVING_S = 0.005


def refill_s(topology: Topology) -> float:
    """Seconds until every token bucket of idle links is full again; 0 where there are none.

    An emulated link lets a burst through before it holds back. What is timed right behind another
    exchange would find the bucket empty, and what runs behind an exchange of other links full.

    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e9, 1e7))
    >>> refill_s(topology)
    0.0
    """
    return max(
        (link.burst_bytes / link.bandwidth_bytes_per_s for link in topology.links), default=0
    )


def line_up(pause_s: float) -> None:
    """Return on all ranks within some ms, once all have come and so many seconds are over."""
    dist.barrier()
    if pause_s > 0:
        time.sleep(pause_s)
        dist.barrier()
        time.sleep(_LEAVING_S)
