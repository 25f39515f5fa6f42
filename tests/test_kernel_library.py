"""Loading the kernels: which library a GPU gets, what is refused, calls from threads."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading

import pytest
import torch

from tamoe import kernel_build, kernel_library, ops
from tamoe.kernel_build import build_shim
from tamoe.kernel_library import for_gpu, load
from tamoe.topology.errors import KernelError
from tests.shim_library import needs_gxx, on_shim, one_unit, shim


@needs_gxx
def test_libraries_that_are_refused(tmp_path, monkeypatch):
    text = tmp_path / "text.so"
    text.write_text("no library")
    with pytest.raises(KernelError, match=r"cannot load the kernels from .*text.so"):
        load(text)
    with pytest.raises(KernelError, match="undefined symbol: tamoe_abi"):
        load(build_shim(folder=one_unit(tmp_path / "sources")))
    path = shim().path
    monkeypatch.setattr(kernel_library, "ABI", 99)
    with pytest.raises(KernelError, match="has interface 3; allowed: 99"):
        load(path)


@needs_gxx
def test_which_library_a_gpu_gets(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(RuntimeWarning, match="kernels are not used, .*: nvcc was not found"):
        assert for_gpu("sm_80") is None
    monkeypatch.setenv("TAMOE_KERNELS", "off")
    assert for_gpu("sm_80") is None
    monkeypatch.setenv("TAMOE_KERNELS", str(shim().path))
    assert for_gpu("sm_80").path == shim().path
    monkeypatch.setenv("TAMOE_KERNELS", "/missing.so")
    with pytest.warns(RuntimeWarning, match=r"cannot load the kernels from /missing.so"):
        assert for_gpu("sm_80") is None


@needs_gxx
def test_a_library_that_does_not_run_on_the_gpu_is_not_used(monkeypatch):
    monkeypatch.setenv("TAMOE_KERNELS", str(shim().path))
    with pytest.warns(RuntimeWarning, match=r"plain PyTorch is: kernel use_device failed \(-1\)"):
        assert for_gpu("sm_86", 3) is None  # the CPU's library knows device 0 alone
    assert for_gpu("sm_86", 0).path == shim().path


@needs_gxx
def test_a_releases_library_is_used_if_it_is_of_its_sources(monkeypatch):
    path = shim().path
    monkeypatch.delenv("TAMOE_KERNELS", raising=False)
    monkeypatch.setattr(kernel_library, "RELEASED", str(path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    other = r"was built from other sources than those beside it; nvcc was not found"
    with pytest.warns(RuntimeWarning, match=other):
        assert for_gpu("sm_89") is None
    monkeypatch.setattr(kernel_library, "sources_digest", lambda: "")  # as the CPU's says
    assert for_gpu("sm_100").path == path


@needs_gxx
def test_messages_of_codes():
    library = shim()
    assert library.message(0) == "no error"
    assert library.message(-2) == "more experts or choices than the kernel is made for"
    with pytest.raises(KernelError, match=r"kernel use_device failed \(-1\): a size, dtype or"):
        library.call("use_device", 3)
    with pytest.raises(KernelError, match=r"failed \(-1\)"):
        library.call("combine", 9, None, 1, None, None, 1, None, None, 1, 1, None)


def test_building_loads_no_torch():
    script = "import sys, tamoe.kernel_build, tamoe.kernel_library, tamoe.kernels_command\n"
    script += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@needs_gxx
def test_threads_may_call_at_once():
    row_nD, index = torch.randn(200, 64), torch.randint(0, 200, (300,))
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not torch.equal(ops.gather_rows(row_nD + number, index), (row_nD + number)[index]):
                wrong.append(number)

    with on_shim():
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@needs_gxx
def test_the_portable_switch_of_stacks(tmp_path, monkeypatch):
    # What other processors than x86-64 and aarch64 get.
    flags = ("-DTAMOE_SHIM_UCONTEXT", *kernel_build.GXX_FLAGS)
    monkeypatch.setattr(kernel_build, "GXX_FLAGS", flags)
    index_TK = torch.randint(-1, 9, (300, 3))
    plain = ops.build_index(index_TK, 9)
    with on_shim(1, load(build_shim(optimise=0))):
        assert all(map(torch.equal, ops.build_index(index_TK, 9), plain))
