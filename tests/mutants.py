"""Bugs planted in the kernels, one at a time: does a check notice?

Run all: ``python -m tests.mutants``. Each bug is a change of the sources' text. The changed sources
are built for the CPU and tried on the checks of :mod:`tests.mutant_checks` in a process of their
own, with the sanitizers where the bug is one of memory; a bug that only the GPU build can show is
tried on the static check. The unchanged sources must pass all of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tamoe.kernel_build import build_shim, source_folder
from tamoe.kernel_check import check_kernels
from tamoe.kernel_library import load
from tamoe.topology.errors import KernelError
from tests.mutant_checks import CHECKS

TIMEOUT_S = 120


@dataclass(frozen=True)
class Mutant:
    """``how``: "plain", "sanitized", or "static", which compiles with nvcc."""

    name: str
    file: str
    before: str
    after: str
    check: str
    how: str = "plain"


SYNC = "    __syncthreads();\n"
FINISH = (
    SYNC
    + """    if (thread == 0) {
        __threadfence_system();
        auto* finished = reinterpret_cast<unsigned long long*>(peers.finished());
        last = atomicAdd(finished, 1ull) == gridDim.x - 1;
        if (last) *finished = 0;
        __threadfence_system();
    }
"""
    + SYNC
)
MUTANTS = [
    Mutant(
        "no barrier behind the histogram",
        "build_index.cu",
        SYNC + "    for (int i = static_cast<int>(threadIdx.x); i < num_keys; i += "
        "static_cast<int>(blockDim.x))\n        base[",
        "    for (int i = static_cast<int>(threadIdx.x); i < num_keys; i += "
        "static_cast<int>(blockDim.x))\n        base[",
        "index",
    ),
    Mutant(
        "shared counts not zeroed",
        "build_index.cu",
        "i < warps * num_keys; i += threads) next[i] = 0;",
        "i < warps * num_keys; i += threads) (void)i;",
        "index",
    ),
    Mutant(
        "no barrier behind the zeroing",
        "build_index.cu",
        "next[i] = 0;\n" + SYNC,
        "next[i] = 0;\n",
        "index",
    ),
    Mutant(
        "no barrier before the totals of the warps are read",
        "build_index.cu",
        "        __syncthreads();\n        const int32_t before",
        "        const int32_t before",
        "index",
    ),
    Mutant(
        "no barrier at the end of the scan's loop",
        "build_index.cu",
        "        __syncthreads();  // carry was read, warp_total too\n",
        "",
        "index",
    ),
    Mutant(
        "a barrier that 200 threads reach",
        "build_index.cu",
        SYNC + "    const int64_t first = static_cast<int64_t>(blockIdx.x) * tile;\n",
        "    if (threadIdx.x < 200) __syncthreads();\n"
        "    const int64_t first = static_cast<int64_t>(blockIdx.x) * tile;\n",
        "index",
    ),
    Mutant(
        "match_any of all lanes within a branch",
        "build_index.cu",
        "const unsigned same = __match_any_sync(port::all_lanes, own);",
        "const unsigned same = own >= 0 ? __match_any_sync(port::all_lanes, own) : 0u;",
        "index",
    ),
    Mutant(
        "lanes of one key lined up backwards",
        "build_index.cu",
        "__popc(same & ((1u << lane) - 1))",
        "__popc(same) - 1 - __popc(same & ((1u << lane) - 1))",
        "index",
    ),
    Mutant(
        "shared memory one row short",
        "build_index.cu",
        "threads, shared * warps, stream",
        "threads, shared * warps - shared, stream",
        "index",
        "sanitized",
    ),
    Mutant(
        "one word behind the row",
        "copy_rows.cu",
        "for (int64_t word = lane; word < words;",
        "for (int64_t word = lane; word <= words;",
        "copy",
        "sanitized",
    ),
    Mutant(
        "16 bytes at any address",
        "copy_rows.cu",
        "if (fits(16))",
        "if (row_bytes % 16 == 0)",
        "copy",
        "sanitized",
    ),
    Mutant(
        "offsets of rows in 32 bits",
        "copy_rows.cu",
        "in + from * words",
        "in + static_cast<int32_t>(from * words)",
        "far",
    ),
    Mutant(
        "products not rounded",
        "combine.cu",
        "term = port::widen(port::narrow(port::multiply(term, factor), T{}));",
        "term = port::multiply(term, factor);",
        "sums",
    ),
    Mutant(
        "sums that start with 0",
        "combine.cu",
        "j == begin ? term : port::add(sum[i], term)",
        "port::add(sum[i], term)",
        "sums",
    ),
    Mutant(
        "a term of the warp's sum left out",
        "combine.cu",
        "by = port::warp_size / 2; by > 0; by /= 2) dot +=",
        "by = port::warp_size / 2; by > 1; by /= 2) dot +=",
        "sums",
    ),
    Mutant(
        "flags raised before all threads have stored",
        "peer_store.cu",
        FINISH,
        FINISH.replace(SYNC, ""),
        "peers",
    ),
    Mutant(
        "flags raised by every block",
        "peer_store.cu",
        "last = atomicAdd(finished, 1ull) == gridDim.x - 1;",
        "last = 1;",
        "peers",
    ),
    Mutant(
        "rows read without waiting",
        "peer_store.cu",
        "if (wait_for(peers.data_flag(peers.me, peer), peers)) {",
        "if (true) {",
        "peers",
    ),
    Mutant(
        "a flag stored without release",
        "port.h",
        'asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value)',
        'asm volatile("st.global.u64 [%0], %1;" ::"l"(address), "l"(value)',
        "peer_store.cu",
        "static",
    ),
    Mutant(
        "a flag stored without an order",
        "port.h",
        "st.release.sys.global.u64 [%0], %1;",
        "st.relaxed.sys.global.u64 [%0], %1;",
        "peer_store.cu",
        "static",
    ),
    Mutant(
        "a flag read without an order",
        "port.h",
        "ld.acquire.sys.global.u64 %0, [%1];",
        "ld.relaxed.sys.global.u64 %0, [%1];",
        "peer_store.cu",
        "static",
    ),
    Mutant(
        "a copy in words of 8 bytes",
        "port.h",
        "ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];",
        "{ ld.global.v2.u32 {%0, %1}, [%4]; ld.global.v2.u32 {%2, %3}, [%4 + 8]; }",
        "copy_rows.cu",
        "static",
    ),
]


@contextlib.contextmanager
def planted(mutant: Mutant | None) -> Iterator[Path]:
    """A folder with the sources and one bug in them (None: unchanged)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in source_folder().glob("*.*"):
            shutil.copy(path, folder)
        if mutant is not None:
            path = folder / mutant.file
            text = path.read_text()
            assert text.count(mutant.before) == 1, f"{mutant.name}: the text to change has changed"
            path.write_text(text.replace(mutant.before, mutant.after))
        yield folder


def notice(mutant: Mutant | None, check: str, how: str) -> str | None:
    """What a check says about a mutant (None: unchanged sources); None if it finds nothing."""
    with planted(mutant) as folder:
        if how == "static":
            return _static(folder, check)
        return _run(build_shim(sanitize=how == "sanitized", folder=folder), check, how)


def _static(folder: Path, unit: str) -> str | None:
    for path in folder.glob("*.cu"):
        if path.name != unit:  # what the check then misses, it names; that is left out below
            path.unlink()
    try:
        check_kernels(["sm_90"], folder=folder)
    except KernelError as error:
        found = [part for part in str(error).split("; ") if "there is no" not in part]
        return found[0] if found and "for sm_90 has" in found[0] else None
    return None


def _run(library: Path, check: str, how: str) -> str | None:
    if how == "plain":
        return _in_a_fork(library, check)
    files = [_file_of_gxx(name) for name in ("libasan.so", "libstdc++.so")]
    environment = os.environ | {"LD_PRELOAD": " ".join(files), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "tests.mutants", "--try", check, str(library)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    return _verdict(result.returncode, result.stderr)


def _in_a_fork(library: Path, check: str) -> str | None:
    """A fork has torch already; this process has run no op that would have started threads."""
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            signal.alarm(TIMEOUT_S)
            code = 1
            try:
                attempt(check, library)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        return _verdict(code, errors.read())


def _verdict(code: int, text: str) -> str | None:
    if code == 0:
        return None
    lines = text.strip().splitlines() or [f"ended by signal {-code}"]
    named = [line for line in lines if "ERROR: Add" in line or "runtime error" in line]
    return (named or lines[-1:])[0][:160]


def attempt(check: str, library: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    CHECKS[check](load(library))


def _file_of_gxx(name: str) -> str:
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--try"]:
        attempt(arguments[1], Path(arguments[2]))
        return 0
    wanted = [m for m in MUTANTS if not arguments or any(word in m.name for word in arguments)]
    if shutil.which("nvcc") is None:
        wanted = [m for m in wanted if m.how != "static"]
        print("without nvcc: the bugs that only its output shows are left out")
    failures = 0
    for check, how in sorted({(mutant.check, mutant.how) for mutant in wanted}):
        said = notice(None, check, how)
        failures += said is not None
        print(
            f"{'passes' if said is None else 'FAILS ' + said}: unchanged, {check}, {how}",
            flush=True,
        )
    caught = 0
    for mutant in wanted:
        start = time.perf_counter()
        said = notice(mutant, mutant.check, mutant.how)
        caught += said is not None
        verdict = "MISSED" if said is None else "caught"
        seconds = time.perf_counter() - start
        print(f"{verdict}: {mutant.name} ({mutant.how}, {seconds:.1f} s): {said}", flush=True)
    print(f"{caught} of {len(wanted)} planted bugs caught")
    return int(failures > 0 or caught < len(wanted))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
