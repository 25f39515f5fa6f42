"""Commands on emulated clusters: output, exit codes, Ctrl-C, kill -9, users and refusals."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tamoe
from tamoe.topology import linux, namespaces
from tamoe.topology.emulate import emulate
from tamoe.topology.errors import EmulationError, InputError
from tamoe.topology.network import address
from tests.emulated import EMULATE, TRANSFER, WAITING, emulation, path, payload, run, transfers_at
from tests.processes import (
    kill_started,
    links,
    marked,
    namespace_mounts,
    network_namespaces,
    start,
    until,
)

pytestmark = pytest.mark.emulated


@pytest.fixture(autouse=True)
def _no_program_outlives_its_test() -> Iterator[None]:
    yield
    kill_started()


# ---- commands ----------------------------------------------------------------------------------


def test_command_has_the_environment_of_torchrun() -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT GLOO_SOCKET_IFNAME"
    show = "echo " + " ".join(f"${name}" for name in names.split()) + " $(hostname)"
    code, out, err = run("2x2:100mbit", "sh", "-c", show)
    assert (code, err) == (0, [])
    assert out == [
        f"[{rank}] {rank} 4 {rank % 2} 2 10.0.0.1 29500 eth0 node{rank // 2}" for rank in range(4)
    ]


def test_plain_torch_script_works_without_warnings(tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text("""
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.ones(1) * dist.get_rank()
dist.all_reduce(value)
print(int(value))
dist.destroy_process_group()
""")
    code, out, err = run("2x2:200mbit", sys.executable, str(script))
    assert (code, err) == (0, [])
    assert [line for line in out if "Gloo" not in line] == [f"[{rank}] 6" for rank in range(4)]


@pytest.mark.parametrize("chosen", [False, True])
def test_freed_buffers_stay_with_their_command_unless_its_user_chose_otherwise(
    chosen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "buffers.py"
    script.write_text("""
import resource
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
before = resident()
buffers = [b"x" * (size * 2**20) for size in (8, 8, 48)]
del buffers
held = resident() - before
print("all" if held > 60 else "none" if held < 10 else held)
""")
    if chosen:
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    said = "[0] none" if chosen else "[0] all"
    assert run("1x1", sys.executable, str(script)) == (0, [said], [])


def test_output_keeps_whole_lines_and_gets_a_prefix() -> None:
    text = "i=0; while [ $i -lt 300 ]; do echo $RANK-$i-abcdefgh; i=$((i+1)); done; printf end >&2"
    code, out, err = run("2x2", "sh", "-c", text)
    assert code == 0
    assert sorted(out) == sorted(f"[{r}] {r}-{i}-abcdefgh" for r in range(4) for i in range(300))
    assert err == [f"[{rank}] end" for rank in range(4)]  # a last line without its break


def test_line_longer_than_a_pipe_stays_whole() -> None:
    code, out, _ = run("2x1", sys.executable, "-c", "print('x' * 300_000)")
    assert code == 0
    assert out == [f"[{rank}] " + "x" * 300_000 for rank in range(2)]


@pytest.mark.parametrize(
    ("action", "code"),
    [("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("exit 0", 0)],
)
def test_first_failure_stops_all_and_gives_the_exit_code(action: str, code: int) -> None:
    rest = "exit 0" if code == 0 else "exec sleep 1000"
    started = time.monotonic()
    got, _, err = run("2x2", "sh", "-c", f"if [ $RANK = 2 ]; then {action}; fi; {rest}")
    assert got == code
    assert err == ([f"[2] ended with exit code {code}; stopping the others"] if code else [])
    assert time.monotonic() - started < 60


def test_rank_that_ignores_being_stopped_is_killed(tmp_path: Path) -> None:
    text = (
        "if [ $RANK = 1 ]; then sleep 0.3; exit 3; fi; trap '' TERM; while true; do sleep 1; done"
    )
    out, err = io.BytesIO(), io.BytesIO()
    command = ("sh", "-c", text)
    assert emulate("2x1", command, grace_s=0.2, stdout=out, stderr=err) == 3


def test_daemons_of_a_command_end_with_it() -> None:
    mark = f"daemon-{os.getpid()}"
    code, _, _ = run("2x1", "env", f"TAMOE_TEST_MARK={mark}", "setsid", "-f", "sleep", "1000")
    assert code == 0
    assert marked(mark) == []


def test_command_that_cannot_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'no-such-program' is not found in any folder of PATH"):
        emulate("2x1", ["no-such-program"])
    (tmp_path / "text").write_text("no program\n")
    with pytest.raises(InputError, match="text' is not executable"):
        emulate("2x1", [str(tmp_path / "text")])
    (tmp_path / "text").chmod(0o755)
    code, _, err = run("2x1", str(tmp_path / "text"))
    assert code == 126
    told = f"cannot run '{tmp_path}/text': Exec format error"
    # Whichever rank comes first says so, and the others are stopped, perhaps before they can.
    assert {f"[0] {told}", f"[1] {told}"} & set(err)
    with pytest.raises(InputError, match="command is empty"):
        emulate("2x1", [])
    with pytest.raises(InputError, match="command is empty"):
        emulate("2x1", ["--"])


def test_more_processes_than_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "available_memory_bytes", lambda: 25_000_000)
    with pytest.raises(InputError, match=r"4 ranks need about 0\.0 GB .* at most 2 ranks"):
        emulate("2x2", ["true"])


def test_reader_that_leaves_ends_the_run() -> None:
    read, write = os.pipe()
    os.close(read)
    # A launcher of its own: a broken pipe also closes its standard output.
    process, mark = emulation("2x1", "yes", stdout=write)
    os.close(write)
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    until(lambda: not marked(mark), 2)


# ---- ends: Ctrl-C, kill -9 ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["polite", "stubborn"])
@pytest.mark.parametrize("shell", [(), ("sh", "-c", '"$@"; exit 0', "sh")])
def test_interrupt_reaches_each_rank_once_and_all_end(how: str, shell: tuple[str, ...]) -> None:
    process, mark = emulation("2x2:100mbit", *shell, sys.executable, "-c", WAITING, how)
    assert process.stdout is not None
    ready = [process.stdout.readline() for _ in range(4)]
    assert sorted(ready) == [f"[{rank}] ready\n" for rank in range(4)]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert sorted(out.splitlines()) == [f"[{rank}] interrupted" for rank in range(4)]
    assert err == ""
    until(lambda: not marked(mark), 2)


def test_second_interrupt_does_not_wait() -> None:
    process, _ = emulation("2x1", sys.executable, "-c", WAITING, "stubborn", grace_s=1000)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


@pytest.mark.parametrize("who", ["command", "function"])
def test_kill_9_leaves_no_process_namespace_or_link(who: str, tmp_path: Path) -> None:
    before = links(), namespace_mounts()
    if who == "command":
        process, mark = emulation("2x2:100mbit", sys.executable, "-c", WAITING, "stubborn")
    else:
        script = tmp_path / "waiting.py"
        script.write_text("""
import os, sys, time
from tamoe.topology.ranks import run_ranks
def wait(rank):
    if os.fork() == 0:
        os.setsid()
    else:
        os.write(1, b"ready\\n")
    time.sleep(1000)
if __name__ == "__main__": run_ranks("2x2:100mbit", wait)
""")
        process, mark = start(str(script), env={"PYTHONPATH": path()})
    assert process.stdout is not None
    for _ in range(4):
        assert "ready" in process.stdout.readline()
    # Launcher, server, job, network, process 1, and four ranks with a daemon each.
    until(lambda: len(marked(mark)) == 5 + 4 * 2, 10)
    assert len(network_namespaces(marked(mark))) == 3  # two nodes and the fabric
    process.kill()
    until(lambda: not marked(mark), 2)
    assert (links(), namespace_mounts()) == before
    process.communicate()


# The kernel's own count of namespaces, limited to what one cluster needs in a user namespace of
# the test: three can be made again only when the killed launcher's three are gone for good.
COUNTED = """
import os, subprocess, sys, time
from pathlib import Path
from tamoe.topology import linux
uid, gid = os.getuid(), os.getgid()
linux.unshare(linux.CLONE_NEWUSER)
linux.map_own_user(uid, gid)
Path("/proc/sys/user/max_net_namespaces").write_text("3")

launcher = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdout=subprocess.PIPE)
assert b"ready" in launcher.stdout.readline()
made = []
try:
    made.append(linux.new_network_namespace())
except OSError:
    pass
assert not made
launcher.kill()
killed = time.monotonic()
while len(made) < 3:
    try:
        made.append(linux.new_network_namespace())
    except OSError:
        time.sleep(0.01)
print(time.monotonic() - killed)
"""


def test_kill_9_frees_the_namespaces_in_the_kernel() -> None:
    command = ("2x1:100mbit", sys.executable, "-c", WAITING, "stubborn")
    process, mark = start("-c", COUNTED, EMULATE, *command, env={"PYTHONPATH": path()})
    out, err = process.communicate(timeout=60)
    assert err == ""
    assert float(out) < 2
    until(lambda: not marked(mark), 2)


# ---- users, refusals -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ordinary() -> Iterator[dict[str, Any]]:
    """How to start a Python as an ordinary user: options and environment of a process.

    A program in another user's home cannot be started, so root takes the system's Python and a
    copy of the few packages that commands on an emulated cluster need.
    """
    if os.getuid() != 0:
        yield {"executable": sys.executable, "env": {"PYTHONPATH": path()}}
        return
    python = next(
        filter(None, map(_usable_by_nobody, (sys.executable, "python3", "/usr/bin/python3"))), None
    )
    if python is None:
        pytest.skip("an ordinary user can start no Python 3.11 or later here")
    import pyroute2

    with tempfile.TemporaryDirectory(prefix="tamoe-test-") as folder:
        os.chmod(folder, 0o755)
        for package in (Path(tamoe.__path__[0]), Path(pyroute2.__path__[0])):
            skip = shutil.ignore_patterns("__pycache__", "cuda", "experiments")
            shutil.copytree(package, Path(folder, package.name), ignore=skip)
        env = {"PYTHONPATH": folder, "HOME": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        user = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": folder}
        yield {"executable": python, "env": env, **user}


def _usable_by_nobody(name: str) -> str | None:
    found = shutil.which(name)
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    try:
        done = subprocess.run(
            [found or "", "-c", check], user=65534, group=65534, extra_groups=[], cwd="/"
        )
    except OSError:
        return None
    return found if done.returncode == 0 else None


def test_ordinary_user_gets_the_same_network(ordinary: dict[str, Any]) -> None:
    show = "echo $(id -u) $(hostname) $(head -c 4 /etc/hosts)"
    options = {**ordinary, "env": {**ordinary["env"], "TARGET": address(0)}}
    process, _ = start("-c", EMULATE, "2x2:200mbit", "sh", "-c", show, **options)
    out, err = process.communicate(timeout=60)
    user = options.get("user", os.getuid())
    assert (err, process.returncode) == ("", 0)
    assert sorted(out.splitlines()) == [f"[{r}] {user} node{r // 2} ::1" for r in range(4)]
    command = (options["executable"], "-c", TRANSFER, "3", "0")

    def transfer() -> tuple[int, list[str], list[str]]:
        process, mark = start("-c", EMULATE, "2x2:200mbit", *command, **options)
        out, err = process.communicate(timeout=60)
        until(lambda: not marked(mark), 2)
        return process.returncode, out.splitlines(), err.splitlines()

    assert transfers_at(payload(200e6), transfer)


def test_kill_9_by_an_ordinary_user_leaves_nothing(ordinary: dict[str, Any]) -> None:
    command = (ordinary["executable"], "-c", WAITING, "stubborn")
    process, mark = start("-c", EMULATE, "2x1:100mbit", *command, **ordinary)
    assert process.stdout is not None
    assert ["ready" in process.stdout.readline() for _ in range(2)] == [True, True]
    process.kill()
    until(lambda: not marked(mark), 2)
    process.communicate()


def test_refused_namespaces_name_the_setting() -> None:
    # The limit is set inside a user namespace of the test's own; the machine's stays as it is.
    script = """
import os
from pathlib import Path
from tamoe.topology import linux
uid, gid = os.getuid(), os.getgid()
linux.unshare(linux.CLONE_NEWUSER)
linux.map_own_user(uid, gid)
Path("/proc/sys/user/max_net_namespaces").write_text("0")
"""
    process, mark = start("-c", script + EMULATE, "2x1:100mbit", "true", env={"PYTHONPATH": path()})
    out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == ("", 2)
    assert re.fullmatch(
        r"the kernel refuses an emulated cluster \(No space left on device\): "
        r"user.max_net_namespaces is 0 \(as root: sysctl -w user.max_net_namespaces=15000\)\. "
        r"Without namespaces there is still the simulated run: .*\n",
        err,
    )
    until(lambda: not marked(mark), 2)


@pytest.mark.parametrize(
    ("settings", "user", "expected"),
    [
        ({"user/max_user_namespaces": "0"}, 1000, "user.max_user_namespaces is 0"),
        ({"kernel/unprivileged_userns_clone": "0"}, 1000, "kernel.unprivileged_userns_clone is 0"),
        (
            {"kernel/apparmor_restrict_unprivileged_userns": "1"},
            1000,
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ({"kernel/unprivileged_userns_clone": "0"}, 0, "security module|seccomp"),
        ({}, 1000, "security module|seccomp"),
    ],
)
def test_refusal_finds_the_setting(
    settings: dict[str, str], user: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namespaces, "_setting", settings.get)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    error = namespaces.refusal(PermissionError(1, "Operation not permitted"))
    assert isinstance(error, EmulationError)
    assert re.search(expected, str(error))
    assert "simulated run" in str(error)
    assert error.exit_code == 2
