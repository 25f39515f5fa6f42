"""solve(): from a topology and a workload to a plan."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from tamoe.solver.closed_form import closed_form_target
from tamoe.solver.cost import SELF_SENDS, SelfSend, check_self_send
from tamoe.solver.entropic import entropic_target
from tamoe.solver.exact import SLACK, Optimum, even_most, least_time, time_limit_s
from tamoe.solver.plan import Plan
from tamoe.solver.problem import Problem, make_problem
from tamoe.solver.workload import Workload
from tamoe.topology.errors import InfeasibleError, InputError
from tamoe.topology.graph import Topology

Method = Literal["exact", "entropic", "closed_form"]
METHODS: tuple[Method, ...] = ("exact", "entropic", "closed_form")
EXCHANGES = ("auto", "flat")
LOCAL = 0.99  # kept on its rank: from here on the target is "keep everything local"


def solve(
    topology: Topology,
    workload: Workload,
    *,
    method: Method = "exact",
    floor: float = 0.0,
    kl: float = 0.0,
    self_send: SelfSend = "intra",
    exchange: str = "auto",
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
        "auto" or "flat"; both give the flat exchange.

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
    rank_price_GI, column_price_GJ = optimum.rank_price_GI, optimum.column_price_GJ
    price_R, objective_gap, notes = optimum.price_R, 0.0, _latency_notes(problem, optimum)
    if method == "entropic":
        scale_s = max(optimum.time_s, 1e-6 * problem.even_time_s)
        entropic = entropic_target(problem, float(kl), scale_s)
        x_GIJ, price_R, objective_gap = entropic.x_GIJ, entropic.price_R, entropic.gap
        rank_price_GI, column_price_GJ = entropic.rank_price_GI, entropic.column_price_GJ
    elif method == "closed_form":
        x_GIJ, num_capped = closed_form_target(problem)
        notes += _closed_form_notes(problem, x_GIJ, num_capped)
    else:
        _refuse_all_local(problem, optimum.x_GIJ, kl)
        x_GIJ = even_most(problem, time_limit_s(problem, optimum))
    _refuse_all_local(problem, x_GIJ, kl)
    num_links = problem.cost.num_links
    return Plan(
        topology=topology,
        workload=workload,
        method=method,
        floor=float(floor),
        kl=float(kl),
        self_send=self_send,
        target_PN=problem.target_PN(x_GIJ),
        time_s=problem.time_s(x_GIJ),
        even_time_s=problem.even_time_s,
        lower_bound_s=optimum.lower_bound_s,
        link_prices=price_R[:num_links],
        pair_prices=tuple(
            (i, j, float(price))
            for (i, j), price in zip(problem.cost.pairs, price_R[num_links:], strict=True)
        ),
        rank_price_P=problem.per_rank_P(rank_price_GI),
        expert_price_GN=problem.per_expert_GN(column_price_GJ),
        objective_gap=objective_gap,
        notes=notes,
    )


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
    if method not in METHODS:
        raise InputError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    if exchange not in EXCHANGES:
        raise InputError(f"exchange is {exchange!r}; allowed: {', '.join(EXCHANGES)}")
    if not _is_number(floor) or not 0 <= floor <= 1:
        raise InputError(f"floor is {floor!r}; allowed: 0 to 1, a fraction of even dispatch")
    if not _is_number(kl) or kl < 0:
        raise InputError(f"kl is {kl!r}; allowed: a finite number >= 0")
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
    routes = (problem.topology.route(rank, rank) for rank in range(problem.topology.num_ranks))
    priced_as_inside = problem.self_send == "intra" and all(routes)
    if priced_as_inside or problem.floor > 0 or kl > 0 or not problem.has_choice:
        return
    kept = problem.kept_share(x_GIJ)
    if kept >= LOCAL and problem.time_s(x_GIJ) < problem.even_time_s:
        raise InfeasibleError(
            f"self_send is {problem.self_send!r} with floor 0 and kl 0: the best dispatch keeps "
            f"{kept:.2%} of the tokens on their rank, and experts would only see their own rank's "
            f"data. Give floor > 0, or method 'entropic' with kl > 0"
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


def _closed_form_notes(problem: Problem, x_GIJ: np.ndarray, num_capped: int) -> tuple[str, ...]:
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
