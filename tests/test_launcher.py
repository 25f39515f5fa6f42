"""Programs that start ranks: their own functions, Ctrl-C, and nothing left when they are killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import kill_started, marked, start, until

pytestmark = pytest.mark.ranks


@pytest.fixture(autouse=True)
def _no_program_outlives_its_test() -> Iterator[None]:
    yield
    kill_started()


SCRIPT = """
import sys, time
from tamoe.topology.rank_protocol import Kind, raised, send
from tamoe.topology.ranks import run_ranks
def double(rank): return 2 * rank
def hang(rank):
    import os
    if rank == 0 and os.fork() == 0:      # a daemon, as servers and loaders leave
        os.setsid()
        os.execvp("sleep", ["sleep", "1000"])
    import torch.distributed as dist
    dist.barrier()
    if rank == 0: print("running", flush=True)
    time.sleep(1000)
"""
GUARDED = SCRIPT + "if __name__ == '__main__': print(run_ranks(2, double))\n"
UNGUARDED = SCRIPT + "print(run_ranks(2, double))\n"
HANGING = SCRIPT + "if __name__ == '__main__': run_ranks(3, hang)\n"


def _started(tmp_path: Path, text: str) -> Any:
    script = tmp_path / "script.py"
    script.write_text(text)
    return start(str(script), env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})


def test_functions_of_a_script_work_when_it_guards_its_start(tmp_path: Path) -> None:
    process, _ = _started(tmp_path, GUARDED)
    out, err = process.communicate(timeout=120)
    assert (out, err, process.returncode) == ("[0, 2]\n", "", 0)


def test_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    process, mark = _started(tmp_path, UNGUARDED)
    _, err = process.communicate(timeout=120)
    assert "module '__main__' starts ranks when it is imported; put what starts them" in err
    until(lambda: not marked(mark), 2)


def test_functions_of_the_command_line_are_refused(tmp_path: Path) -> None:
    text = "from tamoe.topology.ranks import run_ranks\ndef f(rank): ...\nrun_ranks(1, f)"
    process, _ = start("-c", text, env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    _, err = process.communicate(timeout=120)
    assert "fn 'f' is defined in an interactive session, on the command line" in err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_launcher_is_ended(tmp_path: Path, number: int) -> None:
    process, mark = _started(tmp_path, HANGING)
    assert process.stdout.readline() == "running\n"
    # Launcher, server, job, process 1, three ranks, and the daemon once it is a program.
    until(lambda: len(marked(mark)) == 8, 10)
    os.kill(process.pid, number)
    until(lambda: not marked(mark), 2)
    _, err = process.communicate()
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)
