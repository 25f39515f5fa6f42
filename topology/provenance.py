"""How a topology was measured, as JSON values: enough to repeat it and to judge it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tamoe.topology.campaign import Campaign
from tamoe.topology.findings import (
    asymmetric_pairs,
    partition_report,
    slow_links,
    slow_nodes,
    tree_report,
)
from tamoe.topology.fit import PairFit, median
from tamoe.topology.hierarchy import Group, find_levels
from tamoe.topology.inventory import RankFacts, common, partition_by, software
from tamoe.topology.survey import Survey, Window
from tamoe.topology.times import REFERENCE_BYTES, limited_by_cpu, node_times

CPU_BOUND = (
    "ranks share processors: values inside nodes are those of the processors; "
    "compare them by the time of a message, not by bandwidth"
)


def describe(
    campaign: Campaign,
    tree: Group,
    facts: Sequence[RankFacts],
    *,
    status: str,
    reason: str | None,
    started: float,
    backend: str,
    device: str,
    use_hosts: bool,
) -> dict[str, Any]:
    """Everything about a probe that is no link.

    Parameters
    ----------
    campaign
        What was measured, complete or not.
    tree
        The switches that were kept.
    facts
        Of each rank.
    status
        "complete", "partial" or "timeout".
    reason
        Why it is not complete, or None.
    started
        ``time.time()`` at the start.
    backend, device
        What carried the messages.
    use_hosts
        Whether hosts were taken for nodes.

    Returns
    -------
    dict
        JSON values. ``label`` is "emulated" where several hosts share a machine, else "measured".
    """
    survey = campaign.survey
    return {
        "made_by": "probe",
        "status": status,
        "reason": reason,
        **_where(facts),
        "backend": backend,
        "device": device,
        "started": _utc(started),
        "ended": _utc(time.time()),
        "duration_s": round(time.time() - started, 3),
        "versions": software(),
        "environment": dict(facts[0].environment),
        "schedule": _schedule(campaign),
        "cpu_bound": CPU_BOUND if campaign.site.shares_cpu else None,
        "network_limited_by_cpu": limited_by_cpu(survey),
        "partition": _partition(survey, facts, use_hosts),
        "tree": tree_report(find_levels(node_times(survey), survey.noise)),
        **_findings(survey, tree),
        "contention": _windows(survey, survey.windows),
        "load": _windows(survey, survey.loads),
        "pairs": [_pair(pair, fit) for pair, fit in sorted(survey.fits.items())],
        "samples": [
            {"source_rank": i, "target_rank": j, **samples.to_json()}
            for (i, j), samples in sorted(campaign.samples.items())
        ],
    }


def _where(facts: Sequence[RankFacts]) -> dict[str, Any]:
    hosts = partition_by([fact.host for fact in facts])
    machines = partition_by([fact.machine for fact in facts])
    # Hosts that share a kernel are namespaces on one machine.
    emulated = len(hosts) > len(machines)
    return {
        "label": "emulated" if emulated else "measured",
        "hosts": [
            {"hash": facts[ranks[0]].host, "name": facts[ranks[0]].host_name, "ranks": list(ranks)}
            for ranks in hosts
        ],
        "machines": [
            {"hash": facts[ranks[0]].machine, "cores": facts[ranks[0]].cores, "ranks": len(ranks)}
            for ranks in machines
        ],
        "interface": common(fact.interface for fact in facts),
        "congestion_control": common(fact.congestion_control for fact in facts),
        "gpus": [fact.gpu for fact in facts] if any(fact.gpu for fact in facts) else None,
    }


def _schedule(campaign: Campaign) -> dict[str, Any]:
    counts = [len(times) for s in campaign.samples.values() for times in s.stream_s.values()]
    sizes = {size for s in campaign.samples.values() for size in (*s.ping_s, *s.stream_s)}
    return {
        "between_nodes": "circle method over nodes, one active rank a node",
        "seed": campaign.seed,
        "sizes_bytes": sorted(sizes),
        "reference_bytes": REFERENCE_BYTES,
        "repetitions": [min(counts), max(counts)] if counts else None,
        "budget_s": campaign.budget_s,
        "economy": ("none", "fewer repetitions", "one direction")[campaign.economy],
        "rounds_left_out": dict(campaign.skipped),
        "retested_pairs": sorted(map(list, campaign.retested)),
    }


def _partition(survey: Survey, facts: Sequence[RankFacts], use_hosts: bool) -> dict[str, Any]:
    hosts = partition_by([fact.host for fact in facts])
    return {"nodes_from": "hosts" if use_hosts else "times", **partition_report(survey, hosts)}


def _findings(survey: Survey, tree: Group) -> dict[str, Any]:
    return {
        "slow_nodes": [asdict(slow) for slow in slow_nodes(survey, tree)],
        "slow_links": [asdict(slow) for slow in slow_links(survey, tree)],
        "asymmetric_pairs": [list(pair) for pair in asymmetric_pairs(survey)],
    }


def _windows(survey: Survey, windows: Sequence[Window]) -> list[dict[str, Any]]:
    alone = {
        ends: median([fit.bandwidth_bytes_per_s for fit in fits])
        for ends, fits in survey.between().items()
    }
    return [_window(survey, window, alone) for window in windows]


def _window(
    survey: Survey, window: Window, alone: Mapping[tuple[int, int], float]
) -> dict[str, Any]:
    single = [alone.get((survey.node_of[i], survey.node_of[j])) for i, j in window.flows]
    known = [rate for rate in single if rate is not None]
    total = window.total_bytes_per_s
    return {
        "flows": [list(flow) for flow in window.flows],
        "rates_bytes_per_s": list(window.rates_bytes_per_s),
        "total_bytes_per_s": round(total, 3),
        # How many times longer each flow takes than alone: 1 where nothing is shared.
        "slowdown": round(sum(known) / total, 3) if len(known) == len(single) else None,
    }


def _pair(pair: tuple[int, int], fit: PairFit) -> dict[str, Any]:
    return {
        "source_rank": pair[0],
        "target_rank": pair[1],
        "burst_bytes": round(fit.burst_bytes),
        "residual": round(fit.residual, 5),
        "affine": fit.affine,
        "noise": round(fit.noise, 5),
        "time_s": {str(size): round(time_s, 9) for size, time_s in fit.table_s.items()},
    }


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
