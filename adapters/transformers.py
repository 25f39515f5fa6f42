"""Steer the routers of a Hugging Face Transformers model.

    handle = steer(model, plan)                 # a bias for this rank on every router
    loss = model(**batch, labels=...).loss + handle.loss()

Routers come in four shapes: a module that returns logits, weights and experts (Transformers 5), one
that returns experts and weights (DeepSeek in 4.57), gpt-oss's of 4.57, and a linear layer inside a
block that does the rest (Mixtral, Qwen and OLMoE in 4.57). All but the last are steered by a hook.
How a router makes weights of logits is found by asking it once (:mod:`tamoe.adapters.rules`).

Shape suffixes: T tokens, D hidden size, K choices, N experts of the whole group.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from tamoe.adapters.attach import Found, Steering, attach_all, check_model
from tamoe.adapters.handle import Handle
from tamoe.adapters.rules import find_rule
from tamoe.adapters.steered import Rule, Steered
from tamoe.adapters.versions import require
from tamoe.logits import best_experts
from tamoe.plan_module import PlanRows
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.adapters.attach import How, Undo
    from tamoe.groups import Group

_ROUTER = re.compile(r"Top[kK]Router$|MoEGate$")
_BLOCK = re.compile(r"SparseMoeBlock$")
LOOKED_FOR = (
    "modules whose class name ends in TopKRouter, TopkRouter or MoEGate, or SparseMoeBlock with a "
    "linear layer named gate"
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
    """Make every router of a model prefer the experts that the Plan gives its rank.

    Parameters
    ----------
    model
        A model of Transformers 4.57 or 5, already on its device; wrap it (DDP, compile) afterwards.
    plan
        :class:`tamoe.solver.Plan` for as many experts and choices as the routers have.
    how
        ``"bias"``: a :class:`~tamoe.TopologyBias` on selection; weights stay those of the unbiased
        logits. ``"loss"``: :class:`~tamoe.TopologyLoss`, routing changes by training alone; then
        every rank must train a router of its own: keep ``handle.router_parameters()`` out of
        gradient averaging. Or a function that makes one of tamoe's steering modules.
    rank
        Row of the plan; None asks the group.
    group
        Expert-parallel group of the plan, None for the default group.
    weight
        Factor of ``handle.loss()``. None: 0.01 of the steering loss, or nothing beside a bias.
        Beside a bias it is that of a balance loss, on what is dispatched, averaged over the group;
        switch the model's own off then (``router_aux_loss_coef=0``): it counts what would be chosen
        without the bias, on this rank alone, and fights it.
    gain
        Of the bias's controller.

    Returns
    -------
    Handle
        ``loss()``, ``metrics()``, ``update()``, ``set_plan()``, ``off()``, ``detach()``.

    Raises
    ------
    InputError
        Transformers is absent or of another version, the model has no known router, or a router
        does not fit the plan.

    Notes
    -----
    Works under ``torch.compile`` and activation checkpointing (``use_reentrant=False``). Padding is
    left out where the model is called with ``attention_mask=`` by name.
    """
    version = require("transformers")
    steering = Steering(plan, how, rank, group, gain, weight)
    found = find_routers(model)
    if not found:
        raise InputError(
            f"model is {type(model).__name__} of transformers {version} and has no known router; "
            f"looked for {LOOKED_FOR}"
        )

    def attach(router: Found, layer: Steered, handle: Handle) -> list[Undo]:
        where = f"{router.name!r} of transformers {version}"
        by_itself = _BLOCK.search(type(router.module).__name__)
        attach_one = _attach_block if by_itself else _attach_router
        return [attach_one(router.module, layer, handle, where)]

    return attach_all(model, steering, found, attach, _padding)


def find_routers(model: nn.Module) -> list[Found]:
    """Routers of a model, or blocks that route by themselves."""
    check_model(model)
    found = []
    for name, module in model.named_modules():
        kind, gate = type(module).__name__, getattr(module, "gate", None)
        # A router may be a linear layer itself; a block with a router inside is not one.
        linear = isinstance(gate, nn.Linear) and not _ROUTER.search(type(gate).__name__)
        if linear and gate is not None and _BLOCK.search(kind):
            found.append(Found(name, module, gate.weight, _top_k(name, module)))
        elif _ROUTER.search(kind):
            found.append(Found(name, module, module.weight, _top_k(name, module)))
    return found


def _top_k(name: str, module: nn.Module) -> int:
    top_k = getattr(module, "top_k", None)
    if not isinstance(top_k, int):  # DeepSeek's in Transformers 5.0 to 5.5
        raise InputError(
            f"router {name!r} is a {type(module).__name__} without top_k: the block around it "
            f"chooses the experts in this version of transformers; allowed: routers that choose "
            f"or blocks with a linear gate, as in the newest 5.x and in 4.57"
        )
    return top_k


def _padding(kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None  # absent, or of another kind than padding
    return mask.reshape(-1)


# ---- routers that are modules: a hook on what they return ---------------------------------------


def _attach_router(router: Any, layer: Steered, handle: Handle, where: str) -> Callable[[], None]:
    rule, form = find_rule(router, where)
    if form.probabilities:
        _warn_probabilities(where)

    def after(router: Any, args: tuple[Any, ...], output: Any) -> Any:
        logits_TN = form.logits(router, args, output)
        if layer.bias is not None and layer.enabled:
            return form.output(output, *_route(rule, layer, handle, logits_TN))
        index_TK = form.index(output)  # the router's own output stays as it is, bit for bit
        layer.observe(rule.probs_TN(logits_TN), index_TK, handle.mask_for(len(index_TK)))
        return output

    return router.register_forward_hook(after).remove


def _route(
    rule: Rule, layer: Steered, handle: Handle, logits_TN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of each token with the bias, if there is one, and their weights."""
    mask_T = handle.mask_for(len(logits_TN))
    index_TK = layer.select(rule.choice_TN(logits_TN), rule.limit, mask_T)
    layer.observe(rule.probs_TN(logits_TN), index_TK, mask_T)
    return index_TK, rule.weight_TK(logits_TN, index_TK)


# ---- blocks that route by themselves: another forward -------------------------------------------


def _attach_block(block: Any, layer: Steered, handle: Handle, where: str) -> Callable[[], None]:
    # Mixtral has no such option and normalises.
    rule = Rule(normalize=bool(getattr(block, "norm_topk_prob", True)))
    own_forward = block.forward
    _check_block(block, rule, layer.top_k, where)

    def choose(logits_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _route(rule, layer, handle, logits_TN)

    def forward(hidden_states: torch.Tensor) -> Any:
        if layer.bias is not None and layer.enabled:
            return run_block(block, hidden_states, choose)
        output = own_forward(hidden_states)  # as it is, bit for bit
        logits_TN = output[1]
        index_TK = best_experts(rule.choice_TN(logits_TN), layer.top_k)
        layer.observe(rule.probs_TN(logits_TN), index_TK, handle.mask_for(len(index_TK)))
        return output

    had_own = "forward" in block.__dict__
    block.forward = forward

    def undo() -> None:
        if had_own:
            block.forward = own_forward
        else:
            block.__dict__.pop("forward", None)

    return undo


def run_block(
    block: Any,
    hidden_states: torch.Tensor,
    choose: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a block of Transformers 4 does, with experts and weights chosen from outside."""
    x_TD = _jittered(block, hidden_states).reshape(-1, hidden_states.shape[-1])
    logits_TN = block.gate(x_TD)
    index_TK, weight_TK = choose(logits_TN)
    out_TD = _run_experts(block, x_TD, index_TK, weight_TK.to(x_TD.dtype))
    shared = getattr(block, "shared_expert", None)
    if shared is not None:
        out_TD = out_TD + F.sigmoid(block.shared_expert_gate(x_TD)) * shared(x_TD)
    return out_TD.reshape(hidden_states.shape), logits_TN


def _jittered(block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    noise = float(getattr(block, "jitter_noise", 0.0))
    if not (block.training and noise > 0):
        return hidden_states
    return hidden_states * torch.empty_like(hidden_states).uniform_(1 - noise, 1 + noise)


def _run_experts(
    block: Any, x_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    out_TD = torch.zeros_like(x_TD)
    for number, expert in enumerate(block.experts):
        token, slot = torch.where(index_TK == number)
        if len(token):
            row_RD = expert(x_TD[token]) * weight_TK[token, slot, None]
            out_TD.index_add_(0, token, row_RD.to(out_TD.dtype))
    return out_TD


def _check_block(block: Any, rule: Rule, top_k: int, where: str) -> None:
    """Raise :class:`InputError` where a block does not route, run experts and add."""
    weight = block.gate.weight
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(1, 8, weight.shape[1], generator=generator).to(weight)

    def choose(logits_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index_TK = best_experts(rule.choice_TN(logits_TN), top_k)
        return index_TK, rule.weight_TK(logits_TN, index_TK)

    training = block.training
    with torch.no_grad():
        block.eval()
        theirs, ours = block(x_BSD), run_block(block, x_BSD, choose)
        block.train(training)
    close = 2e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if not (
        isinstance(theirs, tuple)
        and len(theirs) == 2
        and torch.allclose(theirs[0].float(), ours[0].float(), rtol=close, atol=close)
    ):
        raise InputError(
            f"block {where} is a {type(block).__name__} that does not add weighted experts as "
            f"Mixtral's does; allowed: blocks with gate, experts, top_k and norm_topk_prob"
        )


def _warn_probabilities(where: str) -> None:
    warnings.warn(
        f"router {where} returns probabilities in the place of logits, so that the model's own "
        f"auxiliary loss takes their softmax again and is almost constant. tamoe reads them as "
        f"what they are. Transformers 5.6 mended it",
        UserWarning,
        stacklevel=4,
    )
