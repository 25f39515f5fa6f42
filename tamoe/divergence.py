"""Losses that pull the probabilities of a per-rank gate to a distribution, beside balance.

Both are 0 where the probabilities have arrived. A gate adds them to its balance loss:
``aux_weight · (balance + weight · loss)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from tamoe.capacity import checked_factor
from tamoe.near_experts import near_experts
from tamoe.plan_module import PlanRows
from tamoe.router_losses import locality_loss, target_divergence
from tamoe.steering_loss import SteeringLoss
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.groups import Group
    from tamoe.solver.plan import Plan


class TargetDivergence(SteeringLoss):
    """KL divergence of the rank's mean probabilities from its target.

    Parameters
    ----------
    plan, group, rank, device
        As for :class:`~tamoe.TopologyLoss`.
    weight
        Factor of the divergence (nats) beside the balance loss, > 0.

    Raises
    ------
    InputError
        The rank is unknown or out of range, the weight is not positive, or the plan has targets of
        0 (solve with ``floor`` or ``kl``).

    Examples
    --------
    >>> from tamoe.solver import Workload, solve
    >>> from tamoe.topology import Topology
    >>> topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(3e10, 1e10))
    >>> loss = TargetDivergence(solve(topology, Workload(), floor=0.25), rank=0)
    >>> probs_TN = torch.from_numpy(loss.share_N).expand(8, 4)
    >>> abs(loss(probs_TN, torch.zeros(8, 1, dtype=torch.long)).item()) < 1e-6
    True
    """

    keeps_balance: ClassVar[bool] = False

    def __init__(
        self,
        plan: PlanRows,
        *,
        group: Group = None,
        rank: int | None = None,
        weight: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        self.weight = checked_factor("weight", weight)
        super().__init__(plan, group, rank, device)

    def forward(
        self,
        probs_TN: torch.Tensor,
        expert_index_TK: torch.Tensor,
        mask_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of a batch: :func:`tamoe.functional.target_divergence`, whatever was chosen."""
        return self.weight * target_divergence(probs_TN, self.row_N, mask_T)

    def _row(self, plan: PlanRows) -> np.ndarray:
        if not (self.share_N > 0).all():
            raise InputError(
                f"plan: {int((self.share_N <= 0).sum())} targets of rank {self.rank} are 0; "
                f"allowed: targets > 0. Solve with floor > 0, or method='entropic' with kl > 0"
            )
        return self.share_N


class LocalityLoss(SteeringLoss):
    """LocMoE's locality loss: divergence from choosing only experts on the rank's own node.

    It knows nodes and neither speeds nor targets; kept to compare. ``remote_share`` makes it
    finite, see :func:`tamoe.functional.locality_loss`.

    Parameters
    ----------
    plan
        :class:`tamoe.solver.Plan`; only its nodes and where experts are is used.
    group, rank, device
        As for :class:`~tamoe.TopologyLoss`.
    weight
        Factor of the divergence (nats) beside the balance loss, > 0.
    remote_share
        What the fully local distribution leaves to remote experts, 0 to 1, both excluded.

    Raises
    ------
    InputError
        The rank is unknown or out of range, or its node has no expert.

    Examples
    --------
    >>> from tamoe.solver import Workload, solve
    >>> from tamoe.topology import Topology
    >>> topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(3e10, 1e10))
    >>> LocalityLoss(solve(topology, Workload()), rank=3).near_N.tolist()
    [False, False, True, True]
    """

    keeps_balance: ClassVar[bool] = False

    def __init__(
        self,
        plan: Plan,
        *,
        group: Group = None,
        rank: int | None = None,
        weight: float = 1.0,
        remote_share: float = 0.01,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 < remote_share < 1:
            raise InputError(f"remote_share is {remote_share}; allowed: between 0 and 1")
        self.weight, self.remote_share = checked_factor("weight", weight), remote_share
        super().__init__(plan, group, rank, device)

    @property
    def is_even(self) -> bool:
        """Whether all experts are near, so that there is nothing to steer."""
        return bool(self._numbers_N.all())

    @property
    def near_N(self) -> torch.Tensor:
        """Experts on the rank's node, ``[N]`` bool."""
        return self.row_N > 0

    def forward(
        self,
        probs_TN: torch.Tensor,
        expert_index_TK: torch.Tensor,
        mask_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of a batch: :func:`tamoe.functional.locality_loss`, whatever was chosen."""
        loss = locality_loss(probs_TN, self.near_N, mask_T, remote_share=self.remote_share)
        return self.weight * loss

    def _row(self, plan: PlanRows) -> np.ndarray:
        near_N = near_experts(plan, self.rank)
        if not near_N.any():
            raise InputError(
                f"plan: the node of rank {self.rank} has no expert; allowed: at least one"
            )
        return near_N.astype(float)
