"""Programs started by tests, found again by a mark that their descendants inherit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

MARK = "TAMOE_TEST_MARK"
_started: list[subprocess.Popen[str]] = []


def start(
    script: str, *args: str, env: dict[str, str] | None = None, **options: object
) -> tuple[subprocess.Popen[str], str]:
    """Run a script's text in a fresh Python; the process, and the mark of all below it."""
    mark = uuid.uuid4().hex
    whole = {**os.environ, **(env or {}), MARK: mark, "PYTHONUNBUFFERED": "1"}
    defaults: dict[str, object] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    python = options.pop("executable", sys.executable)
    process = subprocess.Popen(  # type: ignore[call-overload]
        [python, script, *args], env=whole, **{**defaults, **options}
    )
    _started.append(process)
    return process, mark


def kill_started() -> None:
    """End what a failed test left; all below a launcher ends with it."""
    while _started:
        with _started.pop() as process:
            process.kill()


def marked(mark: str) -> list[int]:
    """Processes that carry a mark in the environment that they were started with."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue  # it ended meanwhile
    return found


def network_namespaces(pids: list[int]) -> set[str]:
    """Names of the network namespaces that processes are in, their own one excluded."""
    found = set()
    for pid in pids:
        try:
            found.add(os.readlink(f"/proc/{pid}/ns/net"))
        except OSError:
            continue
    return found - {os.readlink("/proc/self/ns/net")}


def namespace_mounts() -> int:
    """Number of mounts that keep a namespace, as `ip netns add` makes them."""
    return Path("/proc/self/mountinfo").read_text().count(" - nsfs ")


def links() -> set[str]:
    """Network interfaces of this process's namespace."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return {line.partition(":")[0].strip() for line in lines}


def until(condition: Callable[[], object], timeout_s: float) -> float:
    """Poll until a condition holds; the time that took. Fails the test when it never does."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_s:
            raise AssertionError(f"not true after {timeout_s} s: {condition}")
        time.sleep(0.01)
    return time.monotonic() - started


def can_mount_proc() -> bool:
    """Whether a process may show a PID namespace of its own in /proc."""
    command = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
