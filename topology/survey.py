"""What a probe knows about a cluster so far, and the capacities that follow from it.

A capacity is the largest total that was seen to cross the border of a vertex in one direction,
with one flow or with many at once: each total is a lower bound, and the flows were chosen so that
the border is what limits some of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from tamoe.topology.fit import PairFit, median
from tamoe.topology.hierarchy import Partition

SAME = 0.93  # totals this near to the best are readings of the same capacity (ClusterKit's figure)
SEVERAL = 1.15  # times what one flow gets, from where on flows at the same time get more


@dataclass(frozen=True)
class Window:
    """Flows that ran at the same time: pairs of ranks and what each carried, bytes per second."""

    flows: tuple[tuple[int, int], ...]
    rates_bytes_per_s: tuple[float, ...]

    @property
    def total_bytes_per_s(self) -> float:
        """What all flows carried together."""
        return math.fsum(self.rates_bytes_per_s)


@dataclass
class Survey:
    """What is known so far about a cluster; grows while the probe runs."""

    nodes: Partition
    fits: dict[tuple[int, int], PairFit] = field(default_factory=dict)
    # As read in rounds of many pairs, where flows may have met above the nodes: that shows
    # switches which hold back many flows but not one.
    met: dict[tuple[int, int], PairFit] = field(default_factory=dict)
    windows: list[Window] = field(default_factory=list)
    loads: list[Window] = field(default_factory=list)  # node to node while all nodes send
    copied: set[tuple[int, int]] = field(default_factory=set)  # fits taken over from another pair
    overhead_s: float = 0.0
    copy_bytes_per_s: float | None = None
    cpu_bound: bool = False  # ranks share processors: pairs inside nodes differ by chance alone
    interface_bytes_per_s: tuple[float | None, ...] = ()  # of each node, as its driver states it
    _flows: _Flows | None = field(default=None, repr=False)

    def add(
        self, pair: tuple[int, int], fit: PairFit, *, copied: bool = False, met: bool = True
    ) -> None:
        """Take in what one flow was measured to get, in place of what was known of it.

        ``met`` False keeps what an earlier round of many pairs read, for finding switches.
        """
        self.fits[pair] = fit
        if met:
            self.met[pair] = fit
        (self.copied.add if copied else self.copied.discard)(pair)
        self._flows = None

    @cached_property
    def node_of(self) -> dict[int, int]:
        """Number of the node of each rank."""
        return {rank: node for node, ranks in enumerate(self.nodes) for rank in ranks}

    @property
    def flows(self) -> _Flows:
        """The fits as columns."""
        if self._flows is None:
            self._flows = _Flows.of(self)
        return self._flows

    @property
    def noise(self) -> float:
        """Median noise of the pairs between nodes, of all pairs if there are none."""
        between = [fit.noise for fits in self.between().values() for fit in fits]
        values = between or [fit.noise for fit in self.fits.values()]
        return median(values) if values else 0.0

    def between(self, *, met: bool = False) -> dict[tuple[int, int], list[PairFit]]:
        """Fits from node to node; ``met``: as read in rounds of many pairs."""
        by_node = self._by_node(self.met if met else self.fits)
        return {ends: fits for ends, fits in by_node.items() if ends[0] != ends[1]}

    def inside(self) -> dict[tuple[int, int], list[PairFit]]:
        """Fits inside each node, under (node, node)."""
        by_node = self._by_node(self.fits)
        return {ends: fits for ends, fits in by_node.items() if ends[0] == ends[1]}

    def _by_node(
        self, fits: Mapping[tuple[int, int], PairFit]
    ) -> dict[tuple[int, int], list[PairFit]]:
        found: dict[tuple[int, int], list[PairFit]] = {}
        for (i, j), fit in fits.items():
            found.setdefault((self.node_of[i], self.node_of[j]), []).append(fit)
        return found


@dataclass(frozen=True)
class _Flows:
    """Source node, target node, rate and burst of every fit, one row each."""

    source_F: np.ndarray
    target_F: np.ndarray
    rate_F: np.ndarray
    burst_F: np.ndarray

    @staticmethod
    def of(survey: Survey) -> _Flows:
        ends = np.array([(survey.node_of[i], survey.node_of[j]) for i, j in survey.fits])
        ends = ends.reshape(-1, 2)
        fits = survey.fits.values()
        return _Flows(
            ends[:, 0],
            ends[:, 1],
            np.array([fit.bandwidth_bytes_per_s for fit in fits]),
            np.array([fit.burst_bytes for fit in fits]),
        )

    def crossing(self, members: Iterable[int], out: bool) -> np.ndarray:
        """Rows whose flow leaves (or enters) the nodes."""
        nodes = list(members)
        from_F, to_F = np.isin(self.source_F, nodes), np.isin(self.target_F, nodes)
        return from_F & ~to_F if out else to_F & ~from_F


def capacity(survey: Survey, members: Iterable[int], *, out: bool) -> float | None:
    """Bytes per second that can leave (``out``) or enter a set of nodes; None if unmeasured."""
    inside, flows = set(members), survey.flows
    alone = flows.rate_F[flows.crossing(inside, out)].tolist()
    many = [
        window.total_bytes_per_s
        for window in survey.windows
        if all(_crosses(survey, flow, inside, out) for flow in window.flows)
    ]
    one, several = _usual_best(alone), _usual_best(many)
    if one is None or several is None:
        return one or several
    # A slope is the better reading of a link that one flow fills.
    return several if several > SEVERAL * one else one


def _usual_best(totals: list[float]) -> float | None:
    near = [total for total in totals if total >= SAME * max(totals)]
    return median(near) if near else None


def _crosses(survey: Survey, flow: tuple[int, int], inside: set[int], out: bool) -> bool:
    ends = [survey.node_of[rank] in inside for rank in flow]
    return ends == [out, not out]


def burst_bytes(survey: Survey, members: Iterable[int], *, out: bool) -> float:
    """Burst that flows out of (or into) a set of nodes were seen to get; 0 where none.

    Flows that met others may have found the bucket empty, so a third that saw a burst is enough.
    """
    flows = survey.flows
    bursts = flows.burst_F[flows.crossing(members, out)].tolist()
    seen = [burst for burst in bursts if burst > 0]
    return median(seen) if 3 * len(seen) > len(bursts) else 0.0
