"""The paper's closed form: each rank's tokens in proportion to 1/β, row by row.

β is that of one flow alone, averaged over all pairs of a level (their noise would unbalance the
experts), as in TA-MoE (NeurIPS 2022). The rule is exact where every row has the same Σ 1/β; on
unequal trees it loads experts unevenly, and it knows nothing of shared links.
"""

from __future__ import annotations

import numpy as np

from tamoe.solver.problem import Problem
from tamoe.topology.errors import InputError


def closed_form_target(problem: Problem) -> tuple[np.ndarray, int]:
    """The row rule within its bounds, ``[G, I, J]``, and how many entries the cap cut.

    Raises
    ------
    InputError
        Self-sends are free: their β is 0 and the rule divides by it.
    """
    if problem.self_send == "free":
        raise InputError(
            "self_send is 'free' with method 'closed_form', which divides by its cost; allowed: "
            "'intra', 'copy'"
        )
    rate_GIJ = 1 / levelled_beta_GIJ(problem)
    x_GIJ = _scaled_rows(problem, rate_GIJ)
    unbounded = rate_GIJ / (problem.share_J * rate_GIJ).sum(axis=2, keepdims=True)
    return x_GIJ, int((unbounded > problem.cap).sum())


def levelled_beta_GIJ(problem: Problem) -> np.ndarray:
    """Inverse bandwidth from each rank to each rank with experts, averaged over its level."""
    topology = problem.topology
    beta_PP = topology.beta_s_per_byte.copy()
    level_PP = topology.level_PP.copy()
    if problem.self_send == "copy":
        assert topology.copy_bytes_per_s is not None
        np.fill_diagonal(level_PP, -1)
        np.fill_diagonal(beta_PP, 1 / topology.copy_bytes_per_s)
    rows = problem.ranks_GI[:, :, None]
    columns = problem.ranks_GI[:, None, :]
    levels, betas = level_PP[rows, columns], beta_PP[rows, columns]
    for level in np.unique(levels):
        betas[levels == level] = betas[levels == level].mean()
    if not (betas > 0).all():
        raise InputError(
            "beta_s_per_byte is 0 for pairs of a level (a rank without a link to itself); "
            "allowed: > 0 with method 'closed_form'. Use method 'exact'"
        )
    return np.asarray(betas[:, :, problem.position_J])


def _scaled_rows(problem: Problem, rate_GIJ: np.ndarray) -> np.ndarray:
    """clip(t_i · rate, floor, cap) with t_i such that each row sends its tokens (bisection)."""
    low = np.zeros(problem.shape[:2])
    high = problem.cap / rate_GIJ.min(axis=2)
    for _ in range(200):
        middle = (low + high) / 2
        x_GIJ = np.clip(middle[:, :, None] * rate_GIJ, problem.floor, problem.cap)
        over = (problem.share_J * x_GIJ).sum(axis=2) > 1
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    return x_GIJ
