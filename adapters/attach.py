"""From the routers that an adapter found to a :class:`~tamoe.adapters.handle.Handle` over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tamoe.adapters.handle import Handle
from tamoe.adapters.steered import Steered, check_top_k
from tamoe.bias import TopologyBias
from tamoe.capacity import checked_factor
from tamoe.loss import TopologyLoss
from tamoe.plan_module import PlanRows, check_plan, resolve_rank
from tamoe.steering_loss import SteeringLoss
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.groups import Group

    Maker = Callable[[], TopologyBias | SteeringLoss]
    How = Literal["bias", "loss"] | Maker
    Undo = Callable[[], Any]


_MARK = "_tamoe_steered"


@dataclass(frozen=True)
class Found:
    """A router in a model."""

    name: str
    module: nn.Module
    weight_ND: torch.Tensor
    top_k: int


def check_model(model: object) -> None:
    """Raise :class:`InputError` where something is no module."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {type(model).__name__}; allowed: a torch.nn.Module")


def routers_of_class(
    model: nn.Module, kind: str, framework: str, read: Callable[[Any], tuple[torch.Tensor, int]]
) -> list[Found]:
    """The modules of a class, with the weight and the top_k that are read off each.

    Raises
    ------
    InputError
        There is none.
    """
    check_model(model)
    named = [(name, m) for name, m in model.named_modules() if type(m).__name__ == kind]
    if not named:
        raise InputError(
            f"model is {type(model).__name__} and has no router of {framework}; looked for modules "
            f"of class {kind}"
        )
    return [Found(name, module, *read(module)) for name, module in named]


@dataclass(frozen=True)
class Steering:
    """What all adapters are asked for; they describe it.

    Raises
    ------
    InputError
        The plan is none, or the rank, the way or the weight is out of range.
    """

    plan: PlanRows
    how: How
    rank: int | None
    group: Group
    gain: float
    weight: float | None = None

    def __post_init__(self) -> None:
        check_plan(self.plan)
        resolve_rank(self.plan, self.group, self.rank)
        if not callable(self.how) and self.how not in ("bias", "loss"):
            raise InputError(
                f"how is {self.how!r}; allowed: 'bias', 'loss', or a function that makes a module"
            )
        if self.weight:
            checked_factor("weight", self.weight)

    def loss_weight(self, made: TopologyBias | SteeringLoss) -> float:
        """Of the loss that a handle returns: without a word none beside a bias."""
        if self.weight is None:
            return 0.0 if isinstance(made, TopologyBias) else 0.01
        return float(self.weight)

    def make(self, device: torch.device) -> TopologyBias | SteeringLoss:
        """The bias or the loss of one router."""
        if callable(self.how):
            made: object = self.how()
            if not isinstance(made, TopologyBias | SteeringLoss):
                raise InputError(
                    f"how makes a {type(made).__name__}; allowed: TopologyBias, TopologyLoss, "
                    f"TargetDivergence, LocalityLoss"
                )
            return made
        options: dict[str, Any] = {"group": self.group, "rank": self.rank, "device": device}
        if self.how == "bias":
            return TopologyBias(self.plan, gain=self.gain, **options)
        return TopologyLoss(self.plan, **options)


def attach_all(
    model: nn.Module,
    steering: Steering,
    found: Sequence[Found],
    attach: Callable[[Found, Steered, Handle], Iterable[Undo]],
    mask_of: Callable[[Mapping[str, Any]], torch.Tensor | None] = lambda kwargs: None,
) -> Handle:
    """Steer routers, all or none.

    Parameters
    ----------
    model
        Its forward pass begins a batch.
    steering
        How.
    found
        The routers, at least one.
    attach
        Changes one router and tells how that is undone.
    mask_of
        Finds the tokens that are not padding, ``[T]``, in the arguments of the model by name.
    """
    handle = Handle(steering.plan)
    try:
        for router in found:
            _check(steering.plan, router)
            device = router.weight_ND.device
            made = steering.make(device)
            layer = Steered(
                router.name,
                made,
                top_k=router.top_k,
                weight=steering.loss_weight(made),
                group=steering.group,
                device=device,
            )
            handle.layers.append(layer)
            handle.undo.append(_mark(router.module))
            hook = router.module.register_forward_pre_hook(_before_router(handle, layer))
            handle.undo.append(hook.remove)
            handle.undo.extend(attach(router, layer, handle))
            if isinstance(made, SteeringLoss):
                handle.routers.append(router.module)
    except BaseException:
        handle.detach()
        raise

    def before(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        handle.before_forward(mask_of(kwargs))

    handle.undo.append(model.register_forward_pre_hook(before, with_kwargs=True).remove)
    return handle


def _before_router(handle: Handle, layer: Steered) -> Callable[[nn.Module, Any], None]:
    def before(router: nn.Module, args: Any) -> None:
        handle.before_router(layer, router.training)

    return before


def _mark(module: nn.Module) -> Undo:
    module.__dict__[_MARK] = True
    return lambda: module.__dict__.pop(_MARK, None)


def _workload_of(num_experts: int, num_ranks: int) -> str:
    if num_experts % num_ranks:
        return f"Workload(placement=...), the rank of each of {num_experts} experts"
    return f"Workload(experts_per_rank={num_experts // num_ranks})"


def _check(plan: PlanRows, router: Found) -> None:
    name, num_experts = f"router {router.name!r}", len(router.weight_ND)
    if _MARK in router.module.__dict__:
        raise InputError(
            f"{name} is steered already; allowed: one handle, detach() the other first"
        )
    if num_experts != plan.num_experts:
        raise InputError(
            f"plan has {plan.num_experts} experts and {name} {num_experts}; allowed: the same "
            f"number. Solve with {_workload_of(num_experts, plan.num_ranks)}"
        )
    check_top_k(plan, name, router.top_k)
