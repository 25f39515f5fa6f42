"""How long transfers take that share links: a fluid simulation with max-min fair rates.

Every rank goes through steps. A step holds the flows that it sends or receives then, and work that
goes on beside them; ranks that work at the same time share the cores. The next step begins when the
work is done, what it has to wait for has arrived, and of each flow that it sends the rest fits in a
socket. A flow runs once its sender has come to its step, and its receiver to it or to one before it
that takes those rows already. Flows of earlier steps take more of a link than those of later ones
(only steps count that have a flow under way on it), those of the first rank of a node maybe
more than those of the next, and flows that two of the busiest links mix with others lose some of
their rate. A link with a token bucket lets a burst through before it holds back; the bucket fills
again while the link is less than full. That burst goes to the node that is written to first.

Shape suffixes: F flows, L links, P ranks, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tamoe.topology.graph import Topology

# Flows within this share of their end finish together: fewer events, and an error below it.
TOGETHER = 0.005
FREE_BYTES_PER_S = 1e15
NEVER = np.iinfo(np.int64).max
SOON_S = 1e-9  # work that is left when it has as good as ended
# Share of a link that a flow of a later step takes beside one of an earlier step, whose connection
# has its window open. With 1, a combine in rounds on three nodes was predicted 11 % too long, with
# .25 one-hot exchanges beside a slow node 6 % (emulated), with .5 none of both.
LATER = 0.5
# Flows share a link in proportion to their bytes and these. Without it, small ones ended with the
# large ones beside them, and one-hot dispatches in rounds were predicted 23 % too long.
HEAD_BYTES = 2.0**16
# A rank writes to one node after another, and what an idle bucket lets through at once opens the
# windows of those to the first: as much again waits at the link before rows for the next. So the
# first has the link nearly to itself for two bursts. Without it, one-hot combines beside a slow
# node were predicted 11 of 150 ms too short where others are written to before it (emulated).
FIRST_BURSTS, SECOND = 2.0, 0.001
# Of a flow that two of the busiest links mix with others, what loses some of its rate; then enough
# of its packets wait at each link. With all of its bytes, exchanges all at once on eight nodes were
# predicted up to 14 % too long where they are large, and 5 % too short where small (emulated).
CROSSING_BYTES = 2.0**16
NEARLY = 0.85  # links with this share of what is left on the busiest one hold transfers up as well
# Linux lets a socket grow to megabytes. Without it, one-hot combines in rounds on three nodes were
# predicted 23 % too long, with it 8 % (emulated); 4 MiB in its place changes nothing.
SOCKET_BYTES = 2.0**20
Flows = tuple[tuple[int, int, float], ...]  # source, target, bytes


@dataclass(frozen=True)
class Step:
    """What a rank does at a time: flows, as (source, target, bytes), and work beside them.

    ``work_s`` are seconds of a core. Rows from other nodes may come up to ``early`` of its steps
    before this one, and are waited for ``late`` steps after it. Each flow is of so many messages.
    """

    flows: Flows = ()
    work_s: float = 0.0
    early: int = 0
    late: int = 0
    messages: float = 1.0


@dataclass(frozen=True, eq=False)
class Timeline:
    """When everything has ended, and seconds that each link needs at its rate, less bursts."""

    time_s: float
    busy_L: np.ndarray


def run_steps(
    topology: Topology,
    steps_P: Sequence[Sequence[Step]],
    *,
    crossing_share: float = 1.0,
    at_once: int | None = None,
    behind: float = 1.0,
) -> Timeline:
    """Simulate steps of all ranks.

    Parameters
    ----------
    topology
        The links.
    steps_P
        Steps of each rank. A flow belongs to the steps of equal number at its two ends, is given
        at either end or at both, and has to differ from others of its step in source or target.
        What comes early or late is up to the rank that gets it.
    crossing_share
        Share of its rate, > 0 to 1, that a message's beginning keeps which goes through two of the
        busiest links among different flows: neither always has its packets when the other has room.
        What it loses is spread over the flow.
    at_once
        Cores, >= 1, that all ranks share alike while they work; None: as many as ranks.
    behind
        Share, > 0 to 1, of what a rank takes of a link that the next one of its node takes.

    Examples
    --------
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(4e9, 1e9))
    >>> there, back = Step(((0, 1, 1e9),)), Step(((1, 0, 2e9),), work_s=2.5)
    >>> round(run_steps(topology, [[there, back], [there, back]]).time_s, 2)
    3.5
    """
    num_ranks = len(steps_P)
    bandwidth_L = np.array([link.bandwidth_bytes_per_s for link in topology.links])
    burst_L = np.array([link.burst_bytes for link in topology.links], dtype=float)
    ends, step_F, left_F = _flows(steps_P)
    size_F = left_F.copy()
    incidence_FL = np.zeros((len(ends), len(bandwidth_L)))
    for number, (source, target) in enumerate(ends):
        incidence_FL[number, list(topology.route(source, target))] = 1.0
    source_F = np.array([source for source, _ in ends], dtype=int)
    target_F = np.array([target for _, target in ends], dtype=int)
    last_P = np.array([len(steps) for steps in steps_P])
    sends, gets = (
        [steps_P[p][n] if n < last_P[p] else Step() for p, n in zip(end_F, step_F, strict=True)]
        for end_F in (source_F, target_F)
    )
    node_P = np.array(topology.node_of)
    far_F = node_P[source_F] != node_P[target_F]
    opens_F = step_F - far_F * np.array([step.early for step in gets], dtype=int)
    due_F = step_F + far_F * np.array([step.late for step in gets], dtype=int)
    due_F = np.clip(due_F, step_F, np.maximum(last_P[target_F] - 1, step_F))
    place_P = {rank: place for ranks in topology.nodes for place, rank in enumerate(ranks)}
    weight_F = (size_F + HEAD_BYTES) * behind ** np.array(
        [float(place_P[source]) for source, _ in ends]
    )
    messages_F = np.array([step.messages for step in sends], dtype=float)
    head_F = np.minimum(CROSSING_BYTES * messages_F / size_F, 1.0)
    kept_F = 1 / (1 + (1 / crossing_share - 1) * head_F)
    credit_L, busy_L = burst_L.copy(), np.zeros_like(burst_L)
    first_L = FIRST_BURSTS * burst_L  # bytes until those written to first leave others their share
    turn_F = step_F * num_ranks + (node_P[target_F] - node_P[source_F]) % len(topology.nodes)
    step_P, now_s = np.zeros(num_ranks, dtype=int), 0.0
    left_s_P = np.array([steps[0].work_s if steps else 0.0 for steps in steps_P])
    # Flows that keep each rank in each of its steps: its own, until the rest fits in a socket, and
    # those that it waits for then.
    held_PS = np.zeros((num_ranks, 1 + int(last_P.max(initial=0))), dtype=int)
    held = [
        (np.ones(len(ends), dtype=bool), SOCKET_BYTES, (source_F, step_F)),
        (np.ones(len(ends), dtype=bool), 0.0, (target_F, due_F)),
    ]
    for _, _, places in held:
        np.add.at(held_PS, places, 1)
    while True:
        for holds_F, until, (end_F, number_F) in held:
            freed_F = holds_F & (left_F <= until)
            np.subtract.at(held_PS, (end_F[freed_F], number_F[freed_F]), 1)
            holds_F &= ~freed_F
        _advance(steps_P, step_P, last_P, left_s_P, held_PS)
        if (step_P >= last_P).all():
            return Timeline(float(now_s), busy_L)
        active_F = (left_F > 0) & (step_P[source_F] >= step_F) & (step_P[target_F] >= opens_F)
        capacity_L = np.where(credit_L > 0, FREE_BYTES_PER_S, bandwidth_L)
        rate_F, active_FL = np.zeros(len(left_F)), incidence_FL[active_F]
        later_F = _steps_before(active_FL, step_F[active_F])
        waits_F = _written_later(active_FL[:, first_L > 0], source_F[active_F], turn_F[active_F])
        share_F = weight_F[active_F] * LATER**later_F * np.where(waits_F, SECOND, 1.0)
        rate_F[active_F] = fair_rates(active_FL, capacity_L, share_F, together=TOGETHER)
        load_L = rate_F[active_F] @ active_FL
        left_s_L = left_F[active_F] @ active_FL / bandwidth_L
        busiest_L = left_s_L > NEARLY * left_s_L.max(initial=0.0)
        busiest_L &= credit_L == 0  # a burst is held up by nothing
        crosses_F = _crossing(active_FL[:, busiest_L])
        rate_F[active_F] *= np.where(crosses_F, kept_F[active_F], 1.0)
        working = int(np.count_nonzero(left_s_P))
        core_share = min((at_once or num_ranks) / max(working, 1), 1.0)  # that each of them has
        works_s = left_s_P[left_s_P > 0] / core_share
        unsent_F = np.where(left_F > SOCKET_BYTES, left_F - SOCKET_BYTES, left_F)
        ends_s = unsent_F[active_F] / rate_F[active_F]
        over_L = (load_L > (1 + 2 * TOGETHER) * bandwidth_L) & (credit_L > 0)
        empties_s = credit_L[over_L] / (load_L - bandwidth_L)[over_L]
        begins_L = (first_L > 0) & (load_L > 0)
        begun_s = first_L[begins_L] / load_L[begins_L]
        step_s = min([*works_s, *ends_s, *empties_s, *begun_s], default=np.inf)
        assert np.isfinite(step_s), "flows whose ends are never in the same step"
        busy_L += step_s * np.minimum(load_L / bandwidth_L, 1.0)
        spare_L = bandwidth_L - load_L
        spare_L[np.abs(spare_L) <= 2 * TOGETHER * bandwidth_L] = 0.0  # full, whatever rounding says
        credit_L = np.clip(credit_L + step_s * spare_L, 0.0, burst_L)
        credit_L[credit_L < 1e-6 * burst_L] = 0.0
        first_L -= step_s * load_L
        first_L[first_L < 1e-6 * burst_L] = 0.0
        idle_L = (load_L == 0) & (credit_L == burst_L)
        first_L = np.where(idle_L, FIRST_BURSTS * burst_L, first_L)
        now_s += step_s
        left_s_P -= core_share * step_s
        left_s_P[left_s_P <= SOON_S] = 0.0
        left_F -= rate_F * step_s
        left_F[active_F & (left_F <= TOGETHER * size_F)] = 0.0
        sent_F = active_F & (np.abs(left_F - SOCKET_BYTES) <= TOGETHER * size_F)
        left_F[sent_F] = np.minimum(left_F[sent_F], SOCKET_BYTES)


def run_steps_together(
    topology: Topology, steps_P: Sequence[Sequence[Step]], *, at_once: int | None = None
) -> Timeline:
    """As :func:`run_steps`, where every step begins on all ranks at once and links are shared well.

    Takes little time on large clusters; steps that ranks would begin apart make it too long. Steps
    that ranks go on through before rows have come are one, which makes it too short.

    Examples
    --------
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(4e9, 1e9))
    >>> there, back = Step(((0, 1, 1e9),)), Step(((1, 0, 2e9),), work_s=2.5)
    >>> run_steps_together(topology, [[there, back], [there, back]]).time_s
    3.5
    """
    bandwidth_L = np.array([link.bandwidth_bytes_per_s for link in topology.links])
    credit_L = np.array([link.burst_bytes for link in topology.links], dtype=float)
    busy_L, time_s = np.zeros_like(bandwidth_L), 0.0
    for first, end in _runs(steps_P):
        load_L, work_s = np.zeros_like(bandwidth_L), 0.0
        for number in range(first, end):
            steps = [steps[number] for steps in steps_P if number < len(steps)]
            for source, target, size in {flow for step in steps for flow in step.flows}:
                if source != target:
                    load_L[list(topology.route(source, target))] += size
            each_s = [step.work_s for step in steps]
            work_s += max(max(each_s), sum(each_s) / (at_once or len(steps_P)))
        each_L = np.maximum(load_L - credit_L, 0.0) / bandwidth_L
        credit_L = np.maximum(credit_L - load_L, 0.0)
        busy_L += each_L
        time_s += max(float(each_L.max(initial=0.0)), work_s)
    return Timeline(time_s, busy_L)


def _runs(steps_P: Sequence[Sequence[Step]]) -> list[tuple[int, int]]:
    """First step and end of runs of steps that some rank goes on through before rows have come."""
    runs, first, last = [], 0, max(map(len, steps_P), default=0)
    while first < last:
        late = max(steps[first].late for steps in steps_P if first < len(steps))
        runs.append((first, min(first + late + 1, last)))
        first += late + 1
    return runs


def fair_rates(
    incidence_FL: np.ndarray,
    capacity_L: np.ndarray,
    weight_F: np.ndarray | None = None,
    *,
    together: float = 0.0,
) -> np.ndarray:
    """Max-min fair rates of flows: no flow can have more without another having less.

    Parameters
    ----------
    incidence_FL
        ``[F, L]``, 1 where a flow goes over a link.
    capacity_L
        ``[L]`` bytes/s, > 0.
    weight_F
        ``[F]``, > 0: shares of a link are in proportion to them. None: all alike.
    together
        Links whose shares differ by less than this part of the least fill at the same time: fewer
        passes, and as much of them is left unused.

    Examples
    --------
    >>> fair_rates(np.array([[1, 0], [1, 1], [0, 1]]), np.array([1.0, 4.0])).tolist()
    [0.5, 0.5, 3.5]
    """
    rate_F = np.full(len(incidence_FL), FREE_BYTES_PER_S)
    left_L = capacity_L.astype(float)
    weight_F = np.ones(len(incidence_FL)) if weight_F is None else weight_F
    open_F = np.where(incidence_FL.any(axis=1), weight_F, 0.0)  # weights of flows without a rate
    while open_F.any():
        weight_L = open_F @ incidence_FL
        share_L = np.divide(left_L, weight_L, where=weight_L > 0, out=np.full_like(left_L, np.inf))
        least = share_L.min()
        full_L = share_L <= least * (1.0 + together)
        fixed_F = (open_F > 0) & (incidence_FL @ full_L > 0)
        rate_F[fixed_F] = np.maximum(least * weight_F[fixed_F], 1e-9)
        open_F[fixed_F] = 0.0
        left_L = np.maximum(left_L - np.where(fixed_F, rate_F, 0.0) @ incidence_FL, 0.0)
    return rate_F


def _steps_before(incidence_FL: np.ndarray, step_F: np.ndarray) -> np.ndarray:
    """Of each flow, how many earlier steps have flows on one of its links: on that with most."""
    steps, number_F = np.unique(step_F, return_inverse=True)
    on_SL = np.zeros((len(steps), incidence_FL.shape[1]), dtype=int)
    np.maximum.at(on_SL, number_F, incidence_FL > 0)
    before_SL = on_SL.cumsum(0) - on_SL
    before_F: np.ndarray = (before_SL[number_F] * (incidence_FL > 0)).max(1, initial=0)
    return before_F


def _written_later(
    incidence_FL: np.ndarray, source_F: np.ndarray, turn_F: np.ndarray
) -> np.ndarray:
    """Whether a flow's source has written to an earlier one on one of these links."""
    turn_FL = np.where(incidence_FL > 0, turn_F[:, None], NEVER)
    first_PL = np.full((source_F.max(initial=-1) + 1, turn_FL.shape[1]), NEVER)
    np.minimum.at(first_PL, source_F, turn_FL)
    later_F: np.ndarray = ((turn_FL > first_PL[source_F]) & (turn_FL < NEVER)).any(1)
    return later_F


def _crossing(incidence_FL: np.ndarray) -> np.ndarray:
    """Whether two of these links mix a flow with others."""
    both_LL = incidence_FL.T @ incidence_FL  # flows on both links
    mixed_LL = both_LL < both_LL.diagonal()[:, None]
    mixed_LL |= mixed_LL.T
    crosses_F: np.ndarray = ((incidence_FL @ mixed_LL) * incidence_FL).any(1)
    return crosses_F


def _flows(
    steps_P: Sequence[Sequence[Step]],
) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
    """Ends, step and bytes of every flow with bytes, once."""
    found = {
        (number, source, target): size
        for steps in steps_P
        for number, step in enumerate(steps)
        for source, target, size in step.flows
        if size > 0 and source != target
    }
    ends = [(source, target) for _, source, target in found]
    numbers = np.array([number for number, _, _ in found], dtype=int)
    return ends, numbers, np.array(list(found.values()), dtype=float)


def _advance(
    steps_P: Sequence[Sequence[Step]],
    step_P: np.ndarray,
    last_P: np.ndarray,
    left_s_P: np.ndarray,
    held_PS: np.ndarray,
) -> None:
    """Let every rank whose step is done begin the next one that has something to do."""
    for rank in np.flatnonzero((step_P < last_P) & (left_s_P == 0)).tolist():
        while not held_PS[rank, step_P[rank]]:
            step_P[rank] += 1
            if step_P[rank] == last_P[rank]:
                break
            left_s_P[rank] = steps_P[rank][step_P[rank]].work_s
            if left_s_P[rank] > 0:
                break
