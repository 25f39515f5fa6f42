"""Run a function in many processes, one a rank, with the process group up.

The processes are forked from a server that a launcher keeps (see
:mod:`tamoe.topology.rank_server` for the tree of processes), so only the first call in a program
waits for torch to be imported.
"""

from __future__ import annotations

import functools
import multiprocessing.spawn
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tamoe.topology.errors import InputError, RankError, RankTimeoutError
from tamoe.topology.launcher import check_launcher, check_memory, running_job
from tamoe.topology.rank_protocol import JOB_ITSELF, Inbox, Kind, Raised, Request, send

if TYPE_CHECKING:
    from tamoe.topology.network import NetworkReport
    from tamoe.topology.spec import ClusterSpec

RANK_BYTES = 50e6  # memory that a rank with torch and a group has to itself, measured
SERVER_BYTES = 250e6  # torch itself, which all ranks share
_BLAME_S = 0.5  # a rank's death is known this long after its peers complain of it
_REPORT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class RanksRun:
    """What a run of ranks gave."""

    results: list[Any]  # by rank
    network: NetworkReport | None  # None on plain processes


def run_ranks(
    cluster_or_world_size: int | str | ClusterSpec,
    fn: Callable[..., Any],
    *args: Any,
    timeout_s: float = 300.0,
) -> list[Any]:
    """Run ``fn(rank, *args)`` in one process per rank and return the results by rank.

    The default process group (gloo) is up when ``fn`` starts, each rank has one torch thread and
    the environment that torchrun would give it, and standard output and error are the caller's.
    Ranks ignore Ctrl-C; the launcher ends them all and raises KeyboardInterrupt, so a function
    that must keep partial results writes them to a file as it goes. A rank holds on to memory that
    it frees, unless a variable such as MALLOC_TRIM_THRESHOLD_ says how malloc is to work.

    Parameters
    ----------
    cluster_or_world_size
        A number of ranks: plain processes on this machine's loopback. A
        :class:`~tamoe.topology.ClusterSpec` or its text: an emulated cluster.
    fn
        A function at the top level of a module, since it travels by name. The module is imported
        anew; a script needs ``if __name__ == "__main__":`` around what starts the ranks.
    args
        Values that pickle.
    timeout_s
        Longest time from the start of all ranks to the last result, in seconds.

    Returns
    -------
    list
        What each rank returned, by rank; values that pickle.

    Raises
    ------
    InputError
        ``fn`` cannot travel by name, there are more ranks than memory allows, or this is not the
        main thread of the program.
    RankError
        A rank raised or died. The message has its traceback, ``rank`` its number, ``__cause__``
        the exception itself where it could be sent.
    RankTimeoutError
        Time ran out; the message names the ranks that had not finished.
    EmulationError
        The kernel refuses the namespaces of an emulated cluster.

    Examples
    --------
    >>> import operator
    >>> run_ranks(2, operator.add, 10)  # rank + 10
    [10, 11]
    """
    return run_ranks_with_report(cluster_or_world_size, fn, *args, timeout_s=timeout_s).results


def run_ranks_with_report(
    cluster_or_world_size: int | str | ClusterSpec,
    fn: Callable[..., Any],
    *args: Any,
    timeout_s: float = 300.0,
) -> RanksRun:
    """:func:`run_ranks`, with what the emulated network saw beside the results."""
    check_launcher()
    request = _request(cluster_or_world_size, fn, args, timeout_s)
    check_memory(request.num_ranks, RANK_BYTES, SERVER_BYTES)
    with running_job(request) as job:
        collector = _Collector(job, request)
        return RanksRun(collector.results(), collector.report())


def _request(
    where: int | str | ClusterSpec, fn: Callable[..., Any], args: tuple[Any, ...], timeout_s: float
) -> Request:
    if not timeout_s > 0:
        raise InputError(f"timeout_s is {timeout_s}; allowed: > 0")
    payload, module, main = _by_reference(fn, args)
    nodes, cluster = _nodes(where)
    return Request(
        nodes=nodes,
        cluster=cluster,
        call=payload,
        command=(),
        module=module,
        module_file=getattr(sys.modules.get(module or ""), "__file__", None),
        main=main,
        import_in_ranks=False,
        environ=dict(os.environ),
        directory=os.getcwd(),
        path=tuple(sys.path),
        argv=tuple(sys.argv),
        timeout_s=timeout_s,
    )


def _nodes(where: int | str | ClusterSpec) -> tuple[tuple[tuple[int, ...], ...], Any]:
    if isinstance(where, int):
        if isinstance(where, bool) or where < 1:
            raise InputError(f"cluster_or_world_size is {where!r}; allowed: >= 1 ranks")
        return (tuple(range(where)),), None
    from tamoe.topology.spec import ClusterSpec

    cluster = ClusterSpec.parse(where) if isinstance(where, str) else where
    if not isinstance(cluster, ClusterSpec):
        raise InputError(
            f"cluster_or_world_size is {where!r}; allowed: a number of ranks, a ClusterSpec or its "
            f"text such as '4x2:200mbit'"
        )
    return cluster.nodes, cluster


def _by_reference(
    fn: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[bytes, str | None, dict[str, str]]:
    """The pickled call, the module to import for it, and how to import ``__main__`` if needed."""
    inner = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not callable(inner):
        raise InputError(f"fn is {fn!r}; allowed: a function at the top level of a module")
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    if "<lambda>" in name or "<locals>" in name:
        raise InputError(
            f"fn is {name!r}, a lambda or a function inside a function; it travels to the ranks by "
            f"name, so allowed: a function at the top level of a module"
        )
    try:
        payload = pickle.dumps((fn, args))
    except Exception as error:
        raise InputError(
            f"fn or its arguments cannot be pickled ({type(error).__name__}: {error}); "
            f"allowed: a function at the top level of a module, and values that pickle"
        ) from None
    module = getattr(inner, "__module__", None)
    main = _main_module() if b"__main__" in payload else {}
    if module == "__main__" and not main:
        raise InputError(
            f"fn {name!r} is defined in an interactive session, on the command line or in a "
            f"notebook; allowed: a function in a file that the ranks can import"
        )
    return payload, module, main


def _main_module() -> dict[str, str]:
    """How to import the script that runs now, as multiprocessing's spawn does it."""
    found = multiprocessing.spawn.get_preparation_data("rank")
    kept = {key: value for key, value in found.items() if key.startswith("init_main_from")}
    path = kept.get("init_main_from_path")
    return {} if path is not None and not os.path.isfile(path) else kept


class _Collector:
    """Receives what the ranks of one job send, until all are done or one has failed."""

    def __init__(self, job: socket.socket, request: Request) -> None:
        self.job = job
        self.inbox = Inbox(job)
        self.timeout_s = request.timeout_s
        self.deadline = time.monotonic() + request.timeout_s
        self.values: dict[int, Any] = {}
        self.raised: dict[int, Raised] = {}
        self.ended: dict[int, int] = {}  # exit codes of ranks that ended without a result
        self.waiting = set(range(request.num_ranks))

    def results(self) -> list[Any]:
        while self.waiting:
            if not self._receive(self.deadline):
                raise RankTimeoutError(
                    f"{_ranks(self.waiting)} had not finished after timeout_s = "
                    f"{self.timeout_s:g} s; all ranks were ended",
                    min(self.waiting),
                )
            if self.raised or self.ended:
                self._receive_causes()
                raise self._failure() from self._cause()
        return [self.values[rank] for rank in sorted(self.values)]

    def report(self) -> NetworkReport | None:
        """End the ranks and wait for what the network saw."""
        self.job.settimeout(_REPORT_TIMEOUT_S)
        send(self.job, JOB_ITSELF, Kind.END)
        for _, kind, payload in self.inbox.messages():
            if kind == Kind.REPORT:
                report: NetworkReport = pickle.loads(payload)
                return report
        return None

    def _receive(self, deadline: float) -> bool:
        """Take one message; False if none came in time."""
        self.job.settimeout(max(deadline - time.monotonic(), 1e-3))
        try:
            message = self.inbox.next()
        except TimeoutError:
            return False
        if message is None:
            raise RankError("the process above the ranks ended before they had finished")
        rank, kind, payload = message
        if kind == Kind.REFUSED:
            raise pickle.loads(payload)
        if kind == Kind.RESULT:
            self.values[rank] = pickle.loads(payload)
        elif kind == Kind.RAISED:
            self.raised[rank] = pickle.loads(payload)
        elif kind == Kind.EXITED and rank in self.waiting:
            self.ended[rank] = int(payload)
        self.waiting.discard(rank)
        return True

    def _receive_causes(self) -> None:
        """Peers of a dead rank may complain before its death is reported: listen a little."""
        deadline = time.monotonic() + _BLAME_S
        while self.waiting and not self.ended and self._receive(deadline):
            pass

    def _failure(self) -> RankError:
        rank = next(iter(self.ended or self.raised))
        others = sorted({*self.raised, *self.ended} - {rank})
        more = f"\n({_ranks(others)} failed after it)" if others else ""
        if rank in self.ended:
            return RankError(f"rank {rank} {_how_it_ended(self.ended[rank])}{more}", rank)
        what = self.raised[rank]
        text = f"rank {rank} raised {what.summary}\n\nIn rank {rank}:\n{what.traceback}{more}"
        return RankError(text, rank)

    def _cause(self) -> BaseException | None:
        if self.ended:
            return None
        pickled = next(iter(self.raised.values())).exception
        return None if pickled is None else pickle.loads(pickled)


def _ranks(ranks: Iterable[int]) -> str:
    numbers = [str(rank) for rank in sorted(ranks)]
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} before its function returned"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "an unnamed signal"
    hint = "; the kernel does that when memory runs out" if code == -signal.SIGKILL else ""
    return f"was killed by signal {-code} ({name}{hint}) before its function returned"
