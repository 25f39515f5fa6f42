"""A thread that moves rows, while its caller works on others.

On a GPU it has a stream of its own. Each stream waits for what the other hands over; a tensor that
is handed over has to be kept until the caller has waited for all that it asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Lane:
    """Where rows move, one exchange after another in the order in which they are asked for.

    Parameters
    ----------
    device
        Of the rows.
    graphs
        Whether gradients are on there.
    inline
        Run everything in the caller's thread; on a GPU still on the other stream.
    """

    def __init__(self, device: torch.device, graphs: bool, *, inline: bool) -> None:
        self._device, self._graphs = device, graphs
        self._inference = torch.is_inference_mode_enabled()
        self._stream = _stream(device) if device.type == "cuda" else None
        self._thread = None if inline else ThreadPoolExecutor(1, "tamoe-overlap")
        self._failure: BaseException | None = None

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_: object) -> None:
        # What was asked for runs: other ranks, which experts fail on later, may have begun it.
        if self._thread is not None:
            self._thread.shutdown()
        self._failure = None  # its traceback leads here

    def start(self, function: Callable[[Piece], Result], piece: Piece) -> Callable[[], Result]:
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
        self, ready: torch.cuda.Event | None, function: Callable[[Piece], Result], piece: Piece
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


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all layers, as freed memory is used again on the same stream alone."""
    return torch.cuda.Stream(device)


def in_turns(
    lane: Lane,
    pieces: Sequence[Piece],
    out: Callable[[Piece], None],
    work: Callable[[Piece], None],
    back: Callable[[Piece], Result],
) -> list[Result]:
    """Rows out for each piece, work on them in this thread, rows back; results of the latter.

    Rows of the next piece are asked for before those of this one are worked on.
    """
    coming, going = lane.start(out, pieces[0]), []
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        wait = coming
        if following is not None:
            coming = lane.start(out, following)
        wait()
        work(piece)
        going.append(lane.start(back, piece))
    return [wait() for wait in going]
