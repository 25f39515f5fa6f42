"""Constants of the exchanges' cost model: measured on a cluster, kept in its topology's file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tamoe.topology.errors import InputError
from tamoe.topology.graph import Topology

FILE_KEY = "exchange_constants"


@dataclass(frozen=True)
class Constants:
    """What one way of one exchange costs beside the links' bytes; measured on a cluster.

    Parameters
    ----------
    start_s
        Seconds, >= 0, whatever the rows, for a group of all ranks; smaller ones take half of it
        and, of the other half, a share in proportion to their ranks.
    message_s
        Seconds, >= 0, of a rank for each message that it sends or gets.
    work_s_per_byte
        Seconds of a rank for each byte that it sends or gets, in whichever way; what it keeps
        counts once.
    work_s_per_token_byte
        Seconds of a rank for each byte of its own tokens, whatever becomes of them.
    crossing_share
        Share of its rate, > 0 to 1, that a flow keeps which goes through two of the busiest links
        among different flows, as of :func:`tamoe.solver.flows.run_steps`.
    at_once
        Ranks of the cluster that work at the same time without slowing each other; None: all.
    """

    start_s: float = 0.0
    message_s: float = 0.0
    work_s_per_byte: float = 0.0
    work_s_per_token_byte: float = 0.0
    crossing_share: float = 1.0
    at_once: int | None = None

    def __post_init__(self) -> None:
        for name in ("start_s", "message_s", "work_s_per_byte", "work_s_per_token_byte"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is {value}; allowed: >= 0 and finite")
        if not 0 < self.crossing_share <= 1:
            raise InputError(f"crossing_share is {self.crossing_share}; allowed: > 0 to 1")
        if self.at_once is not None and not self.at_once >= 1:
            raise InputError(f"at_once is {self.at_once}; allowed: >= 1, or None")


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
