"""How a router of Transformers turns logits into weights: found by asking it.

Families differ in whether scores are softmax or sigmoid, normalised, scaled, limited to groups, and
in what the module returns. Candidates are made of the router's attributes; the one that explains
what it does to a few random tokens is taken, and a router that none explains is refused, so that
a version not known here is never steered wrongly.

Shape suffixes: T tokens, D hidden size, K choices, N experts of the whole group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from tamoe.adapters.steered import Rule, Score
from tamoe.group_limit import GroupLimit
from tamoe.logits import best_experts
from tamoe.topology.errors import InputError

_TOKENS = 512  # asked of a router; few do not tell group limits from each other
_CORRECTION = "e_score_correction_bias"


@dataclass(frozen=True)
class Form:
    """What a router returns, and how to read and rewrite it."""

    index_at: int
    weight_at: int
    logits_at: int | None = None  # None: not returned, made again from the input
    probabilities: bool = False  # what it calls logits has been through softmax
    dense: bool = False  # weights are scattered over all experts

    def index(self, output: Any) -> torch.Tensor:
        """Experts that the router chose, ``[T, K]``."""
        index_TK: torch.Tensor = output[self.index_at]
        return index_TK

    def weight(self, output: Any) -> torch.Tensor:
        """Weights of the chosen, ``[T, K]``."""
        weight: torch.Tensor = output[self.weight_at]
        return weight.gather(1, self.index(output)) if self.dense else weight

    def logits(self, router: Any, args: tuple[Any, ...], output: Any) -> torch.Tensor:
        """Logits, or what is as good: their log-probabilities."""
        if self.logits_at is None:
            return router_logits(router, args[0])
        given_TN: torch.Tensor = output[self.logits_at]
        if not self.probabilities:
            return given_TN
        return given_TN.clamp_min(torch.finfo(given_TN.dtype).tiny).log()

    def output(self, output: Any, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> Any:
        """The router's output with other experts."""
        parts = list(output)
        old = parts[self.weight_at]
        weight = weight_TK.to(old.dtype)
        if self.dense:
            weight = torch.zeros_like(old).scatter(1, index_TK, weight)
        parts[self.weight_at] = weight
        parts[self.index_at] = index_TK.to(parts[self.index_at].dtype).contiguous()
        return type(output)(parts)


# Transformers 5; 5.0 to 5.5, where some return probabilities; DeepSeek in 4.57; gpt-oss in 4.57.
_FORMS = (
    Form(index_at=2, weight_at=1, logits_at=0),
    Form(index_at=2, weight_at=1, logits_at=0, probabilities=True),
    Form(index_at=0, weight_at=1),
    Form(index_at=1, weight_at=0, dense=True),
)


def router_logits(router: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """A router's logits from its weight, ``[T, N]``."""
    weight, bias = router.weight, getattr(router, "bias", None)
    assert isinstance(weight, torch.Tensor)
    x_TD = hidden_states.reshape(-1, weight.shape[1])
    if hasattr(router, _CORRECTION) or hasattr(router, "topk_method"):
        return F.linear(x_TD.float(), weight.float())  # DeepSeek's routers compute in float32
    return F.linear(x_TD, weight, bias if isinstance(bias, torch.Tensor) else None)


def find_rule(router: Any, where: str) -> tuple[Rule, Form]:
    """The rule and the form that explain a router.

    Parameters
    ----------
    router
        On its device. It is called once, without gradient and in evaluation mode.
    where
        Its name and version, for the error.

    Raises
    ------
    InputError
        Nothing known explains it.
    """
    weight = router.weight
    assert isinstance(weight, torch.Tensor)
    if weight.is_meta:
        raise InputError(f"router {where} is on the meta device; allowed: a model with weights")
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(_TOKENS, weight.shape[1], generator=generator).to(weight)
    # One of 4.57 wants to be told sequences, one of 5 wants tokens.
    x = x_TD[None] if type(router).__name__.endswith("MoEGate") else x_TD
    training = router.training
    with torch.no_grad():
        router.eval()
        output = router(x)
        router.train(training)
        logits_TN = router_logits(router, x)
        for form in _forms_of(output, len(weight)):
            for rule in _candidates(router):
                if _explains(rule, form, router, (x,), output, logits_TN):
                    return rule, form
    raise InputError(
        f"router {where} is a {type(router).__name__} that returns {_shapes(output)}; allowed: "
        f"softmax or sigmoid of linear logits, normalised or not, scaled, limited to groups. None "
        f"of these gives its weights: this version is not supported"
    )


def _forms_of(output: Any, num_experts: int) -> Iterator[Form]:
    if not isinstance(output, tuple):
        return
    for form in _FORMS:
        parts = 2 if form.logits_at is None else 3
        if len(output) != parts or output[form.index_at].dtype.is_floating_point:
            continue
        wide = output[form.weight_at].shape[-1] == num_experts
        if form.dense == (wide and output[form.index_at].shape[-1] != num_experts):
            yield form


def _candidates(router: Any) -> Iterator[Rule]:
    scale = float(getattr(router, "routed_scaling_factor", 1.0) or 1.0)
    correction = partial(_correction, router) if hasattr(router, _CORRECTION) else None
    scores: tuple[Score, ...] = ("softmax", "sigmoid")
    if correction is not None:
        scores = ("sigmoid", "softmax")
    for limit in _limits(router):
        for score in scores:
            for normalize in (True, False):
                yield Rule(score, normalize, scale, limit, correction)


def _correction(router: Any) -> torch.Tensor:
    bias = getattr(router, _CORRECTION)
    assert isinstance(bias, torch.Tensor)
    return bias


def _limits(router: Any) -> Iterator[GroupLimit | None]:
    groups = getattr(router, "num_group", getattr(router, "n_group", None))
    top_groups = getattr(router, "topk_group", None)
    weight = router.weight
    assert isinstance(weight, torch.Tensor)
    if groups and top_groups and getattr(router, "topk_method", "") != "greedy":
        group_of_N = [expert * groups // len(weight) for expert in range(len(weight))]
        for score in ("max", "top2"):
            limit = GroupLimit(group_of_N, top_groups, score=score, device=weight.device)
            yield limit
    yield None


def _explains(
    rule: Rule,
    form: Form,
    router: Any,
    args: tuple[Any, ...],
    output: Any,
    logits_TN: torch.Tensor,
) -> bool:
    """Whether a rule gives the weights and, but for ties, the choices of a router."""
    index_TK, weight_TK = form.index(output), form.weight(output)
    close = 2e-2 if weight_TK.dtype in (torch.bfloat16, torch.float16) else 1e-4
    read_TN = form.logits(router, args, output)
    shift_TN = (read_TN - logits_TN).float()  # a constant of each token, if it is probabilities
    shift_TN = shift_TN - (shift_TN.mean(1, keepdim=True) if form.probabilities else 0.0)
    if not shift_TN.abs().max() <= close * logits_TN.float().abs().max().clamp_min(1.0):
        return False
    if not ((index_TK >= 0) & (index_TK < read_TN.shape[1])).all():
        return False
    own_TK = rule.weight_TK(read_TN, index_TK)
    if not torch.allclose(own_TK.float(), weight_TK.float(), rtol=close, atol=close):
        return False
    choice_TN = rule.choice_TN(read_TN)
    if rule.limit is not None:
        choice_TN = choice_TN.masked_fill(~rule.limit(choice_TN), -torch.inf)
    best_TK = choice_TN.gather(1, best_experts(choice_TN, index_TK.shape[1])).sort(1).values
    taken_TK = choice_TN.gather(1, index_TK).sort(1).values
    return torch.allclose(taken_TK.float(), best_TK.float(), rtol=close, atol=close)


def _shapes(output: Any) -> str:
    if isinstance(output, tuple):
        return ", ".join(
            str(tuple(part.shape)) if isinstance(part, torch.Tensor) else type(part).__name__
            for part in output
        )
    return type(output).__name__
