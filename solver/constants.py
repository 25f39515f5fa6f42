"""Constants of the exchanges' cost model: measured on a cluster, kept in its topology's file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tamoe.topology.errors import InputError, whole
from tamoe.topology.graph import Topology

FILE_KEY = "exchange_constants"
# Rounds that a rank sends ahead of what it gets, where the transport takes rows early (gloo).
# With 0, skewed routings took up to 1.5 times as long as all at once; without an end, even ones on
# eight nodes took up to 1.08 times as long as round by round, with 3 up to 1.05 (emulated).
ROUNDS_AHEAD = 3


@dataclass(frozen=True)
class Constants:
    """What one way of one exchange costs beside the links' bytes; measured on a cluster.

    Parameters
    ----------
    start_s
        Seconds, >= 0, whatever the rows, for a group of all ranks; smaller ones take half of it
        and, of the other half, a share in proportion to their ranks. Where no rank has a row it is
        a fifth to three quarters less: nobody wakes up for one.
    message_s
        Seconds of a core, >= 0, for each message that a rank sends or gets.
    work_s_per_byte
        Seconds of a core for each byte that a rank sends or gets, in whichever way, and twice for
        what it keeps.
    work_s_per_own_byte
        Seconds of a core for each byte of a rank's own tokens, whatever becomes of them; in a flat
        combine, of the sums that it makes and adds up again.
    crossing_share
        Share of its rate, > 0 to 1, that a message's beginning keeps which goes through two of the
        busiest links among different flows, as of :func:`tamoe.solver.flows.run_steps`.
    at_once
        Cores that the ranks of the cluster share alike while they work; None: one for each.
    rounds_ahead
        Rounds, >= 0, that a rank sends ahead of what it gets; 0: each waits for the one before.
    """

    start_s: float = 0.0
    message_s: float = 0.0
    work_s_per_byte: float = 0.0
    work_s_per_own_byte: float = 0.0
    crossing_share: float = 1.0
    at_once: int | None = None
    rounds_ahead: int = ROUNDS_AHEAD

    def __post_init__(self) -> None:
        for name in ("start_s", "message_s", "work_s_per_byte", "work_s_per_own_byte"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is {value}; allowed: >= 0 and finite")
        if not 0 < self.crossing_share <= 1:
            raise InputError(f"crossing_share is {self.crossing_share}; allowed: > 0 to 1")
        if self.at_once is not None and not self.at_once >= 1:
            raise InputError(f"at_once is {self.at_once}; allowed: >= 1, or None")
        whole("rounds_ahead", self.rounds_ahead, 0)


def read_constants(topology: Topology) -> dict[tuple[str, str], Constants]:
    """Constants in a topology's file, by exchange and way; empty where none were measured.

    Raises
    ------
    InputError
        They are malformed, out of range, or of another version.
    """
    found = topology.extra.get(FILE_KEY, {})
    try:
        return {
            (exchange, way): Constants(**values)
            for exchange, ways in found.items()
            for way, values in ways.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"{FILE_KEY} of the topology: {error}. Another version may have written it; allowed: "
            f"what this one writes: run `tamoe probe --exchange` again"
        ) from None


def constants_of(
    given: Mapping[tuple[str, str], Constants], exchange: str, way: str, default: Constants
) -> Constants:
    """Those of one way of an exchange; of a backward pass from the forward way that it is like.

    Gradients of a combine go the way of a dispatch, but nothing is planned: they start as a combine
    does, and work on products of rows as it does on sums.

    Examples
    --------
    >>> given = {("flat", "dispatch"): Constants(0.5, 0.25), ("flat", "combine"): Constants(0.125)}
    >>> back = constants_of(given, "flat", "combine_backward", Constants())
    >>> back.start_s, back.message_s
    (0.125, 0.25)
    """
    if way == "combine_backward":
        there, back = (given.get((exchange, way), default) for way in ("dispatch", "combine"))
        return dataclasses.replace(
            there, start_s=back.start_s, work_s_per_own_byte=back.work_s_per_own_byte
        )
    return given.get((exchange, "combine" if way == "dispatch_backward" else way), default)


def with_constants(topology: Topology, constants: Mapping[tuple[str, str], Constants]) -> Topology:
    """The topology with constants, as its file carries them.

    Examples
    --------
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(4e9, 1e9))
    >>> given = {("flat rounds", "dispatch"): Constants(start_s=0.5)}
    >>> read_constants(with_constants(topology, given)) == given
    True
    """
    document: dict[str, dict[str, Any]] = {}
    for (exchange, way), values in constants.items():
        document.setdefault(exchange, {})[way] = dataclasses.asdict(values)
    return dataclasses.replace(topology, extra={**topology.extra, FILE_KEY: document})
