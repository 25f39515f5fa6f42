"""One line of progress on stderr with the time left; off a terminal, a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

Progress = Callable[[str, int, int, float | None], None]
_SECONDS_BETWEEN_LINES = 10.0  # in a log file


def progress_line(task: str) -> Progress:
    """A function (phase, done, total, seconds left or None) that shows how far a task is.

    Call it with ``done == total`` at the end of each phase; the line is then finished. The time
    left is shown from the first unit on that is done: before it, there is nothing to go by.
    """
    last_shown_s = -_SECONDS_BETWEEN_LINES

    def show(phase: str, done: int, total: int, seconds_left: float | None) -> None:
        nonlocal last_shown_s
        timed = seconds_left is not None and 0 < done < total
        left = f", {seconds_left:.0f} s left" if timed else ""
        line = f"{task}: {phase} {done}/{total}{left}"
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="\n" if done >= total else "", file=sys.stderr, flush=True)
        elif done >= total or time.monotonic() - last_shown_s >= _SECONDS_BETWEEN_LINES:
            last_shown_s = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    return show


class Count:
    """Counts units of one phase as they are done, and shows how far it is with the time left.

    Parameters
    ----------
    show
        What shows it, as of :func:`progress_line`; None: nothing does.
    phase, total
        What is counted, and at most how many units.

    Examples
    --------
    >>> shown = []
    >>> count = Count(lambda *line: shown.append(line[:3]), "pages", 9)
    >>> count(), count.end()  # a page was enough
    (None, None)
    >>> shown
    [('pages', 1, 9), ('pages', 1, 1)]
    """

    def __init__(self, show: Progress | None, phase: str, total: int) -> None:
        self._show, self._phase, self._total = show, phase, total
        self._done, self._began_s = 0, time.monotonic()

    def __call__(self) -> None:
        """One more is done."""
        self._done += 1
        left_s = (time.monotonic() - self._began_s) / self._done * (self._total - self._done)
        if self._show is not None:
            self._show(self._phase, self._done, self._total, left_s)

    def end(self) -> None:
        """Finish the line; fewer may have been done than was thought."""
        if self._show is not None and self._done < self._total:
            self._show(self._phase, self._done, self._done, None)
