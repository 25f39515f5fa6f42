"""What the commands print for people: topologies, plans and checks as tables."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tamoe.topology.completeness import ORIGINS_IN_WORDS, what_is_missing
from tamoe.topology.errors import InputError
from tamoe.topology.units import counted, format_bytes, format_rate, format_time

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from tamoe.solver.plan import Plan
    from tamoe.topology.doctor import Check
    from tamoe.topology.graph import Topology
    from tamoe.topology.link import Link

MAX_ROWS = 40  # more links than this are told by level


def print_checks(checks: Sequence[Check]) -> None:
    """One line a check: yes or no, what was found, and the fix where it is no."""
    table = _table("", "what", "found", numbers=False)
    for check in checks:
        found = check.detail if check.ok or not check.fix else f"{check.detail}\n→ {check.fix}"
        table.add_row("yes" if check.ok else "no", check.name, found)
    _print(table)


def print_topology(topology: Topology) -> None:
    """Nodes, then every uplink with its rate, latency and origin."""
    label = topology.provenance.get("label", "given")
    print(
        f"{counted(topology.num_ranks, 'rank')} on {counted(topology.num_nodes, 'node')}, "
        f"{topology.contention} contention ({label})"
    )
    if missing := what_is_missing(topology):
        print(f"PARTIAL: {missing}")
    if topology.contention == "pairwise":
        _print_pairs(topology)
        return
    uplinks = [link for link in topology.links if link.level and _is_upward(topology, link)]
    table = _table("link", "out", "in", "latency", "burst", "origin")
    for link in _one_a_class(topology) + (uplinks if len(uplinks) <= MAX_ROWS else []):
        back = topology.graph.edges.get((link.target, link.source), {})
        name = "device links" if link.level == 0 else f"{link.source} – {link.target}"
        table.add_row(
            name,
            format_rate(link.bandwidth_bytes_per_s),
            format_rate(back.get("bandwidth_bytes_per_s", link.bandwidth_bytes_per_s)),
            format_time(link.latency_s),
            format_bytes(link.burst_bytes) if link.burst_bytes else "–",
            link.origin,
        )
    _print(table)
    if len(uplinks) > MAX_ROWS:
        _print_levels(uplinks)
    for origin, meaning in ORIGINS_IN_WORDS.items():
        if any(link.origin == origin for link in topology.links):
            print(f"{origin}: {meaning}")
    for note in topology.provenance.get("notes", []):
        print(note)
    _print_constants(topology)


def _print_constants(topology: Topology) -> None:
    """What each exchange costs beside bytes on links, where that was measured."""
    from tamoe.solver.constants import read_constants

    try:
        constants = read_constants(topology)
    except InputError as error:  # the links are good all the same
        print(error)
        return
    if not constants:
        return
    table = _table("exchange (fitted)", "start", "message", "rows", "tokens, sums", "mixed")
    for (exchange, way), found in constants.items():
        table.add_row(
            f"{exchange}, {way}",
            format_time(found.start_s),
            format_time(found.message_s),
            f"{found.work_s_per_byte * 1e9:.2f} ns/B",
            f"{found.work_s_per_own_byte * 1e9:.2f} ns/B",
            f"{found.crossing_share:.0%}",
        )
    _print(table)


def _one_a_class(topology: Topology) -> list[Link]:
    """The slowest device link: device links of a cluster are alike."""
    devices = [link for link in topology.links if link.level == 0]
    return sorted(devices, key=lambda link: link.bandwidth_bytes_per_s)[:1]


def _is_upward(topology: Topology, link: Link) -> bool:
    # Switches are listed from the root down, so what stands later is lower.
    order = list(topology.graph.nodes)
    return order.index(link.source) > order.index(link.target)


def _print_levels(uplinks: Sequence[Link]) -> None:
    by_level = defaultdict(list)
    for link in uplinks:
        by_level[link.level].append(link.bandwidth_bytes_per_s)
    table = _table("uplink level", "links", "slowest", "median", "fastest")
    for level, rates in sorted(by_level.items()):
        rates.sort()
        shown = [format_rate(rate) for rate in (rates[0], rates[len(rates) // 2], rates[-1])]
        table.add_row(str(level), str(len(rates)), *shown)
    _print(table)


def _print_pairs(topology: Topology) -> None:
    import numpy as np

    table = _table("level", "pairs", "slowest", "fastest", "latency (median)")
    for level in range(topology.num_levels):
        chosen = (topology.level_PP == level) & ~np.eye(topology.num_ranks, dtype=bool)
        if chosen.any():
            rates = 1 / topology.beta_s_per_byte[chosen]
            slowest, fastest = format_rate(rates.min()), format_rate(rates.max())
            latency = format_time(float(np.median(topology.alpha_s[chosen])))
            table.add_row(str(level), str(int(chosen.sum())), slowest, fastest, latency)
    _print(table)


def plan_summary(plan: Plan) -> dict[str, Any]:
    """The numbers of a plan as JSON values; every time is simulated (cost model)."""
    return {
        "label": "simulated",
        "method": plan.method,
        "time_s": plan.time_s,
        "even_time_s": plan.even_time_s,
        "predicted_speedup": plan.even_time_s / plan.time_s,
        "lower_bound_s": plan.lower_bound_s,
        "gap": plan.gap,
        "exchange": plan.exchange,
        "exchange_reason": plan.exchange_reason,
        "floor": plan.floor,
        "kl": plan.kl,
        "self_send": plan.self_send,
        "level_shares": _shares(plan.level_shares()),
        "even_level_shares": _shares(plan.level_shares(even=True)),
        "bottlenecks": [dataclasses.asdict(bottleneck) for bottleneck in plan.bottlenecks],
        "notes": list(plan.notes),
    }


def print_plan(plan: Plan) -> None:
    """What each level gets, predicted against even time, the bound and the bottleneck links."""
    workload = plan.workload
    print(
        f"{plan.method}: {workload.tokens_per_rank} tokens a rank, top-{workload.top_k} of "
        f"{plan.num_experts} experts, {format_bytes(workload.hidden_size * workload.element_bytes)}"
        f" a token; floor {plan.floor:g}, kl {plan.kl:g}, self-sends priced {plan.self_send!r}"
    )
    table = _table("tokens sent to", "even", "plan")
    even = _shares(plan.level_shares(even=True))
    for name, share in _shares(plan.level_shares()).items():
        table.add_row(name, f"{even[name]:.1%}", f"{share:.1%}")
    _print(table)
    table = _table("one exchange (simulated)", "time", "")
    speedup = plan.even_time_s / plan.time_s if plan.time_s else 1.0
    table.add_row("even", format_time(plan.even_time_s), "")
    table.add_row("plan", format_time(plan.time_s), f"{speedup:.2f}x")
    table.add_row("lower bound", format_time(plan.lower_bound_s), f"gap {plan.gap:.1e}")
    _print(table)
    names = [bottleneck.name for bottleneck in plan.bottlenecks]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    print(f"bottleneck links: {', '.join(names[:6])}{more}")
    print(f"exchange: {plan.exchange_reason}")
    for note in plan.notes:
        print(note)


def _shares(shares: np.ndarray) -> dict[str, float]:
    """Shares by what a token crosses, in words."""
    crossed = ["own rank", "same node", "other nodes", *(f"switch level {n}" for n in range(2, 99))]
    return {name: float(share) for name, share in zip(crossed, shares, strict=False)}


def _table(*columns: str, numbers: bool = True) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(
            column, justify="right" if numbers and position else "left", overflow="fold"
        )
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    Console(highlight=False).print(table)
