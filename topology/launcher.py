"""The launcher's side of the rank server: start it once, hand it jobs, never leave anything."""

from __future__ import annotations

import atexit
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from tamoe.topology import linux
from tamoe.topology.errors import EmulationError, InputError, RankError, RankTimeoutError
from tamoe.topology.rank_protocol import (
    IDLE,
    JOB_ITSELF,
    SPOILED,
    STALE,
    Inbox,
    Kind,
    Request,
    send,
)

_START_TIMEOUT_S = 300.0  # to import torch and the function's module on a busy machine
_STOP_TIMEOUT_S = 5.0
# Ranks are many on few cores, as under torchrun; and threads of a math library in the server
# would make it unfit to be forked.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# Asking for GPUs through NVML leaves CUDA untouched, so that ranks can still be forked.
_SERVER_ENVIRONMENT = {**_ONE_THREAD, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


@dataclass(frozen=True)
class _Server:
    process: subprocess.Popen[bytes]
    control: socket.socket
    owner_pid: int

    def usable(self) -> bool:
        return self.owner_pid == os.getpid() and self.process.poll() is None

    def stop(self) -> None:
        """End the server and, through it, everything below it."""
        if self.owner_pid != os.getpid():
            return
        self.control.close()
        self.process.kill()
        self.process.wait()


_server: _Server | None = None
_start_threads_on_import: set[str] = set()  # modules that must be imported in each rank


def check_launcher() -> None:
    """Refuse to start processes from where they could outlive the program or recurse.

    Raises
    ------
    InputError
        This is not Linux, not the main thread, a rank, or a module that is being imported for one.
    """
    if not sys.platform.startswith("linux"):
        raise EmulationError(
            f"ranks are started through Linux process features; this is {sys.platform}. On another "
            f"system use torchrun, or the simulated run"
        )
    if threading.current_thread() is not threading.main_thread():
        # The kernel ends our children when the *thread* that started them ends.
        raise InputError(
            f"ranks were started from thread {threading.current_thread().name!r}; "
            f"allowed: the main thread only"
        )
    server = sys.modules.get("tamoe.topology.rank_server")
    process = sys.modules.get("tamoe.topology.rank_process")
    if process is not None and process.inside_rank() is not None:
        rank = process.inside_rank()
        raise InputError(f"run_ranks was called inside rank {rank}; allowed: in the launcher only")
    if server is not None and server.loading() is not None:
        raise InputError(
            f"module {server.loading()!r} starts ranks when it is imported; put what starts them "
            f"under 'if __name__ == \"__main__\":'"
        )


def check_memory(num_ranks: int, rank_bytes: float, shared_bytes: float) -> None:
    """Refuse more ranks than the free memory holds.

    Raises
    ------
    InputError
        With the number of ranks, what they need and what there is.
    """
    available = linux.available_memory_bytes()
    if available is None:
        return
    needed = num_ranks * rank_bytes + shared_bytes
    if needed > available:
        most = max(int((available - shared_bytes) / rank_bytes), 0)
        raise InputError(
            f"{num_ranks} ranks need about {needed / 1e9:.1f} GB ({rank_bytes / 1e6:.0f} MB each), "
            f"and {available / 1e9:.1f} GB are free; allowed here: at most {most} ranks"
        )


@contextmanager
def running_job(request: Request) -> Iterator[socket.socket]:
    """A job whose ranks are being started, as the launcher's end of its socket.

    When the block ends, however it ends, nothing of the job is left.

    Raises
    ------
    TamoeError
        The job was refused: its namespaces or the module of its function.
    """
    job = _handed_over(request)
    while (answer := _first_answer(job)) is not None:
        if answer == SPOILED:
            # Its module starts threads on import, so every rank imports it for itself from now on.
            _start_threads_on_import.add(request.module or "")
        elif answer != STALE:
            raise RankError("the server that forks the ranks ended before it started one")
        job = _handed_over(request)
    try:
        yield job
    finally:
        _end(job)


def stop_server() -> None:
    """End the server, if there is one, and everything that it started."""
    global _server
    if _server is not None:
        _server.stop()
        _server = None


def _handed_over(request: Request) -> socket.socket:
    request = replace(request, import_in_ranks=request.module in _start_threads_on_import)
    server = _running_server()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with theirs, _standard_streams() as streams:
            socket.send_fds(server.control, [b"job"], [theirs.fileno(), *streams])
        send(ours, JOB_ITSELF, Kind.REQUEST, pickle.dumps(request))
    except BaseException:
        ours.close()
        stop_server()
        raise
    return ours


def _first_answer(job: socket.socket) -> bytes | None:
    """None once a job's ranks are being started, or what the server answered instead."""
    try:
        job.settimeout(_START_TIMEOUT_S)
        message = Inbox(job).next()
        if message is not None and message[1] == Kind.REFUSED:
            raise pickle.loads(message[2])
    except BaseException as error:
        _end(job)
        if isinstance(error, TimeoutError):
            raise RankTimeoutError(
                f"no rank was started within {_START_TIMEOUT_S:g} s; is a module slow to import?"
            ) from None
        raise
    return None if message is not None else _end(job)


def _end(job: socket.socket) -> bytes:
    """Close a job's socket, which ends its process 1; what the server says when it is done."""
    answer = b""
    try:
        job.close()
        if _server is not None:
            _server.control.settimeout(_STOP_TIMEOUT_S)
            answer = _server.control.recv(16)
    except OSError:
        pass  # it does not answer, or is dead
    finally:
        if answer != IDLE:
            stop_server()
    return answer


def _running_server() -> _Server:
    global _server
    if _server is not None and not _server.usable():
        stop_server()
    if _server is None:
        _server = _started_server()
        atexit.register(stop_server)
    return _server


def _started_server() -> _Server:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from tamoe.topology import rank_server; "
        f"rank_server.main({theirs.fileno()}, {os.getpid()})"
    )
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    with theirs:
        process = subprocess.Popen(
            [sys.executable, *flags, "-c", code],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, **_SERVER_ENVIRONMENT},
            start_new_session=True,  # Ctrl-C in a terminal is for the launcher alone
        )
    return _Server(process, ours, os.getpid())


@contextmanager
def _standard_streams() -> Iterator[list[int]]:
    """Descriptors of standard output and error as they are now; tests redirect them."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):
            stream.flush()
    opened = []
    try:
        for number in (1, 2):
            try:
                opened.append(os.dup(number))
            except OSError:  # closed, as daemons do
                opened.append(os.open(os.devnull, os.O_WRONLY))
        yield opened
    finally:
        for descriptor in opened:
            os.close(descriptor)
