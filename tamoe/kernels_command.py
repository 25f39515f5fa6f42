"""What ``tamoe kernels`` does: the library of a release, PTX, and the static check."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tamoe.kernel_build import ARCHITECTURES, build_cuda, write_ptx
from tamoe.kernel_check import KernelFacts, check_kernels, find_nvdisasm


def build(architectures: Sequence[str] | None, output: Path, ptx: Path | None) -> dict[str, Any]:
    """Write a library or PTX; what was written, with sizes."""
    if ptx is not None:
        written = write_ptx(ptx)
        compiled = ["compute_90"]
    else:
        compiled = list(architectures or ARCHITECTURES)
        written = [build_cuda(compiled, ptx=not architectures, output=output)]
    return {
        "architectures": compiled,
        "files": [{"path": str(path), "bytes": path.stat().st_size} for path in written],
    }


def check(architectures: Sequence[str] | None) -> list[KernelFacts]:
    """Compile and check; tells what it is at on a terminal."""

    def progress(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    facts = check_kernels(architectures or ARCHITECTURES, progress=progress)
    progress("")
    return facts


def print_facts(facts: Sequence[KernelFacts]) -> None:
    """One line a kernel: its largest registers and its 16-byte accesses over all architectures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("kernel")
    for title in ("registers", "shared B", "spilled B", "16-byte loads", "stores"):
        table.add_column(title, justify="right")
    for kernel in dict.fromkeys(fact.kernel for fact in facts):
        same = [fact for fact in facts if fact.kernel == kernel]
        table.add_row(
            kernel,
            _span([fact.registers for fact in same]),
            _span([fact.shared_bytes for fact in same]),
            _span([fact.spill_bytes for fact in same]),
            _span([fact.wide_loads for fact in same]),
            _span([fact.wide_stores for fact in same]),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    names = ", ".join(dict.fromkeys(fact.architecture for fact in facts))
    print(f"compiled for {names} without a warning, a spill or local memory")
    if find_nvdisasm() is None:
        print("loads and stores were not read: pip install nvidia-cuda-nvdisasm")


def _span(values: Sequence[int | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return str(min(known)) if min(known) == max(known) else f"{min(known)}–{max(known)}"
