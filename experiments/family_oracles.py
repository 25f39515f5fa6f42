"""tamoe's gates against the routers of Transformers' and TorchTitan's models, on random inputs.

Each router gets new weights and new tokens every time, and a gate of tamoe the same logits. What
only the block around a router shows (Mixtral, Qwen and OLMoE in Transformers 4.57) is compared as
the block's output, with tamoe's choice of experts and weights.

Shape suffixes: T tokens, D hidden size, N experts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from tamoe.experiments.oracle_inputs import chosen_map, differ, draw_whole, routed
from tamoe.experiments.tiny_models import NUM_EXPERTS, TOP_K, tiny_model
from tamoe.expert_bias import ExpertBias
from tamoe.gates import Gate, NaiveGate, SigmoidGate
from tamoe.group_limit import GroupLimit

SCALE = 2.5  # of all weights, in DeepSeek's routers and in TorchTitan's here
_FULL = ("qwen2_moe", "qwen3_moe, full weights", "olmoe")  # weights are not normalised


@dataclass(frozen=True)
class Asked:
    """A router of a framework, or the block that routes by itself, where ``form`` is None."""

    module: Any
    form: Any

    @property
    def router(self) -> Any:
        """What holds the weight."""
        return self.module.gate if self.form is None else self.module


@functools.cache
def asked(family: str) -> Asked:
    """The first router of a tiny model of a family."""
    from tamoe.adapters.rules import find_rule
    from tamoe.adapters.transformers import find_routers

    module: Any = find_routers(tiny_model(family).eval())[0].module
    if type(module).__name__.endswith("SparseMoeBlock"):
        return Asked(module, None)
    return Asked(module, find_rule(module, family)[1])


def gate_like(family: str) -> tuple[Gate, float]:
    """The gate of tamoe that does what a family's router does, and a factor of its weights."""
    if family == "deepseek_v3":
        limit = GroupLimit([e // 2 for e in range(NUM_EXPERTS)], 3, score="top2")
        gate: Gate = SigmoidGate(
            NUM_EXPERTS, NUM_EXPERTS, top_k=TOP_K, route_scale=SCALE, limit=limit
        )
        gate.expert_bias = ExpertBias(NUM_EXPERTS)
        return gate.eval(), 1.0
    if family == "deepseek_v2":
        limit = GroupLimit([e // 2 for e in range(NUM_EXPERTS)], 3, score="max")
        gate = NaiveGate(NUM_EXPERTS, NUM_EXPERTS, top_k=TOP_K, weights="full", limit=limit)
        return gate.eval(), SCALE
    full = family in _FULL or family == "deepseek_v2, greedy"
    weights: Any = "full" if full else "chosen"
    gate = NaiveGate(NUM_EXPERTS, NUM_EXPERTS, top_k=TOP_K, weights=weights)
    return gate.eval(), SCALE if family == "deepseek_v2, greedy" else 1.0


@torch.no_grad()
def family_router(generator: torch.Generator, family: str) -> float:
    """Experts and weights of a family's router, or what its block makes of them."""
    found = asked(family)
    router, form = found.router, found.form
    spread = (0.1, 1.0, 5.0)[draw_whole(generator, 0, 2)]
    for parameter in (router.weight, getattr(router, "bias", None)):
        if isinstance(parameter, torch.Tensor):
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * spread / parameter.shape[-1] ** 0.5)
    tokens, hidden_size = draw_whole(generator, 1, 40), router.weight.shape[1]
    x_TD = torch.randn(tokens, hidden_size, generator=generator)
    gate, factor = gate_like(family)
    if hasattr(router, "e_score_correction_bias"):
        # Not negative: Transformers gives experts of other groups a score of 0, not of -infinity.
        bias_N = 0.1 * torch.rand(NUM_EXPERTS, generator=generator)
        router.e_score_correction_bias.copy_(bias_N)
        assert gate.expert_bias is not None
        gate.expert_bias.bias_N.copy_(bias_N)
    bias = getattr(router, "bias", None)
    routing = routed(gate, F.linear(x_TD, router.weight, bias if torch.is_tensor(bias) else None))
    index_TK, weight_TK = routing.expert_index_TK, factor * routing.weight_TK
    if form is None:
        return _block_error(found.module, x_TD, index_TK, weight_TK)
    output = router(x_TD[None] if type(router).__name__.endswith("MoEGate") else x_TD)
    return max(
        differ(chosen_map(index_TK, NUM_EXPERTS), chosen_map(form.index(output), NUM_EXPERTS)),
        differ(
            _spread_out(index_TK, weight_TK), _spread_out(form.index(output), form.weight(output))
        ),
    )


def _block_error(
    block: Any, x_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
) -> float:
    """Difference of a block's output, over its largest number if that is above 1."""
    from tamoe.adapters.transformers import run_block

    ours, _ = run_block(block, x_TD[None], lambda _: (index_TK, weight_TK))
    theirs = block(x_TD[None])[0]
    return differ(ours, theirs) / max(float(theirs.abs().max()), 1.0)


def _spread_out(index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    empty_TN = torch.zeros(len(index_TK), NUM_EXPERTS)
    return empty_TN.scatter_add(1, index_TK, weight_TK.float())


# ---- TorchTitan ---------------------------------------------------------------------------------

TITAN_SCORES = ("softmax", "sigmoid")


@functools.cache
def titan_router(score: str, normalised: bool, limited: bool) -> Any:
    """A router of TorchTitan of 8 experts and top-2, with 3 of 4 groups where it is limited."""
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import TokenChoiceTopKRouter

    gate = Linear.Config(in_features=32, out_features=NUM_EXPERTS, bias=False)
    config = TokenChoiceTopKRouter.Config(
        num_experts=NUM_EXPERTS,
        gate=gate,
        top_k=TOP_K,
        score_func=score,
        route_norm=normalised,
        route_scale=SCALE,
        num_expert_groups=4 if limited else None,
        num_limited_groups=3 if limited else None,
    )
    return config.build()


@torch.no_grad()
def titan(generator: torch.Generator, score: str) -> float:
    """Experts and weights of ``TokenChoiceTopKRouter``, with a bias on selection."""
    normalised = bool(draw_whole(generator, 0, 1))
    limited = score == "sigmoid" and bool(draw_whole(generator, 0, 1))
    router = titan_router(score, normalised, limited)
    spread = (0.1, 1.0, 5.0)[draw_whole(generator, 0, 2)]
    weight = router.gate.weight
    weight.copy_(torch.randn(weight.shape, generator=generator) * spread / weight.shape[1] ** 0.5)
    x_TD = torch.randn(draw_whole(generator, 1, 40), weight.shape[1], generator=generator)
    bias_N = 0.1 * torch.randn(NUM_EXPERTS, generator=generator)
    weights: Any = "chosen" if normalised else "full"
    kind = SigmoidGate if score == "sigmoid" else NaiveGate
    gate: Gate = kind(NUM_EXPERTS, NUM_EXPERTS, top_k=TOP_K, weights=weights)
    if score == "sigmoid":
        gate.expert_bias = ExpertBias(NUM_EXPERTS)
        gate.expert_bias.bias_N.copy_(bias_N)
    if limited:
        gate.limit = GroupLimit([e // 2 for e in range(NUM_EXPERTS)], 3, score="top2")
    theirs_TK, index_TK, _ = (
        part[0] for part in router(x_TD[None], bias_N if score == "sigmoid" else None)
    )
    routing = routed(gate.eval(), F.linear(x_TD, weight))
    return max(
        differ(chosen_map(routing.expert_index_TK, NUM_EXPERTS), chosen_map(index_TK, NUM_EXPERTS)),
        differ(
            _spread_out(routing.expert_index_TK, SCALE * routing.weight_TK),
            _spread_out(index_TK, theirs_TK),
        ),
    )
