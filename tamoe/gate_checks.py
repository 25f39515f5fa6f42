"""What a gate refuses: options that contradict each other or the plan, infinite logits."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch

from tamoe.bias import TopologyBias
from tamoe.capacity import DROP_POLICIES, TopologyCapacity, checked_factor
from tamoe.expert_bias import ExpertBias
from tamoe.group_limit import GroupLimit
from tamoe.plan_module import PlanModule
from tamoe.steering_loss import SteeringLoss
from tamoe.topology.errors import InputError, whole

if TYPE_CHECKING:
    from tamoe.gate import Gate

_STEERS = "TopologyLoss, TargetDivergence, LocalityLoss, TopologyBias"
_MODULES = {
    "steer": (SteeringLoss, TopologyBias),
    "expert_bias": (ExpertBias,),
    "limit": (GroupLimit,),
}


def check_gate(gate: Gate) -> None:
    """Raise :class:`InputError` where an option of a gate is out of range or fits no other."""
    for name, size in (("hidden_size", gate.hidden_size), ("num_experts", gate.num_experts)):
        whole(name, size, 1)
    whole("top_k", gate.top_k, 1, gate.num_experts)
    check_choice("scope", gate.scope, ("shared", "rank"))
    check_choice("drop", gate.drop, DROP_POLICIES)
    check_choice("weights", gate.weights, ("chosen", "full"))
    check_choice("balance_over", gate.balance_over, ("rank", "group", "sequence"))
    check_choice("balance_counts", gate.balance_counts, ("all", "first"))
    for name, weight in (("aux_weight", gate.aux_weight), ("z_weight", gate.z_weight)):
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"{name} is {weight}; allowed: finite and >= 0")
    if not 0 <= gate.jitter < 1:
        raise InputError(f"jitter is {gate.jitter:g}; allowed: 0 to 1, without 1")
    if (gate.sequence_length is not None) != (gate.balance_over == "sequence"):
        raise InputError(
            f"sequence_length is {gate.sequence_length} and balance_over {gate.balance_over!r}; "
            f"allowed: a length with 'sequence', None without"
        )
    if gate.sequence_length is not None:
        whole("sequence_length", gate.sequence_length, 1)
    for name, kinds in _MODULES.items():
        module = getattr(gate, name)
        if module is not None and not isinstance(module, kinds):
            names = _STEERS if name == "steer" else kinds[0].__name__
            raise InputError(f"{name} is {type(module).__name__}; allowed: {names}, None")
    _check_capacity(gate)
    _check_sizes(gate)
    if isinstance(gate.steer, PlanModule):
        _check_plan(gate, "steer", gate.steer)
    if gate.scope == "shared" and isinstance(gate.steer, SteeringLoss):
        _warn_shared_loss(gate.steer)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise :class:`InputError` where a value is not one of those allowed."""
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def check_finite(
    logits_TN: torch.Tensor,
    mask_T: torch.Tensor | None,
    where: str = "x_TD or the gate's weight",
) -> None:
    """Raise :class:`InputError` where a token that counts has logits which are not finite."""
    if logits_TN.device.type != "cpu" or torch.compiler.is_compiling():
        return  # asking would wait for the device, or cut the graph
    if logits_TN.sum().isfinite():  # cheap; only values at the limit of the type overflow here
        return
    bad_T = ~logits_TN.isfinite().all(1)
    if mask_T is not None:
        bad_T &= mask_T.bool()
    if bad_T.any():
        raise InputError(
            f"{where}: the logits of {int(bad_T.sum())} of {len(bad_T)} tokens are not finite, the "
            f"first is token {int(bad_T.nonzero()[0])}; allowed: finite numbers. Mask padding, or "
            f"lower the learning rate if training diverged"
        )


def _check_capacity(gate: Gate) -> None:
    if (gate.capacity is None) != (gate.drop == "none"):
        raise InputError(
            f"capacity is {gate.capacity} and drop {gate.drop!r}; allowed: a capacity with "
            f"'probs', 'position' or 'random', or capacity None with 'none'"
        )
    if isinstance(gate.capacity, TopologyCapacity):
        _check_plan(gate, "capacity", gate.capacity)
    elif gate.capacity is not None:
        gate.capacity = checked_factor("capacity", gate.capacity)


def _check_sizes(gate: Gate) -> None:
    for name in ("expert_bias", "limit"):
        module = getattr(gate, name)
        if module is not None and module.num_experts != gate.num_experts:
            raise InputError(
                f"{name} is for {module.num_experts} experts and the gate has "
                f"{gate.num_experts}; allowed: the same number"
            )
    if gate.limit is not None and gate.limit.least_experts < gate.top_k:
        raise InputError(
            f"limit: its {gate.limit.top_groups} groups may hold only {gate.limit.least_experts} "
            f"experts; allowed with top_k={gate.top_k}: at least {gate.top_k}. Raise top_groups"
        )


def _check_plan(gate: Gate, name: str, module: PlanModule) -> None:
    if module.num_experts != gate.num_experts:
        raise InputError(
            f"{name}: its plan has {module.num_experts} experts and the gate "
            f"{gate.num_experts}; allowed: the same number"
        )
    largest = float(module.share_N.max())
    if largest * gate.top_k > 1 + 1e-6:
        raise InputError(
            f"{name}: its plan sends {largest:.3f} of a rank's choices to one expert; allowed "
            f"with top_k={gate.top_k}: at most {1 / gate.top_k:.3f}, since a token takes an "
            f"expert once. Solve with Workload(top_k={gate.top_k})"
        )


def _warn_shared_loss(loss: SteeringLoss) -> None:
    if loss.is_even:
        return
    warnings.warn(
        f"scope='shared' with a {type(loss).__name__}: the ranks' losses average out over one "
        f"gate. On symmetric clusters nothing becomes local, on others experts become uneven. Use "
        f"scope='rank', or steer a shared gate with a TopologyBias",
        UserWarning,
        stacklevel=5,
    )
