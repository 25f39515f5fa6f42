"""What the exchanges cost on a cluster beside the bytes on its links: timed on a few routings.

The cost model of :mod:`tamoe.solver.exchange_cost` has five constants for each way of each
exchange, which :mod:`tamoe.solver.exchange_fit` fits to the medians.

Shape suffixes: T tokens, K choices, P ranks, N experts, p ranks of a group, M nodes.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from tamoe.cases import Case, Groups, everyone, inside_case, make_case, routing
from tamoe.exchange import Exchange
from tamoe.groups import token_device, tokens_by_gloo
from tamoe.progress import Count, Progress
from tamoe.relays import count_copies, plan_forwarding
from tamoe.solver.constants import ROUNDS_AHEAD, Constants, with_constants
from tamoe.solver.exchange_fit import MOST_STEPS, Measured, error_of_median, fit
from tamoe.solver.exchange_rows import ALL_WAYS, EXCHANGES, KEYS, WAYS, Rows, rows_of_group
from tamoe.solver.relays import make_relays, sum_groups
from tamoe.summation import count_sums
from tamoe.timing import line_up, refill_s
from tamoe.topology.graph import Topology

# Seconds that the busiest link is to be busy, and experts of each token.
CALIBRATED_ON = ((0.1, 8), (0.25, 2))
CALIBRATION = ("even", "uneven", "local 8", "local 64", "one-hot")
# Tokens of each rank whose rows all stay inside their node, and experts of each. Without them
# nothing tells work on bytes from what rounds between nodes lose. The last moves as much as routing
# after a target does: from a quarter of it, work was predicted up to 45 % too long (emulated).
INSIDE = ((1024, 8), (4096, 2), (4096, 8))
REPETITIONS = 9
MOST_AGAIN = 3
Result = TypeVar("Result")


def calibration_cases(topology: Topology) -> list[Case]:
    """Routings that tell the constants apart: links, work and messages count in turn."""
    groups = everyone(topology)
    sized = itertools.product(CALIBRATION, CALIBRATED_ON)
    cases = [make_case(topology, groups, name, *on, seed=1) for name, on in sized]
    # Next to nothing, and so much that the links alone decide.
    ends = [make_case(topology, groups, "even", *on, seed=1) for on in ((0.001, 1), (0.5, 2))]
    return [*ends, *cases, *(inside_case(topology, *on) for on in INSIDE)]


def calibrate(
    rank: int,
    topology: Topology,
    *,
    at_once: int | None = None,
    budget_s: float | None = None,
    progress: Progress | None = None,
) -> Topology:
    """The topology with constants of every exchange, measured on it; every rank calls it.

    Parameters
    ----------
    rank, topology
        This rank, and its cluster.
    at_once
        Cores that all ranks share: those of an emulated cluster's machine; None: one for each.
    budget_s
        Seconds after which no exchange is repeated; each is timed at least once. None: no limit.
    progress
        Called as ``progress(phase, done, total, seconds_left)``.

    Returns
    -------
    Topology
        The same on all ranks. Unchanged where there is one node: nothing is there to choose.
    """
    if len(topology.nodes) == 1:
        return topology
    cases = calibration_cases(topology)
    measured = measure(rank, topology, cases, REPETITIONS, progress, budget_s=budget_s)
    mine = KEYS[rank :: topology.num_ranks]  # a fit takes seconds, so ranks share the work
    fitting = Count(progress, "constants", len(mine) * MOST_STEPS)
    ahead = ROUNDS_AHEAD if tokens_by_gloo(dist.group.WORLD) else 0
    constants = fit(topology, measured, at_once, mine, fitting, ahead)
    found: list[Mapping[tuple[str, str], Constants]] = [{}] * topology.num_ranks
    dist.all_gather_object(found, constants)
    fitting.end()
    return with_constants(topology, {key: part[key] for part in found for key in part})


def measure(
    rank: int,
    topology: Topology,
    cases: Sequence[Case],
    repetitions: int,
    progress: Progress | None = None,
    *,
    budget_s: float | None = None,
    steady: float | None = None,
    most_runs: int | None = None,
    backward: bool = False,
) -> list[Measured]:
    """Time every exchange in every case, all groups of a case at once; every rank calls it.

    Parameters
    ----------
    rank, topology
        This rank, and the whole cluster.
    cases
        What to exchange, in which expert-parallel groups.
    repetitions
        Timed runs of each exchange, after one that is not. All cases run once, then all again: a
        machine that is slower for a while slows a run or two of each. Each time they run in another
        order, so that none always follows the same other.
    progress
        Called as ``progress(phase, done, total, seconds_left)``.
    budget_s
        Seconds after which cases do not run again; they run at least twice. None: no limit.
    steady
        Standard error of a median, as a share of it, above which an exchange goes on to run, in
        turns. None: none does.
    most_runs
        Of an exchange that varies, >= repetitions; None: ``MOST_AGAIN`` times as many.
    backward
        Time the backward passes, too, of tokens and weights that need gradients.

    Returns
    -------
    list
        The same on all ranks; times are those of the last rank in each run.
    """
    device = token_device(dist.group.WORLD)
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    joined = {groups: _join(rank, groups) for groups in dict.fromkeys(c.groups for c in cases)}
    moved, timed, pause_s = [], [], refill_s(topology)
    for seed, case in enumerate(cases):
        members, group = joined[case.groups]
        local = topology.subset(members)
        index_TK = routing(case, members.index(rank), 1000 * seed + rank)
        moved.append(_moved(topology, local, members, case, index_TK))
        exchanges = _exchanges(local, group)
        timed.append(_Timed(case, index_TK.to(device), exchanges, pause_s, backward))
    began_s = time.monotonic()
    count = Count(progress, "exchanges", len(cases) * (repetitions + 1))
    # The first run connects pairs, and exchanges learn how many tokens come.
    for done in range(repetitions + 1):
        if budget_s is not None and done > 1 and not _go_on(began_s + budget_s, device):
            break
        for one in random.Random(done).sample(timed, len(timed)):  # the same on all ranks
            one.run(finish)
            count()
    count.end()
    if steady is not None:
        again = range(repetitions + 1, (most_runs or MOST_AGAIN * repetitions) + 1)
        count = Count(progress, "runs of what varies", len(again))
        for done in again:
            varied = [(one, names) for one in timed if (names := one.varied(steady))]
            if not varied:
                break
            for one, names in random.Random(done).sample(varied, len(varied)):
                one.run(finish, names)
            count()
        count.end()
    measured: list[Measured] = []
    ways = ALL_WAYS if backward else WAYS
    for case, one, bytes_of in zip(cases, timed, moved, strict=True):
        for kind, (way_number, way) in itertools.product(EXCHANGES, enumerate(ways)):
            runs = one.last_s(kind)[:, way_number]
            low_s, middle_s, high_s = np.percentile(runs, (25, 50, 75)).tolist()
            measured.append(
                Measured(
                    case.name,
                    kind,
                    way,
                    middle_s,
                    bytes_of[kind, way],
                    (high_s - low_s) / middle_s,
                    len(runs),
                )
            )
    for _, group in joined.values():  # else they would keep their connections while the job runs
        dist.destroy_process_group(group)
    return measured


def _join(rank: int, groups: Groups) -> tuple[tuple[int, ...], dist.ProcessGroup | None]:
    """Ranks of the group that this rank is in, and their process group; all ranks call it."""
    handles = [dist.new_group(list(members)) for members in groups]
    number = next(i for i, members in enumerate(groups) if rank in members)
    return groups[number], handles[number]


def _go_on(until_s: float, device: torch.device) -> bool:
    """Whether there is time left, by the clock of rank 0."""
    left = torch.tensor([time.monotonic() < until_s], dtype=torch.int32, device=device)
    dist.broadcast(left, 0)
    return bool(left.item())


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

    def __init__(
        self,
        case: Case,
        index_TK: torch.Tensor,
        exchanges: dict[str, Exchange],
        pause_s: float,
        backward: bool,
    ) -> None:
        self._exchanges, self._index_TK, self._pause_s = exchanges, index_TK, pause_s
        self._num_experts, self._backward = case.weight_pN.shape[1], backward
        x_TD = torch.randn(len(index_TK), case.hidden_size, device=index_TK.device)
        weight_TK = torch.rand(index_TK.shape, device=index_TK.device)
        self._x_TD, self._weight_TK = (t.requires_grad_(backward) for t in (x_TD, weight_TK))
        self.seconds: dict[str, list[list[float]]] = {name: [] for name in exchanges}
        self._looked_at = list(exchanges)

    def last_s(self, name: str) -> np.ndarray:
        """Seconds of the last rank in each run but the first, ``[runs, ways]``; on all ranks."""
        last = torch.tensor(self.seconds[name][1:], device=self._x_TD.device)
        dist.all_reduce(last, dist.ReduceOp.MAX)
        return last.cpu().numpy()

    def varied(self, steady: float) -> list[str]:
        """Exchanges of whose medians one is less certain than it should be, the same on all ranks.

        An exchange that was steady does not run again and is not looked at again.
        """
        for name in self._looked_at:
            runs = self.last_s(name)
            low_s, middle_s, high_s = np.percentile(runs, (25, 50, 75), axis=0)
            if (error_of_median((high_s - low_s) / middle_s, len(runs)) <= steady).all():
                self._looked_at = [other for other in self._looked_at if other != name]
        return self._looked_at

    def run(self, finish: Callable[[], None], names: Sequence[str] = EXCHANGES) -> None:
        """Time some exchanges once."""
        for name in names:
            seconds: list[float] = []
            # On for nothing, ranks would ask each other in combine whether experts train.
            with torch.set_grad_enabled(self._backward):
                self._run(self._exchanges[name], partial(self._time, finish, seconds))
            self.seconds[name].append(seconds)

    def _time(
        self, finish: Callable[[], None], seconds: list[float], call: Callable[[], Result]
    ) -> Result:
        line_up(self._pause_s)
        began_s = time.perf_counter()
        result = call()
        finish()
        seconds.append(time.perf_counter() - began_s)
        return result

    def _run(self, exchange: Exchange, timed: Callable[[Callable[[], Any]], Any]) -> None:
        row_RD, handle = timed(
            lambda: exchange.dispatch(
                self._x_TD, self._index_TK, self._weight_TK, num_experts=self._num_experts
            )
        )
        out_TD = timed(lambda: exchange.combine(row_RD, handle))
        if self._backward:
            between, to_out_TD = (row_RD, handle.weight), torch.ones_like(out_TD)
            to_between = timed(lambda: torch.autograd.grad(out_TD, between, to_out_TD))
            given = self._x_TD, self._weight_TK
            timed(lambda: torch.autograd.grad(between, given, to_between))


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
    sums_L = count_sums(index_TK, each, len(members), sum_groups(local))
    parent_TM = plan_forwarding(node_N[index_TK].flatten(), len(index_TK), relays)
    forward_MM = count_copies(parent_TM)[0]
    count_N = torch.bincount(index_TK.flatten(), minlength=num_experts)
    of_ranks: list[Any] = [None] * topology.num_ranks
    mine = (members, count_N.numpy(), forward_MM.numpy(), len(index_TK), sums_L.numpy())
    dist.all_gather_object(of_ranks, mine)
    moved: dict[tuple[str, str], list[Rows]] = {}
    for ranks in dict.fromkeys(entry[0] for entry in of_ranks):
        of_group = [of_ranks[rank] for rank in ranks]
        rows = rows_of_group(
            topology.subset(ranks),
            ranks,
            np.stack([entry[1] for entry in of_group]),
            np.stack([entry[2] for entry in of_group]),
            [expert // each for expert in range(num_experts)],
            case.hidden_size * 4,
            [entry[3] for entry in of_group],
            np.stack([entry[4] for entry in of_group]),
        )
        for key, value in rows.items():
            moved.setdefault(key, []).append(value)
    return {key: tuple(values) for key, values in moved.items()}
