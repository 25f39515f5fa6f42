"""Times every exchange on the same routings, in turns, against the bound of its bytes.

The bound is the time that the most loaded link needs for its rows alone, less the credit that an
idle token bucket gives away; a share of it over 1 would be an error.

Shape suffixes: T tokens, K choices, P ranks, N experts, M nodes.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from tamoe.cases import draw_experts
from tamoe.exchange import Exchange
from tamoe.progress import progress_line
from tamoe.relays import count_copies, plan_forwarding
from tamoe.solver.relays import make_relays, sum_groups
from tamoe.solver.traffic import flat_rows, hierarchical_rows
from tamoe.timing import line_up, refill_s
from tamoe.topology.graph import Topology

Skew = Literal["even", "local", "one-hot"]
SKEWS: tuple[Skew, ...] = ("even", "local", "one-hot")
EXCHANGES = ("flat single", "flat rounds", "hierarchical")


@dataclass(frozen=True)
class Setting:
    """One routing to time the exchanges on."""

    tokens: int  # of each rank
    top_k: int
    skew: Skew
    experts_per_rank: int
    hidden_size: int


@dataclass(frozen=True)
class Score:
    """One exchange in one setting: medians over the repetitions, of the last rank."""

    setting: Setting
    exchange: str
    dispatch_s: float
    combine_s: float
    dispatch_bound_s: float
    combine_bound_s: float
    busiest_link_bytes: float

    @property
    def share_of_bound(self) -> float:
        """Bound over measured time, dispatch and combine together."""
        return (self.dispatch_bound_s + self.combine_bound_s) / (self.dispatch_s + self.combine_s)

    def document(self) -> dict[str, Any]:
        """As JSON writes it."""
        values = dataclasses.asdict(self)
        return {**values.pop("setting"), **values, "share_of_bound": self.share_of_bound}


def random_routing(
    setting: Setting, rank: int, topology: Topology, generator: torch.Generator
) -> torch.Tensor:
    """Distinct experts for each token, ``[T, K]``.

    ``"even"``: every expert as likely. ``"local"``: experts of the own node 16 times as likely.
    ``"one-hot"``: every token of every rank takes the same K experts.
    """
    num_experts = setting.experts_per_rank * topology.num_ranks
    weight_N = torch.ones(num_experts)
    if setting.skew == "one-hot":
        return torch.arange(setting.top_k).repeat(setting.tokens, 1)
    if setting.skew == "local":
        near = [topology.node_of[e // setting.experts_per_rank] for e in range(num_experts)]
        weight_N[torch.tensor(near) == topology.node_of[rank]] = 16.0
    return draw_experts(weight_N, setting.tokens, setting.top_k, generator)


def bench_rank(
    rank: int, topology: Topology, settings: Sequence[Setting], repetitions: int
) -> list[Score]:
    """Time every setting; every rank of the group calls it, and all get the scores."""
    exchanges = {
        "flat single": Exchange(topology, kind="flat", schedule="single"),
        "flat rounds": Exchange(topology, kind="flat", schedule="rounds"),
        "hierarchical": Exchange(topology, kind="hierarchical"),
    }
    show = progress_line("bench") if rank == 0 else None
    scores: list[Score] = []
    began_s = time.monotonic()
    for number, setting in enumerate(settings):
        scores += _bench_setting(rank, topology, setting, exchanges, repetitions)
        if show is not None:
            left_s = (time.monotonic() - began_s) / (number + 1) * (len(settings) - number - 1)
            show("settings", number + 1, len(settings), left_s)
    return scores


@torch.no_grad()  # else ranks ask each other in combine whether experts train
def _bench_setting(
    rank: int,
    topology: Topology,
    setting: Setting,
    exchanges: dict[str, Exchange],
    repetitions: int,
) -> list[Score]:
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(setting.tokens, setting.hidden_size, generator=generator)
    index_TK = random_routing(setting, rank, topology, generator)
    weight_TK = torch.rand(index_TK.shape, generator=generator)
    num_experts = setting.experts_per_rank * topology.num_ranks
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in exchanges}
    pause_s = refill_s(topology)
    for name, exchange in itertools.chain(*[exchanges.items()] * (repetitions + 1)):
        line_up(pause_s)
        start_s = time.perf_counter()
        row_RD, handle = exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=num_experts)
        dispatch_s = time.perf_counter() - start_s
        line_up(pause_s)
        start_s = time.perf_counter()
        exchange.combine(row_RD, handle)
        seconds[name].append((dispatch_s, time.perf_counter() - start_s))
    last = torch.tensor([seconds[name][1:] for name in exchanges])  # the first connects pairs
    dist.all_reduce(last, dist.ReduceOp.MAX)
    medians: list[list[float]] = last.quantile(0.5, dim=1).tolist()  # not the lower middle one
    bounds = _bounds(rank, topology, setting, index_TK)
    return [
        Score(setting, name, dispatch_s, combine_s, *bounds[name])
        for name, (dispatch_s, combine_s) in zip(exchanges, medians, strict=True)
    ]


def _bounds(
    rank: int, topology: Topology, setting: Setting, index_TK: torch.Tensor
) -> dict[str, tuple[float, float, float]]:
    """Bound of dispatch and of combine, and bytes over the busiest link, of each exchange."""
    num_experts = setting.experts_per_rank * topology.num_ranks
    relays = make_relays(rank, topology.nodes, sum_groups(topology))
    node_N = torch.tensor(topology.node_of).repeat_interleave(setting.experts_per_rank)
    parent_TM = plan_forwarding(node_N[index_TK].flatten(), setting.tokens, relays)
    forward_MM = count_copies(parent_TM)[0]
    mine = (torch.bincount(index_TK.flatten(), minlength=num_experts).numpy(), forward_MM.numpy())
    everyone: list[Any] = [None] * topology.num_ranks
    dist.all_gather_object(everyone, mine)
    counts_PN, forward_PMM = (np.stack(parts) for parts in zip(*everyone, strict=True))
    rank_of_N = [expert // setting.experts_per_rank for expert in range(num_experts)]
    flat_PP = flat_rows(counts_PN, rank_of_N)
    hops_PP = np.sum(hierarchical_rows(topology, counts_PN, forward_PMM, rank_of_N), axis=0)
    row_bytes = setting.hidden_size * 4
    flat, relayed = (_bound(topology, rows_PP * row_bytes) for rows_PP in (flat_PP, hops_PP))
    return {"flat single": flat, "flat rounds": flat, "hierarchical": relayed}


def _bound(topology: Topology, bytes_PP: np.ndarray) -> tuple[float, float, float]:
    away_PP = bytes_PP * (1 - np.eye(len(bytes_PP)))
    bandwidth_L = np.array([link.bandwidth_bytes_per_s for link in topology.links])
    burst_L = np.array([link.burst_bytes for link in topology.links])
    times, loads = [], []
    for moved_PP in (away_PP, away_PP.T):
        load_L = topology.incidence @ moved_PP.ravel()
        time_L = np.maximum((load_L - burst_L) / bandwidth_L, 0.0)
        times.append(float(time_L.max()))
        loads.append(float(load_L[np.lexsort((load_L, time_L))[-1]]))
    return times[0], times[1], max(loads)
