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

from tamoe.adapters.attach import Found, Steering, attach_all, routers_of_class
from tamoe.adapters.handle import Handle
from tamoe.adapters.steered import Limit, Rule, Steered
from tamoe.adapters.versions import require
from tamoe.group_limit import GroupLimit
from tamoe.plan_module import PlanRows
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.adapters.attach import How, Undo
    from tamoe.groups import Group

_FUNCTION = "topk_routing_with_score_function"
_SCORES = ("softmax", "sigmoid")
# Options under which Megatron's choices are not the best scores of a token as tamoe knows them.
_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    (
        "moe_router_load_balancing_type",
        ("sinkhorn", "quantile_balancing"),
        "top-k routing, with or without losses",
    ),
    ("moe_router_fusion", (True,), "False"),
    ("moe_enable_routing_replay", (True,), "False"),
)


def steer(
    model: nn.Module,
    plan: PlanRows,
    *,
    how: How = "bias",
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
        not fit the plan, or it routes by Sinkhorn, quantile balancing, square roots of softplus,
        fused kernels or a replay.
    """
    version = require("megatron")
    steering = Steering(plan, how, rank, group, gain, weight)
    found = routers_of_class(
        model,
        "TopKRouter",
        f"megatron-core {version}",
        lambda router: (router.weight, int(router.topk)),
    )
    return attach_all(model, steering, found, _attach)


def _check_router(router: Any, name: str) -> Any:
    """The module of the router's code, if it routes as tamoe knows."""
    config = router.config
    module = sys.modules[type(router).__module__]
    if not hasattr(module, _FUNCTION):
        raise InputError(
            f"router {name!r}: {module.__name__} has no {_FUNCTION}; this version of megatron-core "
            f"is not supported"
        )
    if config.moe_router_score_function not in _SCORES:
        raise InputError(
            f"router {name!r} has moe_router_score_function={config.moe_router_score_function!r}; "
            f"allowed: {' or '.join(map(repr, _SCORES))}"
        )
    for option, refused, allowed in _REFUSED:
        value = getattr(config, option, None)  # newer versions have more of them
        if value in refused:
            raise InputError(f"router {name!r} has {option}={value!r}; allowed: {allowed}")
    return module


def _attach(found: Found, layer: Steered, handle: Handle) -> list[Undo]:
    router: Any = found.module
    module = _check_router(router, found.name)
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
    return [lambda: router.__dict__.pop("routing", None)]


def _choose(
    own_function: Callable[..., Any],
    layer: Steered,
    logits_TN: torch.Tensor,
    top_k: int,
    options: dict[str, Any],
) -> Any:
    """Megatron's probabilities and map, with choices that know the bias."""
    score = options.get("score_function", "softmax")
    if score not in _SCORES:  # the configuration was changed after steer
        raise InputError(
            f"router {layer.name!r} routes by score_function={score!r}; allowed: "
            f"{' or '.join(map(repr, _SCORES))}"
        )
    full = top_k == 1 if score == "sigmoid" else bool(options.get("use_pre_softmax"))
    limit = _limit(options, logits_TN.shape[1], top_k, logits_TN.device)
    if limit is not None and score == "softmax" and full:
        limit = _of_probabilities(limit)
    rule = Rule(
        score,
        normalize=not full,
        scale=options.get("scaling_factor") or 1.0,
        limit=limit,
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


def _of_probabilities(limit: Limit) -> Limit:
    """Groups ranked by sums of probabilities, not of logits."""
    return lambda choice_TN: limit(choice_TN.softmax(1))


def _correction(options: dict[str, Any]) -> Callable[[], torch.Tensor] | None:
    bias = options.get("expert_bias")
    return None if bias is None else lambda: bias


def _limit(
    options: dict[str, Any], num_experts: int, top_k: int, device: torch.device
) -> Limit | None:
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
    limit = GroupLimit(group_of_N, top_groups, score="max" if best == 1 else "top2", device=device)
    return limit
