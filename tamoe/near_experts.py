"""Which experts are on a rank's own node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tamoe.plan_module import PlanModule, PlanRows
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.groups import Group


def near_experts(plan: PlanRows, rank: int) -> np.ndarray:
    """Which experts are on the node of a rank, ``[N]`` bool.

    Raises
    ------
    InputError
        The plan knows no nodes.

    Examples
    --------
    >>> from tamoe.solver import Workload, solve
    >>> from tamoe.topology import Topology
    >>> topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(3e10, 1e10))
    >>> near_experts(solve(topology, Workload()), 3).tolist()
    [False, False, True, True]
    """
    topology, expert_rank_N = getattr(plan, "topology", None), getattr(plan, "expert_rank_N", None)
    if topology is None or expert_rank_N is None:
        raise InputError(
            f"plan is {type(plan).__name__}; allowed: a tamoe.solver.Plan, which knows nodes"
        )
    node_of = np.array(topology.node_of)
    return node_of[expert_rank_N(rank)] == node_of[rank]


class NearExperts(PlanModule):
    """:func:`near_experts` of this rank as a buffer, which differs by rank."""

    near_N: torch.Tensor

    def __init__(
        self,
        plan: PlanRows,
        group: Group,
        rank: int | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__(plan, group, rank)
        self._numbers_N = near_experts(plan, self.rank)
        near_N = torch.empty(self.num_experts, dtype=torch.bool, device=device)
        self.register_buffer("near_N", near_N, persistent=False)
        self.reset_parameters()

    @property
    def num_near(self) -> int:
        """How many are near."""
        return int(self._numbers_N.sum())

    def reset_parameters(self) -> None:
        """Write the buffer anew."""
        self.near_N.copy_(torch.from_numpy(self._numbers_N))

    def set_plan(self, plan: PlanRows) -> None:
        """Follow another Plan of the same ranks and experts from now on."""
        self._adopt(plan)
        self._numbers_N = near_experts(plan, self.rank)
        self.reset_parameters()
