"""The dispatch problem as arrays that all methods share.

Experts on one rank are interchangeable, so the unknowns are x, tokens from a rank to a rank
divided by what even dispatch sends there: x = 1 is even. In a group of I ranks of which J hold
experts, with m the share of the experts that a rank holds,

    minimise T   s.t.   Σ_j m_j x_ij = 1 ∀i,   Σ_i x_ij = I ∀j,   floor <= x <= N/k,
                        T >= const_r + Σ seconds_r x ∀ rows r,   T >= latency.

The upper bound says that a token takes an expert at most once. Shapes: G groups, I ranks of a
group, J ranks of a group with experts, R rows of the cost model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tamoe.solver.cost import CostModel, SelfSend, cost_model
from tamoe.solver.workload import Workload
from tamoe.topology.graph import Topology


@dataclass(frozen=True, eq=False)
class Problem:
    """Constraints of the dispatch problem in units of even dispatch."""

    topology: Topology
    workload: Workload
    self_send: SelfSend
    floor: float  # lower bound of x
    cap: float  # upper bound of x
    ranks_GI: np.ndarray
    position_J: np.ndarray  # position in the group of each rank that holds experts
    share_J: np.ndarray  # share of the group's experts that it holds
    cost: CostModel
    seconds: Any  # csr [R, G·I·J]: seconds that x = 1 takes on each row

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, I, J)."""
        return (*self.ranks_GI.shape, len(self.position_J))

    @property
    def even_GIJ(self) -> np.ndarray:
        """Even dispatch: all ones."""
        return np.ones(self.shape)

    @property
    def has_choice(self) -> bool:
        """Whether any dispatch but the even one is admissible."""
        _, ranks, holders = self.shape
        return min(ranks, holders) > 1 and self.floor < 1 < self.cap

    @cached_property
    def even_time_s(self) -> float:
        """Time of even dispatch."""
        return self.time_s(self.even_GIJ)

    def row_times_s(self, x_GIJ: np.ndarray) -> np.ndarray:
        """When each row of the cost model ends, ``[R]``."""
        loaded_R = self.cost.const_R + self.seconds @ x_GIJ.ravel()
        return np.maximum(loaded_R, self.cost.constant_cost_R)

    def time_s(self, x_GIJ: np.ndarray) -> float:
        """Time of an exchange."""
        return max(self.cost.latency_s, float(self.row_times_s(x_GIJ).max(initial=0.0)))

    def divergence(self, x_GIJ: np.ndarray) -> float:
        """(1/PkS) Σ c log(c/even): mean over ranks of the divergence of its row from even."""
        logs = np.log(x_GIJ, where=x_GIJ > 0, out=np.zeros(self.shape))
        return float((self.share_J * x_GIJ * logs).sum()) / self.topology.num_ranks

    def kept_share(self, x_GIJ: np.ndarray) -> float:
        """Share of all tokens that stay on their rank."""
        holders = np.arange(len(self.position_J))
        return float((self.share_J * x_GIJ[:, self.position_J, holders]).sum()) / (
            self.topology.num_ranks
        )

    @cached_property
    def equalities(self) -> tuple[Any, np.ndarray]:
        """Sums over rows and columns as a csr matrix and right-hand side.

        The last column of each group follows from the others and is left out.
        """
        from scipy import sparse

        groups, ranks, holders = self.shape
        index = np.arange(groups * ranks * holders).reshape(self.shape)
        g, i, j = np.indices(self.shape)
        kept = j < holders - 1
        column_row = groups * ranks + g * (holders - 1) + j
        rows = np.concatenate([(g * ranks + i).ravel(), column_row[kept]])
        columns = np.concatenate([index.ravel(), index[kept]])
        weights = np.concatenate([self.share_J[j.ravel()], np.full(kept.sum(), 1 / ranks)])
        size = groups * ranks + groups * (holders - 1)
        return sparse.csr_array((weights, (rows, columns)), shape=(size, index.size)), np.ones(size)

    def rank_prices_GI(self, multipliers: np.ndarray) -> np.ndarray:
        """Prices of the row sums from multipliers of :attr:`equalities`."""
        groups, ranks, _ = self.shape
        return multipliers[: groups * ranks].reshape(groups, ranks)

    def column_prices_GJ(self, multipliers: np.ndarray) -> np.ndarray:
        """Prices of the column sums, per unit of x, from multipliers of :attr:`equalities`."""
        groups, ranks, holders = self.shape
        prices_GJ = np.zeros((groups, holders))
        columns = multipliers[groups * ranks :].reshape(groups, holders - 1)
        prices_GJ[:, : holders - 1] = columns / ranks
        return prices_GJ

    def onto_sums(self, x_GIJ: np.ndarray) -> np.ndarray:
        """Make the sums of rows and columns hold, for an x that almost fulfils them.

        Entries move in proportion to their distance from the nearer bound: none leaves its bounds
        and none that is almost 0 is changed by more than a share of itself.
        """
        x = np.clip(x_GIJ, self.floor, self.cap)
        for _ in range(50):
            missing_row = 1 - (self.share_J * x).sum(axis=2, keepdims=True)
            if abs(missing_row).max() < 1e-15 and abs(1 - x.mean(axis=1)).max() < 1e-15:
                break
            x = self._moved(x, self.share_J, 2, missing_row)
            x = self._moved(x, 1 / self.shape[1], 1, 1 - x.mean(axis=1, keepdims=True))
        return x

    def _moved(
        self, x: np.ndarray, weight: np.ndarray | float, axis: int, missing: np.ndarray
    ) -> np.ndarray:
        room = np.minimum(x - self.floor, self.cap - x)
        total = (weight * room).sum(axis=axis, keepdims=True)
        share = np.divide(missing, total, where=total > abs(missing), out=np.zeros_like(missing))
        return np.clip(x + room * share, self.floor, self.cap)

    @cached_property
    def holder_N(self) -> np.ndarray:
        """Position along J of each expert's rank."""
        position_N = self.workload.expert_position_N(self.topology.num_ranks)
        return np.searchsorted(self.position_J, position_N)

    @property
    def tokens(self) -> int:
        """Tokens that each rank sends, kS."""
        return self.workload.top_k * self.workload.tokens_per_rank

    def target_PN(self, x_GIJ: np.ndarray) -> np.ndarray:
        """Tokens from each rank to each expert, ``[P, N]``."""
        num = self.topology.num_ranks
        target_PN = np.empty((num, len(self.holder_N)))
        even = self.workload.even_tokens(num)
        target_PN[self.ranks_GI] = x_GIJ[:, :, self.holder_N] * even
        # The bounds hold to the last bit, whatever the product was rounded to.
        return np.clip(target_PN, self.floor * even, self.workload.tokens_per_rank)

    def per_rank_P(self, price_GI: np.ndarray) -> np.ndarray:
        """Prices of the row sums in seconds per token, ``[P]``."""
        price_P = np.empty(self.topology.num_ranks)
        price_P[self.ranks_GI] = price_GI / self.tokens
        return price_P

    def per_expert_GN(self, price_GJ: np.ndarray) -> np.ndarray:
        """Prices of the column sums in seconds per token, ``[G, N]``."""
        return (price_GJ / (self.share_J * self.tokens))[:, self.holder_N]


def make_problem(
    topology: Topology, workload: Workload, floor: float, self_send: SelfSend
) -> Problem:
    """The problem of one topology and workload.

    Raises
    ------
    InputError
        The workload does not fit the topology, or ``self_send`` cannot be priced.
    """
    num = topology.num_ranks
    ranks_GI = np.array(workload.groups(num))
    experts_I = np.bincount(workload.expert_position_N(num), minlength=ranks_GI.shape[1])
    position_J = np.flatnonzero(experts_I)
    share_J = experts_I[position_J] / experts_I.sum()
    cost = cost_model(topology, workload, self_send)
    pair_of_x = ranks_GI[:, :, None] * num + ranks_GI[:, None, position_J]
    row_bytes = workload.top_k * workload.tokens_per_rank * workload.token_bytes
    bytes_of_x = np.broadcast_to(share_J * row_bytes, pair_of_x.shape)
    seconds = cost.seconds_per_byte[:, pair_of_x.ravel()]
    seconds.data = seconds.data * bytes_of_x.ravel()[seconds.indices]
    return Problem(
        topology,
        workload,
        self_send,
        floor,
        int(experts_I.sum()) / workload.top_k,
        ranks_GI,
        position_J,
        share_J,
        cost,
        seconds,
    )
