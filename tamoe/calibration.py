"""What the exchanges cost on a cluster beside the bytes on its links: measured, then fitted.

The cost model of :mod:`tamoe.solver.exchange_cost` has five constants for each way of each
exchange. Here every exchange runs on a few routings, in turns, and the constants are those whose
predictions are nearest to the medians.

Shape suffixes: T tokens, K choices, P ranks, N experts, p ranks of a group, M nodes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tamoe.cases import Case, Groups, make_case, routing
from tamoe.exchange import Exchange
from tamoe.groups import works_by_gloo
from tamoe.relays import count_copies, plan_forwarding
from tamoe.solver import exchange_cost
from tamoe.solver.constants import Constants, with_constants
from tamoe.solver.exchange_cost import EXCHANGES, WAYS, Rows, predict, rows_of_group
from tamoe.solver.relays import make_relays, sum_groups
from tamoe.topology.graph import Topology

# Seconds that the busiest link is to be busy, and experts of each token.
CALIBRATED_ON = ((0.06, 8), (0.16, 2))
CALIBRATION = ("even", "uneven", "local 8", "local 64", "one-hot")
REPETITIONS = 9


@dataclass(frozen=True, eq=False)
class Measured:
    """Median seconds of one way of one exchange in one case, and what it moved."""

    case: str
    exchange: exchange_cost.Exchange
    way: exchange_cost.Way
    seconds: float
    groups: tuple[Rows, ...]


def calibration_cases(topology: Topology) -> list[Case]:
    """Routings that tell the constants apart: links, work and messages count in turn."""
    groups = (tuple(range(topology.num_ranks)),)
    sized = itertools.product(CALIBRATION, CALIBRATED_ON)
    cases = [make_case(topology, groups, name, *on, seed=1) for name, on in sized]
    # Next to nothing, and so much that the links alone decide.
    ends = [make_case(topology, groups, "even", *on, seed=1) for on in ((0.001, 1), (0.5, 2))]
    return [*ends, *cases]


def calibrate(
    rank: int,
    topology: Topology,
    *,
    at_once: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Topology:
    """The topology with constants of every exchange, measured on it; every rank calls it.

    Parameters
    ----------
    rank, topology
        This rank, and its cluster.
    at_once
        Ranks that can work at the same time: the cores of an emulated cluster; None: all.
    progress
        Called with the number of routings done and of all.

    Returns
    -------
    Topology
        The same on all ranks. Unchanged where there is one node: nothing is there to choose.
    """
    if len(topology.nodes) == 1:
        return topology
    groups = (tuple(range(topology.num_ranks)),)
    cases = calibration_cases(topology)
    show = None if progress is None else lambda done: progress(done, len(cases))
    measured = measure(rank, topology, groups, cases, REPETITIONS, show)
    found: list[Any] = [fit(topology, measured, at_once) if rank == 0 else None]
    dist.broadcast_object_list(found)
    return with_constants(topology, found[0])


def measure(
    rank: int,
    topology: Topology,
    groups: Groups,
    cases: Sequence[Case],
    repetitions: int,
    progress: Callable[[int], None] | None = None,
) -> list[Measured]:
    """Time every exchange in every case, all groups at once; every rank calls it.

    Parameters
    ----------
    rank, topology
        This rank, and the whole cluster.
    groups
        Expert-parallel groups, which exchange at the same time.
    cases
        What to exchange.
    repetitions
        Timed runs of each exchange, after one that is not. All cases run once, then all again: a
        machine that is slower for a while slows a run or two of each.
    progress
        Called with the share of the runs that is done, in cases.

    Returns
    -------
    list
        The same on all ranks; times are those of the last rank in each run.
    """
    handles = [dist.new_group(list(members)) for members in groups]
    number = next(i for i, members in enumerate(groups) if rank in members)
    members, group = groups[number], handles[number]
    local = topology.subset(members)
    on_gpu = group is not None and not works_by_gloo(group)
    device = torch.device("cuda" if on_gpu else "cpu")
    finish = torch.cuda.synchronize if on_gpu else lambda: None
    moved, timed = [], []
    for seed, case in enumerate(cases):
        index_TK = routing(case, members.index(rank), 1000 * seed + rank)
        moved.append(_moved(topology, local, members, case, index_TK))
        timed.append(_Timed(case, index_TK.to(device), _exchanges(local, group)))
    rounds = repetitions + 1  # the first connects pairs, and exchanges learn how many tokens come
    for done, (_, one) in enumerate(itertools.product(range(rounds), timed), 1):
        one.run(finish)
        if progress is not None:
            progress(-(-done // rounds))
    measured: list[Measured] = []
    for case, one, bytes_of in zip(cases, timed, moved, strict=True):
        last = torch.tensor([one.seconds[name][1:] for name in EXCHANGES], device=device)
        dist.all_reduce(last, dist.ReduceOp.MAX)
        for exchange_number, kind in enumerate(EXCHANGES):
            for way_number, way in enumerate(WAYS):
                value = median(last[exchange_number, :, way_number].tolist())
                measured.append(Measured(case.name, kind, way, value, bytes_of[kind, way]))
    return measured


def _exchanges(local: Topology, group: dist.ProcessGroup | None) -> dict[str, Exchange]:
    return {
        "flat single": Exchange(local, group=group, kind="flat", schedule="single"),
        "flat rounds": Exchange(local, group=group, kind="flat", schedule="rounds"),
        "hierarchical": Exchange(local, group=group, kind="hierarchical"),
    }


class _Timed:
    """One case: its tokens, exchanges of its own, and their seconds so far.

    Exchanges cut tokens into parts after the dispatch before, so cases do not share them.
    """

    def __init__(self, case: Case, index_TK: torch.Tensor, exchanges: dict[str, Exchange]) -> None:
        self._exchanges, self._index_TK = exchanges, index_TK
        self._num_experts = case.weight_pN.shape[1]
        self._x_TD = torch.randn(len(index_TK), case.hidden_size, device=index_TK.device)
        self._weight_TK = torch.rand(index_TK.shape, device=index_TK.device)
        self.seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in exchanges}

    def run(self, finish: Callable[[], None]) -> None:
        """Time every exchange once."""
        for name, exchange in self._exchanges.items():
            dist.barrier()
            began_s = time.perf_counter()
            row_RD, handle = exchange.dispatch(
                self._x_TD, self._index_TK, self._weight_TK, num_experts=self._num_experts
            )
            finish()
            dispatch_s = time.perf_counter() - began_s
            dist.barrier()
            began_s = time.perf_counter()
            exchange.combine(row_RD, handle)
            finish()
            self.seconds[name].append((dispatch_s, time.perf_counter() - began_s))


def _moved(
    topology: Topology,
    local: Topology,
    members: tuple[int, ...],
    case: Case,
    index_TK: torch.Tensor,
) -> dict[tuple[str, str], tuple[Rows, ...]]:
    """Bytes of all groups, for each way of each exchange."""
    num_experts = case.weight_pN.shape[1]
    each = num_experts // len(members)
    relays = make_relays(members.index(dist.get_rank()), local.nodes, sum_groups(local))
    node_N = torch.tensor(local.node_of).repeat_interleave(each)
    parent_TM = plan_forwarding(node_N[index_TK].flatten(), len(index_TK), relays)
    forward_MM = count_copies(parent_TM)[0]
    count_N = torch.bincount(index_TK.flatten(), minlength=num_experts)
    everyone: list[Any] = [None] * topology.num_ranks
    dist.all_gather_object(everyone, (members, count_N.numpy(), forward_MM.numpy(), len(index_TK)))
    moved: dict[tuple[str, str], list[Rows]] = {}
    for ranks in dict.fromkeys(entry[0] for entry in everyone):
        mine = [everyone[rank] for rank in ranks]
        rows = rows_of_group(
            topology.subset(ranks),
            ranks,
            np.stack([entry[1] for entry in mine]),
            np.stack([entry[2] for entry in mine]),
            [expert // each for expert in range(num_experts)],
            case.hidden_size * 4,
            [entry[3] for entry in mine],
        )
        for key, value in rows.items():
            moved.setdefault(key, []).append(value)
    return {key: tuple(values) for key, values in moved.items()}


def fit(
    topology: Topology, measured: Sequence[Measured], at_once: int | None
) -> Mapping[tuple[str, str], Constants]:
    """Constants whose predictions are nearest to what was measured, in relative terms.

    Parameters
    ----------
    topology
        The cluster.
    measured
        From :func:`measure`; at least five cases.
    at_once
        Ranks that can work at the same time: the cores of an emulated cluster, None for a real
        one, where ranks have cores of their own.
    """
    from scipy.optimize import least_squares

    def from_fit(values: np.ndarray) -> Constants:
        start_ms, message_ms, work_ns, token_ns, share = values.tolist()
        return Constants(
            start_ms / 1e3, message_ms / 1e3, work_ns / 1e9, token_ns / 1e9, share, at_once
        )

    fitted: dict[tuple[str, str], Constants] = {}
    steps = np.diag([0.3, 0.01, 0.03, 0.05, -0.01])
    for key in itertools.product(EXCHANGES, WAYS):
        mine = [m for m in measured if (m.exchange, m.way) == key]

        def error(values: np.ndarray, mine: Sequence[Measured] = mine) -> list[float]:
            constants = from_fit(values)
            return [
                float(
                    np.log(
                        predict(topology, m.exchange, m.way, m.groups, constants).time_s / m.seconds
                    )
                )
                for m in mine
            ]

        # Predictions have small steps, so differences over tiny distances would be noise.
        def jacobian(values: np.ndarray, error: Any = error) -> np.ndarray:
            here = np.array(error(values))
            return np.stack([(error(values + step) - here) / step.sum() for step in steps], 1)

        values = np.array([5.0, 0.1, 1.0, 1.0, 0.95])
        for loss in ("linear", "soft_l1"):  # from a far start the first is faster
            values = least_squares(
                error,
                values,
                bounds=([0.0, 0.0, 0.0, 0.0, 0.5], [1e3, 1e3, 1e3, 1e3, 1.0]),
                x_scale=[10.0, 0.2, 1.0, 1.0, 0.1],
                jac=jacobian,
                loss=loss,
                f_scale=0.05,
                ftol=1e-3,
                xtol=1e-3,
                max_nfev=10,
            ).x
        fitted[key] = from_fit(values)
    return fitted
