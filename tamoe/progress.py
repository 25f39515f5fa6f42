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
