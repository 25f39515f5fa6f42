"""Run a command once for each rank of an emulated cluster, as torchrun would on a real one."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO

from tamoe.topology.errors import InputError, RankError
from tamoe.topology.launcher import check_launcher, check_memory, running_job
from tamoe.topology.rank_protocol import JOB_ITSELF, Inbox, Kind, Request, send
from tamoe.topology.spec import ClusterSpec

COMMAND_BYTES = 10e6  # a bare Python; what the command itself needs is not known
_TICK_S = 0.2
_INTERRUPTED = 128 + signal.SIGINT


def emulate(
    spec: ClusterSpec | str,
    command: Sequence[str],
    *,
    grace_s: float = 5.0,
    stdout: IO[bytes] | None = None,
    stderr: IO[bytes] | None = None,
) -> int:
    """Run ``command`` in one process per rank of an emulated cluster.

    Each process has RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT and
    GLOO_SOCKET_IFNAME, so a script that calls ``init_process_group("gloo")`` works unchanged. Every
    line that a rank writes is passed on whole, with its rank before it. When one rank fails the
    others are stopped. Ctrl-C is passed on once; a second one, or ``grace_s`` later, ends them all.

    A rank holds on to memory that it frees, since page faults would count as work; a variable
    MALLOC_TRIM_THRESHOLD_ of your own, or another one for malloc, turns that off.

    Parameters
    ----------
    spec
        The cluster, or its text such as ``"4x2:200mbit"``.
    command
        The program and its arguments.
    grace_s
        Time that ranks get between being asked to stop and being killed, in seconds, >= 0.
    stdout, stderr
        Binary files for what the ranks write; the process's own by default.

    Returns
    -------
    int
        0 if every rank ended with 0; else the code of the first that failed, 128 + n if signal n
        ended it; 130 after Ctrl-C.

    Raises
    ------
    InputError
        The specification is malformed, the program is not found, or there are more ranks than
        memory allows.
    EmulationError
        The kernel refuses the namespaces; the message names the setting.
    """
    try:
        return _emulate(spec, command, grace_s, stdout, stderr)
    except KeyboardInterrupt:  # before the first rank ran
        return _INTERRUPTED


def _emulate(
    spec: ClusterSpec | str,
    command: Sequence[str],
    grace_s: float,
    stdout: IO[bytes] | None,
    stderr: IO[bytes] | None,
) -> int:
    check_launcher()
    cluster = ClusterSpec.parse(spec) if isinstance(spec, str) else spec
    request = _request(cluster, _found(command))
    check_memory(cluster.num_ranks, COMMAND_BYTES, 0)
    sys.stdout.flush()
    outputs = {
        Kind.STDOUT: stdout or sys.stdout.buffer,
        Kind.STDERR: stderr or sys.stderr.buffer,
    }
    with running_job(request) as job:
        watch = _Watch(job, set(range(cluster.num_ranks)), outputs, grace_s)
        with _interrupts_go_to(watch):
            try:
                return watch.run()
            except BrokenPipeError:  # nobody reads any more, as behind "| head"
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it ends
                return 128 + signal.SIGPIPE


def _request(cluster: ClusterSpec, command: tuple[str, ...]) -> Request:
    return Request(
        nodes=cluster.nodes,
        cluster=cluster,
        call=None,
        command=command,
        module=None,
        module_file=None,
        main={},
        import_in_ranks=False,
        environ=dict(os.environ),
        directory=os.getcwd(),
        path=tuple(sys.path),
        argv=(),
        timeout_s=0.0,
    )


def _found(command: Sequence[str]) -> tuple[str, ...]:
    if command and command[0] == "--":  # parsers of command lines may leave it
        command = command[1:]
    if not command:
        raise InputError("command is empty; allowed: a program and its arguments, after --")
    program = os.fspath(command[0])
    if shutil.which(program) is None:
        where = "" if os.sep in program else " in any folder of PATH"
        problem = "is not executable" if os.path.exists(program) else f"is not found{where}"
        raise InputError(f"command {program!r} {problem}; allowed: an executable program")
    return tuple(os.fspath(part) for part in command)


class _Watch:
    """Prints what the ranks of a job write and decides when they must stop."""

    def __init__(
        self, job: socket.socket, running: set[int], outputs: dict[Kind, IO[bytes]], grace_s: float
    ) -> None:
        self.job = job
        self.running = running
        self.outputs = outputs
        self.grace_s = grace_s
        self.code: int | None = None  # decided once
        self.deadline: float | None = None

    def run(self) -> int:
        inbox = Inbox(self.job)
        self.job.settimeout(_TICK_S)
        while self.running and not self._overdue():
            try:
                message = inbox.next()
            except TimeoutError:
                continue
            if message is None:
                raise RankError("the process above the ranks ended before they had")
            self._handle(*message)
        with suppress(OSError):
            send(self.job, JOB_ITSELF, Kind.END)
        return self.code or 0

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Signal handler for Ctrl-C: pass it on the first time, give up the second time."""
        if self.code == _INTERRUPTED:
            self.deadline = 0.0
        else:
            self._stop(_INTERRUPTED, signal.SIGINT)

    def _overdue(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _handle(self, rank: int, kind: Kind, payload: bytes) -> None:
        if kind in self.outputs:
            self._print(rank, kind, payload)
        elif kind == Kind.EXITED:
            self.running.discard(rank)
            code = int(payload)
            if code != 0 and self.code is None:
                code = code if code > 0 else 128 - code
                if self.running:
                    self._note(rank, f"ended with exit code {code}; stopping the others")
                self._stop(code, signal.SIGTERM)

    def _stop(self, code: int, number: int) -> None:
        self.code = code
        self.deadline = time.monotonic() + self.grace_s
        with suppress(OSError):
            send(self.job, JOB_ITSELF, Kind.SIGNAL, str(number).encode())

    def _print(self, rank: int, kind: Kind, text: bytes) -> None:
        prefix = f"[{rank}] ".encode()
        lines = text.removesuffix(b"\n").split(b"\n")
        self.outputs[kind].write(b"".join(prefix + line + b"\n" for line in lines))
        self.outputs[kind].flush()

    def _note(self, rank: int, text: str) -> None:
        self._print(rank, Kind.STDERR, text.encode())


@contextmanager
def _interrupts_go_to(watch: _Watch) -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:  # nohup and background jobs
        yield
        return
    signal.signal(signal.SIGINT, watch.interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
