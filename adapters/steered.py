"""Steered: what tamoe does at one router of another framework.

A router's own code stays in charge of everything but the choice of experts. How it turns logits
into weights is a :class:`Rule`, which an adapter reads off the router and checks against it.

Shape suffixes: T tokens, K choices, N experts of the whole group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from tamoe.balance import balance_loss, group_balance_loss
from tamoe.bias import TopologyBias
from tamoe.gate_checks import check_finite
from tamoe.logits import best_experts
from tamoe.loss_totals import expert_counts
from tamoe.steering_loss import SteeringLoss
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.groups import Group
    from tamoe.plan_module import PlanRows

Score = Literal["softmax", "sigmoid"]
Limit = Callable[[torch.Tensor], torch.Tensor]  # what is ranked, to which experts are allowed


@dataclass(frozen=True, eq=False)
class Rule:
    """How a router turns logits into choices and weights.

    Parameters
    ----------
    score
        Weights are softmax probabilities or sigmoids of the logits.
    normalize
        Whether the weights of the chosen are divided by their sum.
    scale
        Factor of all weights.
    limit
        Which experts a token may use: :class:`~tamoe.GroupLimit`.
    correction
        Gives the model's own bias on selection, ``[N]``, if it has one.
    """

    score: Score = "softmax"
    normalize: bool = True
    scale: float = 1.0
    limit: Limit | None = None
    correction: Callable[[], torch.Tensor] | None = None

    def choice_TN(self, logits_TN: torch.Tensor) -> torch.Tensor:
        """What selection ranks, before tamoe's bias: logits, or corrected sigmoids."""
        wide_TN = logits_TN.detach().to(torch.promote_types(logits_TN.dtype, torch.float32))
        if self.score == "sigmoid":
            wide_TN = wide_TN.sigmoid()
        return wide_TN if self.correction is None else wide_TN + self.correction()

    def probs_TN(self, logits_TN: torch.Tensor) -> torch.Tensor:
        """Probabilities for losses, rows sum to 1."""
        wide_TN = logits_TN.to(torch.promote_types(logits_TN.dtype, torch.float32))
        if self.score == "softmax":
            return wide_TN.softmax(1)
        score_TN = wide_TN.sigmoid()
        return score_TN / (score_TN.sum(1, keepdim=True) + 1e-20)

    def weight_TK(self, logits_TN: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """Weights of chosen experts, from the unbiased logits, in float32 or wider."""
        wide_TN = logits_TN.to(torch.promote_types(logits_TN.dtype, torch.float32))
        score_TN = wide_TN.softmax(1) if self.score == "softmax" else wide_TN.sigmoid()
        weight_TK = score_TN.gather(1, index_TK)
        if self.normalize:
            weight_TK = weight_TK / (weight_TK.sum(1, keepdim=True) + 1e-20)
        return self.scale * weight_TK


class Steered(nn.Module):
    """One router under steering: its bias or loss, and what it counted.

    Parameters
    ----------
    name
        Of the router in its model.
    steer
        A bias or a loss, of this rank.
    top_k
        k of the router.
    weight
        Factor of its loss: the steering loss, or a balance loss on what is dispatched beside a
        bias; 0 for none.
    group
        Over which a balance loss beside a bias is averaged.
    """

    counts_N: torch.Tensor
    seen_N: torch.Tensor

    def __init__(
        self,
        name: str,
        steer: TopologyBias | SteeringLoss,
        *,
        top_k: int,
        weight: float = 0.0,
        group: Group = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.name, self.steer, self.top_k, self.weight = name, steer, top_k, weight
        self.group = group
        self.enabled = True
        self.latest_loss: torch.Tensor | None = None
        zeros_N = torch.zeros(steer.num_experts, dtype=torch.int64, device=device)
        self.register_buffer("counts_N", zeros_N, persistent=False)  # since the last update
        self.register_buffer("seen_N", zeros_N.clone(), persistent=False)  # for metrics

    @property
    def bias(self) -> TopologyBias | None:
        """The bias, where that is how it steers."""
        return self.steer if isinstance(self.steer, TopologyBias) else None

    def biased(self, choice_TN: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
        """What selection ranks, with the bias."""
        if self.bias is None or not self.enabled:
            return choice_TN
        return choice_TN + self.bias(choice_TN, mask_T)

    def select(
        self, choice_TN: torch.Tensor, limit: Limit | None, mask_T: torch.Tensor | None
    ) -> torch.Tensor:
        """Experts of each token, with the bias."""
        choice_TN = self.biased(choice_TN, mask_T)
        if limit is not None:
            choice_TN = choice_TN.masked_fill(~limit(choice_TN), -torch.inf)
        return best_experts(choice_TN, self.top_k)

    def observe(
        self, probs_TN: torch.Tensor, index_TK: torch.Tensor, mask_T: torch.Tensor | None
    ) -> None:
        """Count what is dispatched, and make the loss of it.

        Raises
        ------
        InputError
            On the CPU: a token has probabilities that are not finite. A device is not asked,
            since that would wait.
        """
        # Not the logits: a model may rule experts out by -inf.
        check_finite(probs_TN, mask_T, f"router {self.name!r}")
        counts_N = expert_counts(index_TK, self.steer.num_experts, mask_T)
        loss = None
        if self.weight:
            loss = self.weight * self.unweighted_loss(probs_TN, index_TK, mask_T, counts_N)
        if in_backward():
            return  # counted before; the loss is made again, for what autograd saved of it
        self.seen_N.add_(counts_N)
        if self.training and self.enabled:
            self.counts_N.add_(counts_N)
        self.latest_loss = loss

    def update(self) -> None:
        """Move the bias by what was counted in training since the last time."""
        if self.bias is not None and self.enabled:
            self.bias.update(self.counts_N)
            self.counts_N.zero_()

    def unweighted_loss(
        self,
        probs_TN: torch.Tensor,
        index_TK: torch.Tensor,
        mask_T: torch.Tensor | None,
        counts_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The steering loss; beside a bias the group's balance loss, in evaluation the rank's."""
        if isinstance(self.steer, SteeringLoss):
            loss = self.steer(probs_TN, index_TK, mask_T)
            if self.steer.keeps_balance:
                return loss
            return loss + balance_loss(probs_TN, index_TK, mask_T, counts_N)
        if not self.training:  # not every rank may be here
            return balance_loss(probs_TN, index_TK, mask_T, counts_N)
        return group_balance_loss(probs_TN, index_TK, self.group, mask_T, counts_N)

    def extra_repr(self) -> str:
        """Name and size, for ``print(handle)``."""
        return f"{self.name!r}, top_k={self.top_k}, weight={self.weight:g}"


def check_top_k(plan: PlanRows, name: str, top_k: int) -> None:
    """Raise :class:`InputError` where a plan is for another number of choices than a router's."""
    workload = getattr(plan, "workload", None)
    if workload is not None and workload.top_k != top_k:
        raise InputError(
            f"plan was solved for top_k={workload.top_k} and {name} takes {top_k}; allowed: the "
            f"same. Solve with Workload(top_k={top_k})"
        )


def in_backward() -> bool:
    """Whether autograd runs forward code again, as activation checkpointing does.

    >>> in_backward()
    False
    """
    # A compiled graph is traced once; what is recomputed in it runs no Python.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
