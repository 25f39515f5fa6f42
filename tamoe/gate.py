"""Gate: the base of all gates. Linear logits, top-k, weights, loss and drops.

Shape suffixes: T tokens, D hidden size, K choices, N experts of the whole group.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import nn
from torch.nn import functional as F

from tamoe.bias import TopologyBias
from tamoe.capacity import (
    DROP_POLICIES,
    DropPolicy,
    TopologyCapacity,
    checked_factor,
    even_capacity,
    within_capacity,
)
from tamoe.functional import balance_loss, expert_counts, group_balance_loss
from tamoe.loss import TopologyLoss
from tamoe.plan_module import PlanModule
from tamoe.routing import Routing
from tamoe.scope import mark_scope
from tamoe.topology.errors import InputError, whole

if TYPE_CHECKING:
    from tamoe.groups import Group

Scope = Literal["shared", "rank"]
Weights = Literal["chosen", "full"]


class GateOptions(TypedDict, total=False):
    """Keyword arguments that every gate takes; :class:`Gate` describes them."""

    scope: Scope
    steer: TopologyLoss | TopologyBias | None
    capacity: float | TopologyCapacity | None
    drop: DropPolicy
    weights: Weights | None
    renormalize: bool
    aux_weight: float | None
    balance_over: Literal["rank", "group"] | None
    group: Group
    auto_update: bool
    generator: torch.Generator | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class Gate(nn.Module, ABC):
    """Base of the gates; use :class:`NaiveGate`, :class:`SwitchGate` or :class:`GShardGate`.

    Parameters
    ----------
    hidden_size
        D, >= 1.
    num_experts
        N, experts of the whole group, >= 1.
    top_k
        k, 1 to N.
    scope
        ``"shared"``: one gate for all ranks, its gradients are averaged. ``"rank"``: each rank has
        its own, never averaged; a checkpoint keys it by rank. Only a mark on the parameters
        (:mod:`tamoe.scope`): equal initial values on all ranks are the caller's business.
    steer
        :class:`~tamoe.TopologyLoss`, :class:`~tamoe.TopologyBias` or None.
    capacity
        None: no limit. A number: equal capacities, ceil(number · k·T/N) choices per rank and
        expert. :class:`~tamoe.capacity.TopologyCapacity`: in proportion to the target.
    drop
        What goes where a capacity is exceeded: the choices of lowest probability (``"probs"``), of
        latest position (``"position"``: second choices first, then later tokens) or random ones
        (``"random"``). Ties go by position. ``"none"`` without capacity.
    weights
        ``"chosen"``: softmax over the logits of the chosen experts. ``"full"``: their
        probabilities among all experts. None: ``"full"`` where k = 1, else ``"chosen"``; the
        softmax of a single logit is always 1 and would teach the gate nothing.
    renormalize
        Whether what is left of a token takes over the weight of its dropped choices.
    aux_weight
        Factor of the loss in ``Routing.aux_loss``, >= 0. The loss is 1 at even routing: the
        topology loss where ``steer`` is one, else the balance loss. None: 0.01, but 0 for a
        NaiveGate that no loss steers.
    balance_over
        Balance loss on the numbers of this ``"rank"`` or averaged over the ``"group"`` (one small
        all-reduce a batch, in training mode only). None: ``"group"`` beside a TopologyBias, where
        every rank is uneven on purpose, else ``"rank"``.
    group
        For ``balance_over="group"``: ProcessGroup, 1-D DeviceMesh or None for the default group.
    auto_update
        True: in training mode the gate calls ``steer.update`` with its counts after each batch.
        False: the caller does, for example once an optimizer step. Needed where forward runs again
        in backward (activation checkpointing), because the bias must not move in between.
    generator
        Source of random drops and jitter; None for torch's global one.
    device, dtype
        Of the weight. Logits and all that follows from them are float32 or wider.

    Raises
    ------
    InputError
        An argument is out of range, does not fit the plan of ``steer``, or capacity and drop
        contradict each other.

    Warns
    -----
    UserWarning
        A shared gate is steered by a TopologyLoss, which cannot make it local.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int,
        scope: Scope = "shared",
        steer: TopologyLoss | TopologyBias | None = None,
        capacity: float | TopologyCapacity | None = None,
        drop: DropPolicy = "none",
        weights: Weights | None = None,
        renormalize: bool = False,
        aux_weight: float | None = None,
        balance_over: Literal["rank", "group"] | None = None,
        group: Group = None,
        auto_update: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.scope, self.steer, self.capacity, self.drop = scope, steer, capacity, drop
        self.weights = weights or ("full" if top_k == 1 else "chosen")
        self.renormalize, self.auto_update, self.generator = renormalize, auto_update, generator
        self.aux_weight = self._default_aux_weight() if aux_weight is None else float(aux_weight)
        beside_bias = isinstance(steer, TopologyBias)
        self.balance_over = balance_over or ("group" if beside_bias else "rank")
        self.group = group
        self.steering = True  # see tamoe.gates.steering
        self._check()
        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
        )
        mark_scope(self, scope)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew as torch.nn.Linear does, uniform in ±1/√D."""
        bound = self.hidden_size**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x_TD: torch.Tensor, mask_T: torch.Tensor | None = None) -> Routing:
        """Route a batch.

        Parameters
        ----------
        x_TD
            ``[T, D]``; T may be 0. Tokens of any rank: a gate routes them as its own rank does.
        mask_T
            ``[T]``; tokens where it is 0 (padding) get no expert and count nowhere.

        Returns
        -------
        Routing
            Weights and probabilities in float32 or wider. The loss and the counts for the bias
            take the choices before drops.
        """
        if x_TD.ndim != 2 or x_TD.shape[1] != self.hidden_size:
            raise InputError(
                f"x_TD is {tuple(x_TD.shape)}; allowed: (tokens, {self.hidden_size}), with batch "
                f"and sequence flattened"
            )
        if mask_T is not None and mask_T.shape != x_TD.shape[:1]:
            raise InputError(f"mask_T is {tuple(mask_T.shape)}; allowed: ({len(x_TD)},)")
        logits_TN = self._logits(x_TD)
        probs_TN = logits_TN.softmax(1)
        index_TK = self._select(logits_TN.detach(), mask_T)
        weight_TK = self._weigh(logits_TN, probs_TN, index_TK)
        if mask_T is not None:
            index_TK = index_TK.masked_fill(~mask_T.bool().unsqueeze(1), -1)
        aux_loss = self._aux_loss(probs_TN, index_TK, mask_T)
        bias = self._bias()
        if bias is not None and self.training and self.auto_update:
            bias.update(expert_counts(index_TK, self.num_experts))
        index_TK = self._drop_at_random(index_TK, weight_TK.detach())
        index_TK = self._drop_over_capacity(index_TK, probs_TN.detach(), mask_T)
        return Routing(index_TK, self._keep_weight(weight_TK, index_TK), probs_TN, aux_loss)

    def extra_repr(self) -> str:
        """Sizes and policies, for ``print(model)``."""
        capacity = "" if isinstance(self.capacity, nn.Module) else f"capacity={self.capacity}, "
        return (
            f"{self.hidden_size}, {self.num_experts}, top_k={self.top_k}, scope={self.scope!r}, "
            f"{capacity}drop={self.drop!r}, aux_weight={self.aux_weight:g}"
        )

    @abstractmethod
    def _default_aux_weight(self) -> float: ...

    def _logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        # Narrow types round logits enough to flip choices (Switch Transformer, section 2.4).
        dtype = torch.promote_types(
            torch.promote_types(x_TD.dtype, self.weight.dtype), torch.float32
        )
        device = x_TD.device.type
        # meta, where shapes are traced, knows no autocast.
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            return F.linear(x_TD.to(dtype), self.weight.to(dtype))

    def _bias(self) -> TopologyBias | None:
        return self.steer if self.steering and isinstance(self.steer, TopologyBias) else None

    def _select(self, logits_TN: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
        bias = self._bias()
        if bias is not None:
            logits_TN = logits_TN + bias(logits_TN, mask_T)
        # A stable sort, not topk: equal logits go to the lower expert on every device.
        return logits_TN.sort(dim=1, descending=True, stable=True).indices[:, : self.top_k]

    def _weigh(
        self, logits_TN: torch.Tensor, probs_TN: torch.Tensor, index_TK: torch.Tensor
    ) -> torch.Tensor:
        if self.weights == "full":
            return probs_TN.gather(1, index_TK)
        return logits_TN.gather(1, index_TK).softmax(1)

    def _aux_loss(
        self, probs_TN: torch.Tensor, index_TK: torch.Tensor, mask_T: torch.Tensor | None
    ) -> torch.Tensor:
        if self.aux_weight == 0:
            return probs_TN.new_zeros(())
        if isinstance(self.steer, TopologyLoss):
            return self.aux_weight * self.steer(probs_TN, index_TK, mask_T)
        if self.balance_over == "group" and self.training:
            return self.aux_weight * group_balance_loss(probs_TN, index_TK, self.group, mask_T)
        return self.aux_weight * balance_loss(probs_TN, index_TK, mask_T)

    def _drop_at_random(self, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        return index_TK

    def _drop_over_capacity(
        self, index_TK: torch.Tensor, probs_TN: torch.Tensor, mask_T: torch.Tensor | None
    ) -> torch.Tensor:
        if self.capacity is None:
            return index_TK
        priority_TK = None
        if self.drop == "probs":
            priority_TK = probs_TN.gather(1, index_TK.clamp_min(0))
        elif self.drop == "random":
            priority_TK = torch.rand(
                index_TK.shape, generator=self.generator, device=index_TK.device
            )
        capacity_N = self._capacity_N(index_TK, mask_T)
        return index_TK.masked_fill(~within_capacity(index_TK, capacity_N, priority_TK), -1)

    def _capacity_N(self, index_TK: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
        tokens = len(index_TK) if mask_T is None else mask_T.bool().sum()
        if isinstance(self.capacity, TopologyCapacity):
            return self.capacity(self.top_k * tokens)
        assert self.capacity is not None
        num_experts, k, factor = self.num_experts, self.top_k, self.capacity
        if isinstance(tokens, torch.Tensor):
            return even_capacity(tokens, num_experts, top_k=k, factor=factor).expand(num_experts)
        size = even_capacity(tokens, num_experts, top_k=k, factor=factor)
        return torch.full((num_experts,), size, device=index_TK.device)

    def _keep_weight(self, weight_TK: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        kept_TK = torch.where(index_TK >= 0, weight_TK, 0.0)
        if not self.renormalize:
            return kept_TK
        left_T1 = kept_TK.sum(1, keepdim=True)
        return kept_TK * (weight_TK.sum(1, keepdim=True) / torch.where(left_T1 > 0, left_T1, 1.0))

    def _check(self) -> None:
        for name, size in (("hidden_size", self.hidden_size), ("num_experts", self.num_experts)):
            whole(name, size, 1)
        whole("top_k", self.top_k, 1, self.num_experts)
        _check_choice("scope", self.scope, ("shared", "rank"))
        _check_choice("drop", self.drop, DROP_POLICIES)
        _check_choice("weights", self.weights, ("chosen", "full"))
        _check_choice("balance_over", self.balance_over, ("rank", "group"))
        if not (math.isfinite(self.aux_weight) and self.aux_weight >= 0):
            raise InputError(f"aux_weight is {self.aux_weight}; allowed: finite and >= 0")
        if self.steer is not None and not isinstance(self.steer, TopologyLoss | TopologyBias):
            raise InputError(
                f"steer is {type(self.steer).__name__}; allowed: TopologyLoss, TopologyBias, None"
            )
        self._check_capacity()
        self._check_plan("steer", self.steer)
        if self.scope == "shared" and isinstance(self.steer, TopologyLoss):
            _warn_shared_loss(self.steer)

    def _check_capacity(self) -> None:
        if (self.capacity is None) != (self.drop == "none"):
            raise InputError(
                f"capacity is {self.capacity} and drop {self.drop!r}; allowed: a capacity with "
                f"'probs', 'position' or 'random', or capacity None with 'none'"
            )
        if isinstance(self.capacity, TopologyCapacity):
            self._check_plan("capacity", self.capacity)
        elif self.capacity is not None:
            self.capacity = checked_factor("capacity", self.capacity)

    def _check_plan(self, name: str, module: PlanModule | None) -> None:
        if module is None:
            return
        if module.num_experts != self.num_experts:
            raise InputError(
                f"{name}: its plan has {module.num_experts} experts and the gate "
                f"{self.num_experts}; allowed: the same number"
            )
        largest = float(module.share_N.max())
        if largest * self.top_k > 1 + 1e-6:
            raise InputError(
                f"{name}: its plan sends {largest:.3f} of a rank's choices to one expert; allowed "
                f"with top_k={self.top_k}: at most {1 / self.top_k:.3f}, since a token takes an "
                f"expert once. Solve with Workload(top_k={self.top_k})"
            )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def _warn_shared_loss(loss: TopologyLoss) -> None:
    if loss.is_even:
        return
    warnings.warn(
        "scope='shared' with a TopologyLoss: the ranks' losses average out over one gate. On "
        "symmetric clusters nothing becomes local, on others experts become uneven. Use "
        "scope='rank', or steer a shared gate with a TopologyBias",
        UserWarning,
        stacklevel=5,
    )
