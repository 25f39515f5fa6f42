"""What can be said about the GPU build without a GPU: no warning, no spill, 16-byte accesses.

Registers, stack and spills are what ptxas reports. Loads and stores are read from the machine code
with nvdisasm: the toolkit's, or PyPI's ``nvidia-cuda-nvdisasm``. Nothing here says how fast it is.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tamoe.kernel_build import (
    ARCHITECTURES,
    NVCC_FLAGS,
    STRICT,
    check_architectures,
    find_nvcc,
    nvcc_version,
    run_tool,
    sources,
)
from tamoe.topology.errors import KernelError

# Which kernels must load and store 16 bytes in one instruction; a weight's gradient only loads.
WIDE = {
    "copy_rows_kernel<uint4>": (True, True),
    "store_kernel<uint4>": (True, True),
    **{
        f"{kernel}_kernel<{element}, {weighted}>": (True, True)
        for kernel in ("combine", "grad_row")
        for element in ("float, 4", "double, 2", "__nv_bfloat16, 8", "__half, 8")
        for weighted in ("true", "false")
    },
    **{
        f"grad_weight_kernel<{element}>": (True, False)
        for element in ("float, 4", "double, 2", "__nv_bfloat16, 8", "__half, 8")
    },
}
# Which kernels must wait for flags, and raise them, in an order that other devices see.
ORDERED = {
    "post_kernel": (False, True),
    "wait_kernel": (True, False),
    **{f"store_kernel<{word}>": (True, True) for word in ("uint8", "uint32", "uint4")},
}


@dataclass(frozen=True)
class KernelFacts:
    """One kernel as compiled for one architecture."""

    kernel: str
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    wide_loads: int | None = None  # None: there is no nvdisasm
    wide_stores: int | None = None
    system_loads: int | None = None  # that acquire, and below release, for other devices, too
    system_stores: int | None = None


def check_kernels(
    architectures: Sequence[str] = ARCHITECTURES,
    *,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[KernelFacts]:
    """Compile every kernel for every architecture and report what came out.

    Parameters
    ----------
    architectures
        Such as ``["sm_90"]``.
    folder
        Folder of the sources; None is tamoe's own.
    progress
        Told what is being compiled.

    Raises
    ------
    KernelError
        There is no nvcc or it is too old; a warning, a spill or local memory, which count as
        errors; or :func:`problems` of the result, all of them.
    """
    nvcc = find_nvcc()
    nvcc_version(nvcc)
    check_architectures(nvcc, architectures)
    nvdisasm, facts = find_nvdisasm(), []
    for architecture in architectures:
        for unit in (path for path in sources(folder) if path.suffix == ".cu"):
            progress(f"{unit.name} for {architecture}")
            facts += _compile(nvcc, nvdisasm, unit, architecture)
    found = problems(facts)
    if found:
        raise KernelError("the kernels were compiled, but " + "; ".join(found))
    return facts


def problems(facts: Sequence[KernelFacts]) -> list[str]:
    """What is wrong with compiled kernels; empty if nothing is."""
    found = []
    for fact in facts:
        name = f"{fact.kernel} for {fact.architecture}"
        if fact.stack_bytes or fact.spill_bytes:
            found.append(f"{name} uses {fact.stack_bytes} B of stack, spills {fact.spill_bytes} B")
        loads, stores = WIDE.get(fact.kernel, (False, False))
        if (loads and fact.wide_loads == 0) or (stores and fact.wide_stores == 0):
            found.append(
                f"{name} has {fact.wide_loads} loads and {fact.wide_stores} stores of 16 bytes"
            )
        loads, stores = ORDERED.get(fact.kernel, (False, False))
        if (loads and fact.system_loads == 0) or (stores and fact.system_stores == 0):
            found.append(
                f"{name} has {fact.system_loads} loads and {fact.system_stores} stores that are "
                f"ordered against other devices"
            )
    missing = (set(WIDE) | set(ORDERED)) - {fact.kernel for fact in facts}
    if missing:
        found.append(f"there is no {', '.join(sorted(missing))}")
    return found


def find_nvdisasm() -> str | None:
    """Path of nvdisasm, from the path or from NVIDIA's Python package, or None."""
    found = shutil.which("nvdisasm")
    if found is None:
        package = importlib.util.find_spec("nvidia")
        for location in (package.submodule_search_locations or ()) if package else ():
            candidates = sorted(Path(location).glob("*/bin/nvdisasm"))
            found = str(candidates[-1]) if candidates else found
    return found


def _compile(nvcc: str, nvdisasm: str | None, unit: Path, architecture: str) -> list[KernelFacts]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{unit.stem}.cubin"
        flags = [*NVCC_FLAGS, *STRICT, "-Xptxas", "-v", f"-arch={architecture}", "-cubin"]
        text = run_tool([nvcc, *flags, str(unit), "-o", str(cubin)])
        facts = _ptxas_facts(text, architecture)
        if nvdisasm is None:
            return list(facts.values())
        code = run_tool([nvdisasm, "-c", str(cubin)])
    for section in re.split(r"^\.text\.", code, flags=re.MULTILINE)[1:]:
        name = section[: section.index(":")]
        if name in facts:
            acquires, releases = _ordered(section)
            facts[name] = replace(
                facts[name],
                wide_loads=len(re.findall(r"\bLDG?\.[\w.]*\b128\b", section)),
                wide_stores=len(re.findall(r"\bSTG?\.[\w.]*\b128\b", section)),
                system_loads=acquires,
                system_stores=releases,
            )
    return list(facts.values())


def _ordered(section: str) -> tuple[int, int]:
    """Loads that acquire and stores that release, in a kernel's machine code.

    Relaxed ones look alike but for what comes with them: behind an acquire the first-level cache is
    emptied, as behind a full fence; before a release there is a fence of its own.
    """

    def count(pattern: str) -> int:
        return len(re.findall(rf"\b{pattern}", section))

    loads, stores = (count(rf"{name}G?\.[\w.]*STRONG\.SYS") for name in ("LD", "ST"))
    emptied = count(r"CCTL\.IVALL") - count(r"MEMBAR\.SC\.SYS")
    return max(min(loads, emptied), 0), min(stores, count(r"MEMBAR\.ALL\.SYS"))


def _ptxas_facts(text: str, architecture: str) -> dict[str, KernelFacts]:
    """Facts by mangled name, from what ``ptxas -v`` prints."""
    facts = {}
    for part in text.split("Compiling entry function '")[1:]:
        mangled = part[: part.index("'")]

        def number(pattern: str, part: str = part) -> int:
            found = re.search(pattern, part)
            return int(found[1]) if found else 0

        facts[mangled] = KernelFacts(
            kernel=_readable(mangled),
            architecture=architecture,
            registers=number(r"Used (\d+) registers"),
            shared_bytes=number(r"(\d+) bytes smem"),
            stack_bytes=number(r"(\d+) bytes stack frame"),
            spill_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        )
    return facts


_TYPES = {"f": "float", "d": "double", "h": "uint8", "t": "uint16", "j": "uint32", "m": "uint64"}
_TYPES |= {"i": "int32", "l": "int64", "y": "uint64", "x": "int64"}


def _readable(mangled: str) -> str:
    """A kernel's name with its template's arguments, of the few kinds that the kernels use.

    >>> _readable("_ZN12_GLOBAL__N_114combine_kernelI13__nv_bfloat16Li8ELb1EEEvPKT_")
    'combine_kernel<__nv_bfloat16, 8, true>'
    """
    found = re.search(r"([a-z][a-z_]*_kernel)(.*)", mangled)
    if found is None:
        return mangled
    name, rest = found[1], found[2]
    arguments = []
    if rest.startswith("I"):
        rest = rest[1:]
        while not rest.startswith("E"):
            if value := re.match(r"L([ib])(\d+)E", rest):
                number = value[2]
                arguments.append(number if value[1] == "i" else ("false", "true")[int(number)])
                rest = rest[value.end() :]
            elif length := re.match(r"\d+", rest):
                end = length.end() + int(length[0])
                arguments.append(rest[length.end() : end])
                rest = rest[end:]
            else:
                arguments.append(_TYPES.get(rest[0], rest[0]))
                rest = rest[1:]
    return f"{name}<{', '.join(arguments)}>" if arguments else name
