"""What of tamoe works on this machine: every check tries the thing and names the fix."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tamoe.topology.errors import TamoeError

_TRY_TIMEOUT_S = 120.0
_TRIED_FILES = 4096
_ENOUGH_MEMORY_BYTES = 6e9  # what the demo may take
_KERNEL_FIX = "as root: modprobe {module}; a kernel without it needs another build"


@dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    name: str
    ok: bool  # it was tried and it worked
    detail: str  # what was seen
    fix: str  # what to do about it; empty where all is well


def diagnose() -> list[Check]:
    """Try everything that tamoe may use on this machine.

    Starts processes and takes a few seconds, since nothing is called good that was not tried.

    Returns
    -------
    list of Check
        Emulated clusters (namespaces, tbf, netem), process groups (gloo, NCCL), GPUs (NVML, nvcc),
        limits (open files, memory, cores). What has no use without a GPU says so in its fix.

    Examples
    --------
    >>> [check.name for check in diagnose() if check.name in ("gloo", "cores")]
    ['gloo', 'cores']
    """
    kernel = _tried_in_fresh_process()
    return [
        kernel["namespaces"],
        kernel["tbf"],
        kernel["netem"],
        _guarded("gloo", _gloo),
        _guarded("nccl", _nccl),
        _guarded("nvml", _nvml),
        _guarded("nvcc", _nvcc),
        kernel["open files"],
        _guarded("memory", _memory),
        _guarded("cores", _cores),
    ]


def _guarded(name: str, check: Callable[[], tuple[str, str]]) -> Check:
    """Run a check that returns what it saw and the fix, empty when all is well."""
    try:
        detail, fix = check()
    except TamoeError as error:
        return Check(name, False, str(error).splitlines()[0], "see the message")
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}", "see the message")
    return Check(name, not fix, detail, fix)


# ---- the kernel, in a fresh process with one thread -------------------------------------------


def _tried_in_fresh_process() -> dict[str, Check]:
    names = ("namespaces", "tbf", "netem", "open files")
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from tamoe.topology import doctor; "
        f"doctor.print_kernel_checks()"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_TRY_TIMEOUT_S
        )
        found = {line[0]: Check(*line) for line in map(json.loads, done.stdout.splitlines())}
        problem = (done.stderr.strip().splitlines() or ["no answer"])[-1]
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        found, problem = {}, f"{type(error).__name__}: {error}"
    unknown = {name: Check(name, False, problem, "see the message") for name in names}
    return unknown | found


def print_kernel_checks() -> None:
    """Print one JSON line a check; for a process of its own, which it moves to namespaces."""
    for check in (_guarded("open files", _open_files), *_network_checks()):
        print(json.dumps([check.name, check.ok, check.detail, check.fix]), flush=True)


def _network_checks() -> list[Check]:
    from tamoe.topology.namespaces import enter_cluster_namespaces

    def namespaces() -> tuple[str, str]:
        enter_cluster_namespaces()
        network = _network("2x1")
        return f"2 nodes and a switch built in {network.setup_s:.2f} s", ""

    def tbf() -> tuple[str, str]:
        network = _network("2x1:100mbit")
        return f"{len(network.report().links)} directions of links shaped", ""

    found = _guarded("namespaces", namespaces)
    if not found.ok:
        reason = "not tried: it needs namespaces"
        return [found, *(Check(name, False, reason, found.detail) for name in ("tbf", "netem"))]
    shaped = _guarded("tbf", tbf)
    return [found, shaped, _guarded("netem", _netem)]


def _network(spec: str) -> Any:
    from tamoe.topology import linux
    from tamoe.topology.netns import build_error
    from tamoe.topology.network import Network
    from tamoe.topology.spec import ClusterSpec

    linux.unshare(linux.CLONE_NEWNET)
    try:
        return Network(ClusterSpec.parse(spec))
    except Exception as error:
        raise build_error(error) from None


def _netem() -> tuple[str, str]:
    from pyroute2 import IPRoute, NetlinkError

    from tamoe.topology import linux

    linux.unshare(linux.CLONE_NEWNET)
    with IPRoute() as ip:
        try:
            ip.tc("add", "netem", index=1, delay=1000)
        except NetlinkError as error:
            reason = os.strerror(error.code)
            detail = f"the kernel has no netem ({reason}): latency is not shaped, rates are"
            return detail, _KERNEL_FIX.format(module="sch_netem")
    return "a delay was set", ""


def _open_files() -> tuple[str, str]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    opened: list[int] = []
    with suppress(OSError):
        while len(opened) < _TRIED_FILES:
            opened.append(os.open(os.devnull, os.O_RDONLY))
    for descriptor in opened:
        os.close(descriptor)
    detail = f"soft limit {soft}, hard limit {hard}, {len(opened)} opened at once"
    enough = len(opened) >= 1000
    return detail, "" if enough else "raise the hard limit: ulimit -Hn 4096, or limits.conf"


# ---- process groups ---------------------------------------------------------------------------


def _gloo() -> tuple[str, str]:
    import time

    from tamoe.topology.ranks import run_ranks

    started = time.perf_counter()
    sums = run_ranks(2, sum_of_ranks, "gloo", timeout_s=_TRY_TIMEOUT_S)
    if sums != [1.0, 1.0]:
        raise TamoeError(f"2 ranks summed 0 and 1 to {sums}")
    return f"2 ranks summed in {time.perf_counter() - started:.1f} s, torch's import included", ""


def sum_of_ranks(rank: int, backend: str) -> float:
    """All-reduce each rank's number with a backend; runs in ranks."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    group = dist.new_group(backend=backend)
    value = torch.full((1,), float(rank), device=device)
    dist.all_reduce(value, group=group)
    return value.item()


def _nccl() -> tuple[str, str]:
    import torch

    from tamoe.topology.ranks import run_ranks

    unneeded = "only needed with GPUs: "
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA",
            unneeded + "a CUDA build of torch",
        )
    if not torch.cuda.is_available():
        return "torch sees no GPU", unneeded + "check nvidia-smi and CUDA_VISIBLE_DEVICES"
    if not torch.distributed.is_nccl_available():
        return f"torch {torch.__version__} is built without NCCL", unneeded + "another build"
    ranks = min(torch.cuda.device_count(), 2)
    total = run_ranks(ranks, sum_of_ranks, "nccl", timeout_s=_TRY_TIMEOUT_S)[0]
    if total != ranks * (ranks - 1) / 2:
        raise TamoeError(f"{ranks} ranks summed their numbers to {total}")
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return f"NCCL {version}, {ranks} of {torch.cuda.device_count()} GPUs summed", ""


# ---- GPUs -------------------------------------------------------------------------------------


def _nvml() -> tuple[str, str]:
    try:
        import pynvml
    except ImportError:
        return "pynvml is not installed", "pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"{error}", "only needed with GPUs: install the NVIDIA driver"
    names = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index))
                names.append(name.decode() if isinstance(name, bytes) else name)
            except pynvml.NVMLError as error:
                names.append(f"GPU {index}: {error}")
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return f"{len(names)} GPUs: {', '.join(names)}", "" if names else "the driver sees no GPU"


def _nvcc() -> tuple[str, str]:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(home, "bin") for home in homes if home]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        return (
            "nvcc is not found",
            "only needed to build kernels for GPUs: install the CUDA toolkit",
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "try.cu")
        source.write_text("__global__ void k(float* x) { x[threadIdx.x] = 1.f; }\n")
        command = [nvcc, "-c", str(source), "-o", str(Path(folder, "try.o"))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TRY_TIMEOUT_S)
    if done.returncode != 0:
        first = (done.stderr.strip().splitlines() or ["no message"])[0]
        return f"{nvcc} fails: {first}", "install a host compiler that this nvcc supports"
    return f"{nvcc} compiled a kernel", ""


# ---- limits -----------------------------------------------------------------------------------


def _memory() -> tuple[str, str]:
    from tamoe.topology.linux import available_memory_bytes
    from tamoe.topology.ranks import RANK_BYTES, SERVER_BYTES

    available = available_memory_bytes()
    if available is None:
        return "free memory is not known (no /proc/meminfo)", "run on Linux"
    ranks = max(int((available - SERVER_BYTES) / RANK_BYTES), 0)
    enough = available >= _ENOUGH_MEMORY_BYTES
    detail = f"{available / 1e9:.1f} GB free, room for about {ranks} ranks"
    return detail, "" if enough else "the demo's 8 ranks want up to 6 GB: close programs, or fewer"


def _cores() -> tuple[str, str]:
    cores = len(os.sched_getaffinity(0))
    fix = "" if cores >= 2 else "emulated ranks share it and get slow: use 2 cores or more"
    return f"{cores} cores for this process", fix
