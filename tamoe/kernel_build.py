"""Compiling the kernels: for GPUs with nvcc, for the CPU (tests) with g++, into a cache.

The cache is ``$TAMOE_CACHE_DIR``, else ``tamoe`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. The name
of a library holds a hash of the sources, the compiler's version and the command, so a changed file,
another nvcc or another architecture never meets an old library. Nothing here loads torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tamoe.topology.errors import InputError, KernelError

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
OLDEST_NVCC = (11, 8)  # the first that knows sm_90
STRICT = ("-Werror", "all-warnings", "-Xptxas", "-Werror,-warn-spills,-warn-lmem-usage")
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static")
# Contracting a product and a sum into one operation would change their bits.
GXX_FLAGS = ("-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread")
GXX_WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror")
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)
TIMEOUT_S = 900


def source_folder() -> Path:
    """Folder of the kernels: ``cuda/`` in a checkout and in an installed package."""
    return Path(__file__).parent / "cuda"


def sources(folder: Path | None = None) -> list[Path]:
    """Every file that a build reads, by name; :class:`KernelError` if they are not there.

    >>> [path.name for path in sources()][:2]
    ['build_index.cu', 'combine.cu']
    """
    folder = folder or source_folder()
    found = sorted(path for path in folder.glob("*") if path.suffix in (".cu", ".h"))
    if not found:
        raise KernelError(f"no kernel sources in {folder}; reinstall tamoe")
    return found


def sources_digest(folder: Path | None = None) -> str:
    """What tells these sources from others, in 24 characters; a library for GPUs carries it."""
    digest = hashlib.sha256()
    for path in sources(folder):
        _add(digest, path)
    return f"s{digest.hexdigest()[:23]}"  # the compiler takes it for a name


def _add(digest: hashlib._Hash, path: Path) -> None:
    digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")


def cache_folder() -> Path:
    """A folder to write libraries to, made if need be.

    Where the usual one is read-only, a private one in the system's folder for temporary files.
    """
    usual = _usual_folder()
    if usual is not None and _writable(usual):
        return usual
    private = Path(tempfile.gettempdir()) / f"tamoe-{os.getuid()}"
    if _writable(private):
        status = private.stat()
        # Whoever else could write there could have tamoe load a library of theirs.
        if status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return private
    raise KernelError(
        f"no folder to build the kernels in: neither {usual or 'a home'} nor {private} can be "
        f"written by this user alone; set TAMOE_CACHE_DIR to a folder of yours"
    )


def _usual_folder() -> Path | None:
    if chosen := os.environ.get("TAMOE_CACHE_DIR"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "tamoe"
    try:
        return Path.home() / ".cache" / "tamoe"
    except RuntimeError:  # a user that the system does not know
        return None


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


# ---- compilers ----------------------------------------------------------------------------------


def find_nvcc() -> str:
    """Path of nvcc: ``$CUDACXX``, ``$CUDA_HOME/bin``, the path, ``/usr/local/cuda/bin``."""
    home = os.environ.get("CUDA_HOME")
    candidates = [os.environ.get("CUDACXX"), f"{home}/bin/nvcc" if home else None, "nvcc"]
    for candidate in (*candidates, "/usr/local/cuda/bin/nvcc"):
        path = shutil.which(candidate) if candidate else None
        if path:
            return path
    raise KernelError(
        "nvcc was not found, and the kernels are not built; install the CUDA toolkit or set "
        "CUDA_HOME. Without it tamoe runs its plain PyTorch implementations"
    )


def nvcc_version(nvcc: str) -> tuple[int, int]:
    """Major and minor version; :class:`KernelError` if it is too old or says none."""
    text = run_tool([nvcc, "--version"])
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        raise KernelError(f"{nvcc} --version names no release: {text.strip()[-200:]!r}")
    version = int(found[1]), int(found[2])
    if version < OLDEST_NVCC:
        raise KernelError(
            f"{nvcc} is version {version[0]}.{version[1]}; allowed: {OLDEST_NVCC[0]}."
            f"{OLDEST_NVCC[1]} or newer. Set CUDA_HOME to a newer toolkit"
        )
    return version


def check_architectures(nvcc: str, architectures: Sequence[str]) -> None:
    """Raise if a name is no architecture, or one that this nvcc does not know."""
    known = re.findall(r"sm_\d+[a-z]?", run_tool([nvcc, "--list-gpu-code"]))
    for architecture in architectures:
        if not re.fullmatch(r"sm_\d+[a-z]?", architecture):
            raise InputError(f"architecture is {architecture!r}; allowed: such as sm_90")
        if architecture not in known:
            raise KernelError(
                f"{nvcc} does not know {architecture}, only {', '.join(known)}; use a newer "
                f"toolkit or another architecture"
            )


def find_gxx() -> str:
    """Path of g++: ``$CXX`` or the path."""
    path = shutil.which(os.environ.get("CXX") or "g++")
    if path is None:
        raise KernelError("g++ was not found; install it, or set CXX, to build for the CPU")
    return path


# ---- builds -------------------------------------------------------------------------------------


def build_cuda(
    architectures: Sequence[str],
    *,
    ptx: bool = False,
    output: Path | None = None,
    folder: Path | None = None,
) -> Path:
    """Library for GPUs of these architectures, from the cache or built now.

    Parameters
    ----------
    architectures
        Such as ``["sm_90"]``.
    ptx
        Add PTX of the highest one, which newer GPUs translate when they first load it.
    output
        Write the library here rather than into the cache.
    folder
        Of the sources, if they are other ones than tamoe's.

    Raises
    ------
    KernelError
        There is no nvcc, it is too old, it fails, or nothing can be written.
    """
    if not architectures:
        raise InputError("architectures are none; allowed: at least one, such as sm_90")
    nvcc = find_nvcc()
    version = nvcc_version(nvcc)
    check_architectures(nvcc, architectures)
    numbers = sorted({name.removeprefix("sm_") for name in architectures}, key=_number)
    codes = [f"arch=compute_{number},code=sm_{number}" for number in numbers]
    if ptx:
        codes.append(f"arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    flags = [*NVCC_FLAGS, *(part for code in codes for part in ("-gencode", code))]
    flags.append(f"-DTAMOE_SOURCES={sources_digest(folder)}")
    if output is not None:
        _compile([nvcc, *flags, "-shared", *_units(folder)], output)
        return output
    command = [nvcc, *flags, "-shared"]
    more = [os.environ.get(f"NVCC_{name}_FLAGS", "") for name in ("PREPEND", "APPEND")]
    compiler = f"nvcc {version[0]}.{version[1]} {more}"  # nvcc obeys these, too
    return _cached("-cuda.so", command, compiler, sources(folder))


def build_shim(*, sanitize: bool = False, folder: Path | None = None, optimise: int = 1) -> Path:
    """Library that runs the kernels on the CPU, for tests; of another folder's sources if given.

    Each file is compiled by itself, so that only what changed is compiled again.
    """
    gxx = find_gxx()
    version = run_tool([gxx, "--version"])
    shared = [*GXX_FLAGS, *(SANITIZERS if sanitize else ())]
    compile_unit = [gxx, *shared, f"-O{optimise}", *GXX_WARNINGS, "-x", "c++", "-c"]
    files = sources(folder)
    headers = [path for path in files if path.suffix == ".h"]
    units = [path for path in files if path.suffix == ".cu"]
    objects = [_cached(".o", compile_unit, version, [unit, *headers]) for unit in units]
    return _cached("-shim.so", [gxx, *shared, "-shared"], version, objects)


def write_ptx(folder: Path, architecture: str = "compute_90") -> list[Path]:
    """Write each op's PTX to a folder, to inspect or to run elsewhere."""
    nvcc = find_nvcc()
    nvcc_version(nvcc)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for unit in _units():
        output = folder / f"{Path(unit).stem}.ptx"
        _compile([nvcc, *NVCC_FLAGS, f"-arch={architecture}", "-ptx", unit], output)
        written.append(output)
    return written


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name))


def _units(folder: Path | None = None) -> list[str]:
    return [str(path) for path in sources(folder) if path.suffix == ".cu"]


def _cached(suffix: str, command: list[str], compiler: str, files: list[Path]) -> Path:
    """What a command makes of files, from the cache or made now; headers count for the key only."""
    digest = hashlib.sha256("\0".join([compiler, *command]).encode())
    for path in files:
        _add(digest, path)
    output = cache_folder() / f"{digest.hexdigest()[:24]}{suffix}"
    if not output.exists():
        with _locked(output.with_suffix(".lock")):
            if not output.exists():  # another process may have built it meanwhile
                _compile([*command, *(str(path) for path in files if path.suffix != ".h")], output)
    return output


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file closes, as that of a killed process
        except OSError as error:
            raise KernelError(
                f"cannot lock {path}: {error.strerror}; set TAMOE_CACHE_DIR to another folder"
            ) from None
        yield


def _compile(command: Sequence[str], output: Path) -> None:
    """Compile beside the output and rename, so that nobody loads half a library."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as folder:
            built = Path(folder) / output.name
            run_tool([*command, "-o", str(built)])
            os.replace(built, output)
    except OSError as error:
        raise KernelError(
            f"cannot write {output}: {error.strerror}; choose another folder"
        ) from None


def run_tool(command: Sequence[str]) -> str:
    """What a program printed, both streams; :class:`KernelError` if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except FileNotFoundError:
        raise KernelError(f"{command[0]} was not found") from None
    except OSError as error:
        raise KernelError(f"{command[0]} cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise KernelError(f"{command[0]} took more than {TIMEOUT_S} s") from None
    if result.returncode:
        text = (result.stderr or result.stdout).strip()
        named = [line for line in text.splitlines() if re.search(r"error|warning", line)]
        text = "\n".join(named) or text  # ptxas -v has a hundred lines that are neither
        raise KernelError(f"{' '.join(command)} failed:\n{text[-4000:]}")
    return result.stdout + result.stderr
