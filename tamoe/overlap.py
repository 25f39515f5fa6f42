"""Experts at work on some of a layer's tokens while others are on the links.

The tokens go in pieces. A thread of its own moves them, one exchange after another and in the same
order on all ranks: dispatch of piece 0 and of piece 1, combine of 0, dispatch of 2, combine of 1
and so on; meanwhile the caller's thread runs the experts. The backward pass goes the same way, from
the last piece to the first. Autograd alone would take the pieces in an order that may differ
between ranks, so each step of a piece has a graph of its own, and one function holds them all.

On a GPU the rows have a stream of their own; each stream waits for what the other hands over. What
is handed over is kept until the caller's stream has waited for all of it, so memory is not used
again too early.

Shape suffixes: T tokens, t tokens of a piece, K choices, D hidden size, R rows received.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tamoe.first_order import first_order
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.exchange import Exchange
    from tamoe.handle import Handle

Experts = Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]
Maybe = torch.Tensor | None
Result = TypeVar("Result")
Waited = TypeVar("Waited")


def run_overlapped(
    exchange: Exchange,
    experts: Experts,
    parameters: Sequence[torch.nn.Parameter],
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
        Function of rows and how many each expert of this rank has, run in this thread.
    parameters
        What the experts train.
    x_TD, expert_index_TK, weight_TK, num_experts
        As for :meth:`Exchange.dispatch`.
    num_pieces
        Pieces, >= 1, of as equal numbers of tokens as can be.

    Returns
    -------
    torch.Tensor
        ``[T, D]``, as without pieces but for how the experts' matrix products round.

    Raises
    ------
    InputError
        Parameters are sharded: their gradients would pass by what shards them.

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
    pieces = _cut(x_TD, expert_index_TK, weight_TK, num_pieces)
    run = _Run(exchange, experts, parameters, num_experts, pieces)
    if not run.graphs:
        return run.forward()
    anchor_0D = x_TD.new_empty(0, x_TD.shape[1]).requires_grad_()
    out_TD: torch.Tensor = _Overlapped.apply(run, x_TD, weight_TK, anchor_0D, *parameters)
    return out_TD


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

    def dispatch(self, exchange: Exchange, num_experts: int) -> None:
        given = self.x_tD, self.index_tK, self.weight_tK
        self.row_RD, self.handle = exchange.dispatch(*given, num_experts=num_experts)

    def work(self, experts: Experts) -> None:
        self.given_RD = _start(self.row_RD)
        self.made_RD = experts(self.given_RD, self.handle.counts_E)

    def combine(self, exchange: Exchange) -> None:
        self.back_RD = _start(self.made_RD)
        self.out_tD = exchange.combine(self.back_RD, self.handle)

    def combine_backward(self) -> None:
        # The anchor is asked for so that rows move also where experts lose their graph.
        wanted = self.back_RD, self.handle.weight, self.handle.anchor_0D
        self.grad_made_RD, self.grad_weight, _ = _gradients(
            [self.out_tD], [self.grad_out_tD], wanted
        )

    def work_backward(self, parameters: Sequence[torch.Tensor]) -> list[Maybe]:
        wanted = self.given_RD, *parameters
        grads = _gradients([self.made_RD], [self.grad_made_RD], wanted)
        self.grad_row_RD = grads[0]
        return grads[1:]

    def dispatch_backward(self) -> list[Maybe]:
        sent, grads = [self.row_RD, self.handle.weight], [self.grad_row_RD, self.grad_weight]
        return _gradients(sent, grads, (self.x_tD, self.weight_tK))


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
    outputs: Iterable[Maybe], grads: Iterable[Maybe], inputs: Sequence[Maybe]
) -> list[Maybe]:
    """Gradients of the inputs that need some; a gradient of an output that is None counts as 0."""
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
        torch.autograd.backward(ends, ends_grads, retain_graph=True)
        return found
    given = torch.autograd.grad(
        ends, list(needed.values()), ends_grads, retain_graph=True, allow_unused=True
    )
    for number, grad in zip(needed, given, strict=True):
        found[number] = grad
    return found


class _Lane:
    """Where rows move, one exchange after another in the order in which they are asked for."""

    def __init__(self, device: torch.device, graphs: bool, *, inline: bool) -> None:
        self._device, self._graphs = device, graphs
        self._inference = torch.is_inference_mode_enabled()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = None if inline else ThreadPoolExecutor(1, "tamoe-overlap")
        self._failure: BaseException | None = None

    def __enter__(self) -> _Lane:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def start(self, function: Callable[[_Piece], Result], piece: _Piece) -> Callable[[], Result]:
        """Ask for something; the caller's stream waits for it where the caller waits."""
        ready = None
        if self._stream is not None:
            ready = torch.cuda.current_stream(self._device).record_event()
        if self._thread is None:
            ended = self._run(ready, function, piece)
            return lambda: self._waited(*ended)
        future = self._thread.submit(self._run, ready, function, piece)
        return lambda: self._waited(*future.result())

    def _run(
        self, ready: torch.cuda.Event | None, function: Callable[[_Piece], Result], piece: _Piece
    ) -> tuple[Result, torch.cuda.Event | None]:
        # What comes after a failure never begins: other ranks may not, and this one would wait.
        if self._failure is not None:
            raise self._failure
        try:
            with ExitStack() as modes:  # which a new thread does not have
                modes.enter_context(torch.inference_mode(self._inference))
                modes.enter_context(torch.set_grad_enabled(self._graphs))
                if self._stream is None or ready is None:
                    return function(piece), None
                modes.enter_context(torch.cuda.stream(self._stream))
                self._stream.wait_event(ready)
                return function(piece), self._stream.record_event()
        except BaseException as error:
            self._failure = error
            raise

    def _waited(self, result: Result, done: torch.cuda.Event | None) -> Result:
        if done is not None:
            torch.cuda.current_stream(self._device).wait_event(done)
        return result


def _in_turns(
    lane: _Lane,
    pieces: Sequence[_Piece],
    out: Callable[[_Piece], None],
    work: Callable[[_Piece], Waited],
    back: Callable[[_Piece], Result],
) -> tuple[list[Waited], list[Result]]:
    """Rows out for each piece, work on them in this thread, rows back; all of each one's results.

    Rows of the next piece are asked for before those of this one are worked on.
    """
    coming, going, worked = [lane.start(out, pieces[0])], [], []
    for number, piece in enumerate(pieces):
        if number + 1 < len(pieces):
            coming.append(lane.start(out, pieces[number + 1]))
        coming[number]()
        worked.append(work(piece))
        going.append(lane.start(back, piece))
    return worked, [wait() for wait in going]


@dataclass(eq=False)
class _Run:
    """One forward pass of a layer, and what its backward pass needs."""

    exchange: Exchange
    experts: Experts
    parameters: Sequence[torch.Tensor]
    num_experts: int
    pieces: list[_Piece]
    graphs: bool = field(default_factory=torch.is_grad_enabled)

    @property
    def differentiable(self) -> bool:
        """Whether the result needs gradients on some rank, hence on all."""
        return any(piece.out_tD.requires_grad for piece in self.pieces)

    def forward(self) -> torch.Tensor:
        """``[T, D]``; makes graphs, but none of its own."""
        device = self.pieces[0].x_tD.device
        with _Lane(device, self.graphs, inline=False) as lane, torch.set_grad_enabled(self.graphs):
            _in_turns(
                lane,
                self.pieces,
                lambda piece: piece.dispatch(self.exchange, self.num_experts),
                lambda piece: piece.work(self.experts),
                lambda piece: piece.combine(self.exchange),
            )
        return torch.cat([piece.out_tD.detach() for piece in self.pieces])

    def backward(self, grad_TD: torch.Tensor) -> tuple[Maybe, Maybe, list[Maybe]]:
        """Gradients of tokens, of weights and of the parameters."""
        sizes = [len(piece.x_tD) for piece in self.pieces]
        for piece, grad_tD in zip(self.pieces, grad_TD.split(sizes), strict=True):
            piece.grad_out_tD = grad_tD
        # On a GPU autograd's own thread is here, and another one would wait for it. Nothing waits
        # for the device in a backward pass, so that rows and experts overlap all the same.
        device = grad_TD.device
        with _Lane(device, False, inline=device.type == "cuda") as lane:
            worked, given = _in_turns(
                lane,
                self.pieces[::-1],
                _Piece.combine_backward,
                lambda piece: piece.work_backward(self.parameters),
                _Piece.dispatch_backward,
            )
        of_x_TD, of_weight_TK = (_joined(grads) for grads in zip(*given[::-1], strict=True))
        return of_x_TD, of_weight_TK, [_added(grads) for grads in zip(*worked, strict=True)]


def _joined(grads: Sequence[Maybe]) -> Maybe:
    found = [grad for grad in grads if grad is not None]
    return torch.cat(found) if found else None


def _added(grads: Iterable[Maybe]) -> Maybe:
    total: Maybe = None
    for grad in grads:
        if grad is not None:
            total = grad if total is None else total + grad
    return total


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
        if not run.differentiable:
            ctx.mark_non_differentiable(out_TD)
        return out_TD

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[Maybe, ...]:
        (keeper,) = ctx.saved_tensors
        grad_x_TD, grad_weight_TK, grads = keeper.run.backward(grad_TD)
        return None, grad_x_TD, grad_weight_TK, None, *grads
