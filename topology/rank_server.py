"""The process from which ranks are forked: torch imported, no operation run, one thread.

A launcher keeps one such server, so only its first job pays for importing torch; modules of the
functions that it runs are imported here too, once. The tree while a job runs::

    launcher                  its main thread; anything may be loaded there
    └─ server                 this file; fresh interpreter, own session
       └─ job                 rank_job.py; in the job's own user namespace where not root
          ├─ network          emulated clusters only: builds and keeps the network namespaces
          └─ init             process 1 of a PID namespace: reaps, reports, prefixes output
             ├─ rank 0        in its node's network and host name namespaces
             └─ rank 1 ...

Each process below the launcher asks the kernel for SIGKILL when its parent ends, and the end of
process 1 ends everything in its PID namespace, daemons too. So kill -9 of the launcher, or the end
of a job, leaves nothing.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing.spawn
import os
import pickle
import socket
import sys
import traceback

from tamoe.topology import linux
from tamoe.topology.errors import InputError
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

_loading: str | None = None  # module that is being imported for a job
_files: dict[str, tuple[str | None, int]] = {}  # of the modules that jobs brought, with their times
_threads_of_torch = 1


def loading() -> str | None:
    """Name of the module that this server is importing now, None elsewhere."""
    return _loading


def main(control_fd: int, launcher_pid: int) -> None:
    """Serve jobs until the launcher closes the control socket."""
    linux.die_with_parent(launcher_pid)
    control = socket.socket(fileno=control_fd)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 16, 3, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return
        answer = _serve(descriptors)
        control.send(answer)
        if answer != IDLE:
            return


def _serve(descriptors: list[int]) -> bytes:
    job = socket.socket(fileno=descriptors[0])
    streams = descriptors[1:]
    answer = IDLE
    try:
        message = Inbox(job).next()
        if message is None:
            return answer
        request: Request = pickle.loads(message[2])
        if _is_stale(request):
            return STALE
        error = _prepare(request)
        if error is not None:
            send(job, JOB_ITSELF, Kind.REFUSED, pickle.dumps(error))
        elif request.call is not None and not request.import_in_ranks and not _still_fork_safe():
            answer = SPOILED
        else:
            _fork_job(request, job, streams)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the launcher gave the job up
    finally:
        job.close()
        for descriptor in streams:
            os.close(descriptor)
    return answer


def _fork_job(request: Request, job: socket.socket, streams: list[int]) -> None:
    from tamoe.topology.rank_job import run_job

    server_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            linux.die_with_parent(server_pid)
            run_job(request, job, streams)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def _is_stale(request: Request) -> bool:
    """Whether the launcher's module is another file than the one that was imported here."""
    known = _files.get(request.module or "")
    return known is not None and known != _file_of(request)


def _file_of(request: Request) -> tuple[str | None, int]:
    try:
        return request.module_file, os.stat(request.module_file or "").st_mtime_ns
    except OSError:  # built in, or gone
        return request.module_file, 0


def _prepare(request: Request) -> InputError | None:
    """Import what the ranks need; a reason to refuse the job if that fails."""
    global _threads_of_torch
    with contextlib.suppress(OSError):  # the launcher's may be gone
        os.chdir(request.directory)
    sys.path[:] = request.path
    importlib.invalidate_caches()
    if request.cluster is not None:
        import pyroute2  # noqa: F401  (the network process is forked from here)
    if request.call is None:
        return None
    if "torch.distributed" not in sys.modules:
        import torch.distributed  # noqa: F401  (what every rank needs)

        _threads_of_torch = linux.num_threads()
    error = None
    if not request.import_in_ranks:
        error = import_function_module(request)
        if request.module is not None:
            _files[request.module] = _file_of(request)
    gc.collect()
    gc.freeze()  # objects that no collection touches stay shared between the ranks
    return error


def import_function_module(request: Request) -> InputError | None:
    """Import the module of a job's function; the error to report if that fails."""
    global _loading
    _loading = request.module
    try:
        if request.main:
            multiprocessing.spawn.prepare(dict(request.main))
        if request.module is not None and request.module != "__main__":
            importlib.import_module(request.module)
    except InputError as error:
        return error
    except BaseException as error:  # pytest.skip and SystemExit are no Exceptions
        return InputError(
            f"fn: the processes of the ranks cannot import its module {request.module!r} "
            f"({type(error).__name__}: {error}); allowed: a function in a module that imports "
            f"anew from sys.path\n\n{traceback.format_exc()}"
        )
    finally:
        _loading = None
    return None


def _still_fork_safe() -> bool:
    """Whether importing users' modules started no thread and did not initialise CUDA."""
    import torch

    return linux.num_threads() <= _threads_of_torch and not torch.cuda.is_initialized()
