"""Waiting for other ranks: within a time, and with an error that says for whom and where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from tamoe.topology.errors import ExchangeError, InputError

MOST_TIMEOUT_S = 10**9  # 31 years; as nanoseconds it fits 64 bits


def checked_timeout(timeout_s: float | None) -> float | None:
    """The timeout, if it is allowed."""
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if timeout_s is not None and not (number and 0 < timeout_s <= MOST_TIMEOUT_S):
        allowed = f"> 0 seconds, at most {MOST_TIMEOUT_S:,}, or None"
        raise InputError(f"timeout_s is {timeout_s!r}; allowed: {allowed}")
    return timeout_s


@dataclass(frozen=True)
class Patience:
    """What is being waited for, in words, and for how long.

    Parameters
    ----------
    what
        The exchange, such as "hierarchical exchange".
    timeout_s
        Seconds for each wait; None: as long as the process group says.
    """

    what: str
    timeout_s: float | None = None

    def wait(
        self,
        works: Iterable[tuple[dist.Work, tuple[int, ...]]],
        where: str,
        *,
        by_host: bool = True,
    ) -> None:
        """Wait for transfers, each with the ranks that take part.

        Where the device waits and not the host, which returns at once, the group's timeout holds:
        with another one the host would wait, too.

        Raises
        ------
        ExchangeError
            One failed or took too long; rows may be lost, so the group cannot go on.
        """
        for work, peers in works:
            with self.trying(peers, where):
                if self.timeout_s is None or not by_host:
                    work.wait()
                else:
                    work.wait(timedelta(seconds=self.timeout_s))

    @contextmanager
    def trying(self, peers: Iterable[int], where: str) -> Iterator[None]:
        """Let what torch.distributed or a socket raises say where it happened and with whom.

        A transfer can fail when it starts, too: with a rank that is known to be dead.
        """
        try:
            yield
        except (RuntimeError, OSError) as error:
            ranks = list(peers)
            raise ExchangeError(
                f"{self.what}, {where}: failed with rank {', '.join(map(str, ranks))} of the "
                f"group: {error}. Rows may be lost; end the job or make a new group",
                ranks[0] if len(ranks) == 1 else None,
            ) from error
