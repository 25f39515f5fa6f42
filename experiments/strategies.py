"""The ways to route that are compared, each as the MoE layer that it trains.

- ``even``: one gate, GShard's balance loss, counts as they come. The baseline.
- ``capacity``: the same with one fixed capacity for every pair of rank and expert. What is over it
  is dropped, what is under it is padded, so the traffic is the capacity (DeepSpeed's style).
- ``loss``: each rank trains a gate of its own towards its target (TA-MoE).
- ``bias``: one gate for all ranks and a bias a rank, driven to the target by a controller.
- ``faster``: one gate, of whose choices a fixed share may leave the node (FasterMoE).
- ``locality``: each rank trains a gate of its own towards experts of its node (LocMoE).
- ``groups``: one gate, experts of one node, any, for a token (DeepSeek's group limit).

The demo compares the first four, :mod:`tamoe.experiments.compare` all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tamoe.bias import TopologyBias
from tamoe.capacity import even_capacity
from tamoe.divergence import LocalityLoss
from tamoe.exchange import Exchange
from tamoe.faster_gate import FasterGate
from tamoe.functional import expert_counts
from tamoe.gate import Gate
from tamoe.gates import GShardGate
from tamoe.group_limit import GroupLimit
from tamoe.loss import TopologyLoss
from tamoe.moe import MoE, MoEOutput
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.groups import Group
    from tamoe.solver import Plan

Kind = Literal["even", "capacity", "loss", "bias", "faster", "locality", "groups"]
PLANLESS: tuple[Kind, ...] = ("even", "capacity")


@dataclass(frozen=True)
class Strategy:
    """Gate, steering and exchange under one name."""

    name: str
    kind: Kind
    kl: float | None = None  # of its plan (entropic); None for those that need none
    aux_weight: float = 0.1  # of the balance or the topology loss; strong, for a short run
    gate_lr_factor: float = 0.3  # learning rate of the gate over that of the rest
    capacity_factor: float = 1.25  # of "capacity"
    remote_share: float = 0.14  # of "faster": choices that may leave the node, over tokens

    def __post_init__(self) -> None:
        if (self.kl is None) != (self.kind in PLANLESS):
            raise InputError(
                f"strategy {self.name!r}: kl is {self.kl!r} and kind {self.kind!r}; allowed: none "
                f"for {' and '.join(map(repr, PLANLESS))}, a kl for the others"
            )

    @property
    def has_target(self) -> bool:
        """Whether it goes for its plan's target; of other plans only the nodes are looked at."""
        return self.kind in ("loss", "bias")

    @property
    def router(self) -> str:
        """Who decides where a token goes, for the reader."""
        if self.kind in ("loss", "locality"):
            return "a gate of its own on each rank"
        beside = {
            "bias": ", a bias for each rank",
            "faster": ", most choices redirected to the node",
            "groups": ", one node's experts for a token",
        }
        return f"one gate shared by all ranks{beside.get(self.kind, '')}"


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


def all_strategies(num_ranks: int) -> tuple[Strategy, ...]:
    """Every published way to fit routing to a topology that tamoe has, for top-2 routing.

    >>> len(all_strategies(8)), all_strategies(8)[1].name
    (11, "even, FastMoE's scale")
    """
    gentle, strong = 0.5, 0.3
    nodes_of = 1.0  # the plan of those that only look at its nodes
    shrunk = 0.1 / num_ranks**2  # what FastMoE's GShard gate makes of its balance loss
    return (
        Strategy("even", "even"),
        Strategy("even, FastMoE's scale", "even", aux_weight=shrunk),
        Strategy("capacity 1.25", "capacity"),
        Strategy("group limit, one node", "groups", nodes_of),
        Strategy("FasterMoE's gate", "faster", nodes_of),
        Strategy("locality loss", "locality", nodes_of, gate_lr_factor=3.0),
        Strategy("ta-moe loss kl=1", "loss", 1.0, gate_lr_factor=3.0),
        Strategy(f"ta-moe loss kl={gentle:g}", "loss", gentle, gate_lr_factor=3.0),
        Strategy("bias kl=1", "bias", 1.0),
        Strategy(f"bias kl={gentle:g}", "bias", gentle),
        Strategy(f"bias kl={strong:g}", "bias", strong),
    )


def make_gate(
    strategy: Strategy,
    *,
    hidden_size: int,
    num_experts: int,
    top_k: int,
    plan: Plan | None,
    rank: int,
    group: Group = None,
) -> Gate:
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
    elif strategy.kind == "locality":
        assert plan is not None
        options.update(scope="rank", steer=LocalityLoss(plan, rank=rank))
    elif strategy.kind == "groups":
        assert plan is not None
        options.update(limit=GroupLimit.of_nodes(plan, 1, rank=rank))
    elif strategy.kind == "faster":
        assert plan is not None
        # Averaged over ranks, since each rank's choices are lopsided on purpose.
        options.update(balance_over="group", group=group)
        share = strategy.remote_share
        return FasterGate(
            hidden_size, num_experts, plan=plan, rank=rank, remote_share=share, **options
        )
    return GShardGate(hidden_size, num_experts, **options)


def make_layer(
    strategy: Strategy, gate: Gate, make_expert: Callable[[], nn.Module], exchange: Exchange
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
