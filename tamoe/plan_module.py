"""What the loss, the bias and the capacity share: one rank's row of a Plan, as a module."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tamoe.float32_state import Float32State
from tamoe.groups import group_rank, group_size, is_distributed
from tamoe.topology.errors import InputError, whole

if TYPE_CHECKING:
    from tamoe.groups import Group
    from tamoe.scope import Scope


class PlanRows(Protocol):
    """What steering needs of a Plan: one row a rank. :class:`tamoe.solver.Plan` has them."""

    @property
    def num_ranks(self) -> int:
        """P."""
        ...

    @property
    def num_experts(self) -> int:
        """N."""
        ...

    def target_N(self, rank: int) -> np.ndarray:
        """Tokens that the rank should send to each expert, ``[N]``."""
        ...

    def penalty_N(self, rank: int, norm: Any = "sum") -> np.ndarray:
        """Weights of the topology loss, ``[N]``, mean 1."""
        ...

    def log_prior_N(self, rank: int) -> np.ndarray:
        """log(target/even), ``[N]``."""
        ...


def check_plan(plan: object) -> None:
    """Raise :class:`InputError` where something is no Plan, such as the name of its file."""
    if not all(hasattr(plan, name) for name in ("num_ranks", "num_experts", "target_N")):
        raise InputError(
            f"plan is {reprlib.repr(plan)}; allowed: a tamoe.solver.Plan, made by solve(topology, "
            f"workload) or read by Plan.load('plan.json')"
        )


def resolve_rank(plan: PlanRows, group: Group = None, rank: int | None = None) -> int:
    """The row of a Plan that belongs to this process.

    Parameters
    ----------
    plan
        Numbers its ranks as the group does.
    group
        Asked where ``rank`` is None; must be as large as the plan.
    rank
        0 to ``plan.num_ranks`` - 1, or None to ask the group.

    Returns
    -------
    int

    Raises
    ------
    InputError
        The rank is out of range, or None without a group; or group and plan differ in size.
    """
    if rank is None:
        if group is None and not is_distributed():
            raise InputError(
                f"rank is None and torch.distributed is not initialised; give rank, 0 to "
                f"{plan.num_ranks - 1}, or call init_process_group first"
            )
        if group_size(group) != plan.num_ranks:
            raise InputError(
                f"group has {group_size(group)} ranks and the plan {plan.num_ranks}; allowed: "
                f"the group of all ranks of the plan; or give rank"
            )
        rank = group_rank(group)
    return whole("rank", rank, 0, plan.num_ranks - 1)


def checked_row(name: str, values_N: np.ndarray, num_experts: int) -> np.ndarray:
    """A row as float64: ``num_experts`` finite numbers."""
    row_N = np.asarray(values_N, dtype=np.float64)
    if row_N.shape != (num_experts,) or not np.isfinite(row_N).all():
        raise InputError(
            f"plan: {name} has shape {row_N.shape} and "
            f"{int((~np.isfinite(row_N)).sum())} values that are not finite; allowed: "
            f"{num_experts} finite numbers"
        )
    return row_N


class PlanModule(Float32State, ABC):
    """A module made of one rank's row of a Plan.

    Its buffers stay float32 and differ by rank (``tamoe_scope``), so nothing may broadcast or
    average them: give DistributedDataParallel ``broadcast_buffers=False``.
    """

    tamoe_scope: Scope = "rank"

    def __init__(self, plan: PlanRows, group: Group, rank: int | None) -> None:
        super().__init__()
        check_plan(plan)
        self.rank = resolve_rank(plan, group, rank)
        self.num_ranks = plan.num_ranks
        self.num_experts = plan.num_experts
        self._adopt(plan)

    @abstractmethod
    def set_plan(self, plan: PlanRows) -> None:
        """Follow another Plan of the same ranks and experts from now on."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Fill the buffers anew, for example after ``to_empty`` of a model made on ``meta``."""

    @property
    def is_even(self) -> bool:
        """Whether the rank's target is even, so that there is nothing to steer."""
        return bool(np.allclose(self.share_N * self.num_experts, 1.0, rtol=1e-3))

    def _check_size(self, plan: PlanRows) -> None:
        check_plan(plan)
        if (plan.num_ranks, plan.num_experts) != (self.num_ranks, self.num_experts):
            raise InputError(
                f"plan has {plan.num_ranks} ranks and {plan.num_experts} experts; allowed: "
                f"{self.num_ranks} ranks and {self.num_experts} experts, as before"
            )

    def _adopt(self, plan: PlanRows) -> None:
        self._check_size(plan)
        self.share_N = self._share(plan)

    def _share(self, plan: PlanRows) -> np.ndarray:
        target_N = checked_row("target_N", plan.target_N(self.rank), plan.num_experts)
        if (target_N < 0).any() or not target_N.sum() > 0:
            raise InputError("plan: target_N has negative numbers or sums to 0; allowed: >= 0")
        return target_N / target_N.sum()

    def extra_repr(self) -> str:
        """Rank and size, for ``print(model)``."""
        return f"rank={self.rank}, num_ranks={self.num_ranks}, num_experts={self.num_experts}"
