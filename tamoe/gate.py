"""Gate: the base of all gates. Linear logits, top-k, weights, loss and drops.

Shape suffixes: T tokens, D hidden size, K choices, N experts of the whole group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

import torch
from torch import nn

from tamoe.balance import balance_loss, group_balance_loss, sequence_balance_loss
from tamoe.bias import TopologyBias
from tamoe.capacity import DropPolicy, TopologyCapacity, even_capacity, within_capacity
from tamoe.expert_bias import ExpertBias
from tamoe.gate_checks import check_finite, check_gate
from tamoe.group_limit import GroupLimit
from tamoe.logits import best_experts, wide_linear
from tamoe.loss_totals import expert_counts
from tamoe.router_losses import z_loss
from tamoe.routing import Routing
from tamoe.scope import mark_scope
from tamoe.steering_loss import SteeringLoss
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.groups import Group

Scope = Literal["shared", "rank"]
Weights = Literal["chosen", "full"]
BalanceOver = Literal["rank", "group", "sequence"]
BalanceCounts = Literal["all", "first"]


class GateOptions(TypedDict, total=False):
    """Keyword arguments that every gate takes; :class:`Gate` describes them."""

    scope: Scope
    steer: SteeringLoss | TopologyBias | None
    expert_bias: ExpertBias | None
    limit: GroupLimit | None
    capacity: float | TopologyCapacity | None
    drop: DropPolicy
    weights: Weights | None
    renormalize: bool
    jitter: float
    aux_weight: float | None
    z_weight: float
    balance_over: BalanceOver | None
    balance_counts: BalanceCounts
    sequence_length: int | None
    group: Group
    auto_update: bool
    generator: torch.Generator | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class Scored(NamedTuple):
    """The logits that a gate goes by, and what a noisy one made them of."""

    logits_TN: torch.Tensor
    clean_TN: torch.Tensor | None = None
    spread_TN: torch.Tensor | None = None  # standard deviation of the noise


class Gate(nn.Module, ABC):
    """Base of the gates of :mod:`tamoe.gates`: what all of them can do, and their options.

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
        :class:`~tamoe.TopologyBias`; a loss for a gate of each rank (:class:`~tamoe.TopologyLoss`,
        :mod:`tamoe.divergence`); or None.
    expert_bias
        :class:`~tamoe.ExpertBias`: balances load without a loss, for selection only.
    limit
        :class:`~tamoe.GroupLimit`: a token's experts lie in few groups, such as nodes.
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
    jitter
        In training the gate's *input* is multiplied by U(1 - jitter, 1 + jitter) element by
        element; 0 to 1. Switch Transformer uses 0.01.
    aux_weight
        Factor of the loss in ``Routing.aux_loss``, >= 0. The topology loss where ``steer``
        is one, else the balance loss (1 at even routing), plus ``steer`` where that is another
        loss. None: 0.01, but 0 for a NaiveGate that no loss steers and
        for a SigmoidGate that an ExpertBias balances.
    z_weight
        Factor of :func:`tamoe.functional.z_loss`, >= 0. ST-MoE uses 0.001.
    balance_over
        Balance loss on the numbers of this ``"rank"``, averaged over the ``"group"`` (one small
        all-reduce a batch, in training mode only), or of each ``"sequence"``. None: ``"group"``
        beside a TopologyBias, where every rank is uneven on purpose, else ``"rank"``.
    balance_counts
        Whether the balance loss counts ``"all"`` choices, or the ``"first"`` of each token alone,
        as those of GShard, FastMoE and DeepSpeed's top-2 do, which leave the others free.
    sequence_length
        Tokens of a sequence, for ``balance_over="sequence"``.
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
        An argument is out of range, does not fit the plan of ``steer``, or arguments contradict
        each other. In :meth:`forward` on the CPU: a token's logits are not finite. A device is not
        asked, since that would wait for it.

    Warns
    -----
    UserWarning
        A shared gate is steered by a loss, which cannot make it local.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int,
        scope: Scope = "shared",
        steer: SteeringLoss | TopologyBias | None = None,
        expert_bias: ExpertBias | None = None,
        limit: GroupLimit | None = None,
        capacity: float | TopologyCapacity | None = None,
        drop: DropPolicy = "none",
        weights: Weights | None = None,
        renormalize: bool = False,
        jitter: float = 0.0,
        aux_weight: float | None = None,
        z_weight: float = 0.0,
        balance_over: BalanceOver | None = None,
        balance_counts: BalanceCounts = "all",
        sequence_length: int | None = None,
        group: Group = None,
        auto_update: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.scope, self.steer, self.capacity, self.drop = scope, steer, capacity, drop
        self.expert_bias, self.limit = expert_bias, limit
        self.jitter, self.z_weight = float(jitter), float(z_weight)
        self.weights = weights or ("full" if top_k == 1 else "chosen")
        self.renormalize, self.auto_update, self.generator = renormalize, auto_update, generator
        self.aux_weight = self._default_aux_weight() if aux_weight is None else float(aux_weight)
        beside_bias = isinstance(steer, TopologyBias)
        self.balance_over = balance_over or ("group" if beside_bias else "rank")
        self.balance_counts, self.sequence_length = balance_counts, sequence_length
        self.group = group
        self.steering = True  # see tamoe.gates.steering
        check_gate(self)
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
        if mask_T is not None:  # padding may hold NaN, which would reach the weight's gradient
            whole_T = mask_T.bool() | x_TD.isfinite().all(1)
            x_TD = torch.where(whole_T.unsqueeze(1), x_TD, 0.0)
        scored = self._score(self._jittered(x_TD))
        logits_TN = scored.logits_TN
        check_finite(logits_TN, mask_T)
        probs_TN = self._probs(logits_TN)
        index_TK = self._select(logits_TN.detach(), mask_T)
        weight_TK = self._weigh(logits_TN, probs_TN, index_TK)
        if mask_T is not None:
            index_TK = index_TK.masked_fill(~mask_T.bool().unsqueeze(1), -1)
        counts_N = self._counts_for_bias(index_TK)
        aux_loss = self._aux_loss(scored, probs_TN, index_TK, mask_T, counts_N)
        self._update(counts_N)
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

    def _score(self, x_TD: torch.Tensor) -> Scored:
        return Scored(wide_linear(x_TD, self.weight))

    def _jittered(self, x_TD: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.jitter):
            return x_TD
        return x_TD * (1 + self.jitter * (2 * self._uniform(x_TD) - 1))

    def _uniform(self, like: torch.Tensor) -> torch.Tensor:
        """U(0, 1) in float32, of the shape and on the device of ``like``."""
        shape, device = like.shape, like.device
        return torch.rand(shape, generator=self.generator, device=device, dtype=torch.float32)

    def _probs(self, logits_TN: torch.Tensor) -> torch.Tensor:
        return logits_TN.softmax(1)

    def _scores(self, logits_TN: torch.Tensor) -> torch.Tensor:
        """What selection ranks, before biases."""
        return logits_TN

    def _bias(self) -> TopologyBias | None:
        return self.steer if self.steering and isinstance(self.steer, TopologyBias) else None

    def _select(self, logits_TN: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
        score_TN = self._biased(self._scores(logits_TN), mask_T)
        if self.limit is not None:
            score_TN = score_TN.masked_fill(~self.limit(score_TN), -torch.inf)
        return best_experts(score_TN, self.top_k)

    def _biased(self, score_TN: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
        bias = self._bias()
        if bias is None:
            return score_TN if self.expert_bias is None else score_TN + self.expert_bias.bias_N
        shift_N = bias(score_TN, mask_T)
        if self.expert_bias is not None:
            shift_N = shift_N + self.expert_bias.bias_N
        return score_TN + shift_N

    def _counts_for_bias(self, index_TK: torch.Tensor) -> torch.Tensor | None:
        """Choices of each expert; None where no bias moves."""
        if not (self.training and self.auto_update):
            return None
        if self._bias() is None and self.expert_bias is None:
            return None
        return expert_counts(index_TK, self.num_experts)

    def _update(self, counts_N: torch.Tensor | None) -> None:
        if counts_N is None:
            return
        bias = self._bias()
        if bias is not None:
            bias.update(counts_N)
        if self.expert_bias is not None:
            self.expert_bias.update(counts_N)

    def _weigh(
        self, logits_TN: torch.Tensor, probs_TN: torch.Tensor, index_TK: torch.Tensor
    ) -> torch.Tensor:
        if self.weights == "full":
            return probs_TN.gather(1, index_TK)
        return logits_TN.gather(1, index_TK).softmax(1)

    def _aux_loss(
        self,
        scored: Scored,
        probs_TN: torch.Tensor,
        index_TK: torch.Tensor,
        mask_T: torch.Tensor | None,
        counts_N: torch.Tensor | None,
    ) -> torch.Tensor:
        loss = probs_TN.new_zeros(())
        if self.z_weight:
            loss = loss + self.z_weight * z_loss(scored.logits_TN, mask_T)
        if self.aux_weight == 0:
            return loss
        steer = self.steer if isinstance(self.steer, SteeringLoss) else None
        if steer is not None:
            loss = loss + self.aux_weight * steer(probs_TN, index_TK, mask_T)
        if steer is None or not steer.keeps_balance:
            balance = self._balance_loss(scored, probs_TN, index_TK, mask_T, counts_N)
            loss = loss + self.aux_weight * balance
        return loss

    def _balance_loss(
        self,
        scored: Scored,
        probs_TN: torch.Tensor,
        index_TK: torch.Tensor,
        mask_T: torch.Tensor | None,
        counts_N: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.balance_counts == "first":
            index_TK, counts_N = index_TK[:, :1], None
        if self.balance_over == "sequence":
            assert self.sequence_length is not None
            if len(index_TK) % self.sequence_length:
                raise InputError(
                    f"sequence_length is {self.sequence_length} and there are {len(index_TK)} "
                    f"tokens; allowed: whole sequences"
                )
            num_sequences = max(len(index_TK) // self.sequence_length, 1)
            return sequence_balance_loss(probs_TN, index_TK, num_sequences, mask_T)
        if self.balance_over == "group" and self.training:
            return group_balance_loss(probs_TN, index_TK, self.group, mask_T, counts_N)
        return balance_loss(probs_TN, index_TK, mask_T, counts_N)

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
            priority_TK = self._uniform(index_TK)
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
