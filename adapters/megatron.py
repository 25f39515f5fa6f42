"""Steer the routers of Megatron-Core.

    handle = steer(model, plan)

``TopKRouter`` keeps its losses, capacity and padding; while it routes, the function that turns
logits into choices is one that knows this rank's bias. Its own auxiliary losses count what would
have been chosen without the bias, on the ranks that Megatron averages over.

Shape suffixes: T tokens, K choices, N experts of the whole group.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tamoe.adapters.handle import Handle, How, check_experts, check_steer_arguments, make_steer
from tamoe.adapters.steered import Rule, Steered
from tamoe.adapters.versions import require
from tamoe.group_limit import GroupLimit
from tamoe.plan_module import PlanRows
from tamoe.steering_loss import SteeringLoss
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.bias import TopologyBias
    from tamoe.groups import Group

_FUNCTION = "topk_routing_with_score_function"


def steer(
    model: nn.Module,
    plan: PlanRows,
    *,
    how: How | Callable[[], TopologyBias | SteeringLoss] = "bias",
    rank: int | None = None,
    group: Group = None,
    weight: float | None = None,
    gain: float = 0.3,
) -> Handle:
    """Make every Megatron-Core router of a model prefer the experts that the Plan gives its rank.

    Parameters
    ----------
    model, plan, how, rank, group, weight, gain
        As for :func:`tamoe.adapters.transformers.steer`.

    Returns
    -------
    Handle
        ``loss()``, ``metrics()``, ``update()``, ``set_plan()``, ``off()``, ``detach()``.

    Raises
    ------
    InputError
        Megatron-Core is absent or of another version, the model has no router of it, a router does
        not fit the plan, or it routes by Sinkhorn or by fused kernels.
    """
    version = require("megatron")
    weight = check_steer_arguments(plan, rank, group, weight, how)
    routers: dict[str, Any] = {
        n: m for n, m in model.named_modules() if type(m).__name__ == "TopKRouter"
    }
    if not routers:
        raise InputError(
            f"model is {type(model).__name__} and has no router of megatron-core {version}; "
            f"looked for modules of class TopKRouter"
        )
    handle = Handle(plan, [])
    try:
        for name, router in routers.items():
            _check_router(router, name)
            config: Any = router.config
            top_k = int(router.topk)
            check_experts(plan, int(config.num_moe_experts), top_k, f"router {name!r}")
            device = next(router.parameters()).device
            made = make_steer(plan, how, group=group, rank=rank, gain=gain, device=device)
            layer = Steered(name, made, top_k=top_k, weight=weight, group=group, device=device)
            handle.add(layer.train(model.training))
            handle.undo.append(_attach(router, layer))
            if isinstance(made, SteeringLoss):
                handle.routers.append(router)
    except BaseException:
        handle.detach()
        raise

    def before(model: nn.Module, args: Any) -> None:
        handle.before_forward(model.training)

    handle.undo.append(model.register_forward_pre_hook(before).remove)
    return handle


def _check_router(router: Any, name: str) -> None:
    config: Any = router.config
    module = sys.modules[type(router).__module__]
    if not hasattr(module, _FUNCTION):
        raise InputError(
            f"router {name!r}: {module.__name__} has no {_FUNCTION}; this version of megatron-core "
            f"is not supported"
        )
    if config.moe_router_load_balancing_type == "sinkhorn":
        raise InputError(f"router {name!r} routes by 'sinkhorn'; allowed: top-k routing")
    if config.moe_router_fusion:
        raise InputError(f"router {name!r} has moe_router_fusion=True; allowed: False")


def _attach(router: Any, layer: Steered) -> Callable[[], None]:
    module = sys.modules[type(router).__module__]
    own_routing = router.routing

    def routing(*args: Any, **kwargs: Any) -> Any:
        own_function = getattr(module, _FUNCTION)

        def choose(logits: torch.Tensor, topk: int, **options: Any) -> Any:
            return _choose(own_function, layer, logits, topk, options)

        setattr(module, _FUNCTION, choose)
        try:
            return own_routing(*args, **kwargs)
        finally:
            setattr(module, _FUNCTION, own_function)

    router.routing = routing
    return lambda: router.__dict__.pop("routing", None)


def _choose(
    own_function: Callable[..., Any],
    layer: Steered,
    logits_TN: torch.Tensor,
    top_k: int,
    options: dict[str, Any],
) -> Any:
    """Megatron's probabilities and map, with choices that know the bias."""
    score = options.get("score_function", "softmax")
    rule = Rule(
        score,
        normalize=not (score == "softmax" and options.get("use_pre_softmax"))
        and not (score == "sigmoid" and top_k == 1),
        scale=options.get("scaling_factor") or 1.0,
        limit=_limit(options, logits_TN.shape[1], top_k, logits_TN.device),
        correction=_correction(options),
    )
    if layer.bias is None or not layer.enabled:
        probs_TN, chosen_TN = own_function(logits_TN, top_k, **options)
        index_TK = chosen_TN.to(torch.int8).topk(top_k, dim=1).indices
        layer.observe(rule.probs_TN(logits_TN), index_TK, None)
        return probs_TN, chosen_TN
    index_TK = layer.select(rule.choice_TN(logits_TN), rule.limit, None)
    layer.observe(rule.probs_TN(logits_TN), index_TK, None)
    weight_TK = rule.weight_TK(logits_TN, index_TK).to(logits_TN.dtype)
    probs_TN = torch.zeros_like(logits_TN).scatter(1, index_TK, weight_TK)
    return probs_TN, torch.zeros_like(logits_TN, dtype=torch.bool).scatter(1, index_TK, True)


def _correction(options: dict[str, Any]) -> Callable[[], torch.Tensor] | None:
    bias = options.get("expert_bias")
    return None if bias is None else lambda: bias


def _limit(
    options: dict[str, Any], num_experts: int, top_k: int, device: torch.device
) -> GroupLimit | None:
    groups, top_groups = options.get("num_groups"), options.get("group_topk")
    if not groups or not top_groups:
        return None
    # A group is worth its best k / groups experts; two kinds of limit cover k up to twice that.
    best = top_k // top_groups
    if best not in (1, 2):
        raise InputError(
            f"group_topk is {top_groups} and topk {top_k}; allowed: topk // group_topk of 1 or 2"
        )
    group_of_N = [expert * groups // num_experts for expert in range(num_experts)]
    limit = GroupLimit(group_of_N, top_groups, score="max" if best == 1 else "top2")
    return limit.to(device)
