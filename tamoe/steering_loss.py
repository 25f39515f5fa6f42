"""SteeringLoss: the family of losses that pull a per-rank gate to its row of the Plan."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from tamoe.plan_module import PlanModule, PlanRows

if TYPE_CHECKING:
    from tamoe.groups import Group


class SteeringLoss(PlanModule):
    """Base of the losses; use :class:`~tamoe.TopologyLoss` or those of :mod:`tamoe.divergence`.

    It belongs to a cluster, not to a model, so nothing of it is in ``state_dict``. A gate shared by
    all ranks cannot follow it: the losses of the ranks average out.
    """

    row_N: torch.Tensor
    keeps_balance: ClassVar[bool]  # it balances by itself, in place of a balance loss

    def __init__(
        self,
        plan: PlanRows,
        group: Group,
        rank: int | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__(plan, group, rank)
        self._numbers_N = self._row(plan)
        row_N = torch.empty(self.num_experts, dtype=torch.float32, device=device)
        self.register_buffer("row_N", row_N, persistent=False)
        self.reset_parameters()

    @abstractmethod
    def _row(self, plan: PlanRows) -> np.ndarray:
        """What the loss needs of the plan's row, ``[N]``."""

    @abstractmethod
    def forward(
        self,
        probs_TN: torch.Tensor,
        expert_index_TK: torch.Tensor,
        mask_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of a batch, a scalar."""

    def reset_parameters(self) -> None:
        """Write the plan's row into the buffer."""
        self.row_N.copy_(torch.from_numpy(self._numbers_N))

    def set_plan(self, plan: PlanRows) -> None:
        """Follow another Plan of the same ranks and experts from now on.

        Raises
        ------
        InputError
            The plan has another number of ranks or experts.
        """
        self._adopt(plan)
        self._numbers_N = self._row(plan)
        self.reset_parameters()
