"""Routing: what a gate decides about a batch of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """Where each token goes, with which weight, and what the gate asks to add to the loss.

    Shape suffixes: T tokens, K choices, N experts of the whole group.

    Parameters
    ----------
    expert_index_TK
        ``[T, K]`` int64, 0 to N - 1; -1 where the choice was dropped.
    weight_TK
        ``[T, K]``, factor of each expert's output; 0 where the choice was dropped. Differentiable.
    probs_TN
        ``[T, N]``, the gate's probabilities before any bias, rows sum to 1. Differentiable.
    aux_loss
        Scalar, already multiplied by the gate's loss weights: add it to the task loss as it is.
        0 where the gate asks for nothing. Differentiable.

    Examples
    --------
    >>> index_TK = torch.tensor([[0, 1], [2, -1]])
    >>> weight_TK = torch.tensor([[0.75, 0.25], [0.5, 0.0]])
    >>> routing = Routing(index_TK, weight_TK, torch.full((2, 4), 0.25), torch.zeros(()))
    >>> (routing.expert_index_TK >= 0).sum().item()
    3
    """

    expert_index_TK: torch.Tensor
    weight_TK: torch.Tensor
    probs_TN: torch.Tensor
    aux_loss: torch.Tensor
