"""run_ranks: results, failures, deaths, timeouts, and that nothing is ever left."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from numpy import random as numpy_random  # so that the server imports it before it forks

from tamoe.topology import launcher, ranks as ranks_module
from tamoe.topology.errors import InputError, RankError, RankTimeoutError
from tamoe.topology.rank_protocol import Kind, raised, send
from tamoe.topology.ranks import run_ranks
from tests.processes import MARK, can_mount_proc, marked

pytestmark = pytest.mark.ranks


# ---- functions for ranks: at the top level, since they travel by name --------------------------


def numbered(rank: int, *args: Any) -> tuple[Any, ...]:
    return (rank, *args)


def summed(rank: int) -> float:
    import torch
    import torch.distributed as dist

    value = torch.full((3,), float(rank))
    dist.all_reduce(value)
    return value[0].item()


def surroundings(rank: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False)
    store.set(f"seen{rank}", "yes")
    return {
        **{name: os.environ[name] for name in names},
        "interface": os.environ["GLOO_SOCKET_IFNAME"],
        "threads": torch.get_num_threads(),
        "backend": dist.get_backend(),
        "of_caller": os.environ.get("TAMOE_TEST_VALUE"),
        "directory": os.getcwd(),
        "interrupt": signal.getsignal(signal.SIGINT),
    }


def fails_in(rank: int, bad: int, error: Exception) -> None:
    import torch.distributed as dist

    if rank == bad:
        raise error
    dist.barrier()


def killed_in(rank: int, bad: int, number: int) -> None:
    import torch.distributed as dist

    if rank == bad:
        os.kill(os.getpid(), number)
    dist.barrier()


def exits_in(rank: int, bad: int, code: int) -> None:
    if rank == bad:
        os._exit(code)


def waits_in(rank: int, *slow: int) -> None:
    if rank in slow:
        threading.Event().wait()


def backward(rank: int) -> float:
    import torch

    weight = torch.ones(64, 64, requires_grad=True)
    (torch.ones(64, 64) @ weight).sum().backward()
    assert weight.grad is not None
    return weight.grad.sum().item()


def returns_a_lambda(rank: int) -> Any:
    return lambda: rank


def calls_run_ranks(rank: int) -> None:
    run_ranks(1, numbered)


def talks(rank: int) -> None:
    sys.stdout.write(f"out of {rank}\n")  # in one piece; print may write the newline apart
    sys.stderr.write(f"err of {rank}\n")


def random_number(rank: int) -> float:
    return float(numpy_random.random())


def leaves_a_daemon(rank: int) -> None:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", "1000"])
        os._exit(0)


class UnreadableError(Exception):
    """Pickles, and cannot be read back: two arguments, one kept."""

    def __init__(self, a: str, b: str) -> None:
        super().__init__(a)


# ---- what works ----------------------------------------------------------------------------


def own_number(rank: int) -> tuple[int, int, bool]:
    listed = {int(name) for name in os.listdir("/proc") if name.isdecimal()}
    return os.getpid(), int(os.readlink("/proc/self")), os.getpid() in listed


def test_proc_shows_a_rank_under_its_own_number() -> None:
    """CUDA does not start where it does not."""
    found = run_ranks(2, own_number)
    if any(number != shown for number, shown, _ in found) and not can_mount_proc():
        pytest.skip("this kernel or container lets no process mount /proc")
    for number, shown, listed in found:
        assert number == shown and listed


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_results_come_by_rank_and_the_group_works(ranks: int) -> None:
    assert run_ranks(ranks, summed) == [ranks * (ranks - 1) / 2] * ranks
    assert run_ranks(ranks, numbered, "a", {"b": 1}) == [(r, "a", {"b": 1}) for r in range(ranks)]


def test_ranks_have_the_environment_of_torchrun_and_of_the_caller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_ranks(1, numbered)  # the server is older than what follows
    monkeypatch.setenv("TAMOE_TEST_VALUE", "mine")
    monkeypatch.chdir(tmp_path)
    for rank, seen in enumerate(run_ranks(3, surroundings)):
        assert seen == {
            "RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "interface": "lo",
            "threads": 1,
            "backend": "gloo",
            "of_caller": "mine",
            "directory": str(tmp_path),
            "interrupt": signal.SIG_IGN,
        }


def test_output_goes_where_the_caller_s_goes_now(capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(2, talks)
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["out of 0", "out of 1"]
    assert sorted(err.splitlines()) == ["err of 0", "err of 1"]  # and no warnings


def test_big_arguments_and_results_pass() -> None:
    blob = os.urandom(3_000_000)
    assert run_ranks(2, numbered, blob) == [(0, blob), (1, blob)]


def test_partial_of_a_top_level_function_is_a_function() -> None:
    assert run_ranks(2, partial(fails_in, bad=9, error=ValueError())) == [None, None]


def test_autograd_works_in_forked_ranks() -> None:
    assert run_ranks(2, backward) == [64.0**3] * 2


def test_ranks_do_not_share_a_stream_of_random_numbers() -> None:
    assert len(set(run_ranks(3, random_number))) == 3


def test_no_port_is_fixed() -> None:
    with socket.create_server(("127.0.0.1", 29500)) if _free(29500) else socket.socket():
        assert run_ranks(2, summed) == [1.0, 1.0]


def _free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_server_is_kept_between_runs_and_started_again_when_dead() -> None:
    run_ranks(1, numbered)
    assert launcher._server is not None
    first = launcher._server.process
    with pytest.raises(RankError):
        run_ranks(2, fails_in, 1, ValueError("no"))
    run_ranks(1, numbered)
    assert launcher._server.process is first
    first.kill()
    first.wait()
    assert run_ranks(1, numbered) == [(0,)]
    assert launcher._server.process is not first


def test_runs_leak_no_descriptors() -> None:
    run_ranks(2, numbered)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        run_ranks(2, numbered)
        with pytest.raises(RankError):
            run_ranks(2, exits_in, 0, 3)
    assert len(os.listdir("/proc/self/fd")) == before


def test_module_that_starts_threads_on_import_is_imported_by_each_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = """
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
def threads(rank): return threading.active_count()
"""
    (tmp_path / "threaded_on_import.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import threaded_on_import

    # In a fork of a process with that thread it would be gone.
    assert run_ranks(2, threaded_on_import.threads) == [2, 2]
    assert run_ranks(2, threaded_on_import.threads) == [2, 2]


def test_ranks_run_the_file_that_the_launcher_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for value in (1, 2):  # the server has imported the first when the second comes
        folder = tmp_path / str(value)
        folder.mkdir()
        (folder / "of_a_name.py").write_text(f"def value(rank): return {value}\n")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "of_a_name", raising=False)
        assert run_ranks(1, importlib.import_module("of_a_name").value) == [value]


# ---- what fails, and how it says so ----------------------------------------------------------


def test_exception_comes_back_with_rank_traceback_and_cause() -> None:
    with pytest.raises(RankError, match="rank 1 raised ValueError: no such luck") as caught:
        run_ranks(3, fails_in, 1, ValueError("no such luck"))
    assert caught.value.rank == 1
    assert "in fails_in" in str(caught.value)
    assert "rank_process" not in str(caught.value)  # the traceback begins in the user's code
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.exit_code == 3


def test_exception_that_cannot_be_read_back_still_has_its_text() -> None:
    with pytest.raises(RankError, match="rank 0 raised UnreadableError: a") as caught:
        run_ranks(1, partial(_raise_unreadable))
    assert caught.value.__cause__ is None


def _raise_unreadable(rank: int) -> None:
    raise UnreadableError("a", "b")


@pytest.mark.parametrize("bad", [0, 2])
def test_rank_that_a_signal_killed_is_named_and_not_its_peers(bad: int) -> None:
    with pytest.raises(RankError, match=rf"rank {bad} was killed by signal 9 \(SIGKILL") as caught:
        run_ranks(3, killed_in, bad, signal.SIGKILL)
    assert caught.value.rank == bad


def test_death_is_blamed_even_if_its_victims_complain_first() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = ranks_module._request(3, numbered, (), 60.0)
    with ours, theirs:
        complaint = pickle.dumps(raised(RuntimeError("connection closed"), "..."))
        send(theirs, 0, Kind.RAISED, complaint)
        send(theirs, 2, Kind.EXITED, b"-11")
        with pytest.raises(
            RankError, match=r"rank 2 was killed by signal 11 \(SIGSEGV\)"
        ) as caught:
            ranks_module._Collector(ours, request).results()
    assert "(rank 0 failed after it)" in str(caught.value)


def test_rank_that_ends_early_is_named() -> None:
    with pytest.raises(RankError, match="rank 1 ended with exit code 4 before its function"):
        run_ranks(2, exits_in, 1, 4)
    with pytest.raises(RankError, match="rank 0 ended with exit code 0"):
        run_ranks(2, exits_in, 0, 0)


def test_timeout_names_the_ranks_that_had_not_finished() -> None:
    with pytest.raises(RankTimeoutError, match=r"ranks 1, 3 had not finished.* 0\.5 s") as caught:
        run_ranks(4, waits_in, 1, 3, timeout_s=0.5)
    assert caught.value.exit_code == 3
    assert isinstance(caught.value, TimeoutError)


def test_functions_without_a_name_are_refused_before_anything_starts() -> None:
    def local(rank: int) -> None: ...

    for fn in (lambda rank: rank, local, partial(local)):
        with pytest.raises(InputError, match="a lambda or a function inside a function"):
            run_ranks(2, fn)


def test_what_does_not_pickle_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be pickled"):
        run_ranks(1, numbered, threading.Lock())
    with pytest.raises(RankError, match="fn returned a function that cannot be pickled"):
        run_ranks(1, returns_a_lambda)


@pytest.mark.parametrize("ranks", [0, -1, True, 1.5, None])
def test_number_of_ranks_is_checked(ranks: Any) -> None:
    with pytest.raises(InputError, match="cluster_or_world_size"):
        run_ranks(ranks, numbered)


def test_timeout_is_checked() -> None:
    with pytest.raises(InputError, match="timeout_s is 0; allowed: > 0"):
        run_ranks(1, numbered, timeout_s=0)


def test_more_ranks_than_memory_holds_are_refused_with_numbers() -> None:
    with pytest.raises(InputError, match=r"10000000 ranks need about 500000\.\d GB .* at most \d+"):
        run_ranks(10_000_000, numbered)


def test_ranks_start_from_the_main_thread_only() -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            run_ranks(1, numbered)
        except InputError as error:
            caught.append(error)

    thread = threading.Thread(target=run, name="side")
    thread.start()
    thread.join()
    assert "'side'" in str(caught[0])


def test_ranks_cannot_start_ranks() -> None:
    with pytest.raises(RankError, match="run_ranks was called inside rank 0"):
        run_ranks(1, calls_run_ranks)


def test_module_that_the_ranks_cannot_import_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "only_here.py").write_text("def f(rank): return rank\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here

    (tmp_path / "only_here.py").write_text("raise OSError('gone')\n")
    with pytest.raises(InputError, match=r"cannot import its module 'only_here' \(OSError: gone\)"):
        run_ranks(1, only_here.f)


def test_daemons_of_ranks_end_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher.stop_server()  # the next one has the mark
    monkeypatch.setenv(MARK, "daemons")
    run_ranks(2, leaves_a_daemon)
    assert marked("daemons") == [launcher._server.process.pid]  # type: ignore[union-attr]
    launcher.stop_server()
    assert marked("daemons") == []


def test_ranks_start_fast_once_the_server_runs() -> None:
    run_ranks(1, numbered)
    started = time.monotonic()
    run_ranks(8, summed)
    # Seen: 0.15 s idle, 0.6 s under load; importing torch in each rank takes over 10 s.
    assert time.monotonic() - started < 6
