"""Experts at work on some of a layer's tokens while others are on the links.

The tokens go in pieces. A thread of its own moves them, one exchange after another and in the same
order on all ranks: dispatch of piece 0 and of piece 1, combine of 0, dispatch of 2, combine of 1
and so on; meanwhile the caller's thread runs the experts. The backward pass goes the same way, from
the last piece to the first. Autograd alone would take the pieces in an order that may differ
between ranks, so each step of a piece has a graph of its own, and one function holds them all.

Shape suffixes: T tokens, t tokens of a piece, K choices, D hidden size, R rows received.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tamoe.first_order import first_order
from tamoe.handle import require_tensors
from tamoe.lane import Lane, in_turns
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.exchange import Exchange
    from tamoe.handle import Handle

Experts = Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]
Maybe = torch.Tensor | None


def run_overlapped(
    exchange: Exchange,
    experts: Experts,
    parameters: Sequence[torch.Tensor],
    x_TD: torch.Tensor,
    expert_index_TK: torch.Tensor,
    weight_TK: torch.Tensor | None,
    *,
    num_experts: int,
    num_pieces: int,
) -> torch.Tensor:
    """Dispatch, experts and combine of a layer, piece by piece.

    Parameters
    ----------
    exchange
        All its ranks call this with the same ``num_pieces``.
    experts
        Function of rows and how many each expert of this rank has, run in this thread, once for
        each piece. It must not talk to other ranks over the group of the exchange.
    parameters
        All that the experts train.
    x_TD, expert_index_TK, weight_TK, num_experts
        As for :meth:`Exchange.dispatch`.
    num_pieces
        Pieces, >= 1, of as equal numbers of tokens as can be.

    Returns
    -------
    torch.Tensor
        ``[T, D]``; of experts that take each row by itself, as without pieces but for how matrix
        products of other sizes round.

    Raises
    ------
    InputError
        The exchange refuses its input; or gradients would be lost: of parameters that are sharded,
        of a tensor that the experts use and that is none of ``parameters``, or where hooks give
        back copies of what autograd saves. What experts do is refused on their rank alone.

    Examples
    --------
    >>> from tamoe.exchange import Exchange
    >>> x_TD, index_TK = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0], [1], [0]])
    >>> run_overlapped(
    ...     Exchange(), lambda row_RD, _: 2 * row_RD, (), x_TD, index_TK, None,
    ...     num_experts=2, num_pieces=2,
    ... ).tolist()
    [[2.0], [4.0], [6.0]]
    """
    sharding = sys.modules.get("torch.distributed.tensor")  # 0.7 s to load; who shards has it
    if sharding is not None and any(isinstance(one, sharding.DTensor) for one in parameters):
        raise InputError(
            f"overlap is {num_pieces} and parameters of the experts are sharded (DTensor); "
            f"allowed: 1, or experts that are whole on their rank"
        )
    given = x_TD, expert_index_TK, weight_TK
    if not _can_be_cut(given):
        exchange.dispatch(*given, num_experts=num_experts)  # which says why, to all ranks
    run = _Run(exchange, experts, parameters, num_experts, _cut(*given, num_pieces))
    if not run.graphs:
        return run.forward()
    # Of a dtype that may need gradients, whatever that of the tokens, which the exchange checks.
    anchor_0D = torch.empty(0, x_TD.shape[1], device=x_TD.device, requires_grad=True)
    out_TD: torch.Tensor = _Overlapped.apply(run, x_TD, weight_TK, anchor_0D, *parameters)
    return out_TD


# ---- a piece ------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Piece:
    """Some tokens, and what becomes of them step by step; a graph ends where the next begins."""

    x_tD: torch.Tensor
    index_tK: torch.Tensor
    weight_tK: Maybe
    row_RD: torch.Tensor = field(init=False)  # dispatched
    handle: Handle = field(init=False)
    given_RD: torch.Tensor = field(init=False)  # to the experts
    made_RD: torch.Tensor = field(init=False)  # by them
    back_RD: torch.Tensor = field(init=False)  # what combine takes
    out_tD: torch.Tensor = field(init=False)
    grad_out_tD: Maybe = None
    grad_made_RD: Maybe = None
    grad_row_RD: Maybe = None
    grad_weight: Maybe = None  # of the handle's

    def dispatch(self, exchange: Exchange, num_experts: int, num_pieces: int) -> None:
        given = self.x_tD, self.index_tK, self.weight_tK
        self.row_RD, self.handle = exchange.dispatch(
            *given, num_experts=num_experts, num_pieces=num_pieces
        )

    def work(self, experts: Experts) -> None:
        self.given_RD = _start(self.row_RD)
        self.made_RD = experts(self.given_RD, self.handle.counts_E)
        require_tensors(row_RD=self.made_RD)

    def combine(self, exchange: Exchange) -> None:
        self.back_RD = _start(self.made_RD)
        self.out_tD = exchange.combine(self.back_RD, self.handle)

    def combine_backward(self) -> None:
        # The anchor is asked for so that rows move also where experts lose their graph.
        wanted = self.back_RD, self.handle.weight, self.handle.anchor_0D
        grads = _gradients([self.out_tD], [self.grad_out_tD], wanted)
        self.grad_made_RD, self.grad_weight, _ = grads

    def work_backward(self, parameters: Sequence[torch.Tensor], keep: bool) -> list[Maybe]:
        with _without_hooks(parameters):
            wanted = self.given_RD, *parameters
            grads = _gradients([self.made_RD], [self.grad_made_RD], wanted, keep)
        self.grad_row_RD = grads[0]
        return grads[1:]

    def dispatch_backward(self) -> tuple[Maybe, Maybe]:
        sent, grads = [self.row_RD, self.handle.weight], [self.grad_row_RD, self.grad_weight]
        of_x_tD, of_weight_tK = _gradients(sent, grads, (self.x_tD, self.weight_tK))
        return of_x_tD, of_weight_tK

    def forget_gradients(self) -> None:
        self.grad_out_tD = self.grad_made_RD = self.grad_row_RD = self.grad_weight = None


def _can_be_cut(given: Sequence[Any]) -> bool:
    tensors = [one for one in given if one is not None]
    if not all(isinstance(one, torch.Tensor) and one.ndim == 2 for one in tensors):
        return False
    return len({len(one) for one in tensors}) == 1


def _cut(
    x_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: Maybe, num_pieces: int
) -> list[_Piece]:
    x, index = (
        [_start(part) for part in values.tensor_split(num_pieces)] for values in (x_TD, index_TK)
    )
    weight: list[Maybe] = [None] * num_pieces
    if weight_TK is not None:
        weight = [_start(part) for part in weight_TK.tensor_split(num_pieces)]
    return [_Piece(*given) for given in zip(x, index, weight, strict=True)]


def _start(given: torch.Tensor) -> torch.Tensor:
    """The same values, as the start of a graph."""
    return given.detach().requires_grad_(given.requires_grad)


def _gradients(
    outputs: Iterable[Maybe], grads: Iterable[Maybe], inputs: Sequence[Maybe], keep: bool = True
) -> list[Maybe]:
    """Gradients of the inputs that need some; a gradient of an output that is None counts as 0.

    The graph is kept for another backward pass, or is not.
    """
    pairs = [
        (output, torch.zeros_like(output) if grad is None else grad)
        for output, grad in zip(outputs, grads, strict=True)
        if output is not None and output.requires_grad
    ]
    found: list[Maybe] = [None] * len(inputs)
    if not pairs:
        return found
    needed = {i: t for i, t in enumerate(inputs) if t is not None and t.requires_grad}
    ends, ends_grads = zip(*pairs, strict=True)
    if not needed:  # on this rank; rows move all the same
        torch.autograd.backward(ends, ends_grads, retain_graph=keep)
        return found
    given = torch.autograd.grad(
        ends, list(needed.values()), ends_grads, retain_graph=keep, allow_unused=True
    )
    for number, grad in zip(needed, given, strict=True):
        found[number] = grad
    return found


@contextmanager
def _without_hooks(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Keep hooks of parameters for their whole gradients, not for those of each piece."""
    hooked = [(one, one._backward_hooks) for one in parameters if one._backward_hooks]
    try:
        for parameter, _ in hooked:
            parameter._backward_hooks = None
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks


def _require_known(made_RD: torch.Tensor, known: Iterable[torch.Tensor]) -> set[Any]:
    """Refuse a graph that begins anywhere else, as gradients from there would be lost.

    Returns its nodes, but for those where it begins.
    """
    numbers = {id(tensor) for tensor in known}
    waiting, seen = [made_RD.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf: Any = getattr(node, "variable", None)
        if type(node).__name__ == "AccumulateGrad" and id(leaf) not in numbers:
            raise InputError(
                f"experts use a tensor of shape {tuple(leaf.shape)} that needs a gradient and is "
                f"none of their parameters; allowed where overlap is over 1: parameters of the "
                f"experts alone, which `experts.parameters()` lists"
            )
        waiting += [before for before, _ in node.next_functions]
    return {node for node in seen if node.next_functions}


# ---- all pieces ---------------------------------------------------------------------------------


@dataclass(eq=False)
class _Run:
    """One forward pass of a layer, and what its backward pass needs."""

    exchange: Exchange
    experts: Experts
    parameters: Sequence[torch.Tensor]
    num_experts: int
    pieces: list[_Piece]
    graphs: bool = field(default_factory=torch.is_grad_enabled)
    shared: bool = False  # some of the experts' graph, as a weight that is made once for all calls

    def forward(self) -> torch.Tensor:
        """``[T, D]``; makes the pieces' graphs, and none itself."""
        device, nodes = self.pieces[0].x_tD.device, set[Any]()

        def work(piece: _Piece) -> None:
            piece.work(self.experts)
            if self.graphs:
                found = _require_known(piece.made_RD, (piece.given_RD, *self.parameters))
                self.shared = self.shared or not nodes.isdisjoint(found)
                nodes.update(found)

        with Lane(device, self.graphs, inline=False) as lane, torch.set_grad_enabled(self.graphs):
            in_turns(
                lane,
                self.pieces,
                lambda piece: piece.dispatch(self.exchange, self.num_experts, len(self.pieces)),
                work,
                lambda piece: piece.combine(self.exchange),
            )
        return torch.cat([piece.out_tD.detach() for piece in self.pieces])

    def backward(self, grad_TD: torch.Tensor, keep: bool) -> tuple[Maybe, Maybe, list[Maybe]]:
        """Gradients of tokens, of weights and of the parameters.

        The experts' graphs are not kept without need: compiled ones refuse that.
        """
        sizes = [len(piece.x_tD) for piece in self.pieces]
        for piece, grad_tD in zip(self.pieces, grad_TD.split(sizes), strict=True):
            piece.grad_out_tD = grad_tD
        total: list[Maybe] = [None] * len(self.parameters)

        def work(piece: _Piece) -> None:
            for number, grad in enumerate(
                piece.work_backward(self.parameters, keep or self.shared)
            ):
                if grad is not None:
                    before = total[number]
                    total[number] = grad if before is None else before + grad

        # On a GPU autograd's own thread is here, and another one would wait for it. By NCCL nothing
        # waits for the device in a backward pass, so that rows and experts overlap all the same.
        device = grad_TD.device
        with Lane(device, False, inline=device.type == "cuda") as lane:
            back = in_turns(
                lane,
                self.pieces[::-1],
                _Piece.combine_backward,
                work,
                _Piece.dispatch_backward,
            )
        for piece in self.pieces:
            piece.forget_gradients()
        of_x_TD, of_weight_TK = (_joined(grads) for grads in zip(*back[::-1], strict=True))
        return of_x_TD, of_weight_TK, total


def _joined(grads: Sequence[Maybe]) -> Maybe:
    found = [grad for grad in grads if grad is not None]
    assert len(found) in (0, len(grads))
    return torch.cat(found) if found else None


def _keeps_graph() -> bool:
    """Whether the backward pass that is under way has ``retain_graph``."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


class _Overlapped(torch.autograd.Function):
    """A run as one step of the caller's graph."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *given: Maybe) -> torch.Tensor:
        """``given`` are tokens, weights, an anchor and the parameters."""
        out_TD = run.forward()
        # Kept as saved tensors are: freed after a backward pass that does not retain the graph, and
        # left to a checkpoint, which runs this anew and finds another run.
        keeper = out_TD.new_empty(0)
        keeper.run = run  # type: ignore[attr-defined]
        ctx.save_for_backward(keeper)
        # So on all ranks or on none.
        if not any(piece.out_tD.requires_grad for piece in run.pieces):
            ctx.mark_non_differentiable(out_TD)
        return out_TD

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[Maybe, ...]:
        (keeper,) = ctx.saved_tensors
        run: _Run | None = getattr(keeper, "run", None)
        if run is None:
            raise InputError(
                "saved_tensors_hooks give back copies of what autograd saves, as offloading does; "
                "allowed where overlap is over 1: none around the layer, or a checkpoint"
            )
        of_x_TD, of_weight_TK, of_parameters = run.backward(grad_TD, _keeps_graph())
        return None, of_x_TD, of_weight_TK, None, *of_parameters
