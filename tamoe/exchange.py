"""Exchange: moves tokens to the ranks of their experts and the experts' outputs back.

Shape suffixes: T tokens, K choices, N experts of the group, E experts of a rank, P ranks, D hidden
size, n rows sent (choices that were not dropped), R rows received.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from tamoe.agreement import Header, RefusedValues, exchange_counts, layout_code
from tamoe.groups import group_rank, group_size, process_group
from tamoe.handle import Handle, count_keys, deal_locally, input_problem, make_handle, sort_keys
from tamoe.record import Phase, note_counts, timed
from tamoe.schedules import Schedule, move_rounds, move_single, rounds_of
from tamoe.summation import accumulation_dtype, add_up, sum_groups, weigh
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.groups import Group
    from tamoe.solver import Plan
    from tamoe.topology.graph import Topology

Kind = Literal["auto", "flat", "none"]


class Exchange:
    """Dispatch and combine over an expert-parallel group, with gradients.

    Expert e of N lives on rank e // (N / P). Each (token, choice) row goes straight to the rank of
    its expert. Both directions are deterministic, and the sum over a token's choices has one order
    for every exchange (:mod:`tamoe.summation`), so results do not depend on the schedule. A row is
    multiplied by its weight and rounded to the rows' dtype before it is added.

    A dispatch needs one host round trip for counts (two beyond 24 experts a rank); combine and the
    backward passes need none. All ranks must call dispatch and combine, and run backward, equally
    often and in the same order, also ranks without tokens.

    Parameters
    ----------
    topology_or_plan
        :class:`~tamoe.topology.Topology` of the group's ranks, or a Plan, which holds one. Gives
        the nodes for the schedule and for the order of summation. None: one node.
    group
        ProcessGroup, 1-D DeviceMesh, or None for the default group; one rank where
        torch.distributed is not initialised.
    kind
        ``"flat"``; ``"auto"`` takes the best that is there, which is flat; ``"none"`` moves
        nothing: every rank works on its own rows, dealt in turn to its experts, as many as it
        would get on average. For measuring what the exchange costs; its results are not a model.
    schedule
        ``"single"``: one all-to-all. ``"rounds"``: disjoint node pairs, one after another; needs a
        topology. ``"auto"``: rounds on gloo where there are several nodes, else single.

    Raises
    ------
    InputError
        Unknown kind or schedule, or a topology with another number of ranks than the group.

    Examples
    --------
    >>> exchange = Exchange()
    >>> index_TK, weight_TK = torch.tensor([[1, 0], [1, -1]]), torch.tensor([[0.5, 0.5], [1.0, 0]])
    >>> x_TD = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> row_RD, handle = exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=2)
    >>> handle.counts_E
    (1, 2)
    >>> exchange.combine(row_RD, handle).tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """

    def __init__(
        self,
        topology_or_plan: Topology | Plan | None = None,
        *,
        group: Group = None,
        kind: Kind = "auto",
        schedule: Schedule | Literal["auto"] = "auto",
    ) -> None:
        if kind not in ("auto", "flat", "none"):
            raise InputError(f"kind is {kind!r}; allowed: 'auto', 'flat', 'none'")
        if schedule not in ("auto", "single", "rounds"):
            raise InputError(f"schedule is {schedule!r}; allowed: 'auto', 'single', 'rounds'")
        given: Any = topology_or_plan
        topology: Topology | None = getattr(given, "topology", given)
        self.group = process_group(group)
        self.rank, self.num_ranks = group_rank(group), group_size(group)
        if topology is not None and topology.num_ranks != self.num_ranks:
            raise InputError(
                f"topology_or_plan has {topology.num_ranks} ranks and the group {self.num_ranks}; "
                f"allowed: the group's ranks. Take topology.subset(ranks)"
            )
        if schedule == "rounds" and topology is None:
            raise InputError("schedule is 'rounds' without topology_or_plan, which gives the nodes")
        self.nodes = (tuple(range(self.num_ranks)),) if topology is None else topology.nodes
        self.kind: Literal["flat", "none"] = "none" if kind == "none" else "flat"
        self.schedule: Schedule = self._best_schedule() if schedule == "auto" else schedule
        self._rounds = rounds_of(self.nodes, self.rank)
        self._near = set(next(ranks for ranks in self.nodes if self.rank in ranks))
        self._groups = sum_groups(topology) if self.kind == "flat" else ()
        self._layout = layout_code(self.kind, self.schedule, self.nodes)

    def _best_schedule(self) -> Schedule:
        if self.group is None or len(self.nodes) == 1:
            return "single"
        return "rounds" if "gloo" in dist.get_backend(self.group) else "single"

    def __repr__(self) -> str:
        return f"Exchange(kind={self.kind!r}, schedule={self.schedule!r}, nodes={self.nodes})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        return self  # no state of its own, and process groups cannot be copied

    # ---- dispatch and combine -----------------------------------------------------------------

    def dispatch(
        self,
        x_TD: torch.Tensor,
        expert_index_TK: torch.Tensor,
        weight_TK: torch.Tensor | None = None,
        *,
        num_experts: int,
    ) -> tuple[torch.Tensor, Handle]:
        """Send each token to its experts.

        Parameters
        ----------
        x_TD
            ``[T, D]``, this rank's tokens; T may differ between ranks and be 0.
        expert_index_TK
            ``[T, K]`` integers, 0 to N - 1; -1 drops the choice.
        weight_TK
            ``[T, K]``, factor of each expert's output in combine; None for 1. A NaN makes its own
            token's output NaN and no other's; weights of dropped choices are not looked at.
        num_experts
            Experts N of the whole group, a multiple of its ranks.

        Returns
        -------
        row_RD, handle
            Rows for this rank's experts, sorted by expert, then by source rank, then by token;
            ``handle.counts_E`` rows for each. The handle belongs to :meth:`combine`.

        Raises
        ------
        InputError
            On every rank, before rows move: a shape, dtype or index that is not allowed on one of
            them, or dtype, hidden size, K, N, need for gradients or schedule that differ.
        """
        problem = input_problem(x_TD, expert_index_TK, weight_TK, num_experts, self.num_ranks)
        header = Header(
            dtype=x_TD.dtype,
            hidden_size=x_TD.shape[-1] if x_TD.ndim else 0,
            top_k=expert_index_TK.shape[-1] if expert_index_TK.ndim else 0,
            num_experts=num_experts,
            requires_grad=torch.is_grad_enabled() and x_TD.requires_grad,
            weighted=weight_TK is not None,
            layout=self._layout,
            problem=problem,
        )
        if problem is not None:
            self._refuse(header, x_TD.device)
        key, refused = sort_keys(expert_index_TK, num_experts)
        try:
            sent_N, received_PE = self._counts(header, count_keys(key, num_experts), refused)
        except RefusedValues:
            raise InputError(
                f"expert_index_TK holds {int(expert_index_TK.min())} to "
                f"{int(expert_index_TK.max())}; allowed: 0 to {num_experts - 1}, or -1 for a "
                f"dropped choice"
            ) from None
        note_counts(sent_N)
        send_N: Sequence[int] = sent_N
        if self.kind == "none":
            key = deal_locally(key, num_experts, num_experts // self.num_ranks)
            send_N = received_PE[0]
        handle = make_handle(
            x_TD, key, weight_TK, header.top_k, sent_N, send_N, received_PE, self._groups
        )
        row_RD: torch.Tensor = _Dispatch.apply(x_TD, handle, self)
        return row_RD, handle

    def combine(self, row_RD: torch.Tensor, handle: Handle) -> torch.Tensor:
        """Return the experts' outputs to their tokens and add them up with their weights.

        Parameters
        ----------
        row_RD
            ``[R, D]``, outputs in the order in which dispatch gave the inputs, in the same dtype.
        handle
            From that dispatch.

        Returns
        -------
        torch.Tensor
            ``[T, D]``; 0 for tokens of which every choice was dropped.

        Raises
        ------
        InputError
            The rows' shape or dtype is not that of the dispatched rows.
        """
        expected = (sum(handle.receive_splits), handle.hidden_size)
        if tuple(row_RD.shape) != expected or row_RD.dtype != handle.dtype:
            raise InputError(
                f"row_RD is {row_RD.dtype} of shape {tuple(row_RD.shape)}; allowed: {handle.dtype} "
                f"of shape {expected}, as dispatched. Experts must keep shape and dtype"
            )
        combined_TD: torch.Tensor = _Combine.apply(row_RD, handle.weight_n, handle, self)
        return combined_TD

    # ---- counts -------------------------------------------------------------------------------

    def _refuse(self, header: Header, device: torch.device) -> None:
        """Raise the header's problem, after telling the other ranks of the group."""
        if self.group is not None and self.kind == "flat":
            nothing_N = torch.zeros(self.num_ranks, dtype=torch.int64, device=device)
            exchange_counts(header, nothing_N, nothing_N[0], self.group)
        raise InputError(header.problem)

    def _counts(
        self, header: Header, count_N: torch.Tensor, refused: torch.Tensor
    ) -> tuple[list[int], list[list[int]]]:
        """Rows sent to each expert, and received by source rank and local expert."""
        if self.group is not None and self.kind == "flat":
            with timed("counts", count_N.device, 0, 0):
                return exchange_counts(header, count_N, refused, self.group)
        *sent_N, bad = torch.cat([count_N, refused.to(torch.int64).view(1)]).tolist()
        if bad:
            raise RefusedValues("the exchange refused values of this rank")
        num_local = header.num_experts // self.num_ranks
        if self.kind == "flat":
            return sent_N, [sent_N]
        share, extra = divmod(sum(sent_N), num_local)
        return sent_N, [[share + (expert < extra) for expert in range(num_local)]]

    # ---- moving rows --------------------------------------------------------------------------

    def _send(self, row_nD: torch.Tensor, handle: Handle, phase: Phase) -> torch.Tensor:
        """From the order of sending to the order of this rank's experts."""
        row_RD = self._move(row_nD, handle.send_splits, handle.receive_splits, phase)
        return row_RD if handle.arrangement_R is None else row_RD[handle.arrangement_R]

    def _return(self, row_RD: torch.Tensor, handle: Handle, phase: Phase) -> torch.Tensor:
        """From the order of this rank's experts back to the order of sending."""
        if handle.arrangement_R is not None:
            row_RD = torch.empty_like(row_RD).index_copy_(0, handle.arrangement_R, row_RD)
        return self._move(row_RD, handle.receive_splits, handle.send_splits, phase)

    def _move(
        self,
        row_nD: torch.Tensor,
        send_splits: Sequence[int],
        receive_splits: Sequence[int],
        phase: Phase,
    ) -> torch.Tensor:
        if self.group is None or self.kind == "none":
            return row_nD
        row_bytes = row_nD.shape[1] * row_nD.element_size()
        away = [rows * row_bytes for rank, rows in enumerate(send_splits) if rank != self.rank]
        far = [rows * row_bytes for rank, rows in enumerate(send_splits) if rank not in self._near]
        with timed(phase, row_nD.device, sum(away), sum(far)):
            if self.schedule == "single":
                return move_single(row_nD, send_splits, receive_splits, self.group)
            return move_rounds(row_nD, send_splits, receive_splits, self.group, self._rounds)


class _Dispatch(torch.autograd.Function):
    """Rows out; the backward pass returns their gradients and adds them up, as combine does."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, handle: Handle, exchange: Exchange) -> torch.Tensor:
        ctx.handle, ctx.exchange = handle, exchange
        return exchange._send(x_TD.index_select(0, handle.token_n), handle, "dispatch")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad_nD = ctx.exchange._return(grad_RD.contiguous(), ctx.handle, "dispatch_backward")
        return add_up(grad_nD, ctx.handle.sum_plan), None, None


class _Combine(torch.autograd.Function):
    """Rows back and added up; the backward pass sends the sum's gradient out, as dispatch does.

    The weights are applied where the tokens are: the product is rounded to the rows' dtype, so it
    has the same bits as if the expert's rank had made it, and weights need not travel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        row_RD: torch.Tensor,
        weight_n: torch.Tensor | None,
        handle: Handle,
        exchange: Exchange,
    ) -> torch.Tensor:
        ctx.handle, ctx.exchange, ctx.weighted = handle, exchange, weight_n is not None
        row_nD = exchange._return(row_RD.contiguous(), handle, "combine")
        if weight_n is None:
            return add_up(row_nD, handle.sum_plan)
        ctx.save_for_backward(row_nD, weight_n)
        return add_up(weigh(row_nD, weight_n), handle.sum_plan)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        grad_nD = grad_TD.index_select(0, ctx.handle.token_n)
        grad_weight_n = None
        if ctx.weighted:
            row_nD, weight_n = ctx.saved_tensors
            wide = accumulation_dtype(row_nD.dtype)
            grad_weight_n = (grad_nD.to(wide) * row_nD.to(wide)).sum(1).to(weight_n.dtype)
            grad_nD = weigh(grad_nD, weight_n)
        return (
            ctx.exchange._send(grad_nD, ctx.handle, "combine_backward"),
            grad_weight_n,
            None,
            None,
        )
