"""Capacity: how many choices an expert takes from one rank, and which ones are dropped.

Shape suffixes: T tokens, K choices, N experts of the whole group.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, overload

import torch

from tamoe.plan_module import PlanModule, PlanRows
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.groups import Group

DropPolicy = Literal["none", "probs", "position", "random"]
DROP_POLICIES: tuple[DropPolicy, ...] = ("none", "probs", "position", "random")
# ceil must not round the noise of a factor in binary, or of a solver, up to one more token.
_FLOAT_SLACK = 1e-12
_PLAN_SLACK = 1e-6


@overload
def even_capacity(num_tokens: int, num_experts: int, *, top_k: int, factor: float) -> int: ...


@overload
def even_capacity(
    num_tokens: torch.Tensor, num_experts: int, *, top_k: int, factor: float
) -> torch.Tensor: ...


def even_capacity(
    num_tokens: int | torch.Tensor, num_experts: int, *, top_k: int, factor: float
) -> int | torch.Tensor:
    """The same capacity for each expert: ``ceil(factor · k · T / N)``.

    DeepSpeed's capacity per rank and expert, without its minimum of 4.

    Parameters
    ----------
    num_tokens
        T, tokens of this rank, >= 0; an integer tensor where only the device knows.
    num_experts
        N, experts of the whole group, >= 1.
    top_k
        k, choices a token.
    factor
        > 0; at 1 the capacities hold every choice only if routing is exactly even.

    Returns
    -------
    int or torch.Tensor
        As ``num_tokens`` is.

    Examples
    --------
    >>> even_capacity(1024, 8, top_k=2, factor=1.25)
    320
    """
    scale = factor * top_k / num_experts * (1 - _FLOAT_SLACK)
    if isinstance(num_tokens, torch.Tensor):
        return (num_tokens.double() * scale).ceil().long()
    return math.ceil(num_tokens * scale)


def within_capacity(
    expert_index_TK: torch.Tensor,
    capacity_N: torch.Tensor,
    priority_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which choices their experts have room for.

    Each expert takes its choices in order of priority until its capacity is used. Among equal
    priorities all first choices come before all second ones, and within those the token that
    comes first. Exact: an expert takes the smaller of its capacity and what chose it.

    Parameters
    ----------
    expert_index_TK
        ``[T, K]`` int64, 0 to N - 1, or -1 for a choice that was dropped already.
    capacity_N
        ``[N]`` integers, >= 0.
    priority_TK
        ``[T, K]``, higher goes first. None: only the order above.

    Returns
    -------
    torch.Tensor
        ``[T, K]`` bool; False where the choice is dropped.

    Examples
    --------
    >>> index_TK = torch.tensor([[0], [0], [0], [1]])
    >>> within_capacity(index_TK, torch.tensor([2, 2])).squeeze(1).tolist()
    [True, True, False, True]
    """
    index_Q = expert_index_TK.T.reshape(-1)  # all first choices, then all second ones
    order_Q = torch.arange(len(index_Q), device=index_Q.device)
    if priority_TK is not None:
        order_Q = priority_TK.T.reshape(-1).argsort(descending=True, stable=True)
    order_Q = order_Q[index_Q[order_Q].argsort(stable=True)]  # by expert, then by priority
    sorted_Q = index_Q[order_Q]
    first_Q = torch.searchsorted(sorted_Q, sorted_Q)  # where the expert's choices begin
    place_Q = torch.arange(len(index_Q), device=index_Q.device) - first_Q
    room_Q = place_Q < capacity_N[sorted_Q.clamp_min(0)]
    keep_Q = torch.empty_like(room_Q).scatter_(0, order_Q, room_Q & (sorted_Q >= 0))
    return keep_Q.reshape(expert_index_TK.shape[::-1]).T


class TopologyCapacity(PlanModule):
    """Capacities that follow the rank's target: ``ceil(factor · k · T · ĉ_e / Σĉ)``.

    With a padded exchange the traffic is the capacity, from the first step on; a gate that does
    not follow loses tokens instead. Combine it with a loss or a bias.

    Parameters
    ----------
    plan
        :class:`tamoe.solver.Plan`.
    group
        Expert-parallel group that the plan was solved for, None for the default group. Only asked
        for this process's rank.
    rank
        Row of the plan; None asks the group.
    factor
        > 0; at 1 a batch of the plan's size has room for exactly the target (rounded up).
    device
        Of the shares.

    Raises
    ------
    InputError
        The rank is unknown or out of range, or the factor is not positive.

    Examples
    --------
    >>> from tamoe.solver import Workload, solve
    >>> from tamoe.topology import Topology
    >>> topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(3e10, 1e10))
    >>> plan = solve(topology, Workload(tokens_per_rank=100, top_k=1), method="closed_form")
    >>> capacity = TopologyCapacity(plan, rank=0, factor=1.2)
    >>> int(capacity(100).sum()) >= 120
    True
    """

    target_share_N: torch.Tensor

    def __init__(
        self,
        plan: PlanRows,
        *,
        group: Group = None,
        rank: int | None = None,
        factor: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(plan, group, rank)
        self.factor = checked_factor("factor", factor)
        share_N = torch.empty(self.num_experts, dtype=torch.float32, device=device)
        self.register_buffer("target_share_N", share_N, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Write the plan's shares into the buffer."""
        self.target_share_N.copy_(torch.from_numpy(self.share_N))

    def set_plan(self, plan: PlanRows) -> None:
        """Follow another Plan of the same ranks and experts from now on."""
        self._adopt(plan)
        self.reset_parameters()

    def forward(self, num_choices: int | torch.Tensor) -> torch.Tensor:
        """Capacity of each expert, ``[N]`` int64, for k·T choices made on this rank."""
        scaled_N = self.target_share_N * (self.factor * num_choices * (1 - _PLAN_SLACK))
        return scaled_N.ceil().long()

    def extra_repr(self) -> str:
        """Rank, size and factor, for ``print(model)``."""
        return f"{super().extra_repr()}, factor={self.factor:g}"


def checked_factor(name: str, factor: float) -> float:
    """A capacity factor: finite and positive."""
    number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not (number and math.isfinite(factor) and factor > 0):
        raise InputError(f"{name} is {factor!r}; allowed: a finite number > 0")
    return float(factor)
