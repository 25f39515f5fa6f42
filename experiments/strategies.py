"""The ways to route that the demo compares, each as the MoE layer that it trains.

- ``even``: one gate, GShard's balance loss, counts as they come. The baseline.
- ``capacity``: the same with one fixed capacity for every pair of rank and expert. What is over it
  is dropped, what is under it is padded, so the traffic is the capacity (DeepSpeed's style).
- ``loss``: each rank trains a gate of its own towards its target (TA-MoE).
- ``bias``: one gate for all ranks and a bias a rank, driven to the target by a controller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tamoe.bias import TopologyBias
from tamoe.capacity import even_capacity
from tamoe.exchange import Exchange
from tamoe.functional import expert_counts
from tamoe.gates import GShardGate
from tamoe.loss import TopologyLoss
from tamoe.moe import MoE, MoEOutput
from tamoe.plan_module import PlanRows
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.groups import Group

Kind = Literal["even", "capacity", "loss", "bias"]


@dataclass(frozen=True)
class Strategy:
    """Gate, steering and exchange under one name."""

    name: str
    kind: Kind
    kl: float | None = None  # of its plan (entropic); None for those that need none
    aux_weight: float = 0.1  # of the balance or the topology loss; strong, for a short run
    gate_lr_factor: float = 0.3  # learning rate of the gate over that of the rest
    capacity_factor: float = 1.25  # of "capacity"

    def __post_init__(self) -> None:
        if (self.kl is None) != (self.kind in ("even", "capacity")):
            raise InputError(
                f"strategy {self.name!r}: kl is {self.kl!r} and kind {self.kind!r}; allowed: a kl "
                f"for 'loss' and 'bias', none for the others"
            )

    @property
    def router(self) -> str:
        """Who decides where a token goes, for the reader."""
        if self.kind == "loss":
            return "a gate of its own on each rank"
        bias = ", a bias for each rank" if self.kind == "bias" else ""
        return f"one gate shared by all ranks{bias}"


def default_strategies(kls: tuple[float, float] = (0.5, 0.3)) -> tuple[Strategy, ...]:
    """The five strategies of the demo; ``kls`` are the two strengths of the bias.

    >>> [strategy.name for strategy in default_strategies()]
    ['even', 'capacity 1.25', 'ta-moe loss kl=0.5', 'bias kl=0.5', 'bias kl=0.3']
    """
    gentle, strong = kls
    return (
        Strategy("even", "even"),
        Strategy("capacity 1.25", "capacity"),
        Strategy(f"ta-moe loss kl={gentle:g}", "loss", gentle, aux_weight=0.1, gate_lr_factor=3.0),
        Strategy(f"bias kl={gentle:g}", "bias", gentle),
        Strategy(f"bias kl={strong:g}", "bias", strong),
    )


def make_gate(
    strategy: Strategy,
    *,
    hidden_size: int,
    num_experts: int,
    top_k: int,
    plan: PlanRows | None,
    rank: int,
    group: Group = None,
) -> GShardGate:
    """A rank's gate.

    Parameters
    ----------
    strategy
        Of which.
    hidden_size, num_experts, top_k
        D, N of the whole group, k.
    plan
        Of the group; None for strategies without a ``kl``.
    rank, group
        Whose row of the plan, and over which ranks a balance loss beside a bias is averaged.
    """
    options: dict[str, Any] = {"top_k": top_k, "aux_weight": strategy.aux_weight}
    if strategy.kind == "capacity":
        # DeepSpeed drops the choices of lowest probability.
        options.update(capacity=strategy.capacity_factor, drop="probs")
    elif strategy.kind == "loss":
        assert plan is not None
        options.update(scope="rank", steer=TopologyLoss(plan, rank=rank))
    elif strategy.kind == "bias":
        assert plan is not None
        options.update(steer=TopologyBias(plan, rank=rank), group=group)
    return GShardGate(hidden_size, num_experts, **options)


def make_layer(
    strategy: Strategy, gate: GShardGate, make_expert: Callable[[], nn.Module], exchange: Exchange
) -> MoE:
    """The MoE layer of a strategy on this rank."""
    layer = PaddedMoE if strategy.kind == "capacity" else MoE
    return layer(gate, make_expert, num_experts=gate.num_experts, exchange=exchange)


class PaddedMoE(MoE):
    """MoE whose exchange moves the full capacity of every pair of rank and expert.

    Rows of zeros fill what the gate left free. They cost what tokens cost, in the exchange and in
    the experts, and add nothing to the result.
    """

    def forward(self, x: torch.Tensor) -> MoEOutput:
        """As :meth:`tamoe.MoE.forward`."""
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.gate(x_TD)
        pad_TK = self._padding(routing.expert_index_TK)
        zeros_TD = x_TD.new_zeros(len(pad_TK), x_TD.shape[1])
        weight_TK = routing.weight_TK.new_zeros(pad_TK.shape)
        row_RD, handle = self.exchange.dispatch(
            torch.cat([x_TD, zeros_TD]),
            torch.cat([routing.expert_index_TK, pad_TK]),
            torch.cat([routing.weight_TK, weight_TK]),
            num_experts=self.num_experts,
        )
        hidden_TD = self.exchange.combine(self._run_experts(row_RD, handle.counts_E), handle)
        hidden_TD = hidden_TD[: len(x_TD)]
        return MoEOutput(hidden_TD.reshape(x.shape), routing.aux_loss, routing)

    def _padding(self, index_TK: torch.Tensor) -> torch.Tensor:
        """Choices of rows of zeros: one each, so that no exchange sends two of them as one."""
        gate = self.gate
        assert isinstance(gate, GShardGate) and isinstance(gate.capacity, float)
        tokens, top_k = index_TK.shape
        capacity = even_capacity(tokens, self.num_experts, top_k=top_k, factor=gate.capacity)
        free_N = int(capacity) - expert_counts(index_TK, self.num_experts)
        expert_n = torch.repeat_interleave(torch.arange(self.num_experts), free_N)
        return torch.nn.functional.pad(expert_n[:, None], (0, top_k - 1), value=-1)
