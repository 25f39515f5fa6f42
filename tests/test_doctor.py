"""tamoe doctor: nothing is called good that was not tried, and what is bad has its fix."""

from __future__ import annotations

import json
import os
import resource
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tamoe.topology import doctor, linux, ranks
from tamoe.topology.doctor import Check
from tamoe.topology.errors import RankError
from tests.processes import kill_started, start


@pytest.fixture(autouse=True)
def _no_program_outlives_its_test() -> Iterator[None]:
    yield
    kill_started()


NAMES = [
    "namespaces",
    "tbf",
    "netem",
    "gloo",
    "nccl",
    "nvml",
    "nvcc",
    "open files",
    "memory",
    "cores",
]
KERNEL = "from tamoe.topology import doctor; doctor.print_kernel_checks()"


def kernel_checks(prelude: str = "", **options: Any) -> dict[str, Check]:
    """What the fresh process of the doctor finds after some other code ran in it."""
    env = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process, _ = start("-c", f"{prelude}\n{KERNEL}", env=env, **options)
    out, err = process.communicate(timeout=120)
    assert err == ""
    return {line[0]: Check(*line) for line in map(json.loads, out.splitlines())}


@pytest.mark.emulated
def test_every_check_has_a_detail_and_a_fix_exactly_when_it_is_bad() -> None:
    found = doctor.diagnose()
    assert [check.name for check in found] == NAMES
    for check in found:
        assert check.detail
        assert bool(check.fix) != check.ok
    good = {check.name for check in found if check.ok}
    assert {"namespaces", "tbf", "gloo"} <= good  # the other tests here need them


@pytest.mark.emulated
def test_refused_namespaces_are_bad_and_take_what_needs_them_along() -> None:
    prelude = """
import os
from pathlib import Path
from tamoe.topology import linux
uid, gid = os.getuid(), os.getgid()
linux.unshare(linux.CLONE_NEWUSER)
linux.map_own_user(uid, gid)
Path("/proc/sys/user/max_net_namespaces").write_text("0")
"""
    found = kernel_checks(prelude)
    assert not found["namespaces"].ok
    assert "user.max_net_namespaces is 0" in found["namespaces"].detail
    for name in ("tbf", "netem"):
        assert not found[name].ok
        assert found[name].detail == "not tried: it needs namespaces"


def test_missing_netem_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyroute2
    from pyroute2.netlink.exceptions import NetlinkError

    class Refusing:
        def __enter__(self) -> Refusing:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def tc(self, *_: object, **__: object) -> None:
            raise NetlinkError(2, "RTNETLINK answers: No such file or directory")

    monkeypatch.setattr("tamoe.topology.linux.unshare", lambda _flags: None)
    monkeypatch.setattr(pyroute2, "IPRoute", Refusing)
    detail, fix = doctor._netem()
    assert detail.startswith("the kernel has no netem (No such file or directory): latency")
    assert "sch_netem" in fix


def test_low_limit_of_open_files_is_bad() -> None:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))

    found = kernel_checks(preexec_fn=lower)["open files"]
    assert not found.ok
    assert "hard limit 200" in found.detail
    assert "ulimit -Hn" in found.fix


def test_kernel_checks_that_do_not_answer_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    found = doctor._tried_in_fresh_process()
    assert not any(check.ok for check in found.values())
    assert set(found) == {"namespaces", "tbf", "netem", "open files"}


def test_gloo_is_bad_when_ranks_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RankError("rank 1 raised OSError: no route\n\nIn rank 1: ...", 1)

    monkeypatch.setattr(ranks, "run_ranks", fail)
    check = doctor._guarded("gloo", doctor._gloo)
    assert not check.ok
    assert check.detail == "rank 1 raised OSError: no route"


def fake_nvml(names: list[Any]) -> types.ModuleType:
    class NVMLError(Exception): ...

    def name_of(index: int) -> Any:
        if isinstance(names[index], Exception):
            raise NVMLError(str(names[index]))
        return names[index]

    module = types.ModuleType("pynvml")
    module.__dict__.update(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(names),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=name_of,
    )
    return module


@pytest.mark.parametrize(
    ("names", "ok", "detail"),
    [
        (["H100", b"H100"], True, "2 GPUs: H100, H100"),
        (["A100", OSError("lost")], True, "2 GPUs: A100, GPU 1: lost"),
        ([], False, "0 GPUs: "),
    ],
)
def test_nvml_survives_calls_that_fail(
    names: list[Any], ok: bool, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(names))
    check = doctor._guarded("nvml", doctor._nvml)
    assert (check.ok, check.detail) == (ok, detail)


def test_nvml_without_its_package_or_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    check = doctor._guarded("nvml", doctor._nvml)
    assert (check.ok, check.fix) == (False, "pip install nvidia-ml-py")
    module = fake_nvml([])

    def no_driver() -> None:
        raise module.NVMLError("Driver Not Loaded")

    module.nvmlInit = no_driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    check = doctor._guarded("nvml", doctor._nvml)
    assert (check.ok, check.detail) == (False, "Driver Not Loaded")


@pytest.mark.parametrize(
    ("script", "ok", "detail"),
    [
        ("exit 0", True, "compiled a kernel"),
        ("echo unsupported compiler >&2; exit 1", False, "fails: unsupported compiler"),
    ],
)
def test_nvcc_is_good_only_when_it_compiles(
    script: str, ok: bool, detail: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nvcc").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check = doctor._guarded("nvcc", doctor._nvcc)
    assert check.ok == ok
    assert detail in check.detail


def test_missing_nvcc_is_bad_and_only_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda *args, **kwargs: None)
    check = doctor._guarded("nvcc", doctor._nvcc)
    assert not check.ok
    assert check.fix.startswith("only needed to build kernels for GPUs")


def test_too_little_memory_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "available_memory_bytes", lambda: 1_000_000_000)
    check = doctor._guarded("memory", doctor._memory)
    assert not check.ok
    assert check.detail == "1.0 GB free, room for about 15 ranks"  # (1 GB - 250 MB) / 50 MB


def test_check_that_breaks_is_bad_and_does_not_break_the_rest() -> None:
    def broken() -> tuple[str, str]:
        raise ZeroDivisionError("unexpected")

    assert doctor._guarded("x", broken) == Check(
        "x", False, "ZeroDivisionError: unexpected", "see the message"
    )
