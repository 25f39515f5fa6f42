"""From expert indices to the order in which rows travel and are added up again.

Shape suffixes: T tokens, K choices, N experts of the group, E experts of a rank, P ranks, D hidden
size, n rows sent (choices that were not dropped), R rows received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tamoe.agreement import DTYPES
from tamoe.summation import SumPlan, plan_sum

INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8)


@dataclass(frozen=True, eq=False)
class Handle:
    """What a dispatch found out about its routing; combine and both backward passes reuse it."""

    num_tokens: int
    top_k: int
    num_experts: int
    hidden_size: int
    dtype: torch.dtype
    sent_counts_N: tuple[int, ...]  # rows of this rank for each expert, as routed
    received_counts_PE: tuple[tuple[int, ...], ...]  # rows by source rank and local expert
    send_splits: tuple[int, ...]  # rows for each rank
    receive_splits: tuple[int, ...]  # rows from each rank
    token_n: torch.Tensor  # token of each row; rows are sorted by expert, then by token
    arrangement_R: torch.Tensor | None  # place, as received, of each row in expert order
    sum_plan: SumPlan
    weight_n: torch.Tensor | None  # factor of each row, with its graph

    @property
    def counts_E(self) -> tuple[int, ...]:
        """Rows for each expert of this rank."""
        return tuple(sum(column) for column in zip(*self.received_counts_PE, strict=True))


def input_problem(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weight_TK: torch.Tensor | None,
    num_experts: int,
    num_ranks: int,
) -> str | None:
    """What is not allowed about the arguments of a dispatch, values on the device aside."""
    if x_TD.ndim != 2 or x_TD.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"x_TD is {x_TD.dtype} of shape {tuple(x_TD.shape)}; allowed: [T, D] of {allowed}"
    if index_TK.ndim != 2 or len(index_TK) != len(x_TD) or index_TK.shape[1] < 1:
        return (
            f"expert_index_TK has shape {tuple(index_TK.shape)}; allowed: [{len(x_TD)}, K], a row "
            f"for each token and K >= 1"
        )
    if index_TK.dtype not in INDEX_DTYPES:
        return f"expert_index_TK is {index_TK.dtype}; allowed: int64, int32, int16, int8"
    if weight_TK is not None:
        if weight_TK.shape != index_TK.shape:
            return (
                f"weight_TK has shape {tuple(weight_TK.shape)}; allowed: that of expert_index_TK, "
                f"{tuple(index_TK.shape)}"
            )
        if not weight_TK.is_floating_point():
            return f"weight_TK is {weight_TK.dtype}; allowed: a floating-point dtype"
    if num_experts < 1 or num_experts % num_ranks:
        return (
            f"num_experts is {num_experts}; allowed: a positive multiple of the group's "
            f"{num_ranks} ranks"
        )
    return None


def sort_keys(index_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert of each flat choice, N where dropped; and a scalar: whether an index is not allowed.

    >>> sort_keys(torch.tensor([[1, -1], [0, 2]]), 2)
    (tensor([1, 2, 0, 2]), tensor(True))
    """
    index_TK = index_TK.to(torch.int64)
    kept_TK = (index_TK >= 0) & (index_TK < num_experts)
    key = torch.where(kept_TK, index_TK, num_experts).flatten()
    return key, ((index_TK < -1) | (index_TK >= num_experts)).any()


def count_keys(key: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Choices of each expert, ``[N]`` int64; integer sums, so any order gives the same."""
    count = torch.zeros(num_experts + 1, dtype=torch.int64, device=key.device)
    return count.scatter_add_(0, key, torch.ones_like(key))[:num_experts]


def deal_locally(key: torch.Tensor, num_experts: int, num_local: int) -> torch.Tensor:
    """Keys that deal the kept choices to the local experts in turn; dropped ones stay dropped.

    >>> deal_locally(torch.tensor([3, 4, 0, 1]), 4, 2)
    tensor([0, 2, 1, 0])
    """
    kept = key < num_experts
    return torch.where(kept, (kept.cumsum(0) - 1) % num_local, num_local)


def make_handle(
    x_TD: torch.Tensor,
    key: torch.Tensor,
    weight_TK: torch.Tensor | None,
    top_k: int,
    sent_counts_N: Sequence[int],
    send_counts_N: Sequence[int],
    received_counts_PE: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
) -> Handle:
    """Sort the kept choices by expert and plan both ways.

    ``send_counts_N`` are the counts of the keys, which are not ``sent_counts_N``, those of the
    routing, where rows were dealt locally.
    """
    num_ranks = len(received_counts_PE)
    num_local = len(send_counts_N) // num_ranks
    choice_n = torch.argsort(key, stable=True)[: sum(send_counts_N)]
    token_n = choice_n // top_k
    rank_n = key[choice_n] // num_local
    return Handle(
        num_tokens=len(x_TD),
        top_k=top_k,
        num_experts=len(sent_counts_N),
        hidden_size=x_TD.shape[1],
        dtype=x_TD.dtype,
        sent_counts_N=tuple(sent_counts_N),
        received_counts_PE=tuple(tuple(row) for row in received_counts_PE),
        send_splits=tuple(
            sum(send_counts_N[rank * num_local : (rank + 1) * num_local])
            for rank in range(num_ranks)
        ),
        receive_splits=tuple(sum(row) for row in received_counts_PE),
        token_n=token_n,
        arrangement_R=_arrangement(received_counts_PE, x_TD.device),
        sum_plan=plan_sum(token_n, rank_n, len(x_TD), groups),
        weight_n=None if weight_TK is None else weight_TK.flatten().index_select(0, choice_n),
    )


def _arrangement(
    received_counts_PE: Sequence[Sequence[int]], device: torch.device
) -> torch.Tensor | None:
    """Rows come sorted by source, then expert; experts want them by expert, then source."""
    num_ranks, num_local = len(received_counts_PE), len(received_counts_PE[0])
    if num_ranks == 1 or num_local == 1:
        return None
    count = torch.tensor(received_counts_PE, device=device).flatten()
    expert = torch.arange(num_local, device=device).repeat(num_ranks)
    size = sum(map(sum, received_counts_PE))
    expert_R = expert.repeat_interleave(count, output_size=size)
    return torch.argsort(expert_R, stable=True)
