"""Gates for FastMoE's ``FMoE(gate=...)`` that follow a Plan.

    layer = FMoETransformerMLP(num_expert=2, d_model=512, world_size=8, gate=gate_class(plan))

FastMoE asks for a class with the signature of its ``NaiveGate`` and calls it with sizes, so
:func:`gate_class` makes one that knows the plan. FastMoE itself is not imported; it needs CUDA.

Shape suffixes: T tokens, K choices, N experts of the whole group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tamoe.adapters.attach import Steering
from tamoe.gates import NaiveGate
from tamoe.logits import wide_linear
from tamoe.plan_module import PlanRows
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.groups import Group


def gate_class(
    plan: PlanRows,
    *,
    how: Literal["bias", "loss"] = "bias",
    rank: int | None = None,
    group: Group = None,
    weight: float = 0.01,
    gain: float = 0.3,
) -> type[nn.Module]:
    """A gate class for FastMoE.

    Parameters
    ----------
    plan
        :class:`tamoe.solver.Plan` for ``num_expert · world_size`` experts and its ``top_k``.
    how
        ``"bias"``: on selection. ``"loss"``: topology loss, with a gate of each rank: then give
        ``DistributedGroupedDataParallel`` a ``gate_group`` of this rank alone, since its default
        averages gates over the world.
    rank
        Row of the plan; None asks the group.
    group
        Expert-parallel group of the plan, None for the default group.
    weight
        Factor of the loss in ``get_loss()``; multiply it no further.
    gain
        Of the bias's controller.

    Returns
    -------
    type
        Called by FastMoE as ``gate(d_model, num_expert, world_size, top_k)``. Its ``forward``
        returns experts (int64, -1 where dropped) and scores, ``[T, K]``; its loss is fetched by
        ``get_loss()``.

    Raises
    ------
    InputError
        From the class, where sizes do not fit the plan.

    Examples
    --------
    >>> from tamoe.solver import Workload, solve
    >>> from tamoe.topology import Topology
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(3e10, 1e10))
    >>> plan = solve(topology, Workload(top_k=2, experts_per_rank=2), floor=0.25)
    >>> gate = gate_class(plan, rank=0)(16, 2, 2, 2)
    >>> index_TK, score_TK = gate(torch.randn(8, 16))
    >>> tuple(index_TK.shape), gate.has_loss
    ((8, 2), True)
    """
    steering = Steering(plan, how, rank, group, gain)

    class PlanGate(nn.Module):
        """FastMoE's gate contract around a gate of tamoe."""

        def __init__(
            self,
            d_model: int,
            num_expert: int,
            world_size: int,
            top_k: int = 2,
            gate_bias: bool = False,
        ) -> None:
            super().__init__()
            if gate_bias:
                raise InputError("gate_bias is True; allowed: False, tamoe's gates have no bias")
            total = num_expert * world_size
            if world_size != plan.num_ranks or total != plan.num_experts:
                raise InputError(
                    f"num_expert is {num_expert} and world_size {world_size}; allowed: as in the "
                    f"plan, {plan.num_experts} experts on {plan.num_ranks} ranks"
                )
            self.tot_expert, self.top_k, self.loss = total, top_k, None
            self.gate = NaiveGate(
                d_model,
                total,
                top_k=top_k,
                scope="rank" if how == "loss" else "shared",
                steer=steering.make(torch.device("cpu")),
                aux_weight=weight,
                group=group,
            )

        def forward(self, inp: torch.Tensor, return_all_scores: bool = False) -> Any:
            """Experts and scores, and all logits if asked."""
            routing = self.gate(inp)
            self.set_loss(routing.aux_loss)
            found = (routing.expert_index_TK, routing.weight_TK.to(inp.dtype))
            if not return_all_scores:
                return found
            return (*found, wide_linear(inp, self.gate.weight))

        def set_loss(self, loss: Any) -> None:
            """As FastMoE's BaseGate."""
            self.loss = loss

        def get_loss(self, clear: bool = True) -> Any:
            """As FastMoE's BaseGate."""
            loss = self.loss
            if clear:
                self.loss = None
            return loss

        @property
        def has_loss(self) -> bool:
            """As FastMoE's BaseGate."""
            return self.loss is not None

    return PlanGate
