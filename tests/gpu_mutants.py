"""Planted bugs tried on a GPU: those of tests/mutants.py, and three that the CPU build cannot show.

Run: ``python -m tests.gpu_mutants [WORD…]``. The changed sources are built with nvcc and tried on
the tests of tests/test_gpu.py, each bug in a process of its own, since some end the GPU's context.
A GPU runs some races right by luck, so a bug that is missed is named and no failure; cuda/README.md
says which.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from tamoe.kernel_build import build_cuda
from tests.mutants import FINISH, MUTANTS, SYNC, Mutant, planted

TIMEOUT_S = 200
AT_ONCE = 6
TESTS = {
    "index": "test_index",
    "copy": "test_copies",
    "far": "32_bits",
    "sums": "sums",
    "peers": "other_processes",
}
ONLY_HERE = [
    Mutant(
        "counts added without an atomic",
        "build_index.cu",
        "atomicAdd(&count[key[c]], 1);",
        "count[key[c]] += 1;",
        "index",
    ),
    Mutant(
        "a warp that does not wait before it counts on",
        "build_index.cu",
        "        __syncwarp();\n        if (own >= 0 && rank == 0)",
        "        if (own >= 0 && rank == 0)",
        "index",
    ),
    Mutant(
        "flags raised before all threads of a block have stored",
        "peer_store.cu",
        FINISH,
        FINISH.removeprefix(SYNC),
        "peers",
    ),
]


def notice(mutant: Mutant | None, check: str) -> str | None:
    """What the tests say about a bug (None: unchanged sources); None if they pass."""
    major, minor = torch.cuda.get_device_capability()
    with planted(mutant) as folder:
        library = build_cuda([f"sm_{major}{minor}"], folder=folder)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    try:
        result = subprocess.run(
            [*command, "tests/test_gpu.py", "-k", TESTS[check]],
            env=os.environ | {"TAMOE_KERNELS": str(library)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {TIMEOUT_S} s"
    if result.returncode == 0:
        return None
    errors = [line for line in result.stdout.splitlines() if line.startswith("E  ")]
    return (errors or result.stdout.splitlines()[-1:])[0][:160]


def main(words: list[str]) -> int:
    mutants = [m for m in (*MUTANTS, *ONLY_HERE) if m.how != "static"]
    wanted = [m for m in mutants if not words or any(word in m.name for word in words)]
    unchanged = [(None, check) for check in TESTS]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tries = [*unchanged, *((m, m.check) for m in wanted)]
        said = list(pool.map(lambda one: notice(*one), tries))
    for (_, check), text in zip(unchanged, said, strict=False):
        print(f"{'passes' if text is None else 'FAILS ' + text}: unchanged, {check}")
    found = said[len(unchanged) :]
    for mutant, text in zip(wanted, found, strict=True):
        print(f"{'MISSED' if text is None else 'caught'}: {mutant.name}: {text}")
    caught = sum(text is not None for text in found)
    print(f"{caught} of {len(wanted)} planted bugs caught")
    return int(any(text is not None for text in said[: len(unchanged)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
