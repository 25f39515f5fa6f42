"""Entering namespaces, as root or as an ordinary user, and saying which setting refuses them."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path

from tamoe.topology import linux
from tamoe.topology.errors import EmulationError

_ESCAPE = (
    "Without namespaces there is still the simulated run: ClusterSpec.parse(...).topology() "
    "instead of a probe"
)
# Setting, the value that refuses, what to do.
_SETTINGS = (
    ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
    ("user/max_net_namespaces", "0", "sysctl -w user.max_net_namespaces=15000"),
    ("user/max_pid_namespaces", "0", "sysctl -w user.max_pid_namespaces=15000"),
    ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
    ),
)


def enter_cluster_namespaces() -> None:
    """Move this process into network and mount namespaces of its own.

    Root makes them directly. Anybody else makes a user namespace in the same call, which the
    kernel then counts as the owner of the network; that needs a process with one thread.

    Raises
    ------
    EmulationError
        The kernel refuses; the message names the setting.
    """
    wanted = linux.CLONE_NEWNET | linux.CLONE_NEWNS
    uid, gid = os.getuid(), os.getgid()
    try:
        try:
            linux.unshare(wanted)
        except PermissionError:
            linux.unshare(linux.CLONE_NEWUSER | wanted)
            linux.map_own_user(uid, gid)
    except OSError as error:
        raise refusal(error) from None


def enter_pid_namespace() -> bool:
    """Let the next child be process 1 of a new PID namespace; False where the kernel refuses.

    This process gets a mount namespace of its own as well.
    """
    wanted = linux.CLONE_NEWPID | linux.CLONE_NEWNS
    uid, gid = os.getuid(), os.getgid()
    with contextlib.suppress(PermissionError):
        linux.unshare(wanted)
        return True
    try:
        linux.unshare(linux.CLONE_NEWUSER | wanted)
        linux.map_own_user(uid, gid)
    except OSError:
        return False
    return True


def see_own_processes() -> None:
    """Let /proc show the PID namespace of this process, which gets a mount namespace of its own.

    Else a process is not found there under its own number, and CUDA does not start (error 304).
    Some containers refuse the mount: then emulated ranks work, and ranks on GPUs do not.
    """
    with contextlib.suppress(OSError):
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount("none", "/", linux.MS_REC | linux.MS_SLAVE)
        linux.mount("proc", "/proc", linux.MS_NOSUID_NODEV_NOEXEC, "proc")


def refusal(error: OSError) -> EmulationError:
    """What the kernel refused, in words: the setting that does it and how to change it."""
    reasons = [
        f"{name.replace('/', '.')} is {value} (as root: {fix})"
        for name, value, fix in _SETTINGS
        if _setting(name) == value and (os.geteuid() != 0 or name.startswith("user/"))
    ]
    if not reasons and error.errno in (errno.EPERM, errno.EACCES):
        reasons = [_permission_reason()]
    if not reasons and error.errno in (errno.ENOSPC, errno.EUSERS):
        reasons = ["a limit under /proc/sys/user/ (max_user_namespaces and others) is reached"]
    if not reasons and error.errno == errno.EINVAL:
        reasons = ["the kernel was built without user, network or PID namespaces"]
    why = "; ".join(reasons) or "the reason is not known"
    return EmulationError(
        f"the kernel refuses an emulated cluster ({error.strerror}): {why}. {_ESCAPE}"
    )


def _setting(name: str) -> str | None:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return None


def _permission_reason() -> str:
    status = Path("/proc/self/status").read_text().splitlines()
    if any(line.split() == ["Seccomp:", "2"] for line in status):
        return (
            "a seccomp filter forbids unshare, as containers do by default (start the container "
            "with --privileged, or with --security-opt seccomp=unconfined and "
            "--cap-add SYS_ADMIN --cap-add NET_ADMIN)"
        )
    return (
        "this process may not make user namespaces: check the security module (AppArmor, SELinux), "
        "user.max_user_namespaces, kernel.unprivileged_userns_clone, or run as root"
    )


def hide_hosts_file(text: str) -> None:
    """Let this mount namespace see ``text`` as /etc/hosts.

    torch looks for the name of every peer: without one it warns at length, and where a name
    server does not answer it waits. A kernel that refuses the mount leaves that, nothing else.
    """
    with contextlib.suppress(OSError):
        # Before anything else, or the mount below would show up outside.
        linux.mount("none", "/", linux.MS_REC | linux.MS_SLAVE)
        handle, name = tempfile.mkstemp(prefix="tamoe-hosts-")
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(text)
            os.chmod(name, 0o644)
            linux.mount(name, "/etc/hosts", linux.MS_BIND)
        finally:
            os.unlink(name)  # the mount keeps the content
