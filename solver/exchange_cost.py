"""What an exchange costs: its steps on the links of a topology, work beside them, and a breakdown.

The steps are those that the exchanges take (rounds, hops, parts in turns); constants that a
calibration measured turn them into seconds. All times here are simulated.

Shape suffixes: P ranks of the cluster, p ranks of a group, M nodes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tamoe.solver.constants import Constants, constants_of, read_constants
from tamoe.solver.exchange_rows import ALL_WAYS, EXCHANGES, Exchange, Rows, Way
from tamoe.solver.flows import Flows, Step, run_steps, run_steps_together
from tamoe.solver.parts import inside_slice_bytes, turns
from tamoe.topology.errors import InputError
from tamoe.topology.graph import Topology

_ALIKE: dict[Way, Way] = {"combine_backward": "dispatch", "dispatch_backward": "combine"}
MOST_RANKS = 32  # beyond, sharing of links is not simulated flow by flow, which takes seconds
MOST_RANK_SLICES = 64  # ranks times slices that are told apart, for the same reason
# Of a flat exchange's other work on rows, what is packing and what goes on while they are under way
# (copies to and from sockets, and of rows that a rank keeps); the rest comes at the end. With
# halves before and after, combines were predicted up to 10 % too short, with a quarter under way
# dispatches up to 9 % too long (emulated, two and four nodes).
PACKED, ALONG = 0.25, 0.5
# Of a dispatch's work on rows, what is sorting choices and finding places, before any row sets out:
# of 37 ms of a core, 6 (flat, 32,768 choices of a rank that stay inside its node; emulated, 4x2).
# Without it, when sorting took .25, dispatches of many rows inside nodes were predicted up to 8 %
# too short.
PLANNED = 0.15
# Ranks that share cores come out of their planning one after another, and what comes to a link
# first leaves it first: in a dispatch each takes this much of what the one of its node before it
# takes. With 1, those over two hops were predicted up to 19 % too long. In other ways, where ranks
# begin together, .5 predicted up to 10 % too short (emulated).
BEHIND = 0.5
# Of a dispatch's start, what ranks that share few cores come out of one after another: rows of the
# first are under way while the others plan. Without it, one-hot dispatches of 16 ranks on two cores
# were predicted up to 14 % too long (emulated).
APART = 0.35
# Of a hierarchical dispatch's work on tokens, what comes before its first rows; the other parts are
# planned while rows are under way. With all of it before them, dispatches of two groups on nodes of
# their own were predicted 9 % too long (emulated, 4x2).
PLANNED_FIRST = 0.5
# Of the work on a slice inside a node, what a rank does alone (it packs its rows); for the rest,
# and for other slices, rows have to be there that the others relay. Without it, dispatches of which
# many rows move inside nodes were predicted up to 14 % too short (emulated, 2x4).
INSIDE_ALONE = 0.5


@dataclass(frozen=True)
class Prediction:
    """Simulated seconds of one way of an exchange, and those that each link is busy.

    ``bottleneck`` is the busiest link in words: "uplink of node 3, 41 ms of 44".
    """

    time_s: float
    busy_s: Mapping[tuple[str, str], float]
    bottleneck: str


def predict(
    topology: Topology,
    exchange: Exchange,
    way: Way,
    groups: Sequence[Rows],
    constants: Constants | None = None,
) -> Prediction:
    """Time of one way of an exchange, of several groups at the same time.

    Latencies of links are in no term of their own: what they cost is in measured constants alone.

    Parameters
    ----------
    topology
        Of the whole cluster.
    exchange
        "flat single", "flat rounds" or "hierarchical".
    way
        "dispatch", or "combine", which moves the same bytes back; or the backward pass of either,
        which plans nothing.
    groups
        What each group moves.
    constants
        None: those of the topology's file, or bare links.

    Raises
    ------
    InputError
        The exchange or the way is unknown.

    Examples
    --------
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(4e9, 1e9))
    >>> rows = Rows((0, 1), [np.array([[0, 2e9], [1e9, 0]])])
    >>> predicted = predict(topology, "flat rounds", "dispatch", [rows])
    >>> round(predicted.time_s, 2), predicted.bottleneck
    (2.0, 'downlink of node 1, 1999 ms of 1999')
    """
    for name, value, allowed in (("exchange", exchange, EXCHANGES), ("way", way, ALL_WAYS)):
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
    if constants is None:
        constants = constants_of(read_constants(topology), exchange, way, Constants())
    plans, way = way == "dispatch", _ALIKE.get(way, way)
    steps_P: list[list[Step]] = [[] for _ in range(topology.num_ranks)]
    for rows in groups:
        local = topology.subset(rows.ranks)
        steps_of = _flat_steps if exchange.startswith("flat") else _relayed_steps
        in_rounds = exchange != "flat single"
        work = _Work(constants, rows, topology.num_ranks, PLANNED if plans else 0.0)
        for place, steps in enumerate(steps_of(local, rows, way, work, in_rounds)):
            steps_P[rows.ranks[place]] = steps
    largest = max((len(rows.ranks) for rows in groups), default=0)
    # Half of it is a rank's own planning, half grows with the ranks that it tells its counts to.
    start_s = constants.start_s * (1 + largest / topology.num_ranks) / 2
    if plans and constants.at_once is not None:
        start_s -= _begin_apart(topology, steps_P, start_s, constants.at_once)
    if topology.num_ranks <= MOST_RANKS:
        line = run_steps(
            topology,
            steps_P,
            crossing_share=constants.crossing_share,
            at_once=constants.at_once,
            behind=BEHIND if plans and constants.at_once is not None else 1.0,
        )
    else:
        line = run_steps_together(topology, steps_P, at_once=constants.at_once)
    busy_s = {
        (link.source, link.target): busy_s
        for link, busy_s in zip(topology.links, line.busy_L.tolist(), strict=True)
        if busy_s > 0
    }
    time_s = start_s + line.time_s
    return Prediction(time_s, busy_s, _bottleneck(topology, time_s, busy_s))


def _begin_apart(
    topology: Topology, steps_P: list[list[Step]], start_s: float, cores: int
) -> float:
    """Make the end of the start work of the ranks, each with more than the last; its seconds.

    The more cores there are for a rank, the less ranks come out one after another; so the last one
    has no more work than these seconds, but for a twentieth of the start.
    """
    order = sorted((place, rank) for ranks in topology.nodes for place, rank in enumerate(ranks))
    planning = [rank for _, rank in order if steps_P[rank]]  # first ranks of all nodes at first
    apart_s = APART * start_s * max(1 - cores / max(len(planning), 1), 0.0)
    for number, rank in enumerate(planning):
        first, *others = steps_P[rank]
        work_s = first.work_s + cores * apart_s * (2 * number + 1) / len(planning) ** 2
        steps_P[rank] = [replace(first, work_s=work_s), *others]
    return apart_s


def _bottleneck(topology: Topology, time_s: float, busy_s: Mapping[tuple[str, str], float]) -> str:
    if not busy_s:
        return "no link is used"
    source, target = busiest = max(busy_s, key=lambda ends: busy_s[ends])
    name, vertices = f"link {source} to {target}", topology.graph.nodes
    for way, nic, other in (("uplink", source, target), ("downlink", target, source)):
        if vertices[nic].get("kind") == "nic" and vertices[other].get("kind") != "device":
            name = f"{way} of node {vertices[nic].get('node', nic)}"
    return f"{name}, {in_ms(busy_s[busiest])} ms of {in_ms(time_s)}"


def in_ms(seconds: float) -> str:
    """Milliseconds with three digits, or all before the point.

    >>> in_ms(0.0123456), in_ms(0.9996), in_ms(12.3456)
    ('12.3', '1000', '12346')
    """
    return f"{seconds * 1e3:.3g}" if seconds < 0.9995 else f"{seconds * 1e3:.0f}"


class _Work:
    """Seconds of a core that each rank of a group works on rows that it sends and gets."""

    def __init__(
        self, constants: Constants, rows: Rows, num_ranks: int, planned_share: float
    ) -> None:
        self._rows, self._per_byte = rows, constants.work_s_per_byte
        self._per_own_byte = constants.work_s_per_own_byte
        self._message_s, self.num_ranks = constants.message_s, num_ranks
        self._rounds_ahead, self.planned_share = constants.rounds_ahead, planned_share

    def rows_s(self, hop: int) -> np.ndarray:
        """For all rows of a hop, ``[p]``, at both ends."""
        hop_pp = self._rows.hops_pp[hop]
        return self._per_byte * (hop_pp.sum(0) + hop_pp.sum(1))

    def own_s(self) -> np.ndarray:
        """For a rank's own tokens, or sums of a flat combine, ``[p]``."""
        own_bytes_p = np.array(self._rows.own_bytes_p or [0.0] * len(self._rows.ranks))
        return self._per_own_byte * own_bytes_p

    def messages_s(self, flows_p: Iterable[Flows]) -> np.ndarray:
        """For the messages of one step, at both ends, ``[p]``."""
        place_of = {rank: place for place, rank in enumerate(self._rows.ranks)}
        count_p = np.zeros(len(place_of))
        for source, target, _ in itertools.chain.from_iterable(flows_p):
            count_p[place_of[source]] += 1
            count_p[place_of[target]] += 1
        return self._message_s * count_p

    def ahead(self, number: int, num_rounds: int) -> tuple[int, int]:
        """Rounds that rows of a round may come early and be late."""
        late = min(self._rounds_ahead, num_rounds - 1 - number)
        return number if self._rounds_ahead else 0, late


def _flat_steps(
    local: Topology, rows: Rows, way: Way, work: _Work, in_rounds: bool
) -> list[list[Step]]:
    """Plan; slice by slice pack, send, place. A combine makes sums once all slices are there."""
    slices = min(len(rows.parts), max(MOST_RANK_SLICES // work.num_ranks, 1))
    bytes_pp = (rows.hops_pp[0] if way == "dispatch" else rows.hops_pp[0].T) / slices
    if in_rounds:
        near = _between(local, bytes_pp, rows.ranks, lambda step: step == 0)
        moves = _rounds(local, bytes_pp, rows.ranks) or [[()] * len(near)]
        moves[-1] = [(*far, *inside) for far, inside in zip(moves[-1], near, strict=True)]
    else:
        moves = [_between(local, bytes_pp, rows.ranks, lambda step: True)]
    each = len(rows.parts) / slices
    planned_p = work.planned_share * work.rows_s(0)
    rows_p = (work.rows_s(0) - planned_p) / slices
    along_sp = [
        (each * work.messages_s(flows_p) + ALONG / len(moves) * rows_p).tolist()
        for flows_p in moves
    ]
    steps_p = []
    work_sp = zip(rows_p.tolist(), (planned_p + work.own_s()).tolist(), strict=True)
    for place, (rows_s, own_s) in enumerate(work_sp):
        packing = Step(work_s=PACKED * rows_s)
        last_s = (1 - PACKED - ALONG) * rows_s
        rounds = [
            Step(flows_p[place], along_p[place], *work.ahead(number, len(moves)), each)
            for number, (flows_p, along_p) in enumerate(zip(moves, along_sp, strict=True))
        ]
        if way == "dispatch":
            own = Step(work_s=own_s)
            steps_p.append([own, *[packing, *rounds, Step(work_s=last_s)] * slices])
        else:
            adding_up = Step(work_s=last_s * slices + own_s)
            steps_p.append([*[packing, *rounds] * slices, adding_up])
    return steps_p


def _relayed_steps(
    local: Topology, rows: Rows, way: Way, work: _Work, in_rounds: bool
) -> list[list[Step]]:
    """Parts in turns between nodes; what one leaves to do inside nodes goes on beside the next."""
    parts = list(rows.parts)
    *between, inside_pp = rows.hops_pp
    inside_sp = work.rows_s(len(rows.hops_pp) - 1)
    planned_p = work.planned_share * inside_sp + PLANNED_FIRST * work.own_s()
    inside_sp = (1 - work.planned_share) * inside_sp
    if way == "combine":
        inside_sp = inside_sp + work.own_s()  # for sums
        parts.reverse()
        between, inside_pp = [hop_pp.T for hop_pp in reversed(between)], inside_pp.T
    else:
        inside_sp = inside_sp + (1 - PLANNED_FIRST) * work.own_s()
    order = turns(len(parts), len(between))
    seen = [0] * len(parts)
    steps_p: list[list[Step]] = [[] for _ in rows.ranks]
    inside = [
        _between(local, inside_pp * share, rows.ranks, lambda step: step == 0) for share in parts
    ]
    slices_sp = _slices_inside(local, inside_pp, parts)

    def beside(part: int | None) -> tuple[np.ndarray, list[Flows]]:
        if part is None:
            return np.zeros(len(rows.ranks)), [()] * len(rows.ranks)
        messages_sp = slices_sp[part] * work.messages_s(inside[part])
        return inside_sp * parts[part] + messages_sp, inside[part]

    def add(flows: Sequence[Flows], part: int | None, ahead: tuple[int, int] = (0, 0)) -> None:
        work_sp, near = beside(part)
        work_sp = work_sp + work.messages_s(flows)
        if told and way == "dispatch":
            # Positions go along with the rows that they are about, weights at first.
            work_sp = work_sp + work.messages_s(flows)
            if len(steps_p[0]) == 1:  # right behind the plan
                work_sp = work_sp + work.messages_s(weights)
        for place, steps in enumerate(steps_p):
            steps.append(Step((*flows[place], *near[place]), float(work_sp[place]), *ahead))

    nothing: list[Flows] = [()] * len(rows.ranks)
    told = rows.weights_pp is not None
    weights: list[Flows] = [
        tuple((rows.ranks[i], rows.ranks[j], 0.0) for j in np.flatnonzero(to_p).tolist() if i != j)
        for i, to_p in enumerate([] if rows.weights_pp is None else rows.weights_pp)
    ]
    if way == "combine":
        for part in range(1 if order else len(parts)):
            add(nothing, part)
    else:
        for steps, planned_s in zip(steps_p, planned_p.tolist(), strict=True):
            steps.append(Step(work_s=planned_s))
    arrived: int | None = None
    for turn, part in enumerate(order):
        hop = seen[part]
        seen[part] += 1
        following = order[turn + 1] if turn + 1 < len(order) else None
        other = arrived if way == "dispatch" else following
        if other is not None and way == "combine" and seen[other]:
            other = None  # its rows have left the node already
        rounds = _rounds(local, between[hop] * parts[part], rows.ranks)
        for number, flows_p in enumerate(rounds):
            add(flows_p, other if number == 0 else None, work.ahead(number, len(rounds)))
        arrived = part if seen[part] == len(between) else None
    if way == "dispatch":
        for left in [arrived] if order else range(len(parts)):
            work_sp, near = beside(left)
            alone_sp = INSIDE_ALONE * work_sp / (1 if left is None else slices_sp[left])
            works_sp = zip(alone_sp.tolist(), (work_sp - alone_sp).tolist(), strict=True)
            for steps, flows, (alone_s, rest_s) in zip(steps_p, near, works_sp, strict=True):
                steps += [Step(flows, alone_s), Step(work_s=rest_s)]
    elif told:
        add(weights, None)
    return steps_p


def _slices_inside(
    local: Topology, inside_pp: np.ndarray, parts: Sequence[float]
) -> list[np.ndarray]:
    """Of each part, slices in which each rank's rows move inside its node, ``[p]``."""
    most_p = np.maximum(inside_pp.sum(0), inside_pp.sum(1))
    slices_sp = [np.ones(len(most_p)) for _ in parts]
    for places in map(list, local.nodes):
        most = float(most_p[places].max())
        slice_bytes = inside_slice_bytes(max(parts) * most)
        for slices_p, share in zip(slices_sp, parts, strict=True):
            slices_p[places] = max(np.ceil(share * most / slice_bytes), 1)
    return slices_sp


def _rounds(local: Topology, bytes_pp: np.ndarray, ranks: Sequence[int]) -> list[list[Flows]]:
    """Flows of each rank in each round: node n sends to node n + r."""
    return [
        _between(local, bytes_pp, ranks, lambda step, number=number: step == number)
        for number in range(1, len(local.nodes))
    ]


def _between(
    local: Topology, bytes_pp: np.ndarray, ranks: Sequence[int], taken: Any
) -> list[Flows]:
    """Flows that each rank sends, of those whose nodes are so many apart."""
    num_nodes, node_of = len(local.nodes), local.node_of
    return [
        tuple(
            (ranks[i], ranks[j], float(bytes_pp[i, j]))
            for j in np.flatnonzero(bytes_pp[i]).tolist()
            if i != j and taken((node_of[j] - node_of[i]) % num_nodes)
        )
        for i in range(len(ranks))
    ]
