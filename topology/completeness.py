"""What is missing from a measurement that ended early, in words for people."""

from __future__ import annotations

from tamoe.topology.errors import InputError
from tamoe.topology.graph import Topology

ORIGINS_IN_WORDS = {
    "measured": "timed by the probe",
    "interpolated": "not timed itself; taken over from links like it",
    "static": "not timed: what the interface states or a stand-in, not a measurement",
    "given": "as whoever made the file stated it",
}


def what_is_missing(topology: Topology) -> str | None:
    """What a measurement lacks because it ended early; None where it is complete.

    >>> what_is_missing(Topology.from_tree("2x1", bandwidth_bytes_per_s=(2e9, 1e9))) is None
    True
    """
    status = topology.provenance.get("status", "complete")
    if status == "complete":
        return None
    nodes = topology.num_nodes
    met = {(topology.node_of[i], topology.node_of[j]) for i, j in topology.pairs}
    between = len({ends for ends in met if ends[0] != ends[1]})
    reason = topology.provenance.get("reason") or status
    found = [f"the measurement ended early ({reason})"]
    if nodes > 1:
        found.append(f"{between} of {nodes * (nodes - 1)} ways from node to node were timed")
    if missing := _not_timed(topology):
        found.append(f"not timed: {_some(missing)}")
    elif not topology.pairs:
        found.append("no pair of ranks was timed")
    return "; ".join(found)


def check_solvable(topology: Topology, where: str) -> str | None:
    """A warning about a measurement that ended early but timed every uplink; None if complete.

    Raises
    ------
    InputError
        It ended before every uplink was timed: a dispatch for stand-ins would look like a real one.
    """
    missing = what_is_missing(topology)
    if missing is None:
        return None
    if _not_timed(topology) or not topology.pairs:
        raise InputError(
            f"{where} is partial: {missing}; allowed: a file in which every uplink was timed. "
            f"Run 'tamoe probe' to its end"
        )
    return f"warning: {where} is partial: {missing}. Rates may be off; so may be the plan"


def _not_timed(topology: Topology) -> list[str]:
    return [
        f"{link.source} → {link.target} ({link.origin})"
        for link in topology.links
        if link.level and link.origin != "measured"
    ]


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more links" if len(names) > most else ""
    return ", ".join(names[:most]) + more
