"""Steer the gates of DeepSpeed's MoE layers.

    handle = steer(model, plan)                 # before or after deepspeed.initialize
    loss = loss + coefficient * moe_layer.l_aux # as ever: l_aux is the steering's loss

``TopKGate`` keeps its weight, its options and its place; its ``forward`` is replaced. Both of
DeepSpeed's contracts are kept: four dense results, or the seven that it asks for since 0.19.3.

Shape suffixes: T tokens, D hidden size, K choices, N experts of the whole group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tamoe.adapters.attach import Found, Steering, attach_all, routers_of_class
from tamoe.adapters.handle import Handle
from tamoe.adapters.steered import Rule, Steered
from tamoe.adapters.versions import require
from tamoe.capacity import within_capacity
from tamoe.groups import process_group
from tamoe.logits import best_experts, wide_linear
from tamoe.loss_totals import expert_counts
from tamoe.plan_module import PlanRows
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.adapters.attach import How, Undo
    from tamoe.groups import Group

_RULE = Rule()


def steer(
    model: nn.Module,
    plan: PlanRows,
    *,
    how: How = "bias",
    rank: int | None = None,
    group: Group = None,
    gain: float = 0.3,
) -> Handle:
    """Make every DeepSpeed MoE layer of a model prefer the experts that the Plan gives its rank.

    Parameters
    ----------
    model
        Holds ``deepspeed.moe.layer.MoE`` layers.
    plan
        :class:`tamoe.solver.Plan` of the expert-parallel group.
    how
        ``"bias"``: on selection; ``l_aux`` is the balance loss of what is dispatched, averaged over
        the group. ``"loss"``: ``l_aux`` is the topology loss (1 at even routing, as DeepSpeed's);
        then every rank must train a gate of its own: keep ``handle.router_parameters()`` out of
        gradient averaging. Or a function that makes one of tamoe's steering modules.
    rank
        Row of the plan; None asks the group.
    group
        Expert-parallel group of the plan, None for the default group.
    gain
        Of the bias's controller.

    Returns
    -------
    Handle
        ``handle.loss()`` is 0: the loss is in ``l_aux``.

    Raises
    ------
    InputError
        DeepSpeed is absent or of another version, the model has no gate of it, or a gate does not
        fit the plan.

    Notes
    -----
    Capacity, drops (random, by position, by probability), minimum and padding are DeepSpeed's for
    each k, and so is the sampling of second experts; random numbers differ. ``RSample`` noise is
    refused.
    """
    version = require("deepspeed")
    steering = Steering(plan, how, rank, group, gain, weight=0.0)  # the loss is in l_aux
    found = routers_of_class(
        model, "TopKGate", f"deepspeed {version}", lambda router: (router.wg.weight, int(router.k))
    )

    def attach(router: Found, layer: Steered, handle: Handle) -> list[Undo]:
        return [_attach(router.module, layer)]

    return attach_all(model, steering, found, attach)


def _attach(gate: Any, layer: Steered) -> Undo:
    if gate.noisy_gate_policy == "RSample":
        raise InputError(
            f"gate {layer.name!r} has noisy_gate_policy='RSample'; allowed: 'Jitter' or None"
        )

    def forward(
        input: torch.Tensor,
        used_token: torch.Tensor | None = None,
        sparse_routes: bool = False,
        use_tutel: bool = False,
    ) -> tuple[Any, ...]:
        logits_TN = wide_linear(_jittered(gate, input), gate.wg.weight)
        mask_T = None if used_token is None else used_token.reshape(-1).bool()
        probs_TN = _RULE.probs_TN(logits_TN)
        index_TK = _choose(gate, layer.biased(_RULE.choice_TN(logits_TN), mask_T))
        layer.observe(probs_TN, index_TK, mask_T)
        loss = layer.unweighted_loss(probs_TN, index_TK, mask_T)
        if mask_T is not None:
            index_TK = index_TK.masked_fill(~mask_T.unsqueeze(1), -1)
        return _contract(gate, probs_TN, index_TK, loss, sparse_routes)

    gate.forward = forward
    return lambda: gate.__dict__.pop("forward", None)


def _choose(gate: Any, score_TN: torch.Tensor) -> torch.Tensor:
    index_TK = best_experts(score_TN, gate.k)
    if gate.k != 2 or not gate.top2_2nd_expert_sampling:
        return index_TK
    # DeepSpeed samples the second expert, also in evaluation.
    noise_TN = -torch.empty_like(score_TN).exponential_().log()
    noisy_TN = (score_TN + noise_TN).scatter(1, index_TK[:, :1], -torch.inf)
    return torch.cat([index_TK[:, :1], best_experts(noisy_TN, 1)], 1)


def _jittered(gate: Any, x_TD: torch.Tensor) -> torch.Tensor:
    if gate.noisy_gate_policy != "Jitter" or not gate.training:
        return x_TD
    x_TD = x_TD.float()
    return x_TD * torch.empty_like(x_TD).uniform_(0.99, 1.01)


def _contract(
    gate: Any,
    probs_TN: torch.Tensor,
    index_TK: torch.Tensor,
    loss: torch.Tensor,
    sparse: bool,
) -> tuple[Any, ...]:
    """Drops, places in the buffers and weights as DeepSpeed's layer wants them."""
    tokens, num_experts = probs_TN.shape
    counts_N = expert_counts(index_TK, num_experts)
    capacity = _capacity(gate, tokens, num_experts, counts_N)
    chosen_TK = probs_TN.gather(1, index_TK.clamp_min(0))
    if gate.drop_tokens:
        capacity_N = counts_N.new_full((num_experts,), capacity)
        kept_TK = within_capacity(index_TK, capacity_N, _priority(gate, chosen_TK.detach()))
    else:
        kept_TK = index_TK >= 0
    index_TK = torch.where(kept_TK, index_TK, -1)
    weight_TK = torch.where(kept_TK, chosen_TK, 0.0)
    if gate.k > 1:
        total_T1 = weight_TK.sum(1, keepdim=True)
        weight_TK = weight_TK / total_T1.clamp_min(torch.finfo(weight_TK.dtype).eps)
    place_TK = torch.where(kept_TK, _places(index_TK), 0)
    if sparse:
        return (
            loss,
            torch.tensor(capacity, device=probs_TN.device),
            num_experts,
            index_TK.T.contiguous().to(torch.int32),
            place_TK.T.contiguous().to(torch.int32),
            weight_TK.T.contiguous(),
            counts_N,
        )
    row_TK = torch.arange(tokens, device=index_TK.device)[:, None].expand_as(index_TK)
    combine_TNC = probs_TN.new_zeros(tokens, num_experts, capacity)
    at = (row_TK[kept_TK], index_TK[kept_TK], place_TK[kept_TK])
    combine_TNC = combine_TNC.index_put(at, weight_TK[kept_TK])
    return loss, combine_TNC, combine_TNC.bool(), counts_N


def _priority(gate: Any, chosen_TK: torch.Tensor) -> torch.Tensor | None:
    """Who stays where a capacity is exceeded: DeepSpeed's policy for each k."""
    if gate.k == 1:
        return torch.rand_like(chosen_TK) if gate.use_rts else None
    return None if gate.k == 2 else chosen_TK


def _capacity(gate: Any, tokens: int, num_experts: int, counts_N: torch.Tensor) -> int:
    if gate.drop_tokens:
        factor = gate.capacity_factor if gate.training else gate.eval_capacity_factor
        # In float32, as DeepSpeed does it.
        even = torch.tensor(tokens / num_experts, dtype=torch.float32)
        size = int(torch.ceil(even * torch.tensor(float(factor) * gate.k)))
        return max(size, int(gate.min_capacity))
    largest = counts_N.max()
    if gate.ep_group is not None:
        torch.distributed.all_reduce(
            largest, op=torch.distributed.ReduceOp.MAX, group=process_group(gate.ep_group)
        )
    from deepspeed.utils import bwc_tensor_model_parallel_world_size, groups

    tensor_ranks = 1
    if groups.mpu is not None and groups._get_expert_model_parallel_world_size() == 1:
        tensor_ranks = bwc_tensor_model_parallel_world_size(mpu=groups.mpu)
    return -(-int(largest) // tensor_ranks) * tensor_ranks


def _places(index_TK: torch.Tensor) -> torch.Tensor:
    """Number of each kept choice among those of its expert: first choices, then second ones."""
    flat = index_TK.T.reshape(-1)
    order = flat.argsort(stable=True)
    first = torch.searchsorted(flat[order], flat[order])
    place = torch.empty_like(flat)
    place[order] = torch.arange(len(flat), device=flat.device) - first
    return place.reshape(index_TK.shape[::-1]).T
