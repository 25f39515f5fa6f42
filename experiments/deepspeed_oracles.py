"""tamoe's gates and losses against DeepSpeed's gating functions, on random inputs.

Shape suffixes: T tokens, K choices, N experts, C places of an expert.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from tamoe.capacity import even_capacity, within_capacity
from tamoe.experiments.oracle_inputs import (
    chosen_map,
    differ,
    draw_logits,
    draw_whole,
    routed,
)
from tamoe.functional import balance_loss, expert_counts
from tamoe.gates import GShardGate, SwitchGate


def _deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.moe import sharded_moe

    return sharded_moe


def top1_counts_and_loss(generator: torch.Generator) -> float:
    """Counts before drops, kept counts and loss of ``top1gating`` with random selection."""
    logits_TN = draw_logits(generator)
    num_experts, factor = logits_TN.shape[1], (0.5, 1.0, 1.25)[draw_whole(generator, 0, 2)]
    loss, _, mask_TNC, counts_N = _deepspeed().top1gating(logits_TN.clone(), factor, 0)
    gate = SwitchGate(num_experts, num_experts, capacity=factor, drop="random", aux_weight=1.0)
    routing = routed(gate, logits_TN)
    kept_N = expert_counts(routing.expert_index_TK, num_experts)
    before_N = expert_counts(logits_TN.argmax(1, keepdim=True), num_experts)
    return max(
        differ(routing.aux_loss, loss),
        differ(kept_N, mask_TNC.sum((0, 2))),
        differ(before_N, counts_N),
    )


def top1_without_drops(generator: torch.Generator) -> float:
    """Dispatch set and weights of ``top1gating`` that drops nothing."""
    logits_TN = draw_logits(generator)
    num_experts = logits_TN.shape[1]
    _, combine_TNC, mask_TNC, _ = _deepspeed().top1gating(
        logits_TN.clone(), 1.0, 0, drop_tokens=False
    )
    routing = routed(SwitchGate(num_experts, num_experts), logits_TN)
    weight_T = combine_TNC.sum((1, 2))
    return max(
        differ(chosen_map(routing.expert_index_TK, num_experts), mask_TNC.any(2)),
        differ(routing.weight_TK[:, 0], weight_T),
    )


def top2(generator: torch.Generator) -> float:
    """Dispatch set, weights and loss of ``top2gating``, which drops by position."""
    logits_TN = draw_logits(generator)
    num_experts, factor = logits_TN.shape[1], (0.5, 1.0, 1.25)[draw_whole(generator, 0, 2)]
    loss, combine_TNC, mask_TNC, _ = _deepspeed().top2gating(
        logits_TN.clone(), factor, 0, top2_2nd_expert_sampling=False
    )
    gate = GShardGate(
        num_experts,
        num_experts,
        capacity=factor,
        drop="position",
        renormalize=True,
        aux_weight=1.0,
        balance_counts="first",
    )
    routing = routed(gate, logits_TN)
    weight_TN = torch.zeros_like(logits_TN).scatter_add(
        1, routing.expert_index_TK.clamp_min(0), routing.weight_TK.detach()
    )
    return max(
        differ(routing.aux_loss, loss),
        differ(chosen_map(routing.expert_index_TK, num_experts), mask_TNC.any(2)),
        differ(weight_TN, combine_TNC.sum(2)),
    )


def topk(generator: torch.Generator, policy: str) -> float:
    """Dispatch set, weights and loss of ``topkgating`` with a drop policy."""
    logits_TN = draw_logits(generator)
    tokens, num_experts = logits_TN.shape
    top_k, factor = (
        draw_whole(generator, 1, num_experts),
        (0.5, 1.0, 1.25)[draw_whole(generator, 0, 2)],
    )
    drop_tokens = policy != "none"
    loss, combine_TNC, mask_TNC, counts_N = _deepspeed().topkgating(
        logits_TN.clone(),
        top_k,
        factor,
        0,
        drop_tokens=drop_tokens,
        drop_policy=policy if drop_tokens else "probs",
    )
    probs_TN = logits_TN.softmax(1)
    weight_TK, index_TK = probs_TN.topk(top_k, dim=1)
    own_counts_N, own_loss = expert_counts(index_TK, num_experts), balance_loss(probs_TN, index_TK)
    if drop_tokens:
        size = even_capacity(tokens, num_experts, top_k=top_k, factor=factor)
        priority_TK = weight_TK
        if policy == "position":  # of the token alone, whichever choice of it
            priority_TK = -torch.arange(tokens)[:, None].expand_as(index_TK).float()
        kept_TK = within_capacity(index_TK, torch.full((num_experts,), size), priority_TK)
        weight_TK = torch.where(kept_TK, weight_TK, 0.0)
        index_TK = torch.where(kept_TK, index_TK, -1)
    # DeepSpeed stops normalising where next to nothing is left of a token.
    weight_TK = weight_TK / weight_TK.sum(1, keepdim=True).clamp_min(torch.finfo().eps)
    weight_TN = torch.zeros_like(logits_TN).scatter_add(1, index_TK.clamp_min(0), weight_TK)
    return max(
        differ(own_loss, loss),
        differ(own_counts_N, counts_N),
        differ(chosen_map(index_TK, num_experts), mask_TNC.any(2)),
        differ(weight_TN, combine_TNC.sum(2)),
    )
