"""The kernels' C interface, bound with ctypes: one library serves every Python and torch.

A GPU's library is the file that ``$TAMOE_KERNELS`` names. Without that it is the one that a
release carries in ``cuda/``, if it is of the sources beside it and has code for the GPU, else what
nvcc makes at the first use. That is kept in a cache, where nvcc's version is part of the key, so
nvcc has to be there, too. ``TAMOE_KERNELS=off`` uses none. Where there is none that runs on the
GPU, a warning says why and the plain PyTorch implementations run.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tamoe.kernel_build import build_cuda, source_folder, sources_digest
from tamoe.topology.errors import KernelError

ABI = 3
TOO_LARGE = -2
MAX_PEERS = 64
HANDLE_BYTES = 64
RELEASED = "libtamoe.so"  # beside the sources, in a release's wheel

_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "abi": (_int, []),
    "sources": (ctypes.c_char_p, []),
    "message": (ctypes.c_char_p, [_int]),
    "use_device": (_int, [_int]),
    "ready": (_int, []),
    "shim_seed": (_int, [ctypes.c_uint64]),
    "build_index_workspace": (_long, [_long] * 3),
    "build_index": (
        _int,
        [_pointer, _int, _long, _long, _long, _pointer, _long, *[_pointer] * 8],
    ),
    "copy_rows": (
        _int,
        [_pointer, _long, _pointer, _long, _pointer, _pointer, _long, _long, _pointer],
    ),
    "share_memory": (_int, [_long, ctypes.POINTER(_pointer), _pointer]),
    "map_memory": (_int, [_pointer, ctypes.POINTER(_pointer)]),
    "unmap_memory": (_int, [_pointer]),
    "peer_header_bytes": (_long, [_long]),
    "peer_store": (
        _int,
        [
            *[_pointer, _long, _long, ctypes.c_uint64],  # memory, peers, me, epoch
            *[_pointer, _pointer, *[_long] * 4],  # row, source, sizes
            *[_pointer] * 3,  # counts, status
            *[ctypes.c_uint64, _pointer],  # timeout, stream
        ],
    ),
    "combine": (
        _int,
        [
            _int,
            _pointer,
            _long,
            _pointer,
            _pointer,
            _long,
            _pointer,
            _pointer,
            _long,
            _long,
            _pointer,
        ],
    ),
    "combine_backward": (
        _int,
        [
            _int,
            _pointer,
            _pointer,
            _long,
            _pointer,
            _pointer,
            _long,
            *[_pointer] * 3,
            _long,
            _long,
            _pointer,
        ],
    ),
}


@dataclass(frozen=True, eq=False)
class KernelLibrary:
    """A loaded library; ``functions`` are its C functions by name, without the prefix."""

    path: Path
    functions: dict[str, Any]

    def code(self, name: str, *arguments: Any) -> int:
        """Call a function and return its code."""
        return int(self.functions[name](*arguments))

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; :class:`KernelError` with its message unless it returns 0."""
        code = self.code(name, *arguments)
        if code:
            raise KernelError(f"kernel {name} failed ({code}): {self.message(code)}")

    def message(self, code: int) -> str:
        """What a code means."""
        text: bytes = self.functions["message"](code)
        return text.decode(errors="replace")


def load(path: Path) -> KernelLibrary:
    """Load a library; :class:`KernelError` if it cannot be, or has another interface."""
    try:
        handle = ctypes.CDLL(str(path))
        functions = {}
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(handle, f"tamoe_{name}")
            function.restype, function.argtypes = result, arguments
            functions[name] = function
    except (OSError, AttributeError) as error:
        raise KernelError(f"cannot load the kernels from {path}: {error}") from None
    abi = int(functions["abi"]())
    if abi != ABI:
        raise KernelError(f"{path} has interface {abi}; allowed: {ABI}. Build it from this tamoe")
    return KernelLibrary(path, functions)


_lock = threading.Lock()


def for_gpu(architecture: str, device: int | None = None) -> KernelLibrary | None:
    """Library for a GPU's architecture, such as ``"sm_90"``, or None with a warning.

    With the number of a ``device``, which is the current one of this thread, also what does not run
    there is refused.
    """
    with _lock:
        return _for_gpu(architecture, device, os.environ.get("TAMOE_KERNELS", ""))


@functools.cache
def _for_gpu(architecture: str, device: int | None, chosen: str) -> KernelLibrary | None:
    if chosen == "off":
        return None
    released = source_folder() / RELEASED
    ways: list[Callable[[], KernelLibrary]] = [lambda: load(build_cuda([architecture]))]
    if chosen:
        ways = [lambda: load(Path(chosen))]
    elif released.exists():
        ways.insert(0, lambda: _of_these_sources(load(released)))
    problems = []
    for way in ways:
        try:
            return _running(way(), device)
        except KernelError as error:
            problems.append(str(error))
    warnings.warn(
        f"tamoe's kernels are not used, plain PyTorch is: {'; '.join(problems)}",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _of_these_sources(library: KernelLibrary) -> KernelLibrary:
    if library.functions["sources"]().decode() != sources_digest():
        raise KernelError(f"{library.path} was built from other sources than those beside it")
    return library


def _running(library: KernelLibrary, device: int | None) -> KernelLibrary:
    if device is not None:
        library.call("use_device", device)
        library.call("ready")
    return library
