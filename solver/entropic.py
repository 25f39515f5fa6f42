"""The entropic target: time against divergence from even, weighed by one number.

    minimise  T/T_even + kl · (1/PkS) Σ c log(c/even)

Its optimum is ``clip(even · exp(-(π + u + v) · PkS/kl), floor · even, S)`` with prices π of the
links and multipliers u, v of the sums, and is strictly positive.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tamoe.solver.certificate import normalised
from tamoe.solver.exact import time_program, used_rows
from tamoe.solver.interior import minimise
from tamoe.solver.problem import Problem
from tamoe.topology.errors import TamoeError

OBJECTIVE_GAP = 1e-6  # relative; a larger one is an error of tamoe


@dataclass(frozen=True, eq=False)
class EntropicOptimum:
    """The target, an optimal dual and what proves the target's objective."""

    x_GIJ: np.ndarray
    price_R: np.ndarray
    rank_price_GI: np.ndarray  # seconds per unit of a row's sum
    column_price_GJ: np.ndarray  # seconds per unit of x
    objective: float
    objective_bound: float

    @property
    def gap(self) -> float:
        """Relative distance of the objective from its bound."""
        scale = max(abs(self.objective), 1e-300)
        return (self.objective - self.objective_bound) / scale


def entropic_target(problem: Problem, kl: float, scale_s: float) -> EntropicOptimum:
    """Solve for one ``kl`` > 0; ``scale_s`` is the order of the times to expect.

    Raises
    ------
    TamoeError
        The objective is not proven: an error of tamoe, not of the input.
    """
    even_s = problem.even_time_s
    if even_s == 0 or not problem.has_choice:
        return _even(problem)
    # The program's objective is ours times even_s/scale_s, and divided by its larger weight.
    weight = kl * even_s / scale_s
    unit = max(1.0, weight)
    share_n = np.broadcast_to(problem.share_J, problem.shape).ravel() / problem.topology.num_ranks
    program = time_program(
        problem,
        scale_s,
        share_n * (weight / unit),
        time_weight=1 / unit,
    )
    solution = minimise(program)
    price_R = np.zeros(len(problem.cost.const_R))
    price_R[used_rows(problem)] = solution.price_R * unit
    multipliers = -solution.equality_multipliers * (unit * scale_s)
    x_GIJ = problem.onto_sums(solution.x.reshape(problem.shape))
    # The slope of x log x is 1 at even; with it in u, prices of 0 mean even.
    slope_s = kl * even_s / problem.topology.num_ranks
    found = EntropicOptimum(
        x_GIJ,
        normalised(price_R),
        problem.rank_prices_GI(multipliers) - slope_s,
        problem.column_prices_GJ(multipliers),
        objective(problem, kl, x_GIJ),
        -np.inf,
    )
    bound = objective_bound(problem, kl, found.price_R, found.rank_price_GI, found.column_price_GJ)
    found = replace(found, objective_bound=bound)
    if not abs(found.gap) <= OBJECTIVE_GAP:
        raise TamoeError(
            f"the entropic target for kl {kl:g} is {found.gap:.1e} from its bound; allowed "
            f"{OBJECTIVE_GAP:.0e} (residual {solution.error:.1e})"
        )
    return found


def objective(problem: Problem, kl: float, x_GIJ: np.ndarray) -> float:
    """T/T_even + kl · divergence."""
    return problem.time_s(x_GIJ) / problem.even_time_s + kl * problem.divergence(x_GIJ)


def objective_bound(
    problem: Problem,
    kl: float,
    price_R: np.ndarray,
    rank_price_GI: np.ndarray,
    column_price_GJ: np.ndarray,
) -> float:
    """A lower bound on the objective of every admissible dispatch, for any prices.

    The Lagrange dual with x log x - x, of equal sum over a row: each x has its own minimum, at the
    clipped exponential.
    """
    y_R = normalised(price_R)
    even_s = problem.even_time_s
    constant_s = float(y_R @ problem.cost.const_R) + (1 - y_R.sum()) * problem.cost.latency_s
    cost_GIJ = (problem.seconds.T @ y_R).reshape(problem.shape)
    cost_GIJ = cost_GIJ - column_price_GJ[:, None, :]
    cost_GIJ = (cost_GIJ - rank_price_GI[:, :, None] * problem.share_J) / even_s
    weight_J = kl * problem.share_J / problem.topology.num_ranks
    with np.errstate(over="ignore"):
        x_GIJ = np.clip(np.exp(-cost_GIJ / weight_J), problem.floor, problem.cap)
    logs = np.log(x_GIJ, where=x_GIJ > 0, out=np.zeros(problem.shape))
    least = kl + (x_GIJ * (cost_GIJ + weight_J * (logs - 1))).sum()
    sums_s = rank_price_GI.sum() + problem.shape[1] * column_price_GJ.sum()
    return float((constant_s + sums_s) / even_s + least)


def _even(problem: Problem) -> EntropicOptimum:
    groups, ranks, holders = problem.shape
    value = 0.0 if problem.even_time_s == 0 else 1.0
    return EntropicOptimum(
        problem.even_GIJ,
        np.zeros(len(problem.cost.const_R)),
        np.zeros((groups, ranks)),
        np.zeros((groups, holders)),
        value,
        value,
    )
