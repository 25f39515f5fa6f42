"""Handle: what :func:`steer` returns. It collects losses and metrics, and takes the steering off.

Shape suffixes: N experts of the whole group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tamoe.adapters.steered import Steered, check_top_k, in_backward
from tamoe.metrics import dispatch_metrics
from tamoe.plan_module import PlanRows
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class Handle:
    """Steering of a model's routers, until :meth:`detach`.

    Also a context manager that detaches at its end. What it changed on the model is in
    ``undo``, and nothing of it is in the model's ``state_dict``: save :meth:`state_dict` beside it
    (it belongs to this rank).

    Attributes
    ----------
    layers
        One :class:`~tamoe.adapters.steered.Steered` for each router, in the order of the model.
    plan
        The Plan that is followed.
    """

    def __init__(self, plan: PlanRows) -> None:
        self.plan = plan
        self.layers: list[Steered] = []
        self.routers: list[nn.Module] = []  # that a loss steers
        self.undo: list[Callable[[], None]] = []
        self.mask_T: torch.Tensor | None = None  # tokens of the batch that are not padding
        self.auto_update = True

    # ---- what a training loop calls -------------------------------------------------------------

    def loss(self) -> torch.Tensor:
        """Mean over routers of the losses of the latest forward pass: add it to the model's loss.

        Handed out once: 0 until the next forward pass.

        Returns
        -------
        torch.Tensor
            Scalar, already multiplied by ``weight``; 0 where steering asks for no loss.

        Raises
        ------
        InputError
            Activation checkpointing with ``use_reentrant=True`` cut the losses off their graph.
        """
        losses = [layer.latest_loss for layer in self.layers if layer.latest_loss is not None]
        for layer in self.layers:
            layer.latest_loss = None
        if not losses:
            return torch.zeros(())
        total = torch.stack(losses).mean()
        if torch.is_grad_enabled() and self.layers[0].training and not total.requires_grad:
            raise InputError(
                "handle.loss() has no gradient; allowed: routers that train, and activation "
                "checkpointing with use_reentrant=False, since the other kind runs the first "
                "forward pass without a graph"
            )
        return total

    def update(self) -> None:
        """Move the biases by what was dispatched since the last time.

        Happens by itself at the next forward pass in training. Set ``auto_update`` to False and
        call it once an optimizer step where several forward passes come before a backward one and
        activations are checkpointed (pipelines, contrastive losses): what is run again must find
        the bias that it had.
        """
        for layer in self.layers:
            layer.update()

    def metrics(self, *, reset: bool = True) -> dict[str, float]:
        """Remote share, balance, distance to target and more of each router on this rank.

        Counted since the last call, in training and evaluation, with the keys of
        :func:`tamoe.metrics.dispatch_metrics`. ``reset=False`` keeps the counts.
        """
        found: dict[str, float] = {}
        for layer in self.layers:
            steer = layer.steer
            numbers = dispatch_metrics(layer.seen_N, self.plan, steer.rank)
            found |= {f"{layer.name}/{key}": value for key, value in numbers.items()}
            if reset:
                layer.seen_N.zero_()
        return found

    def set_plan(self, plan: PlanRows) -> None:
        """Follow another Plan of the same ranks, experts and top_k from now on."""
        for layer in self.layers:
            check_top_k(plan, f"router {layer.name!r}", layer.top_k)
        for layer in self.layers:
            layer.steer.set_plan(plan)
        self.plan = plan

    def router_parameters(self) -> list[nn.Parameter]:
        """Parameters of the routers that a loss steers: each rank trains its own.

        Leave them out of gradient averaging, or the losses of the ranks cancel.
        """
        return [parameter for router in self.routers for parameter in router.parameters()]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Switch biases off for a while, to see what the model does without them."""
        before = [layer.enabled for layer in self.layers]
        try:
            for layer in self.layers:
                layer.enabled = False
            yield
        finally:
            for layer, enabled in zip(self.layers, before, strict=True):
                layer.enabled = enabled

    def detach(self) -> None:
        """Take everything off the model; its outputs are again what they would be without."""
        while self.undo:
            self.undo.pop()()

    def state_dict(self) -> dict[str, Any]:
        """State of the biases of this rank."""
        return nn.ModuleList(self.layers).state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict` of the same rank, plan size and routers."""
        nn.ModuleList(self.layers).load_state_dict(state)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "detached" if not self.undo else "steering"
        kind = type(self.layers[0].steer).__name__ if len(self.layers) else "nothing"
        return f"Handle({state} {len(self.layers)} routers by {kind})"

    # ---- what an adapter calls ------------------------------------------------------------------

    def before_forward(self, mask_T: torch.Tensor | None) -> None:
        """At the start of a forward pass of the whole model."""
        if not in_backward():
            self.mask_T = mask_T

    def before_router(self, layer: Steered, training: bool) -> None:
        """At the start of a forward pass of a router, whoever calls it."""
        if in_backward():
            return
        layer.train(training)
        if training and self.auto_update:
            layer.update()

    def mask_for(self, num_tokens: int) -> torch.Tensor | None:
        """The batch's mask, where it is of that many tokens."""
        if self.mask_T is None or len(self.mask_T) != num_tokens:
            return None
        return self.mask_T
