"""The few Linux calls that Python 3.11 lacks: namespaces, death signals, mounts, free memory."""

from __future__ import annotations

import ctypes
import os
import select
import signal
from collections.abc import Mapping
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_NOSUID_NODEV_NOEXEC = 0x2 | 0x4 | 0x8
MS_BIND = 0x1000
MS_REC = 0x4000
MS_SLAVE = 0x80000
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_DEFAULT_MMAP_MAX = 2**16
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def unshare(flags: int) -> None:
    """Move this process (with CLONE_NEWPID: its next child) into new namespaces."""
    _checked(_libc.unshare(flags), "unshare")


def setns(descriptor: int, kind: int) -> None:
    """Move this thread into the namespace that a descriptor holds."""
    _checked(_libc.setns(descriptor, kind), "setns")


def mount(source: str, target: str, flags: int, kind: str | None = None) -> None:
    """mount(2); without a kind of file system: bind mounts and propagation."""
    ends = (os.fsencode(source), os.fsencode(target), kind and os.fsencode(kind))
    _checked(_libc.mount(*ends, ctypes.c_ulong(flags), None), f"mount {target}")


def new_network_namespace() -> int:
    """Move into a new network namespace and return a descriptor that keeps it."""
    unshare(CLONE_NEWNET)
    return network_namespace()


def network_namespace() -> int:
    """A descriptor of the network namespace of this process."""
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def die_with_parent(parent_pid: int | None = None, parent_pidfd: int | None = None) -> None:
    """Be killed by the kernel when the parent thread ends; end now if it has ended already.

    ``parent_pid`` is for a parent in the same PID namespace; across namespaces, where the parent
    has no number, ``parent_pidfd`` is a descriptor from ``os.pidfd_open``.
    """
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)
    if parent_pidfd is not None:
        poll = select.poll()
        poll.register(parent_pidfd, select.POLLIN)  # readable once the process has ended
        if poll.poll(0):
            os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def hold_freed_memory() -> None:
    """Let the main thread's malloc hold on to freed buffers, as a device's allocator does.

    glibc by itself gives those of some MB back to the kernel, and each new one costs a page fault
    for every 4 KiB: some percent of an exchange. Nothing happens where malloc is another one, or
    where the environment says how malloc is to work.
    """
    if not _malloc_is_chosen():
        _set_malloc({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})


def environment_that_holds_freed_memory() -> dict[str, str]:
    """Variables by which the malloc of a command does what :func:`hold_freed_memory` does."""
    if _malloc_is_chosen():
        return {}
    return {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**63 - 1)}


def return_freed_memory(smallest_bytes: int) -> None:
    """Let malloc give back what it holds, and from now on freed buffers from a size on."""
    given = {_M_MMAP_THRESHOLD: smallest_bytes, _M_TRIM_THRESHOLD: smallest_bytes}
    _set_malloc({_M_MMAP_MAX: _DEFAULT_MMAP_MAX, **given})
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def _malloc_is_chosen() -> bool:
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    return chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")


def _set_malloc(values: Mapping[int, int]) -> None:
    if hasattr(_libc, "mallopt"):
        for number, value in values.items():
            _libc.mallopt(number, value)


def map_own_user(uid: int, gid: int) -> None:
    """Keep the user and group in a user namespace that was just made; others map to nobody."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def num_threads() -> int:
    """Number of threads of this process, those of C libraries included."""
    return len(os.listdir("/proc/self/task"))


def available_memory_bytes() -> int | None:
    """Memory that new processes can have: the machine's, or the control group's if smaller."""
    found = [value for value in (_meminfo_available(), _cgroup_available()) if value is not None]
    return min(found) if found else None


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kib[0] * 1024 if kib else None


def _reclaimable(folder: Path) -> int:
    """File pages of a control group that the kernel drops when memory is wanted."""
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(stat.get("inactive_file", 0))


def _cgroup_available() -> int | None:
    root = Path("/sys/fs/cgroup")
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].strip("/")
    except OSError:
        return None
    found = None
    for folder in (root / own, *(root / own).parents):
        if not folder.is_relative_to(root):
            break
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text()) - _reclaimable(folder)
        except (OSError, ValueError):
            continue
        if limit.isdecimal():
            free = max(int(limit) - used, 0)
            found = free if found is None else min(found, free)
    return found
