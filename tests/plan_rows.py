"""A Plan of given targets, for tests of what reads its rows: no topology, no solver."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Rows:
    """Targets ``[P, N]`` with the rows that steering reads."""

    target_PN: np.ndarray

    @property
    def num_ranks(self) -> int:
        return len(self.target_PN)

    @property
    def num_experts(self) -> int:
        return self.target_PN.shape[1]

    def target_N(self, rank: int) -> np.ndarray:
        return self.target_PN[rank]

    def penalty_N(self, rank: int, norm: str = "sum") -> np.ndarray:
        inverse_N = 1 / self.target_PN[rank]
        if norm == "softmax":
            inverse_N = np.exp(inverse_N / inverse_N.mean())
        return inverse_N / inverse_N.mean()

    def log_prior_N(self, rank: int) -> np.ndarray:
        return np.log(self.target_PN[rank] / self.target_PN[rank].mean())


def two_nodes(ranks_per_node: int = 4, ratio: float = 5.0, tokens: float = 2048.0) -> Rows:
    """Two nodes; an expert in the rank's node gets ``ratio`` times as much as one outside."""
    node = np.arange(2 * ranks_per_node) // ranks_per_node
    weight_PN = np.where(node[:, None] == node, ratio, 1.0)
    return Rows(tokens * weight_PN / weight_PN.sum(1, keepdims=True))
