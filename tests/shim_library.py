"""The kernels' library for the CPU, compiled once into the cache, and its schedules."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tamoe.kernel_build import build_shim
from tamoe.kernel_calls import on_library
from tamoe.kernel_library import KernelLibrary, load

SEEDS = (0, 1, 2, 3)  # 0 is the fixed schedule
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def one_unit(folder: Path, text: str = "int tamoe_x() { return 1; }") -> Path:
    """A folder of sources with one file."""
    folder.mkdir(exist_ok=True)
    (folder / "unit.cu").write_text(text)
    return folder


@functools.cache
def shim() -> KernelLibrary:
    """With TAMOE_TEST_SANITIZE set, the one that names what it does wrong to memory."""
    if os.environ.get("TAMOE_TEST_SANITIZE"):
        return load(build_shim(sanitize=True))
    return load(build_shim())


@contextlib.contextmanager
def on_shim(seed: int = 0, library: KernelLibrary | None = None) -> Iterator[KernelLibrary]:
    """Operators on CPU tensors run the kernels, threads and blocks in a seed's order."""
    library = library or shim()
    library.call("shim_seed", seed)
    try:
        with on_library(library):
            yield library
    finally:
        library.call("shim_seed", 0)
