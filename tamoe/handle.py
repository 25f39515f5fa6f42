"""What an exchange is given, checked and sorted, and what a dispatch hands on.

Shape suffixes: T tokens, K choices, N experts of the group, E experts of a rank, P ranks, D hidden
size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tamoe.agreement import DTYPES, Header, true_anywhere
from tamoe.flat import FlatRoute
from tamoe.groups import backend_of
from tamoe.hierarchical import RelayRoute
from tamoe.host_table import table_on
from tamoe.placement import Placement, experts_problem
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    import torch.distributed as dist

INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8)


@dataclass(frozen=True, eq=False)
class Handle:
    """What a dispatch found out about its routing; combine, both backward passes and
    :meth:`~tamoe.exchange.Exchange.dispatch_again` reuse it."""

    num_tokens: int
    top_k: int
    num_experts: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    grad_enabled: bool  # the same on all ranks
    requires_grad: bool  # of the tokens where gradients were on, the same on all ranks
    sent_counts_N: tuple[int, ...]  # rows of this rank for each expert, as routed
    received_counts_PE: tuple[tuple[int, ...], ...]  # rows by source rank and local expert
    route: FlatRoute | RelayRoute  # how the rows travel
    weight: torch.Tensor | None  # factors of rows, where the route applies them, with their graph
    anchor_0D: torch.Tensor  # see tamoe.anchor

    @property
    def counts_E(self) -> tuple[int, ...]:
        """Rows for each expert of this rank."""
        return tuple(sum(column) for column in zip(*self.received_counts_PE, strict=True))

    def anchor_beside(self, row_RD: torch.Tensor) -> torch.Tensor:
        """What combine is to get beside the rows, so that all ranks run its backward pass or none.

        Where only experts may train, the ranks ask each other whether any does: a backward pass
        moves gradients through ranks whose own experts are frozen, too. Gradients are to be on or
        off on all ranks alike.
        """
        weights_train = self.weight is not None and self.weight.requires_grad
        if not torch.is_grad_enabled() or self.requires_grad or weights_train:
            return self.anchor_0D
        if not true_anywhere(row_RD.requires_grad, row_RD, self.route.mover):
            return self.anchor_0D
        return torch.empty_like(self.anchor_0D).requires_grad_()


@dataclass(frozen=True, eq=False)
class Asked:
    """What a dispatch was asked for, beside the tokens themselves."""

    header: Header
    placement: Placement
    key: torch.Tensor  # slot of each flat choice, one past all slots where dropped
    refused: torch.Tensor  # nonzero where an index is not allowed
    weight_TK: torch.Tensor | None
    num_parts: int

    def weight_of(self, choice_n: torch.Tensor) -> torch.Tensor | None:
        """Factors of chosen flat choices, with their graph."""
        return (
            None if self.weight_TK is None else self.weight_TK.flatten().index_select(0, choice_n)
        )


def require_tensors(**values: object) -> None:
    """Refuse what is no tensor, by its name."""
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{name} is {type(value).__name__}; allowed: torch.Tensor")


def require_handle(handle: object) -> None:
    """Refuse what no dispatch returned."""
    if not isinstance(handle, Handle):
        raise InputError(f"handle is {type(handle).__name__}; allowed: what dispatch returned")


def weighted(weight_TK: torch.Tensor | None) -> int:
    """0: no weights, 1: weights, 2: weights that need a gradient.

    >>> weighted(None), weighted(torch.ones(1, 1))
    (0, 1)
    """
    if weight_TK is None:
        return 0
    return 2 if weight_TK.requires_grad and torch.is_grad_enabled() else 1


def input_problem(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weight_TK: torch.Tensor | None,
    num_experts: int,
    num_ranks: int,
    placement: Placement | None = None,
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
    if index_TK.device != x_TD.device:
        return f"expert_index_TK is on {index_TK.device}; allowed: that of x_TD, {x_TD.device}"
    if index_TK.numel() >= 2**31:
        return (
            f"expert_index_TK has {index_TK.numel()} choices; allowed: fewer than 2^31 in one "
            f"dispatch, since ranks count rows in 32 bits. Split the tokens"
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
        if weight_TK.device != x_TD.device:
            return f"weight_TK is on {weight_TK.device}; allowed: that of x_TD, {x_TD.device}"
    return experts_problem(num_experts, num_ranks, placement)


def device_problem(device: torch.device, group: dist.ProcessGroup | None) -> str | None:
    """Why the group cannot move tokens that are on a device; None if it can.

    >>> device_problem(torch.device("cpu"), None) is None
    True
    """
    if group is None or device.type != "cpu" or backend_of(group, device) is not None:
        return None
    return "x_TD is on cpu; allowed: cuda, as the group has no backend for the CPU"


def rows_problem(row_RD: torch.Tensor, handle: Handle) -> str | None:
    """What is not allowed about rows that are to go back after a dispatch."""
    why = "as dispatched. Experts must keep shape, dtype and device"
    return _unlike("row_RD", row_RD, sum(handle.counts_E), handle, why)


def _unlike(
    name: str, given_ND: torch.Tensor, num_rows: int, handle: Handle, why: str
) -> str | None:
    expected = (num_rows, handle.hidden_size)
    if tuple(given_ND.shape) != expected or given_ND.dtype != handle.dtype:
        return (
            f"{name} is {given_ND.dtype} of shape {tuple(given_ND.shape)}; allowed: "
            f"{handle.dtype} of shape {expected}, {why}"
        )
    if given_ND.device != handle.device:
        return f"{name} is on {given_ND.device}; allowed: {handle.device}, {why}"
    return None


def again_problem(x_TD: torch.Tensor, handle: Handle) -> str | None:
    """What is not allowed about tokens that are to go the way of an earlier dispatch."""
    unlike = _unlike("x_TD", x_TD, handle.num_tokens, handle, "as in the dispatch of the handle")
    if unlike is not None:
        return unlike
    if torch.is_grad_enabled() != handle.grad_enabled:
        now, then = ("off", "on") if handle.grad_enabled else ("on", "off")
        return (
            f"gradients are {now} (torch.is_grad_enabled); allowed: {then}, as in the dispatch "
            f"that gave the handle: its weights may need some"
        )
    if (handle.grad_enabled and x_TD.requires_grad) != handle.requires_grad:
        return (
            f"x_TD has requires_grad {x_TD.requires_grad}; allowed: {handle.requires_grad}, as in "
            f"the dispatch that gave the handle: ranks agreed on it there"
        )
    return None


def sort_keys(index_TK: torch.Tensor, placement: Placement) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot of each flat choice, one past all where dropped; whether an index is not allowed.

    >>> sort_keys(torch.tensor([[1, -1], [0, 2]]), Placement((0, 1), 2))
    (tensor([1, 2, 0, 2]), tensor(True))
    >>> sort_keys(torch.tensor([[1, -1], [0, 2]]), Placement((1, 0, 0), 2))
    (tensor([0, 4, 2, 1]), tensor(False))
    """
    num_experts = len(placement.rank_of_N)
    index_TK = index_TK.to(torch.int64)
    kept_TK = (index_TK >= 0) & (index_TK < num_experts)
    key = torch.where(kept_TK, index_TK, num_experts).flatten()
    if not placement.is_contiguous:
        table = [*placement.slot_N, placement.num_slots]
        key = table_on(key.device, table)[key]
    return key, ((index_TK < -1) | (index_TK >= num_experts)).any()


def deal_locally(key: torch.Tensor, num_slots: int, num_local: int) -> torch.Tensor:
    """Keys that deal the kept choices to the local experts in turn; dropped ones stay dropped.

    >>> deal_locally(torch.tensor([3, 4, 0, 1]), 4, 2)
    tensor([0, 2, 1, 0])
    """
    kept = key < num_slots
    return torch.where(kept, (kept.cumsum(0) - 1) % num_local, num_local)
