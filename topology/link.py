"""A link of the graph, and what a pair of ranks was measured to get."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from tamoe.topology.errors import InputError

Origin = Literal["measured", "interpolated", "static", "given"]
ORIGINS: tuple[Origin, ...] = ("measured", "interpolated", "static", "given")


@dataclass(frozen=True, slots=True)
class Link:
    """A directed edge of the graph.

    A link lets one burst of ``burst_bytes`` pass at once after a pause (token buckets do, emulated
    or in a cloud); beyond that it carries ``bandwidth_bytes_per_s``.
    """

    source: str  # vertex
    target: str  # vertex
    bandwidth_bytes_per_s: float  # payload, > 0
    latency_s: float = 0.0  # one way, >= 0
    burst_bytes: float = 0.0  # >= 0
    level: int = 0  # 0 device link, 1 node uplink, 2 and more switch uplink
    origin: Origin = "given"  # where the numbers come from

    def __post_init__(self) -> None:
        where = f"link {self.source} -> {self.target}"
        if not (math.isfinite(self.bandwidth_bytes_per_s) and self.bandwidth_bytes_per_s > 0):
            raise InputError(
                f"{where}: bandwidth_bytes_per_s is {self.bandwidth_bytes_per_s}; "
                f"allowed: finite and > 0"
            )
        for name in ("latency_s", "burst_bytes"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{where}: {name} is {value}; allowed: finite and >= 0")
        if self.origin not in ORIGINS:
            raise InputError(f"{where}: origin is {self.origin!r}; allowed: {', '.join(ORIGINS)}")


@dataclass(frozen=True, slots=True)
class Pair:
    """What one flow alone from one rank to another was measured to get."""

    alpha_s: float  # one-way latency of a small message
    beta_s_per_byte: float  # inverse bandwidth of a large one
    origin: Origin = "measured"


LINK_FIELDS = frozenset(spec.name for spec in dataclasses.fields(Link)) - {"source", "target"}
