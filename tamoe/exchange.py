"""Exchange: moves tokens to the ranks of their experts and the experts' outputs back.

Shape suffixes: T tokens, K choices, N experts of the group, E experts of a rank, P ranks, D hidden
size, n rows sent (choices that were not dropped), R rows received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from tamoe.agreement import Header, RefusedValues, exchange_counts, layout_code
from tamoe.groups import (
    backend_of,
    group_rank,
    group_size,
    group_topology,
    process_group,
    token_device,
    tokens_by_gloo,
)
from tamoe.handle import (
    Asked,
    Handle,
    again_problem,
    device_problem,
    input_problem,
    require_handle,
    require_tensors,
    rows_problem,
    sort_keys,
    weighted,
)
from tamoe.placement import Placement, contiguous, experts_problem, resolve_placement
from tamoe.planning import Planner
from tamoe.record import note_counts
from tamoe.schedules import Mover, Schedule
from tamoe.solver.constants import ROUNDS_AHEAD
from tamoe.solver.relays import make_relays, sum_groups
from tamoe.topology.errors import InputError, whole
from tamoe.waiting import Patience, checked_timeout

if TYPE_CHECKING:
    from tamoe.groups import Group
    from tamoe.solver import Plan
    from tamoe.topology.graph import Topology

Kind = Literal["auto", "flat", "hierarchical", "none"]
KINDS: tuple[Kind, ...] = ("auto", "flat", "hierarchical", "none")


class Exchange:
    """Dispatch and combine over an expert-parallel group, with gradients.

    Expert e of N lives on rank e // (N / P), or where ``placement`` says. Both directions are
    deterministic, and the sum over a token's choices has one order for every exchange
    (:mod:`tamoe.summation`): inside a node by rank, then by expert number, then over nodes and
    switches. So results do not depend on kind or schedule; where the experts are decides how they
    round. A row is multiplied by its weight and rounded to the rows' dtype before it is added.

    A dispatch makes the host wait for the device once, for counts; twice where a rank has to be
    told more than 241 of them (flat: E, the most experts that a rank has; hierarchical: E for each
    rank of a node and twice the nodes, for each part). The kernel sorts up to 12,288 experts times
    parts; beyond, PyTorch does, which waits, too. What follows, combine and the backward passes do
    not, given kernels (:mod:`tamoe.ops`), but for combine where gradients are on and neither tokens
    nor weights need any: there ranks ask each other whether experts train. Where gloo moves tokens
    of a GPU, all goes through the host's memory, which waits each time. All ranks must call
    dispatch and combine, and run backward, equally often and in the same order, also ranks without
    tokens.

    Parameters
    ----------
    topology_or_plan
        :class:`~tamoe.topology.Topology` of the group's ranks, or a Plan, which holds one. Gives
        the nodes for the schedule and for the order of summation. A Plan for several ``ep_groups``,
        numbered as the job's ranks, is for each of them. None: one node.
    group
        ProcessGroup, 1-D DeviceMesh, or None for the default group; one rank where
        torch.distributed is not initialised.
    kind
        ``"flat"``: every row goes straight to the rank of its expert. ``"hierarchical"``: a token
        crosses the link of each node and switch once and is copied behind it, and sums cross back;
        needs a topology. ``"auto"``: what the cost model
        says of a Plan (``reason`` says why), flat for anything else. ``"none"`` moves
        nothing: every rank works on its own rows, dealt in turn to its experts, as many as it
        would get on average. For measuring what the exchange costs; its results are not a model.
        Every rank then needs an expert.
    schedule
        ``"single"``: all at once. ``"rounds"``: to one node after another, disjoint pairs; needs a
        topology. ``"auto"``: what the cost model says of a Plan with measured constants, else
        rounds on gloo where there are several nodes, and single elsewhere. The hierarchical
        exchange always goes in rounds.
    chunks
        Parts, >= 1, that the tokens of a hierarchical exchange travel in: while one crosses the
        links between nodes, the one before is worked on inside them. ``"auto"``: as many as suit
        the tokens of the dispatch before, 6 for the first: all at once, many tokens take twice the
        memory. Results do not depend on it.
    placement
        Rank of each expert, 0 to P - 1, the same on all ranks: any order, and ranks may hold
        different numbers of experts or none. None: what the Plan was solved for
        (``Workload(placement=...)``), else equally many on each rank, in rank order.
    timeout_s
        Seconds, > 0, that each wait for others takes at most; None: the group's timeout. On NCCL
        always the group's, whose watchdog ends the process: there the device waits, not the host.

    Raises
    ------
    InputError
        Unknown kind or schedule, a number out of range, a topology or Plan of other ranks than the
        group's, or a placement that is not the Plan's.
    ExchangeError
        In dispatch, combine and backward, on gloo: a rank died or did not answer in time. The
        message names the exchange, the hop and the peers.

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
    >>> Exchange(placement=[0, 0, 0]).placement_of(3).experts_PE
    ((0, 1, 2),)
    """

    def __init__(
        self,
        topology_or_plan: Topology | Plan | None = None,
        *,
        group: Group = None,
        kind: Kind = "auto",
        schedule: Schedule | Literal["auto"] = "auto",
        chunks: int | Literal["auto"] = "auto",
        placement: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if kind not in KINDS:
            raise InputError(f"kind is {kind!r}; allowed: {', '.join(map(repr, KINDS))}")
        if schedule not in ("auto", "single", "rounds"):
            raise InputError(f"schedule is {schedule!r}; allowed: 'auto', 'single', 'rounds'")
        self.chunks = chunks if chunks == "auto" else whole("chunks", chunks, 1)
        given: Any = topology_or_plan
        self.group = process_group(group)
        self.rank, self.num_ranks = group_rank(group), group_size(group)
        topology = group_topology(given, self.group)
        if schedule == "rounds" and topology is None:
            raise InputError("schedule is 'rounds' without topology_or_plan, which gives the nodes")
        if kind == "hierarchical" and topology is None:
            raise InputError("kind is 'hierarchical' without topology_or_plan; it gives the nodes")
        self.placement = resolve_placement(placement, given, self.num_ranks)
        if kind == "none" and self.placement is not None and () in self.placement.experts_PE:
            raise InputError(
                f"kind is 'none' and the placement leaves rank "
                f"{self.placement.experts_PE.index(())} without an expert to work on its rows; "
                f"allowed: an expert on every rank"
            )
        self.nodes = (tuple(range(self.num_ranks)),) if topology is None else topology.nodes
        best, self.reason = kind, "given"
        if kind == "auto":
            from tamoe.solver.choice import choose_for  # loads what other kinds do not need

            ahead = ROUNDS_AHEAD if tokens_by_gloo(self.group) else 0
            choice = choose_for(given, rounds_ahead=ahead)
            best, self.reason = choice.kind, choice.reason
            if schedule == "auto" and choice.schedule is not None:
                schedule = choice.schedule
        self.kind: Kind = best
        if self.group is None and self.kind == "hierarchical":
            self.kind = "flat"  # one rank
        if schedule == "auto":
            schedule = self._best_schedule()
        self.schedule: Schedule = schedule
        if self.kind == "hierarchical":
            self.schedule = "rounds"
        moves = self.group if self.kind != "none" else None
        patience = Patience(f"{self.kind} exchange", checked_timeout(timeout_s))
        self._mover = Mover(moves, self.nodes, self.rank, self.schedule, patience)
        groups = sum_groups(topology) if self.kind != "none" else ()
        relays = make_relays(self.rank, self.nodes, groups)
        self._planner = Planner(self.kind, self._mover, relays, groups, self.chunks)

    def _best_schedule(self) -> Schedule:
        return "rounds" if len(self.nodes) > 1 and tokens_by_gloo(self.group) else "single"

    def __repr__(self) -> str:
        return f"Exchange(kind={self.kind!r}, schedule={self.schedule!r}, nodes={self.nodes})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        return self  # process groups cannot be copied

    def placement_of(self, num_experts: int) -> Placement:
        """Where that many experts are: the given placement, else equally many on each rank.

        Raises
        ------
        InputError
            The placement has another number of experts, or the ranks cannot hold equally many.
        """
        problem = experts_problem(num_experts, self.num_ranks, self.placement)
        if problem is not None:
            raise InputError(problem)
        return self.placement or contiguous(num_experts, self.num_ranks)

    # ---- dispatch and combine -----------------------------------------------------------------

    def dispatch(
        self,
        x_TD: torch.Tensor,
        expert_index_TK: torch.Tensor,
        weight_TK: torch.Tensor | None = None,
        *,
        num_experts: int,
        num_pieces: int = 1,
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
            Experts N of the whole group: a multiple of its ranks, or as many as the placement has.
        num_pieces
            Dispatches, >= 1, that a layer's tokens go in (:mod:`tamoe.overlap`), this one of them.

        Returns
        -------
        row_RD, handle
            Rows for this rank's experts, sorted by expert, then by source rank, then by token;
            ``handle.counts_E`` rows for each, ``()`` on a rank without experts. The handle belongs
            to :meth:`combine`.

        Raises
        ------
        InputError
            On every rank, before rows move: a shape, dtype, device or index that is not allowed on
            one of them, or device, dtype, hidden size, K, N, need for gradients (of tokens or
            weights), kind, schedule, chunks, pieces, nodes, switches or placement that differ. On
            its own rank alone: what is no tensor at all, pieces below 1, and all of kind "none",
            for which ranks of another kind wait until their timeout; so do ranks of tokens on the
            CPU for one of tokens on a GPU where a backend of its own moves those.
        """
        require_tensors(x_TD=x_TD, expert_index_TK=expert_index_TK)
        if weight_TK is not None:
            require_tensors(weight_TK=weight_TK)
        num_parts = self._planner.num_parts(x_TD)
        problem = input_problem(
            x_TD, expert_index_TK, weight_TK, num_experts, self.num_ranks, self.placement
        ) or device_problem(x_TD.device, self._mover.group)
        # A rank that refuses its input never gets to compare experts and where they are.
        rank_of_N = () if problem else self.placement_of(num_experts).rank_of_N
        header = Header(
            device=x_TD.device.type,
            dtype=x_TD.dtype,
            hidden_size=x_TD.shape[-1] if x_TD.ndim else 0,
            top_k=expert_index_TK.shape[-1] if expert_index_TK.ndim else 0,
            num_experts=0 if problem else num_experts,
            requires_grad=torch.is_grad_enabled() * (1 + x_TD.requires_grad),
            weighted=weighted(weight_TK),
            kind=self.kind,
            schedule=self.schedule,
            chunks=num_parts,
            pieces=whole("num_pieces", num_pieces, 1),
            layout=layout_code(self.nodes, self._planner.groups, rank_of_N),
            num_tokens=len(x_TD) if x_TD.ndim else 0,
            problem=problem,
        )
        if problem is not None:
            self._refuse(header, x_TD.device)
        placement = self.placement_of(num_experts)
        key, refused = sort_keys(expert_index_TK, placement)
        asked = Asked(header, placement, key, refused, weight_TK, num_parts)
        try:
            route, sent_slots, received_PE = self._planner.plan(asked)
        except RefusedValues:
            raise InputError(
                f"expert_index_TK holds {int(expert_index_TK.min())} to "
                f"{int(expert_index_TK.max())}; allowed: 0 to {num_experts - 1}, or -1 for a "
                f"dropped choice"
            ) from None
        sent_N = [sent_slots[slot] for slot in placement.slot_N]
        note_counts(sent_N)
        num_local = len(placement.experts_PE[self.rank])
        row_RD, weight, anchor_0D = route.dispatch(x_TD)
        handle = Handle(
            num_tokens=len(x_TD),
            top_k=header.top_k,
            num_experts=num_experts,
            hidden_size=header.hidden_size,
            dtype=x_TD.dtype,
            device=x_TD.device,
            grad_enabled=torch.is_grad_enabled(),
            requires_grad=header.requires_grad == 2,
            sent_counts_N=tuple(sent_N),
            received_counts_PE=tuple(tuple(counts[:num_local]) for counts in received_PE),
            route=route,
            weight=weight,
            anchor_0D=anchor_0D,
        )
        return row_RD, handle

    def dispatch_again(self, x_TD: torch.Tensor, handle: Handle) -> tuple[torch.Tensor, Handle]:
        """Send other tokens the way of an earlier dispatch; nothing is sorted, counted or told.

        For tokens with the same choices and weights: another tensor of the same tokens, say, or a
        second layer that shares a router. All ranks must call it, and none checks the others.

        Parameters
        ----------
        x_TD
            ``[T, D]``, of the shape, dtype, device and need for gradients of the dispatch before,
            with gradients switched on or off as there.
        handle
            From that dispatch of this exchange. Its weights keep their graph: run one backward
            pass for all that use it, or retain the graph.

        Returns
        -------
        row_RD, handle
            As from :meth:`dispatch`; the new handle is for combine.

        Raises
        ------
        InputError
            On this rank alone: one of these differs, or the handle is of another exchange.

        Examples
        --------
        >>> exchange, index_TK = Exchange(), torch.tensor([[1], [0]])
        >>> _, handle = exchange.dispatch(torch.zeros(2, 1), index_TK, num_experts=2)
        >>> exchange.dispatch_again(torch.tensor([[1.0], [2.0]]), handle)[0].tolist()
        [[2.0], [1.0]]
        """
        require_tensors(x_TD=x_TD)
        require_handle(handle)
        if handle.route.mover is not self._mover:
            raise InputError("handle is of another Exchange; allowed: from a dispatch of this one")
        problem = again_problem(x_TD, handle)
        if problem is not None:
            raise InputError(problem)
        note_counts(list(handle.sent_counts_N))
        row_RD, weight, anchor_0D = handle.route.dispatch(x_TD)
        return row_RD, replace(handle, weight=weight, anchor_0D=anchor_0D)

    def combine(self, row_RD: torch.Tensor, handle: Handle) -> torch.Tensor:
        """Return the experts' outputs to their tokens and add them up with their weights.

        Parameters
        ----------
        row_RD
            ``[R, D]``, outputs in the order in which dispatch gave the inputs, in the same dtype.
            Where they need no gradients and the inputs did, those get zeros.
        handle
            From that dispatch.

        Returns
        -------
        torch.Tensor
            ``[T, D]``; 0 for tokens of which every choice was dropped.

        Raises
        ------
        InputError
            On this rank alone: the rows' shape, dtype or device is not that of the dispatched rows.
        """
        require_tensors(row_RD=row_RD)
        require_handle(handle)
        problem = rows_problem(row_RD, handle)
        if problem is not None:
            raise InputError(problem)
        return handle.route.combine(row_RD, handle.weight, handle.anchor_beside(row_RD))

    # ---- what ranks agree on ------------------------------------------------------------------

    def _refuse(self, header: Header, device: torch.device) -> None:
        """Raise the header's problem, after telling the other ranks of the group."""
        group = self._mover.group
        if group is not None:
            if device.type not in ("cpu", "cuda") or backend_of(group, device) is None:
                device = token_device(group)
            nothing_PW = torch.zeros(self.num_ranks, 2, dtype=torch.int64, device=device)
            exchange_counts(header, nothing_PW, nothing_PW[0], self._mover)
        raise InputError(header.problem)
