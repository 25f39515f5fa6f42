"""Nodes found from times alone, for where host names are hidden or wrong."""

from __future__ import annotations

from dataclasses import asdict

from tamoe.topology.campaign import Runner, Site
from tamoe.topology.fit import fit_pair
from tamoe.topology.hierarchy import Partition, find_levels
from tamoe.topology.orders import Order, PairPlan
from tamoe.topology.schedule import group_rounds, split_round
from tamoe.topology.survey import Survey
from tamoe.topology.times import rank_times


def nodes_from_times(runner: Runner, site: Site) -> Partition:
    """Nodes found by a cheap tournament of all ranks.

    Several flows may share a NIC in a round; that makes far pairs look farther, so the partition
    is still right, and the values are thrown away.
    """
    ranks = [(rank,) for rank in range(len(site.machine_of_rank))]
    survey = Survey(tuple(ranks))
    plan = asdict(PairPlan(max_bytes=1 << 19, pings=5, sweeps=3, min_sweeps=3, pair_s=0.5))
    limit = site.pairs_at_once if site.shares_cpu else None
    for pairs in group_rounds(ranks):
        for some in split_round(pairs, limit):
            for pair, samples in runner.samples(Order("pairs", some, plan)).items():
                survey.add(pair, fit_pair(samples))
    levels = find_levels(rank_times(survey), survey.noise)
    if not levels.partitions:
        return (tuple(range(len(ranks))),)
    return levels.partitions[max(range(len(levels.jumps)), key=lambda k: levels.jumps[k])]
