"""FasterGate: FasterMoE's topology gate, which lets a fixed share of choices leave the node.

Shape suffixes: T tokens, K choices, N experts of the whole group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tamoe.gate import Gate, GateOptions
from tamoe.logits import best_experts
from tamoe.near_experts import NearExperts
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from typing import Unpack

    from tamoe.solver.plan import Plan


class FasterGate(Gate):
    """Top-k while few choices leave the node; else the rest is redirected to near experts.

    A rank's budget is B = ⌊share · T⌋ choices. If more would leave, every token takes its best
    near experts, and the B tokens whose best remote logit is highest, of those that prefer a remote
    expert, put it in place of their second choice (of their only one with k = 1). With steering
    switched off (:func:`tamoe.gates.steering`) all choices are free.

    Parameters
    ----------
    hidden_size, num_experts, top_k, options
        See :class:`tamoe.Gate`; ``steer`` and ``limit`` are not taken.
    plan
        :class:`tamoe.solver.Plan`; only its nodes and where experts are is used.
    rank
        Of this process in the plan; None asks ``group``.
    remote_share
        Choices that may leave the node, over tokens; 0 to 1. FasterMoE uses 0.14.
    second_choices_escape
        True: whether the budget is exceeded is judged by first choices alone, as in the original,
        so that second choices leave without limit while first ones stay.

    Notes
    -----
    He et al. (2022), FasterMoE. Its balance loss counts what is dispatched; the original's counts
    first choices before they are redirected.

    Examples
    --------
    >>> from tamoe.solver import Workload, solve
    >>> from tamoe.topology import Topology
    >>> topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(3e10, 1e10))
    >>> plan = solve(topology, Workload(top_k=2), floor=0.25)
    >>> gate = FasterGate(16, 4, plan=plan, rank=0, remote_share=0.125)
    >>> int((gate(torch.randn(64, 16)).expert_index_TK >= 2).sum()) <= 8
    True
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        plan: Plan,
        rank: int | None = None,
        top_k: int = 2,
        remote_share: float = 0.14,
        second_choices_escape: bool = False,
        **options: Unpack[GateOptions],
    ) -> None:
        for name in ("steer", "limit"):
            if options.get(name) is not None:
                raise InputError(f"{name} is given; allowed: None, a FasterGate steers by itself")
        if not 0 <= remote_share <= 1:
            raise InputError(f"remote_share is {remote_share}; allowed: 0 to 1")
        super().__init__(hidden_size, num_experts, top_k=top_k, **options)
        self.remote_share, self.second_choices_escape = float(remote_share), second_choices_escape
        self.near = NearExperts(plan, options.get("group"), rank, options.get("device"))
        if self.near.num_experts != num_experts:
            raise InputError(
                f"plan has {self.near.num_experts} experts and the gate {num_experts}; allowed: "
                f"the same number"
            )
        if self.near.num_near < top_k:
            raise InputError(
                f"top_k is {top_k} and the rank's node has {self.near.num_near} experts; allowed: "
                f"at least as many, since tokens are redirected to them"
            )

    def _default_aux_weight(self) -> float:
        return 0.01

    def _select(self, logits_TN: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
        score_TN = self._biased(self._scores(logits_TN), mask_T)
        free_TK = best_experts(score_TN, self.top_k)
        if not self.steering:
            return free_TK
        remote_TK = ~self.near.near_N[free_TK]
        if mask_T is not None:
            remote_TK = remote_TK & mask_T.bool().unsqueeze(1)
        budget = self._budget(score_TN, mask_T)
        leaving = remote_TK[:, 0] if self.second_choices_escape else remote_TK
        # The original asks for fewer than the budget, a plain limit allows as many.
        fits = leaving.sum() < budget if self.second_choices_escape else leaving.sum() <= budget
        return torch.where(fits, free_TK, self._redirected(score_TN, remote_TK[:, 0], budget))

    def _redirected(
        self, score_TN: torch.Tensor, prefers_T: torch.Tensor, budget: int | torch.Tensor
    ) -> torch.Tensor:
        near_TK = best_experts(score_TN.masked_fill(~self.near.near_N, -torch.inf), self.top_k)
        best_T1 = best_experts(score_TN, 1)
        worth_T = score_TN.gather(1, best_T1).squeeze(1).masked_fill(~prefers_T, -torch.inf)
        order_T = worth_T.argsort(descending=True, stable=True)
        turn_T = torch.arange(len(order_T), device=order_T.device)
        goes_T = prefers_T & (torch.empty_like(order_T).scatter_(0, order_T, turn_T) < budget)
        slot = min(1, self.top_k - 1)
        near_TK[:, slot] = torch.where(goes_T, best_T1.squeeze(1), near_TK[:, slot])
        return near_TK

    def _budget(self, score_TN: torch.Tensor, mask_T: torch.Tensor | None) -> int | torch.Tensor:
        if mask_T is None:
            return int(len(score_TN) * self.remote_share)
        return (mask_T.bool().sum().double() * self.remote_share).long()
