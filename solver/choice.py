"""Which exchange is faster for a dispatch: both predicted, with the link that each waits for.

Shape suffixes: P ranks, N experts of a group, M nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import numpy as np

from tamoe.solver.constants import (
    FILE_KEY,
    ROUNDS_AHEAD,
    Constants,
    constants_of,
    read_constants,
)
from tamoe.solver.exchange_cost import in_ms, predict
from tamoe.solver.exchange_rows import (
    ALL_WAYS,
    EXCHANGES,
    KEYS,
    WAYS,
    Exchange,
    rows_of_group,
)
from tamoe.solver.sampling import sample_routing
from tamoe.solver.workload import Workload
from tamoe.topology.errors import InputError
from tamoe.topology.graph import Topology

if TYPE_CHECKING:
    from tamoe.solver.plan import Plan

MOST_RANKS = 256  # beyond, sampling every rank takes seconds
# Without constants the model does not see what messages cost; a gain has to be worth them.
LEAST_GAIN = 0.1
# Times so near are the same to the model, which is 1 % off in the median. On eight nodes messages
# of up to 100 kB took 2 to 10 % longer in rounds where it had them .1 to .7 % shorter (emulated).
TIE = 0.01
Kind = Literal["flat", "hierarchical"]
AskedExchange = Literal["auto", "flat", "hierarchical"]
ASKED_EXCHANGES: tuple[AskedExchange, ...] = ("auto", "flat", "hierarchical")
_SCHEDULES: dict[str, Literal["single", "rounds"]] = {
    "flat single": "single",
    "flat rounds": "rounds",
}


@dataclass(frozen=True)
class Choice:
    """The exchange to take, and why.

    ``seconds`` are those of one dispatch and combine by each exchange, of their backward passes too
    where those count; simulated.
    """

    kind: Kind
    schedule: (
        Literal["single", "rounds"] | None
    )  # "single" or "rounds"; None: as the transport likes best
    reason: str
    seconds: Mapping[str, float]


# By rounds ahead: all layers of a model ask for the same plan, and of 32 ranks it takes seconds.
_CHOSEN: WeakKeyDictionary[Plan, dict[int, Choice]] = WeakKeyDictionary()


def choose_for(
    topology_or_plan: Topology | Plan | None, *, rounds_ahead: int = ROUNDS_AHEAD
) -> Choice:
    """What a Plan asks for, or the choice for it; flat where there is no Plan or no prediction.

    ``rounds_ahead`` is that of the transport, as in :func:`choose_exchange`.

    >>> choose_for(None).reason
    'flat: without a plan, sizes and routing are unknown'
    """
    if topology_or_plan is None or isinstance(topology_or_plan, Topology):
        return Choice("flat", None, "flat: without a plan, sizes and routing are unknown", {})
    plan = topology_or_plan
    if plan.asked_exchange != "auto":
        asked = plan.asked_exchange
        return Choice(asked, None, f"{asked}: what the plan was solved with", {})
    chosen = _CHOSEN.setdefault(plan, {})
    if rounds_ahead not in chosen:
        try:
            chosen[rounds_ahead] = choose_exchange(
                plan.topology, plan.workload, plan.target_PN, rounds_ahead=rounds_ahead
            )
        except InputError as error:
            chosen[rounds_ahead] = Choice("flat", None, f"flat: {error}", {})
    return chosen[rounds_ahead]


def choose_exchange(
    topology: Topology,
    workload: Workload,
    target_PN: np.ndarray,
    *,
    seed: int = 0,
    rounds_ahead: int = ROUNDS_AHEAD,
    backward: bool = True,
) -> Choice:
    """The fastest exchange for tokens that are routed after a target.

    Parameters
    ----------
    topology
        Links, nodes and switches, with constants if a calibration measured them.
    workload
        Tokens, bytes, experts and groups, which exchange at the same time on the same links.
    target_PN
        ``[P, N]`` tokens that each rank sends to each expert of its group.
    seed
        Of the sample.
    rounds_ahead
        Rounds that a rank sends ahead of what it gets, where no measured constants tell.
    backward
        Count the backward passes, too, as in training.

    Returns
    -------
    Choice

    Raises
    ------
    InputError
        There are more than 256 ranks, or constants of some exchanges alone.

    Examples
    --------
    >>> topology = Topology.from_tree("2x4", bandwidth_bytes_per_s=(1e11, 1e9))
    >>> workload = Workload(tokens_per_rank=1024, top_k=8, hidden_size=1024, experts_per_rank=8)
    >>> choice = choose_exchange(topology, workload, np.full((8, 64), 128.0))
    >>> choice.kind, round(choice.seconds["flat rounds"] / choice.seconds["hierarchical"], 1)
    ('hierarchical', 3.9)
    """
    num_ranks = topology.num_ranks
    if num_ranks > MOST_RANKS:
        raise InputError(f"topology has {num_ranks} ranks; allowed: up to {MOST_RANKS}")
    groups = workload.groups(num_ranks)
    parts = [topology.subset(sorted(ranks)) for ranks in groups] if groups[1:] else [topology]
    if all(len(part.nodes) == 1 for part in parts):
        who = "each group has" if groups[1:] else "there is"
        reason = f"flat: {who} one node, so no link between nodes to spare"
        return Choice("flat", None, reason, {})
    rows = []
    for number, (ranks, part) in enumerate(zip(groups, parts, strict=True)):
        members = sorted(ranks)
        place_N = [members.index(ranks[p]) for p in workload.expert_position_N(num_ranks)]
        counts_pN, forward_pMM, sums_pL = sample_routing(
            part, workload, target_PN[members], place_N, seed + number
        )
        rows.append(
            rows_of_group(
                part,
                tuple(members),
                counts_pN,
                forward_pMM,
                place_N,
                workload.token_bytes,
                [workload.tokens_per_rank] * len(members),
                sums_pL,
            )
        )
    constants = read_constants(topology)
    measured, bare = bool(constants), Constants(rounds_ahead=rounds_ahead)
    if measured and (missing := [key for key in KEYS if key not in constants]):
        raise InputError(
            f"{FILE_KEY} of the topology have no {' '.join(missing[0])}; allowed: those of every "
            f"exchange, as `tamoe probe --exchange` writes them"
        )
    counted = ALL_WAYS if backward else WAYS
    ways = {
        exchange: [
            predict(
                topology,
                exchange,
                way,
                [moved[exchange, way] for moved in rows],
                constants_of(constants, exchange, way, bare),
            )
            for way in counted
        ]
        for exchange in EXCHANGES
        if measured or exchange != "flat single"
    }
    seconds = {str(name): sum(way.time_s for way in ways[name]) for name in ways}
    best = preferred(seconds)
    times = ", ".join(f"{name} {in_ms(value)} ms" for name, value in seconds.items())
    label = "simulated, constants measured" if measured else "simulated"
    least_s = (1 - LEAST_GAIN) * seconds["flat rounds"]
    if not measured and best == "hierarchical" and seconds[best] > least_s:
        best = "flat rounds"
        label += f"; a gain below {LEAST_GAIN:.0%} counts only with measured constants"
    busiest = max(ways[best], key=lambda way: way.time_s).bottleneck
    return Choice(
        "hierarchical" if best == "hierarchical" else "flat",
        _SCHEDULES.get(best) if measured else None,
        f"{best if measured else best.split()[0]}: dispatch and combine"
        f"{', forward and backward,' if backward else ''} take {times} ({label}); {busiest}",
        seconds,
    )


def preferred(seconds: Mapping[str, float]) -> Exchange:
    """The fastest exchange; among those within 1 % of it, the one of the fewest steps.

    ``seconds`` are of some or all exchanges, by name.

    >>> preferred({"flat single": 1.005, "flat rounds": 1.0, "hierarchical": 1.2})
    'flat single'
    """
    most_s = (1 + TIE) * min(seconds.values())
    return next(name for name in EXCHANGES if name in seconds and seconds[name] <= most_s)
