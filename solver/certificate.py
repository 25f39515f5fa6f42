"""Lower bounds that hold whatever the solver did.

For any prices y >= 0 of the rows with Σ y = 1 and any prices v of the column sums,

    Σ y·const + Σ_i min_{x_i in row polytope} Σ_j (π_ij - v_j) x_ij + Σ_j v_j·I  <=  T*,

because the maximum over rows is at least their mean under y, and leaving out the column sums only
enlarges the set of dispatches. The minimum over a row is a fractional knapsack.
"""

from __future__ import annotations

import numpy as np

from tamoe.solver.problem import Problem


def lower_bound_s(problem: Problem, price_R: np.ndarray, column_price_GJ: np.ndarray) -> float:
    """A lower bound in seconds on the time of every admissible dispatch.

    Parameters
    ----------
    problem
        The dispatch problem.
    price_R
        ``[R]`` prices of the rows; clipped at 0 and, where they sum to more than 1, normalised.
        What is missing to 1 goes to the row ``T >= latency``.
    column_price_GJ
        ``[G, J]`` prices of the column sums, in seconds per unit of x.

    Returns
    -------
    float
        Valid for any prices; equal to the optimum for optimal ones.
    """
    y_R = normalised(price_R)
    constant_s = float(y_R @ problem.cost.const_R) + (1 - y_R.sum()) * problem.cost.latency_s
    cost_GIJ = (problem.seconds.T @ y_R).reshape(problem.shape) - column_price_GJ[:, None, :]
    rows_s = _cheapest_rows(problem, cost_GIJ).sum()
    columns_s = problem.shape[1] * column_price_GJ.sum()
    return max(float(constant_s + rows_s + columns_s), problem.cost.latency_s)


def normalised(price_R: np.ndarray) -> np.ndarray:
    """Prices clipped at 0 that sum to at most 1."""
    y_R = np.maximum(price_R, 0.0)
    return y_R / max(1.0, float(y_R.sum()))


def _cheapest_rows(problem: Problem, cost_GIJ: np.ndarray) -> np.ndarray:
    """min Σ_j cost_j x_j s.t. Σ_j m_j x_j = 1, floor <= x <= cap, for every row."""
    unit_cost = cost_GIJ / problem.share_J
    order = np.argsort(unit_cost, axis=2)
    room = (problem.cap - problem.floor) * problem.share_J[order]
    before = np.cumsum(room, axis=2) - room
    taken = np.clip(1 - problem.floor - before, 0.0, room)
    spent = (np.take_along_axis(unit_cost, order, axis=2) * taken).sum(axis=2)
    return np.asarray(problem.floor * cost_GIJ.sum(axis=2) + spent)
