"""Building the kernels: the cache, refusals, the command line, static checks, sanitizers, bugs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tamoe import kernel_build
from tamoe.cli import main
from tamoe.kernel_build import (
    build_cuda,
    build_shim,
    cache_folder,
    check_architectures,
    find_nvcc,
    nvcc_version,
    sources_digest,
)
from tamoe.kernel_check import KernelFacts, problems
from tamoe.kernel_library import load
from tamoe.topology.errors import InputError, KernelError
from tests.mutants import MUTANTS
from tests.shim_library import needs_gxx, one_unit

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TAMOE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# ---- cache ---------------------------------------------------------------------------------------


@needs_gxx
def test_only_what_changed_is_compiled_again(tmp_path, cache, monkeypatch):
    calls: list[list[str]] = []
    run = kernel_build.run_tool
    monkeypatch.setattr(kernel_build, "run_tool", lambda c: calls.append(c) or run(c))

    def compiled() -> int:
        number = sum("-o" in call for call in calls)
        calls.clear()
        return number

    folder = one_unit(tmp_path / "sources")
    (folder / "other.cu").write_text("int tamoe_y() { return 2; }")
    first = build_shim(folder=folder)
    assert compiled() == 3  # two units, one library
    assert build_shim(folder=folder) == first
    assert compiled() == 0
    one_unit(folder, "int tamoe_x() { return 3; }")
    assert build_shim(folder=folder) != first
    assert compiled() == 2
    (folder / "port.h").write_text("// every unit may read it")
    build_shim(folder=folder)
    assert compiled() == 3
    build_shim(folder=folder, optimise=0)
    assert compiled() == 3
    assert not list(cache.glob(".build-*"))


def test_many_processes_compile_once(tmp_path, cache, monkeypatch):
    log = tmp_path / "log"
    fake = 'while [ "$1" != -o ]; do shift; done; sleep 0.2; echo x > "$2"; echo x >> ' + str(log)
    monkeypatch.setenv("CXX", program(tmp_path / "g++", f'[ "$1" = --version ] || {{ {fake}; }}'))
    folder = one_unit(tmp_path / "sources")
    script = f"from tamoe.kernel_build import *; build_shim(folder=Path({str(folder)!r}))"
    started = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(4)]
    assert [process.wait() for process in started] == [0] * 4
    assert log.read_text().split() == ["x", "x"]  # the unit, the library


@needs_gxx
def test_a_file_that_does_not_compile_is_named(tmp_path, cache):
    with pytest.raises(KernelError, match=r"unit.cu.* error: .*'?nonsense"):
        build_shim(folder=one_unit(tmp_path / "sources", "int x = nonsense;"))


def test_no_sources(tmp_path):
    with pytest.raises(KernelError, match=r"no kernel sources in .*; reinstall tamoe"):
        build_shim(folder=tmp_path)


def test_a_cache_that_cannot_be_written_gives_way_to_a_private_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TAMOE_CACHE_DIR", "/proc/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    private = cache_folder()
    assert private == tmp_path / f"tamoe-{os.getuid()}"
    assert private.stat().st_mode & 0o777 == 0o700
    private.chmod(0o777)  # another user could put a library there
    with pytest.raises(KernelError, match=r"neither /proc/nowhere nor .*; set TAMOE_CACHE_DIR"):
        cache_folder()


def test_a_folder_that_knows_no_locks(tmp_path):
    with (
        pytest.raises(KernelError, match=r"cannot lock .*; set TAMOE_CACHE_DIR to another folder"),
        kernel_build._locked(tmp_path),  # a folder in place of a file
    ):
        pass


def test_a_user_without_a_home_gets_a_private_folder(tmp_path, monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TAMOE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache_folder() == tmp_path / f"tamoe-{os.getuid()}"


# ---- nvcc ----------------------------------------------------------------------------------------


def test_without_nvcc(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(KernelError, match=r"nvcc was not found.*plain PyTorch"):
        find_nvcc()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo release 11.2, V11.2.67", "is version 11.2; allowed: 11.8 or newer"),
        ("echo hello", "names no release: 'hello'"),
        ("exit 3", "--version failed"),
    ],
)
def test_an_nvcc_that_will_not_do(tmp_path, monkeypatch, text, message):
    monkeypatch.setenv("CUDACXX", program(tmp_path / "nvcc", text))
    with pytest.raises(KernelError, match=message):
        build_cuda(["sm_90"])
    assert nvcc_version(program(tmp_path / "new", "echo release 12.8,")) == (12, 8)


def test_a_compiler_that_is_no_program(tmp_path, monkeypatch):
    file = tmp_path / "nvcc"
    file.write_bytes(b"\x00\x01 of another processor")
    file.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(file))
    with pytest.raises(KernelError, match=r"nvcc cannot be run: Exec format error"):
        build_cuda(["sm_90"])


def test_flags_that_nvcc_takes_from_the_environment_have_builds_of_their_own(
    tmp_path, cache, monkeypatch
):
    make = 'while [ "$1" != -o ]; do shift; done; echo x > "$2"'
    text = f'case "$1" in --version) echo release 12.8,;; --list*) echo sm_90;; *) {make};; esac'
    monkeypatch.setenv("CUDACXX", program(tmp_path / "nvcc", text))
    monkeypatch.delenv("NVCC_PREPEND_FLAGS", raising=False)
    built = set()
    for flags in ("", "-use_fast_math", "-G"):
        monkeypatch.setenv("NVCC_APPEND_FLAGS", flags)
        built.add(build_cuda(["sm_90"]))
    assert len(built) == 3
    monkeypatch.delenv("NVCC_APPEND_FLAGS")
    assert build_cuda(["sm_90"]) in built


def test_architectures_that_are_refused(tmp_path):
    nvcc = program(tmp_path / "nvcc", "echo sm_80; echo sm_90; echo sm_90a")
    check_architectures(nvcc, ["sm_80", "sm_90a"])
    with pytest.raises(KernelError, match="does not know sm_120, only sm_80, sm_90, sm_90a"):
        check_architectures(nvcc, ["sm_120"])
    with pytest.raises(InputError, match="architecture is 'hopper'; allowed: such as sm_90"):
        check_architectures(nvcc, ["hopper"])
    with pytest.raises(InputError, match="architectures are none"):
        build_cuda([])


# ---- commands ------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["kernels", *arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.mark.slow
@needs_nvcc
def test_a_library_for_gpus_loads_without_one(tmp_path, capsys):
    file = tmp_path / "libtamoe.so"
    code, out, _ = run(capsys, "build", "--arch", "sm_90", "-o", str(file), "--json")
    assert code == 0
    built = json.loads(out)
    assert built["files"] == [{"path": str(file), "bytes": file.stat().st_size}]
    library = load(file)
    assert library.functions["sources"]().decode() == sources_digest()
    assert library.message(35) == "CUDA driver version is insufficient for CUDA runtime version"
    if not torch.cuda.is_available():
        with pytest.raises(KernelError, match=r"kernel use_device failed \(\d+\): CUDA|no CUDA"):
            library.call("use_device", 0)


@pytest.mark.slow
@needs_nvcc
def test_ptx_of_every_unit(tmp_path, capsys):
    code, out, _ = run(capsys, "build", "--ptx", str(tmp_path / "ptx"))
    assert code == 0
    names = {path.name for path in (tmp_path / "ptx").iterdir()}
    assert names == {f"{path.stem}.ptx" for path in (ROOT / "cuda").glob("*.cu")}
    text = (tmp_path / "ptx" / "peer_store.ptx").read_text()
    assert ".target sm_90" in text
    assert text.count("st.release.sys") == 4 and text.count("ld.acquire.sys") == 4
    assert len(out.splitlines()) == len(names)


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_nvcc
def test_static_check(capsys):
    """The most used and the newest, to save time; ``tamoe kernels check`` takes all seven."""
    wanted = [word for sm in ("sm_90", "sm_120") for word in ("--arch", sm)]
    code, out, err = run(capsys, "check", *wanted, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert len({(fact["kernel"], fact["architecture"]) for fact in facts}) == len(facts)
    assert max(fact["registers"] for fact in facts) <= 64  # four blocks a multiprocessor
    assert all(fact["stack_bytes"] == fact["spill_bytes"] == 0 for fact in facts)
    assert all(fact["wide_loads"] is not None for fact in facts), "nvdisasm is not installed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--arch", "hopper"], "architecture is 'hopper'; allowed: such as sm_90"),
        (["check", "--arch", "sm_1"], "does not know sm_1"),
        (["build", "--arch", "sm_90", "-o", "/proc/x/lib.so"], "cannot write /proc/x/lib.so"),
    ],
)
@needs_nvcc
def test_bad_input_is_one_message_and_exit_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_problems_of_compiled_kernels():
    good = [
        KernelFacts(name, "sm_90", 32, 0, 0, 0, 4, 4, 1, 1)
        for name in sorted({*kernel_check_names()})
    ]
    assert problems(good) == []
    assert "there is no wait_kernel" in problems([f for f in good if f.kernel != "wait_kernel"])[0]
    spilled = KernelFacts("scan_kernel", "sm_80", 32, 0, 16, 8)
    assert problems([*good, spilled]) == ["scan_kernel for sm_80 uses 16 B of stack, spills 8 B"]
    narrow = KernelFacts("copy_rows_kernel<uint4>", "sm_80", 32, 0, 0, 0, 0, 2, 0, 0)
    assert "has 0 loads and 2 stores of 16 bytes" in problems([*good, narrow])[0]
    plain = KernelFacts("post_kernel", "sm_80", 32, 0, 0, 0, 0, 0, 0, 0)
    assert "0 stores that are ordered" in problems([*good, plain])[0]


def kernel_check_names() -> set[str]:
    from tamoe.kernel_check import ORDERED, WIDE

    return set(ORDERED) | set(WIDE)


# ---- sanitizers and planted bugs -----------------------------------------------------------------


@pytest.fixture(scope="module")
def sanitized() -> Callable[..., subprocess.CompletedProcess[str]]:
    build_shim(sanitize=True)  # here: a compiler does not start under the preload

    def run_tests(*arguments: str) -> subprocess.CompletedProcess[str]:
        files = [
            subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
            for name in ("libasan.so", "libstdc++.so")
        ]
        environment = os.environ | {
            "LD_PRELOAD": " ".join(files),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much to its end
            "TAMOE_TEST_SANITIZE": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:faulthandler"]
        return subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT
        )

    return run_tests


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_gxx
def test_kernels_under_the_sanitizers(sanitized):
    chosen = "kernel or address or unaligned or experts or nan"
    peers = "way_back or stays_away or too_small or 3-100"
    files = ("tests/test_ops.py", "tests/test_peer_store.py")
    result = sanitized(*files, "-k", f"{chosen} or {peers}")
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it compiles some 25 files; a busy machine took 6 minutes
@needs_gxx
def test_planted_bugs_are_caught():
    result = subprocess.run(
        [sys.executable, "-m", "tests.mutants"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    tried = [m for m in MUTANTS if m.how != "static" or shutil.which("nvcc")]
    assert result.stdout.splitlines()[-1] == f"{len(tried)} of {len(tried)} planted bugs caught"
