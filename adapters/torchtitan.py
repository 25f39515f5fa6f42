"""Steer the routers of TorchTitan.

    handle = steer(model, plan)

``TokenChoiceTopKRouter`` takes a bias on selection as an argument: a hook adds this rank's bias to
it, another looks at what was chosen. The bias is in the scale of scores (sigmoid or softmax); it
begins with the second batch, once their spread is known.

Shape suffixes: T tokens, K choices, N experts of the whole group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tamoe.adapters.attach import Found, Steering, attach_all, routers_of_class
from tamoe.adapters.handle import Handle
from tamoe.adapters.steered import Steered, in_backward
from tamoe.adapters.versions import require
from tamoe.plan_module import PlanRows
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.adapters.attach import How, Undo
    from tamoe.groups import Group


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
    """Make every TorchTitan router of a model prefer the experts that the Plan gives its rank.

    Parameters
    ----------
    model, plan, how, rank, group, weight, gain
        As for :func:`tamoe.adapters.transformers.steer`. TorchTitan's own balancing (the bias that
        is the same on all ranks) goes on beside a bias.

    Returns
    -------
    Handle
        ``loss()``, ``metrics()``, ``update()``, ``set_plan()``, ``off()``, ``detach()``.

    Raises
    ------
    InputError
        TorchTitan is absent or of another version, the model has no router of it, or a router does
        not fit the plan.
    """
    version = require("torchtitan")
    steering = Steering(plan, how, rank, group, gain, weight)
    found = routers_of_class(
        model,
        "TokenChoiceTopKRouter",
        f"torchtitan {version}",
        lambda router: (router.gate.weight, int(router.top_k)),
    )
    return attach_all(model, steering, found, _attach)


def _attach(found: Found, layer: Steered, handle: Handle) -> list[Undo]:
    router = found.module

    def before(router: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if layer.bias is None or not layer.enabled:
            return None
        x, theirs = (*args, None)[:2]
        ours_N = layer.bias.bias_N
        return (x, ours_N if theirs is None else theirs + ours_N)

    def after(router: Any, args: tuple[Any, ...], output: Any) -> None:
        _, index, scores = output
        if scores.shape[:-1] != index.shape[:-1]:
            raise InputError(
                f"router {layer.name!r} returns scores of shape {tuple(scores.shape)}; allowed: "
                f"one row a token, as in torchtitan 0.3"
            )
        score_TN, index_TK = scores.flatten(0, -2), index.flatten(0, -2)
        if layer.bias is not None and not in_backward():
            layer.bias(score_TN)  # notes their spread
        probs_TN = score_TN / (score_TN.sum(1, keepdim=True) + 1e-20)
        layer.observe(probs_TN, index_TK, None)

    return [
        router.register_forward_pre_hook(before).remove,
        router.register_forward_hook(after).remove,
    ]
