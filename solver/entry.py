"""solve(): from a topology and a workload to a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tamoe.solver.choice import ASKED_EXCHANGES, AskedExchange
from tamoe.solver.closed_form import closed_form_target
from tamoe.solver.cost import SELF_SENDS, SelfSend, check_self_send
from tamoe.solver.entropic import entropic_target
from tamoe.solver.exact import SLACK, Optimum, even_most, least_time, time_limit_s
from tamoe.solver.plan import Plan
from tamoe.solver.problem import Problem, make_problem
from tamoe.solver.workload import Workload
from tamoe.topology.errors import InfeasibleError, InputError
from tamoe.topology.graph import MAX_DENSE_RANKS, Topology

Method = Literal["exact", "entropic", "closed_form"]
METHODS: tuple[Method, ...] = ("exact", "entropic", "closed_form")
MAX_KL = 1e9  # beyond, rounding drowns the time
LOCAL = 0.99  # kept on its rank: from here on the target is "keep everything local"


def solve(
    topology: Topology,
    workload: Workload,
    *,
    method: Method = "exact",
    floor: float = 0.0,
    kl: float = 0.0,
    self_send: SelfSend = "intra",
    exchange: AskedExchange = "auto",
) -> Plan:
    """How many tokens each rank should send to each expert.

    Parameters
    ----------
    topology
        The cluster.
    workload
        What is exchanged.
    method
        "exact": the least time with evenly loaded experts, then the even-most of its dispatches.
        "entropic": time weighed against divergence from even by ``kl``. "closed_form": the
        paper's rule, tokens in proportion to the inverse of β, row by row.
    floor
        Least share of even dispatch that every expert gets from every rank, 0 to 1.
    kl
        For "entropic", > 0 and without unit: a target one nat a token away from even is worth
        ``kl`` times the time of even dispatch. Small: the least time. Large: even.
    self_send
        Price of tokens whose expert is on their own rank. "intra": as a message inside the node.
        "copy": as a copy at ``topology.copy_bytes_per_s``. "free": nothing.
    exchange
        What ``Exchange(plan)`` is to take: "flat", "hierarchical", or "auto" for the faster of
        both at the target, by their cost model. The target does not depend on it.

    Returns
    -------
    Plan

    Raises
    ------
    InputError
        An argument is out of range or does not fit the others.
    InfeasibleError
        The best dispatch would keep every token on its rank.

    Notes
    -----
    Times are simulated: T = max over links of A + (bytes - burst)/B; see
    :mod:`tamoe.solver.cost`.

    Examples
    --------
    >>> topology = Topology.from_tree("4x2", bandwidth_bytes_per_s=(1e10, 1e9))
    >>> plan = solve(topology, Workload(tokens_per_rank=1024), method="entropic", kl=0.05)
    >>> bool(plan.time_s < plan.even_time_s), plan.target_PN.sum(axis=1).round(6).tolist()[0]
    (True, 2048.0)
    """
    _check(topology, workload, method, floor, kl, self_send, exchange)
    problem = make_problem(topology, workload, float(floor), self_send)
    optimum = least_time(problem)
    answer = _answer(problem, optimum, method, float(kl))
    _refuse_all_local(problem, answer.x_GIJ, kl)
    num_links = problem.cost.num_links
    return Plan(
        topology=topology,
        workload=workload,
        method=method,
        floor=float(floor),
        kl=float(kl),
        self_send=self_send,
        target_PN=problem.target_PN(answer.x_GIJ),
        time_s=problem.time_s(answer.x_GIJ),
        even_time_s=problem.even_time_s,
        lower_bound_s=optimum.lower_bound_s,
        link_prices=answer.price_R[:num_links],
        pair_prices=tuple(
            (i, j, float(price))
            for (i, j), price in zip(problem.cost.pairs, answer.price_R[num_links:], strict=True)
        ),
        rank_price_P=problem.per_rank_P(answer.rank_price_GI),
        expert_price_GN=problem.per_expert_GN(answer.column_price_GJ),
        objective_gap=answer.objective_gap,
        asked_exchange=exchange,
        notes=_latency_notes(problem, optimum) + answer.notes,
    )


@dataclass(frozen=True, eq=False)
class _Answer:
    """What a method found: its target and prices."""

    x_GIJ: np.ndarray
    price_R: np.ndarray
    rank_price_GI: np.ndarray
    column_price_GJ: np.ndarray
    objective_gap: float = 0.0
    notes: tuple[str, ...] = ()


def _answer(problem: Problem, optimum: Optimum, method: Method, kl: float) -> _Answer:
    if method == "entropic":
        scale_s = max(optimum.time_s, 1e-6 * problem.even_time_s)
        found = entropic_target(problem, kl, scale_s)
        return _Answer(
            found.x_GIJ, found.price_R, found.rank_price_GI, found.column_price_GJ, found.gap
        )
    notes: tuple[str, ...] = ()
    if method == "closed_form":
        x_GIJ, num_capped = closed_form_target(problem)
        notes = _closed_form_notes(x_GIJ, num_capped)
    else:
        x_GIJ = even_most(problem, time_limit_s(problem, optimum))
    prices = optimum.price_R, optimum.rank_price_GI, optimum.column_price_GJ
    return _Answer(x_GIJ, *prices, notes=notes)


def _check(
    topology: Topology,
    workload: Workload,
    method: str,
    floor: float,
    kl: float,
    self_send: str,
    exchange: str,
) -> None:
    for name, value, kind in (("topology", topology, Topology), ("workload", workload, Workload)):
        if not isinstance(value, kind):
            raise InputError(f"{name} is {value!r}; allowed: a {kind.__name__}")
    if topology.num_ranks > MAX_DENSE_RANKS:
        raise InputError(
            f"topology has {topology.num_ranks} ranks; allowed: up to {MAX_DENSE_RANKS} (subset())"
        )
    if method not in METHODS:
        raise InputError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    if exchange not in ASKED_EXCHANGES:
        raise InputError(f"exchange is {exchange!r}; allowed: {', '.join(ASKED_EXCHANGES)}")
    if not _is_number(floor) or not 0 <= floor <= 1:
        raise InputError(f"floor is {floor!r}; allowed: 0 to 1, a fraction of even dispatch")
    if not _is_number(kl) or not 0 <= kl <= MAX_KL:
        raise InputError(f"kl is {kl!r}; allowed: 0 to {MAX_KL:g}, where the target is even")
    if method == "entropic" and kl == 0:
        raise InputError("kl is 0 with method 'entropic'; allowed: > 0, or method 'exact'")
    if method != "entropic" and kl > 0:
        raise InputError(f"kl is {kl!r} with method {method!r}; allowed: 0, or method 'entropic'")
    if self_send not in SELF_SENDS:
        raise InputError(f"self_send is {self_send!r}; allowed: {', '.join(SELF_SENDS)}")
    check_self_send(topology, self_send)


def _is_number(value: object) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating)
    return number and not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]


def _refuse_all_local(problem: Problem, x_GIJ: np.ndarray, kl: float) -> None:
    if problem.floor > 0 or kl > 0 or not problem.has_choice:
        return
    topology, price = problem.topology, f"self_send is {problem.self_send!r}"
    if problem.self_send == "intra":
        unpriced = [rank for rank in range(topology.num_ranks) if not topology.route(rank, rank)]
        if not unpriced:
            return
        price += f" and rank {unpriced[0]} has no link that a message to itself would take,"
    kept = problem.kept_share(x_GIJ)
    if kept >= LOCAL and problem.time_s(x_GIJ) < problem.even_time_s:
        raise InfeasibleError(
            f"{price} with floor 0 and kl 0: the best dispatch keeps {kept:.2%} of the tokens on "
            f"their rank, and experts would only see their own rank's data. Give floor > 0, or "
            f"method 'entropic' with kl > 0"
        )


def _latency_notes(problem: Problem, optimum: Optimum) -> tuple[str, ...]:
    if problem.even_time_s <= optimum.time_s * (1 + SLACK):
        if problem.even_time_s == 0:
            return ("the exchange takes no time in this model: steering cannot help",)
        if problem.even_time_s <= problem.cost.latency_s:
            return ("latency-bound, steering cannot help: even dispatch ends with the latency",)
        return ("even dispatch is already the fastest: steering cannot help",)
    if optimum.time_s <= problem.cost.latency_s * (1 + SLACK):
        return (
            "latency-bound at the target, further steering cannot help: it ends with the latency",
        )
    return ()


def _closed_form_notes(x_GIJ: np.ndarray, num_capped: int) -> tuple[str, ...]:
    notes = []
    error = float(abs(x_GIJ.mean(axis=1) - 1).max())
    if error > 1e-9:
        notes.append(
            f"closed_form loads experts unevenly, up to {error:.1%} off; method 'exact' does not"
        )
    if num_capped:
        notes.append(
            f"closed_form asked {num_capped} pairs for more tokens than a rank has and was capped"
        )
    return tuple(notes)
