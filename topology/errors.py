"""Every error that tamoe raises on purpose, in one small tree.

A message names the argument, the value that was given and what is allowed, and ends with what to
do next. ``exit_code`` is what the command line returns for it.
"""

from __future__ import annotations

import operator


class TamoeError(Exception):
    """Base of all errors raised on purpose by tamoe."""

    exit_code = 1


class InputError(TamoeError, ValueError):
    """An argument, flag or file is not what it may be."""

    exit_code = 2


class InfeasibleError(InputError):
    """The dispatch problem has no solution, or only a degenerate one."""


class EmulationError(TamoeError):
    """The kernel or its settings refuse what an emulated cluster needs."""

    exit_code = 2


class RankError(TamoeError):
    """A rank raised, died or did not answer in time.

    ``rank`` is the first rank that failed, or None where no single rank is to blame.
    """

    exit_code = 3

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class RankTimeoutError(RankError, TimeoutError):
    """Ranks did not finish within the time that they were given."""


class ProbeError(RankError):
    """The probe could not measure what it had to."""


class ExchangeError(RankError):
    """Ranks could not finish an exchange; the message names it, the hop and the peers."""


class KernelError(TamoeError):
    """A kernel could not be built, loaded or run."""

    exit_code = 2


class StoppedError(TamoeError):
    """The user stopped the run; the message says where the results so far are."""

    exit_code = 3


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """The value as an int, if it is a whole number within the limits; else :class:`InputError`.

    >>> whole("rank", 3, 0, 7)
    3
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        limits = f" >= {low}" if high is None else f", {low} to {high}"
        raise InputError(f"{name} is {value!r}; allowed: a whole number{limits}") from None
    if number < low or (high is not None and number > high):
        allowed = f"a whole number >= {low}" if high is None else f"{low} to {high}"
        raise InputError(f"{name} is {value!r}; allowed: {allowed}")
    return number
