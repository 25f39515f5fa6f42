"""Backward passes that have none of their own, and say so whatever they are differentiated by."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As PyTorch's ``once_differentiable``, which looks at incoming gradients alone.

    What a backward pass makes of saved tensors depends on those, too: with ``create_graph=True`` a
    second derivative by them would be left out in silence. Here it raises.
    """
    guarded = once_differentiable(backward)

    @wraps(backward)
    def wrapper(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():  # a graph is being made
            grads = tuple(g if g is None else g.detach().requires_grad_() for g in grads)
        return guarded(ctx, *grads)

    return wrapper
