"""Workload: what one MoE layer sends in one exchange, whatever the cluster."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tamoe.topology.errors import InputError, whole


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens, experts and sizes of one exchange.

    Parameters
    ----------
    tokens_per_rank
        Tokens S of each rank, >= 1.
    top_k
        Experts that each token is sent to, 1 to the number of experts.
    hidden_size
        Elements of a token, >= 1.
    element_bytes
        Bytes of an element on the wire, >= 1.
    experts_per_rank
        Experts on each rank, >= 1: expert e lives on rank ``e // experts_per_rank`` of its group.
    placement
        Position in the group of the rank of each expert; ranks may hold different numbers of
        experts, or none. It replaces ``experts_per_rank``.
    ep_groups
        Ranks of each expert-parallel group. The groups exchange at the same time over the same
        links, each among its own ranks. All are of one size and together they hold every rank
        once. None: one group of all ranks.

    Raises
    ------
    InputError
        A value is out of range.

    Examples
    --------
    >>> workload = Workload(tokens_per_rank=1024, top_k=2, experts_per_rank=4)
    >>> workload.num_experts(8), workload.token_bytes, workload.even_tokens(8)
    (32, 2048, 64.0)
    """

    tokens_per_rank: int = 2048
    top_k: int = 2
    hidden_size: int = 1024
    element_bytes: int = 2
    experts_per_rank: int = 1
    placement: tuple[int, ...] | None = None
    ep_groups: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        for name in (
            "tokens_per_rank", "top_k", "hidden_size", "element_bytes", "experts_per_rank",
        ):  # fmt: skip
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        if self.placement is not None:
            object.__setattr__(self, "placement", _whole_tuple("placement", self.placement))
        if self.ep_groups is not None:
            object.__setattr__(self, "ep_groups", _groups(self.ep_groups))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token on the wire."""
        return self.hidden_size * self.element_bytes

    def groups(self, num_ranks: int) -> tuple[tuple[int, ...], ...]:
        """The expert-parallel groups of a cluster of that many ranks.

        Raises
        ------
        InputError
            ``ep_groups`` does not hold each of the ranks exactly once.

        Examples
        --------
        >>> Workload().groups(3)
        ((0, 1, 2),)
        """
        if self.ep_groups is None:
            return (tuple(range(num_ranks)),)
        if sorted(rank for group in self.ep_groups for rank in group) != list(range(num_ranks)):
            raise InputError(
                f"ep_groups is {self.ep_groups}; allowed: every rank from 0 to {num_ranks - 1} "
                f"in exactly one group"
            )
        return self.ep_groups

    def expert_position_N(self, num_ranks: int) -> np.ndarray:
        """Position in its group of the rank that holds each expert, ``[N]`` int64.

        Raises
        ------
        InputError
            ``placement`` names a position that the groups do not have, or there are fewer experts
            than ``top_k``.

        Examples
        --------
        >>> Workload(top_k=1, experts_per_rank=2).expert_position_N(3).tolist()
        [0, 0, 1, 1, 2, 2]
        """
        size = len(self.groups(num_ranks)[0])
        if self.placement is None:
            position_N = np.repeat(np.arange(size), self.experts_per_rank)
        else:
            position_N = np.array(self.placement, dtype=np.int64)
            self._check_placement(size)
        if self.top_k > len(position_N):
            raise InputError(
                f"top_k is {self.top_k}; allowed: 1 to the number of experts, {len(position_N)}"
            )
        return position_N

    def num_experts(self, num_ranks: int) -> int:
        """Number of experts N of a group."""
        return len(self.expert_position_N(num_ranks))

    def even_tokens(self, num_ranks: int) -> float:
        """Tokens that a rank sends to each expert under even dispatch, kS/N."""
        return self.top_k * self.tokens_per_rank / self.num_experts(num_ranks)

    def _check_placement(self, size: int) -> None:
        placement = self.placement or ()
        wrong = [(e, p) for e, p in enumerate(placement) if not 0 <= p < size]
        if wrong:
            raise InputError(
                f"placement[{wrong[0][0]}] is {wrong[0][1]}; allowed: a position in the group, "
                f"0 to {size - 1}"
            )
        if self.experts_per_rank not in (1, len(placement) / size):
            raise InputError(
                f"experts_per_rank is {self.experts_per_rank} and placement has {len(placement)} "
                f"experts for {size} ranks; allowed: leave experts_per_rank out"
            )


def divide_experts(num_experts: int, num_ranks: int) -> int:
    """Experts per rank when every rank of a group holds as many.

    Raises
    ------
    InputError
        The experts cannot be divided evenly.

    Examples
    --------
    >>> divide_experts(32, 8)
    4
    """
    num_experts = whole("num_experts", num_experts, 1)
    if num_experts % num_ranks:
        raise InputError(
            f"num_experts is {num_experts}; allowed: a multiple of the {num_ranks} ranks of a "
            f"group. Give a placement to spread experts unevenly"
        )
    return num_experts // num_ranks


def _whole_tuple(name: str, values: object) -> tuple[int, ...]:
    if not isinstance(values, list | tuple | range | np.ndarray) or not len(values):
        raise InputError(f"{name} is {values!r}; allowed: a list of whole numbers >= 0")
    return tuple(whole(f"{name}[{at}]", value, 0) for at, value in enumerate(values))


def _groups(values: object) -> tuple[tuple[int, ...], ...]:
    if not isinstance(values, list | tuple) or not values:
        raise InputError(f"ep_groups is {values!r}; allowed: a list of lists of ranks")
    groups = tuple(_whole_tuple(f"ep_groups[{at}]", group) for at, group in enumerate(values))
    if len({len(group) for group in groups}) != 1:
        sizes = [len(group) for group in groups]
        raise InputError(f"ep_groups has groups of {sizes} ranks; allowed: groups of one size")
    ranks = [rank for group in groups for rank in group]
    if len(set(ranks)) != len(ranks):
        raise InputError(f"ep_groups is {groups}; allowed: every rank in exactly one group")
    return groups
