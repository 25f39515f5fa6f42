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
        "executable": sys.executable,
    }
    process = subprocess.Popen(  # type: ignore[call-overload]
        [sys.executable, script, *args], env=whole, **{**defaults, **options}
    )
    return process, mark


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


def everybody() -> list[int]:
    """Every process of this machine."""
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]


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
