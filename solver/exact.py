"""The exact target: a linear program for the time, then the even-most of its optima.

The linear program fixes the time T* and the prices. Its vertex is arbitrary, so the target is the
one dispatch that diverges least from even among all that end by T* (1 + 1e-6).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tamoe.solver.certificate import lower_bound_s, normalised
from tamoe.solver.interior import Program, minimise
from tamoe.solver.problem import Problem
from tamoe.topology.errors import TamoeError

SLACK = 0.999e-6  # second stage: time given up to be unique, a hair under 1e-6 for rounding
LP_GAP = 1e-8  # the linear program is solved again, better scaled, where its gap is larger
GOOD_GAP = SLACK / 10  # and by the other method where it is larger than this
LARGE = 6_000  # unknowns and rows from which the interior-point method beats the simplex method
NOTHING = 1e-9  # of even's time: a time that counts as 0


@dataclass(frozen=True, eq=False)
class Optimum:
    """The least time and what proves it."""

    x_GIJ: np.ndarray
    time_s: float
    lower_bound_s: float
    price_R: np.ndarray
    rank_price_GI: np.ndarray  # seconds per unit of a row's sum
    column_price_GJ: np.ndarray  # seconds per unit of x

    @property
    def gap(self) -> float:
        """(time - bound)/time, 0 where there is nothing to gain."""
        return (self.time_s - self.lower_bound_s) / self.time_s if self.time_s > 0 else 0.0


def least_time(problem: Problem) -> Optimum:
    """Solve the linear program; the prices are one of possibly many optimal duals."""
    best = _even(problem)
    scale_s = problem.even_time_s
    size = problem.even_GIJ.size + len(used_rows(problem))
    first, second = (_interior, _simplex) if size > LARGE else (_simplex, _interior)
    for solver, good_gap in ((first, LP_GAP), (first, LP_GAP), (second, GOOD_GAP)):
        done = best.gap <= good_gap or best.time_s <= NOTHING * problem.even_time_s
        if done or not problem.has_choice:
            break
        best = _better(best, solver(problem, scale_s))
        scale_s = max(best.time_s, NOTHING * problem.even_time_s)
    return best


def _even(problem: Problem) -> Optimum:
    """Even dispatch as the first guess, priced by the row that ends last."""
    price_R = np.zeros(len(problem.cost.const_R))
    if len(price_R) and problem.even_time_s > problem.cost.latency_s:
        price_R[int(np.argmax(problem.row_times_s(problem.even_GIJ)))] = 1.0
    rank_price_GI, column_price_GJ = np.zeros(problem.shape[:2]), np.zeros(problem.shape[::2])
    bound_s = lower_bound_s(problem, price_R, column_price_GJ)
    return Optimum(
        problem.even_GIJ, problem.even_time_s, bound_s, price_R, rank_price_GI, column_price_GJ
    )


def _better(one: Optimum, other: Optimum) -> Optimum:
    """The better time with the better bound."""
    fast = one if one.time_s <= other.time_s else other
    tight = one if one.lower_bound_s >= other.lower_bound_s else other
    return replace(tight, x_GIJ=fast.x_GIJ, time_s=fast.time_s)


def used_rows(problem: Problem) -> np.ndarray:
    """Rows of the cost model that any unknown loads."""
    return np.flatnonzero(np.diff(problem.seconds.indptr))


def _simplex(problem: Problem, scale_s: float) -> Optimum:
    from scipy import optimize, sparse

    used = used_rows(problem)
    equalities, equal_to = problem.equalities
    size = problem.even_GIJ.size
    rows = sparse.hstack(
        [problem.seconds[used] / scale_s, sparse.csr_array(-np.ones((len(used), 1)))]
    )
    result = optimize.linprog(
        np.append(np.zeros(size), 1.0),
        A_ub=rows,
        b_ub=-problem.cost.const_R[used] / scale_s,
        A_eq=sparse.hstack([equalities, sparse.csr_array((equalities.shape[0], 1))]),
        b_eq=equal_to,
        bounds=[(problem.floor, problem.cap)] * size + [(problem.cost.latency_s / scale_s, None)],
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if result.x is None:
        return _even(problem)
    return _optimum(
        problem, result.x[:-1], -result.ineqlin.marginals, result.eqlin.marginals * scale_s
    )


def _interior(problem: Problem, scale_s: float) -> Optimum:
    solution = minimise(time_program(problem, scale_s, np.zeros(problem.even_GIJ.size)))
    multipliers = -solution.equality_multipliers * scale_s
    return _optimum(problem, solution.x, solution.price_R, multipliers)


def _optimum(
    problem: Problem, x: np.ndarray, price_used: np.ndarray, multipliers: np.ndarray
) -> Optimum:
    price_R = np.zeros(len(problem.cost.const_R))
    price_R[used_rows(problem)] = price_used
    rank_price_GI = problem.rank_prices_GI(multipliers)
    column_price_GJ = problem.column_prices_GJ(multipliers)
    x_GIJ = problem.onto_sums(x.reshape(problem.shape))
    bound_s = lower_bound_s(problem, price_R, column_price_GJ)
    price_R = normalised(price_R)
    return Optimum(x_GIJ, problem.time_s(x_GIJ), bound_s, price_R, rank_price_GI, column_price_GJ)


def time_program(problem: Problem, scale_s: float, weight_n: np.ndarray, **changes: Any) -> Program:
    """The dispatch problem for the interior-point method, times in units of ``scale_s``."""
    used = used_rows(problem)
    equalities, equal_to = problem.equalities
    program = Program(
        weight_n,
        equalities,
        equal_to,
        problem.seconds[used] / scale_s,
        problem.cost.const_R[used] / scale_s,
        problem.floor,
        problem.cap,
        problem.cost.latency_s / scale_s,
    )
    return replace(program, **changes)


def time_limit_s(problem: Problem, optimum: Optimum) -> float:
    """By when the second stage has to end: the least time and a millionth."""
    proven = optimum.gap <= GOOD_GAP
    least_s = optimum.lower_bound_s if proven else optimum.time_s
    return max(least_s * (1 + SLACK), NOTHING * problem.even_time_s)


def even_most(problem: Problem, time_limit_s: float) -> np.ndarray:
    """The dispatch of least divergence from even that ends by a time, ``[G, I, J]``.

    Raises
    ------
    TamoeError
        The method did not reach the limit: an error of tamoe, not of the input.
    """
    if problem.even_time_s <= time_limit_s or not problem.has_choice:
        return problem.even_GIJ
    weight = np.broadcast_to(problem.share_J, problem.shape).ravel() / problem.shape[1]
    scale_s = max(time_limit_s, 1e-6 * problem.even_time_s)
    program = time_program(problem, scale_s, weight, fixed_time=time_limit_s / scale_s)
    solution = minimise(program)
    x_GIJ = problem.onto_sums(solution.x.reshape(problem.shape))
    if not problem.time_s(x_GIJ) <= time_limit_s * (1 + 1e-9) + 1e-15 * problem.even_time_s:
        raise TamoeError(
            f"the even-most dispatch takes {problem.time_s(x_GIJ)} s and should take "
            f"{time_limit_s} s (residual {solution.error:.1e})"
        )
    return x_GIJ
