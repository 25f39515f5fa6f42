"""One job inside the rank server: its namespaces, and its process 1 that forks the ranks.

The tree of processes is drawn in :mod:`tamoe.topology.rank_server`; what a rank does is in
:mod:`tamoe.topology.rank_process`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import select
import signal
import socket
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tamoe.topology import linux, namespaces, netns
from tamoe.topology.errors import InputError, TamoeError
from tamoe.topology.network import INTERFACE, address, hosts_text
from tamoe.topology.rank_process import Place, exec_in_rank, run_in_rank
from tamoe.topology.rank_protocol import JOB_ITSELF, Inbox, Kind, Request, send

_OPEN_FILES = 65536
_LONGEST_LINE_BYTES = 1 << 20  # output without a line break is passed on in pieces of this size


def run_job(request: Request, job: socket.socket, streams: list[int]) -> None:
    """Run a job to its end; called in a process of its own with one thread."""
    network: socket.socket | None = None
    found: list[int] = []
    _raise_file_limit()
    try:
        if request.cluster is not None:
            namespaces.enter_cluster_namespaces()
            network, found = _start_network(request.cluster, job)
    except TamoeError as error:
        send(job, JOB_ITSELF, Kind.REFUSED, pickle.dumps(error))
        return
    if namespaces.enter_pid_namespace():
        namespaces.hide_hosts_file(hosts_text(request.cluster))
    else:
        linux.adopt_orphans()
    init = Init(request, _places(request, found), job, streams)
    pid = _fork(init.run)
    os.waitpid(pid, 0)  # returns once the whole PID namespace is gone
    if network is not None:
        network.send(b"report")
        network.recv(1)  # nothing comes: the process has reported to the launcher and ended
    _end_children()


def _fork(run: Callable[[], None]) -> int:
    """Fork a process that runs a function and dies with this one."""
    own = os.pidfd_open(os.getpid())
    pid = os.fork()
    if pid == 0:
        try:
            linux.die_with_parent(parent_pidfd=own)
            os.close(own)
            run()
            os._exit(0)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the launcher gave the job up
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(own)
    return pid


def _start_network(cluster: Any, job: socket.socket) -> tuple[socket.socket, list[int]]:
    """The process that builds and keeps the network, and the namespaces that it made."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def serve() -> None:
        ours.close()
        netns.serve_network(cluster, theirs, job)

    with theirs:
        _fork(serve)
    found = netns.receive_namespaces(ours)
    return ours, found


def _places(request: Request, found: list[int]) -> list[Place]:
    """Where each rank runs, by rank; ``found`` are the namespaces of nodes, then of ranks."""
    num_nodes = len(request.nodes)
    own = len(found) > num_nodes
    alone = request.cluster is None or (num_nodes == 1 and not own)
    places = []
    for node, ranks in enumerate(request.nodes):
        for local, rank in enumerate(ranks):
            place = Place(
                rank=rank,
                node=node,
                local_rank=local,
                local_size=len(ranks),
                num_nodes=num_nodes,
                address="127.0.0.1" if alone else address(0),
                interface="lo" if alone else INTERFACE,
                namespace=found[num_nodes + rank] if own else found[node] if found else None,
                node_namespace=found[node] if found and num_nodes > 1 else None,
            )
            places.append(place)
    return sorted(places, key=lambda place: place.rank)


def _raise_file_limit() -> None:
    """Every rank has a connection to every other, and this process a few files for each rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # No more than that: some programs close every descriptor that they could have.
    wanted = max(soft, _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _end_children() -> None:
    """End the network's process and, where there is no PID namespace, what ranks left behind."""
    children = Path("/proc/thread-self/children")
    while children.exists() and (left := children.read_text().split()):
        for pid in map(int, left):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


class Init:
    """Process 1 of a job: forks the ranks, reaps, reports who ended, ends everything."""

    def __init__(
        self, request: Request, places: list[Place], job: socket.socket, streams: list[int]
    ) -> None:
        self.request = request
        self.places = places
        self.job = job
        self.streams = streams
        self.process_of: dict[int, int] = {}  # by rank
        self.output: dict[int, _Output] = {}  # by descriptor
        self.poll = select.poll()

    def run(self) -> None:
        """Fork the ranks, then serve until the launcher says that it has all it wants."""
        if os.getpid() == 1:
            namespaces.see_own_processes()
        send(self.job, JOB_ITSELF, Kind.STARTED)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a rank may get it before it is a command
        try:
            self._fork_ranks()
        except OSError as error:
            refused = InputError(
                f"{self.request.num_ranks} ranks could not be started: after "
                f"{len(self.process_of)} the system says {error.strerror!r}; allowed: fewer ranks, "
                f"or a higher limit (ulimit -u, ulimit -n)"
            )
            send(self.job, JOB_ITSELF, Kind.REFUSED, pickle.dumps(refused))
            return
        self.poll.register(self.job, select.POLLIN)
        while self._step():
            pass

    def _fork_ranks(self) -> None:
        ports = os.pipe()
        for place in self.places:
            if self.request.call is not None:
                run = partial(run_in_rank, self.request, place, self.job, self.streams, ports)
                pid = _fork(run)
            else:
                pid = self._fork_command(place)
            self.process_of[place.rank] = pid
            self.poll.register(os.pidfd_open(pid), select.POLLIN)
        for descriptor in ports:
            os.close(descriptor)

    def _fork_command(self, place: Place) -> int:
        pipes = [os.pipe(), os.pipe()]
        writers = [writer for _, writer in pipes]
        pid = _fork(lambda: exec_in_rank(self.request, place, writers))
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # the rank does the same; whoever comes first
        for (reader, writer), kind in zip(pipes, (Kind.STDOUT, Kind.STDERR), strict=True):
            os.close(writer)
            os.set_blocking(reader, False)
            self.output[reader] = _Output(place.rank, kind)
            self.poll.register(reader, select.POLLIN)
        return pid

    def _step(self) -> bool:
        """Handle what has happened; False when the job is to end."""
        for descriptor, _ in self.poll.poll(1000):
            if descriptor == self.job.fileno():
                message = Inbox(self.job).next()
                if message is None or message[1] == Kind.END:
                    return False
                self._signal_all(int(message[2]))
            elif descriptor in self.output:
                self._pass_on(descriptor)
            else:  # a rank has ended
                self._forget(descriptor)
        self._reap()
        return True

    def _forget(self, descriptor: int) -> None:
        self.poll.unregister(descriptor)
        os.close(descriptor)

    def _signal_all(self, number: int) -> None:
        for pid in self.process_of.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)

    def _reap(self) -> None:
        """Collect every process that ended, the adopted ones of ranks too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            rank = next((r for r, process in self.process_of.items() if process == pid), None)
            if rank is not None:
                del self.process_of[rank]
                for descriptor in [d for d, out in self.output.items() if out.rank == rank]:
                    self._pass_on(descriptor)
                code = os.waitstatus_to_exitcode(status)
                send(self.job, rank, Kind.EXITED, str(code).encode())

    def _pass_on(self, descriptor: int) -> None:
        """Send on the whole lines that a rank wrote, and the rest of them at the end."""
        output = self.output[descriptor]
        with contextlib.suppress(BlockingIOError):
            while text := os.read(descriptor, 65536):
                lines = output.lines(text)
                if lines:
                    send(self.job, output.rank, output.kind, lines)
            if output.rest:
                send(self.job, output.rank, output.kind, output.rest)
            del self.output[descriptor]
            self._forget(descriptor)


class _Output:
    """What a rank wrote to one stream and has not finished a line of."""

    def __init__(self, rank: int, kind: Kind) -> None:
        self.rank = rank
        self.kind = kind
        self.rest = b""

    def lines(self, text: bytes) -> bytes:
        whole, newline, self.rest = (self.rest + text).rpartition(b"\n")
        if len(self.rest) > _LONGEST_LINE_BYTES:
            whole, newline, self.rest = whole + newline + self.rest, b"", b""
        return whole + newline
