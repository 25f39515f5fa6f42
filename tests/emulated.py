"""Programs and measurements that the tests of emulated clusters share."""

from __future__ import annotations

import io
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from tamoe.topology.emulate import emulate
from tamoe.topology.spec import BURST_BYTES
from tests.processes import start

PAYLOAD_SHARE = 1448 / 1514  # of a full Ethernet frame, TCP timestamps on

# One rank sends 24 MB to another three times; the receiver prints payload bytes per second.
# An idle bucket lets one burst through at once, so that much is not counted.
TRANSFER = f"""
import os, socket, sys, time
source, target = sys.argv[1:3]
rank, address, port = (os.environ[name] for name in ("RANK", "TARGET", "MASTER_PORT"))
if rank == target:
    server = socket.create_server((address, int(port)))
    for _ in range(3):
        peer, _ = server.accept()
        received = len(peer.recv(1 << 20))
        start = time.perf_counter()
        while part := peer.recv(1 << 20):
            received += len(part)
        seconds = time.perf_counter() - start
        assert received == 24_000_000
        print((received - {BURST_BYTES}) / seconds, flush=True)
elif rank == source:
    for _ in range(3):
        while True:
            try:
                peer = socket.create_connection((address, int(port)), timeout=60)
                break
            except OSError:
                time.sleep(0.02)
        peer.sendall(bytes(24_000_000))
        peer.close()
"""

# Runs emulate() on its arguments, as `tamoe emulate SPEC -- COMMAND` does.
EMULATE = """
import os, sys
from tamoe.topology.emulate import emulate
from tamoe.topology.errors import TamoeError
try:
    code = emulate(sys.argv[1], sys.argv[2:], grace_s=float(os.environ.get("GRACE_S", "1")))
except TamoeError as error:
    print(error, file=sys.stderr)
    code = error.exit_code
sys.exit(code)
"""


def run(spec: str, *command: str) -> tuple[int, list[str], list[str]]:
    """Exit code and sorted lines of both streams."""
    out, err = io.BytesIO(), io.BytesIO()
    code = emulate(spec, command, stdout=out, stderr=err)
    return code, *(sorted(stream.getvalue().decode().splitlines()) for stream in (out, err))


def payload(bit_per_s: float) -> float:
    return bit_per_s / 8 * PAYLOAD_SHARE


# Prints when it is ready and when Ctrl-C comes, and leaves a daemon.
WAITING = """
import signal, sys, time, os
def stop(number, frame):
    print("interrupted", flush=True)
    sys.exit(0 if sys.argv[1] == "polite" else time.sleep(1000))
signal.signal(signal.SIGINT, signal.SIG_IGN)  # before the fork: the daemon never has the handler
if os.fork() == 0:
    os.setsid()                                # a daemon beside each rank
    time.sleep(1000)
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
while True: time.sleep(1)
"""


def transfers_at(bytes_per_s: float, transfer: Callable[[], Any]) -> bool:
    """Whether a transfer runs at a rate, within 3 %; a busy machine, which can only be too slow
    for a moment, gets two more tries."""
    for _ in range(3):
        code, out, err = transfer()
        assert (code, err) == (0, [])
        rates = [float(line.split()[1]) for line in out]
        assert len(rates) == 3
        share = statistics.median(rates) / bytes_per_s
        assert share < 1.03
        if share > 0.97:
            return True
    return False


def emulation(*args: str, grace_s: int = 1, **options: Any) -> tuple[subprocess.Popen[str], str]:
    env = {"PYTHONPATH": path(), "GRACE_S": str(grace_s)}
    return start("-c", EMULATE, *args, env=env, **options)


def path() -> str:
    return os.pathsep.join(filter(None, sys.path))
