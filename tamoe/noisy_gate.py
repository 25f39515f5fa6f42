"""NoisyGate: noise that is learned, and a loss on the variation of importance and load.

Shape suffixes: T tokens, D hidden size, K choices, N experts of the whole group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from tamoe.balance import group_sum
from tamoe.gate import Gate, GateOptions, Scored
from tamoe.logits import wide_linear
from tamoe.loss_totals import expert_counts
from tamoe.router_losses import squared_variation
from tamoe.scope import mark_scope

if TYPE_CHECKING:
    from typing import Unpack

LEAST_NOISE = 1e-2


class NoisyGate(Gate):
    """Noisy top-k gating: logits get Gaussian noise of learned size in training.

    Its loss is the squared coefficient of variation of the experts' importance (sum of weights)
    plus that of their load (expected number of choices, smooth through the noise): 0 where even.

    Parameters
    ----------
    hidden_size, num_experts, top_k, options
        See :class:`tamoe.Gate`. ``balance_over="sequence"`` is taken for ``"rank"``.

    Notes
    -----
    Shazeer et al. (2017), section 4 and appendix A. ``Routing.probs_TN`` are those of the noisy
    logits. Without noise (evaluation), where every expert is chosen, and where biases or limits
    choose as well, load counts choices.

    Examples
    --------
    >>> gate = NoisyGate(16, 8, top_k=2, generator=torch.Generator().manual_seed(0))
    >>> gate(torch.randn(64, 16)).expert_index_TK.shape
    torch.Size([64, 2])
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        **options: Unpack[GateOptions],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k=top_k, **options)
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))
        mark_scope(self, self.scope)

    def reset_parameters(self) -> None:
        """Draw the weight anew as torch.nn.Linear does; noise is alike for all tokens at first."""
        super().reset_parameters()
        if hasattr(self, "noise_weight"):  # not yet when the base calls
            nn.init.zeros_(self.noise_weight)

    def _default_aux_weight(self) -> float:
        return 0.01

    def _score(self, x_TD: torch.Tensor) -> Scored:
        clean_TN = wide_linear(x_TD, self.weight)
        if not self.training:
            return Scored(clean_TN, clean_TN)
        spread_TN = F.softplus(wide_linear(x_TD, self.noise_weight)) + LEAST_NOISE
        noise_TN = torch.randn(
            clean_TN.shape, generator=self.generator, device=clean_TN.device, dtype=clean_TN.dtype
        )
        return Scored(clean_TN + noise_TN * spread_TN, clean_TN, spread_TN)

    def _balance_loss(
        self,
        scored: Scored,
        probs_TN: torch.Tensor,
        index_TK: torch.Tensor,
        mask_T: torch.Tensor | None,
        counts_N: torch.Tensor | None,
    ) -> torch.Tensor:
        if mask_T is not None:
            keep_T = mask_T.bool()
            clean_TN, spread_TN = (
                None if part is None else part[keep_T]
                for part in (scored.clean_TN, scored.spread_TN)
            )
            scored = Scored(scored.logits_TN[keep_T], clean_TN, spread_TN)
            probs_TN, index_TK = probs_TN[keep_T], index_TK[keep_T]
        weight_TK = self._weigh(scored.logits_TN, probs_TN, index_TK)
        importance_N = torch.zeros_like(probs_TN).scatter(1, index_TK, weight_TK).sum(0)
        both_2N = torch.stack([importance_N, self._load_N(scored, index_TK)])
        if self.balance_over == "group" and self.training:
            both_2N = group_sum(both_2N, self.group)
        return squared_variation(both_2N[0]) + squared_variation(both_2N[1])

    def _load_N(self, scored: Scored, index_TK: torch.Tensor) -> torch.Tensor:
        """Expected choices of each expert, over the noise of its own logit."""
        noisy_TN, clean_TN, spread_TN = scored
        by_logits = self._bias() is None and self.expert_bias is None and self.limit is None
        chosen_by_noise = clean_TN is not None and by_logits and self.top_k < self.num_experts
        if not chosen_by_noise or clean_TN is None or spread_TN is None:
            return expert_counts(index_TK, self.num_experts).to(noisy_TN.dtype)
        return keep_probability(noisy_TN, clean_TN, spread_TN, self.top_k).sum(0)


def keep_probability(
    noisy_TN: torch.Tensor, clean_TN: torch.Tensor, spread_TN: torch.Tensor, top_k: int
) -> torch.Tensor:
    """Probability that an expert stays among the k best if its own noise is drawn again.

    Parameters
    ----------
    noisy_TN, clean_TN, spread_TN
        ``[T, N]``: logits with noise, without, and the noise's standard deviation.
    top_k
        k, below N.

    Notes
    -----
    Shazeer et al. (2017), equations 8 and 9. The threshold is the k-th best noisy logit of the
    *other* experts.

    Examples
    --------
    >>> zeros_TN, ones_TN = torch.zeros(1, 2), torch.ones(1, 2)
    >>> keep_probability(torch.tensor([[0.0, 1.0]]), zeros_TN, ones_TN, 1)[0, 1].item()
    0.5
    """
    best_TK = noisy_TN.topk(top_k + 1, dim=1).values
    if_in_T1, if_out_T1 = best_TK[:, top_k:], best_TK[:, top_k - 1 : top_k]
    threshold_TN = torch.where(noisy_TN > if_in_T1, if_in_T1, if_out_T1)
    return torch.special.ndtr((clean_TN - threshold_TN) / spread_TN)
