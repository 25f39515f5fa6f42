"""Placement: which rank of a group holds each expert, and the slot that it has in an exchange.

An exchange counts, sorts and sums by slot. Every rank has as many slots as the rank with the most
experts; its own experts fill the first ones in the order of their numbers, the rest stay empty. So
all ranks have equally many slots, wherever the experts are.

Shape suffixes: N experts of the group, P ranks, E experts of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from tamoe.topology.errors import InputError, whole


@dataclass(frozen=True)
class Placement:
    """Where the experts of a group are; equal where the ranks of all experts are.

    Parameters
    ----------
    rank_of_N
        Rank of each expert, 0 to ``num_ranks`` - 1; a rank may hold any number of them, or none.
    num_ranks
        Ranks P of the group.

    Examples
    --------
    >>> placement = Placement((2, 0, 2), 3)
    >>> placement.experts_PE, placement.slots_per_rank, placement.slot_N
    (((1,), (), (0, 2)), 2, (4, 0, 5))
    """

    rank_of_N: tuple[int, ...]
    num_ranks: int

    @cached_property
    def experts_PE(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the experts of each rank, ascending."""
        experts_PE: list[list[int]] = [[] for _ in range(self.num_ranks)]
        for expert, rank in enumerate(self.rank_of_N):
            experts_PE[rank].append(expert)
        return tuple(map(tuple, experts_PE))

    @cached_property
    def slots_per_rank(self) -> int:
        """Slots of each rank, >= 1."""
        return max(map(len, self.experts_PE))

    @property
    def num_slots(self) -> int:
        """Slots of all ranks."""
        return self.num_ranks * self.slots_per_rank

    @cached_property
    def slot_N(self) -> tuple[int, ...]:
        """Slot of each expert."""
        slot_of = {
            expert: rank * self.slots_per_rank + local
            for rank, experts_E in enumerate(self.experts_PE)
            for local, expert in enumerate(experts_E)
        }
        return tuple(slot_of[expert] for expert in range(len(self.rank_of_N)))

    @cached_property
    def is_contiguous(self) -> bool:
        """Whether slots and experts are the same: equally many on each rank, in rank order."""
        return self.slot_N == tuple(range(self.num_slots))


@lru_cache(maxsize=64)
def contiguous(num_experts: int, num_ranks: int) -> Placement:
    """Expert e on rank e // (N / P).

    >>> contiguous(4, 2).rank_of_N
    (0, 0, 1, 1)
    """
    return Placement(tuple(e * num_ranks // num_experts for e in range(num_experts)), num_ranks)


def experts_problem(num_experts: int, num_ranks: int, placement: Placement | None) -> str | None:
    """What is not allowed about a number of experts.

    >>> experts_problem(3, 2, None) is None, experts_problem(3, 2, Placement((1, 0, 0), 2)) is None
    (False, True)
    """
    if placement is not None and num_experts != len(placement.rank_of_N):
        return (
            f"num_experts is {num_experts} and the exchange's placement has "
            f"{len(placement.rank_of_N)} experts; allowed: the same number"
        )
    is_integer = hasattr(num_experts, "__index__")  # 8.0 would fail on this rank alone, later on
    if placement is None and not (is_integer and num_experts > 0 and num_experts % num_ranks == 0):
        return (
            f"num_experts is {num_experts!r}; allowed: a positive multiple of the group's "
            f"{num_ranks} ranks, or any number with Exchange(placement=...); an integer"
        )
    return None


def resolve_placement(
    ranks_of_experts: Sequence[int] | None, topology_or_plan: Any, num_ranks: int
) -> Placement | None:
    """The placement that an exchange was given, by itself or in its Plan; None for contiguous.

    Parameters
    ----------
    ranks_of_experts
        Rank of each expert; None to ask the plan.
    topology_or_plan
        What the exchange was given; a Plan knows where its experts are.
    num_ranks
        Ranks of the group.

    Raises
    ------
    InputError
        A rank is out of range, there are no experts, or the plan has its experts elsewhere.

    Examples
    --------
    >>> resolve_placement([1, 1, 0], None, 2).slot_N
    (2, 3, 0)
    """
    planned = _planned(topology_or_plan, num_ranks)
    if ranks_of_experts is None:
        if planned is None or topology_or_plan.workload.placement is not None:
            return planned
        return None if planned.is_contiguous else planned
    given = Placement(_checked(ranks_of_experts, num_ranks), num_ranks)
    if planned is not None and given != planned:
        raise InputError(
            f"placement is {_short(given)} and the plan was solved for {_short(planned)}; allowed: "
            f"leave placement out, or solve for Workload(placement=...)"
        )
    return given


def _planned(topology_or_plan: Any, num_ranks: int) -> Placement | None:
    """Where a Plan has its experts, by the ranks of a group of that many; None without a Plan."""
    workload = getattr(topology_or_plan, "workload", None)
    if workload is None:
        return None
    everyone = topology_or_plan.topology.num_ranks
    if len(workload.groups(everyone)) > 1:  # of which this is one, with its ranks in that order
        return Placement(tuple(workload.expert_position_N(everyone).tolist()), num_ranks)
    return Placement(tuple(topology_or_plan.expert_rank_N(0).tolist()), num_ranks)


def _checked(ranks_of_experts: Sequence[int], num_ranks: int) -> tuple[int, ...]:
    try:
        ranks = list(ranks_of_experts)
    except TypeError:
        ranks = []
    if not ranks:
        raise InputError(
            f"placement is {ranks_of_experts!r}; allowed: the rank of each expert, at least one"
        )
    return tuple(whole(f"placement[{e}]", rank, 0, num_ranks - 1) for e, rank in enumerate(ranks))


def _short(placement: Placement) -> str:
    ranks = placement.rank_of_N
    return f"({', '.join(map(str, ranks[:8]))}{', …' if len(ranks) > 8 else ''})"
