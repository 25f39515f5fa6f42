"""TopologyLoss: the loss that pulls a per-rank gate to its row of the Plan."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from tamoe.balance import topology_loss
from tamoe.plan_module import PlanRows, checked_row
from tamoe.steering_loss import SteeringLoss
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.groups import Group

Norm = Literal["sum", "softmax"]


class TopologyLoss(SteeringLoss):
    """The topology loss of one rank: 1 at even routing, with the rank's target as fixed point.

    The gate has to differ by rank: with one gate shared by all ranks the losses of the ranks
    average out, to the plain balance loss on symmetric clusters and to uneven experts on others.
    For a shared gate use :class:`~tamoe.TopologyBias`.

    Parameters
    ----------
    plan
        :class:`tamoe.solver.Plan`. It belongs to a cluster, not to a model, so it is not part of
        ``state_dict``.
    group
        Expert-parallel group that the plan was solved for, None for the default group. Only asked
        for this process's rank.
    rank
        Row of the plan; None asks the group.
    norm
        ``"sum"``: penalties 1/ĉ over their sum; the fixed point of the loss is the target.
        ``"softmax"``: as in the code of TA-MoE; its fixed point is not the target and depends on
        the unit of the penalties. Kept for comparison, warns once.
    device
        Of the penalties.

    Raises
    ------
    InputError
        The rank is unknown or out of range, the norm is neither of the two, or the plan has
        targets of 0 (solve with ``floor`` or ``kl``).

    Notes
    -----
    TA-MoE (NeurIPS 2022), topology-aware auxiliary loss; see :func:`tamoe.functional.topology_loss`
    for the formula and for what it takes dropped choices to mean.

    Examples
    --------
    >>> import torch
    >>> from tamoe import TopologyLoss
    >>> from tamoe.solver import Workload, solve
    >>> from tamoe.topology import Topology
    >>> topology = Topology.from_tree("2x4", bandwidth_bytes_per_s=(5e10, 1e10))
    >>> plan = solve(topology, Workload(tokens_per_rank=512, top_k=1))
    >>> loss = TopologyLoss(plan, rank=0)
    >>> probs_TN = torch.full((512, 8), 1 / 8)
    >>> round(loss(probs_TN, torch.arange(512).remainder(8).unsqueeze(1)).item(), 6)
    1.0
    """

    keeps_balance: ClassVar[bool] = True

    def __init__(
        self,
        plan: PlanRows,
        *,
        group: Group = None,
        rank: int | None = None,
        norm: Norm = "sum",
        device: torch.device | str | None = None,
    ) -> None:
        if norm not in ("sum", "softmax"):
            raise InputError(f"norm is {norm!r}; allowed: 'sum', 'softmax'")
        self.norm: Norm = norm  # what follows reads it
        super().__init__(plan, group, rank, device)
        if norm == "softmax":
            _warn_softmax()

    @property
    def penalty_N(self) -> torch.Tensor:
        """Weights of the experts' terms, ``[N]``, mean 1."""
        return self.row_N

    def forward(
        self,
        probs_TN: torch.Tensor,
        expert_index_TK: torch.Tensor,
        mask_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of a batch, a scalar; see :func:`tamoe.functional.topology_loss`."""
        return topology_loss(probs_TN, expert_index_TK, self.row_N, mask_T)

    def extra_repr(self) -> str:
        """Rank, size and norm, for ``print(model)``."""
        return f"{super().extra_repr()}, norm={self.norm!r}"

    def _row(self, plan: PlanRows) -> np.ndarray:
        row_N = checked_row("penalty_N", plan.penalty_N(self.rank, self.norm), self.num_experts)
        if not (row_N > 0).all():
            raise InputError(f"plan: penalty_N of rank {self.rank} has values <= 0; allowed: > 0")
        return row_N


@functools.cache
def _warn_softmax() -> None:
    warnings.warn(
        "norm='softmax': the fixed point of this loss is not the plan's target and depends on the "
        "unit of the penalties; use norm='sum' to reach the target",
        UserWarning,
        stacklevel=3,
    )
