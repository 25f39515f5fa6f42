"""SigmoidGate: each expert is scored by itself, as in DeepSeek-V3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tamoe.capacity import checked_factor
from tamoe.gate import Gate, GateOptions
from tamoe.steering_loss import SteeringLoss

if TYPE_CHECKING:
    from typing import Unpack


class SigmoidGate(Gate):
    """Top-k of sigmoid scores, with weights in proportion to the scores of the chosen.

    With ``expert_bias=ExpertBias(...)`` and ``limit=GroupLimit(..., score="top2")`` it is the
    router of DeepSeek-V3: biases act on selection, weights come from the scores alone.

    Parameters
    ----------
    hidden_size, num_experts, top_k, options
        See :class:`tamoe.Gate`. ``weights="chosen"`` (default, also at k = 1) divides the scores by
        their sum over the chosen, ``"full"`` takes them as they are. ``Routing.probs_TN`` holds the
        scores over their sum, which is what DeepSeek-V3's loss balances.
    route_scale
        Factor of all weights, > 0; DeepSeek-V3 uses 2.5.

    Examples
    --------
    >>> routing = SigmoidGate(16, 8, top_k=2, route_scale=2.5)(torch.randn(64, 16))
    >>> bool((routing.weight_TK.sum(1) - 2.5).abs().max() < 1e-5)
    True
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        route_scale: float = 1.0,
        **options: Unpack[GateOptions],
    ) -> None:
        options["weights"] = options.get("weights") or "chosen"
        super().__init__(hidden_size, num_experts, top_k=top_k, **options)
        self.route_scale = checked_factor("route_scale", route_scale)

    def _default_aux_weight(self) -> float:
        by_bias = self.expert_bias is not None and not isinstance(self.steer, SteeringLoss)
        return 0.0 if by_bias else 0.01

    def _probs(self, logits_TN: torch.Tensor) -> torch.Tensor:
        score_TN = logits_TN.sigmoid()
        return score_TN / (score_TN.sum(1, keepdim=True) + 1e-20)

    def _scores(self, logits_TN: torch.Tensor) -> torch.Tensor:
        return logits_TN.sigmoid()

    def _weigh(
        self, logits_TN: torch.Tensor, probs_TN: torch.Tensor, index_TK: torch.Tensor
    ) -> torch.Tensor:
        weight_TK = logits_TN.gather(1, index_TK).sigmoid()
        if self.weights == "chosen":
            weight_TK = weight_TK / (weight_TK.sum(1, keepdim=True) + 1e-20)
        return self.route_scale * weight_TK
