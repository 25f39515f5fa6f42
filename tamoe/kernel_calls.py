"""The ``torch.library`` side of the operators: which implementation runs, shapes, gradients.

The kernel is called where there is a library for the tensors' device, plain PyTorch otherwise.
Shape suffixes as in :mod:`tamoe.ops`, whose functions check the arguments.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tamoe import plain_ops
from tamoe.kernel_library import TOO_LARGE, KernelLibrary, for_gpu
from tamoe.precision import accumulation_dtype
from tamoe.topology.errors import KernelError

_SCHEMAS = (
    "build_index(Tensor expert_index_TK, int num_experts, Tensor? group_of_expert_N, "
    "int num_groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "copy_rows_(Tensor(a!) out_MD, Tensor row_nD, Tensor? source_m, Tensor? target_m) -> ()",
    "gather_rows(Tensor row_nD, Tensor index_m) -> Tensor",
    "combine(Tensor row_nD, Tensor offset_S1, Tensor index_J, Tensor? weight_J) -> Tensor",
    "combine_backward(Tensor grad_SD, Tensor row_nD, Tensor offset_S1, Tensor index_J, "
    "Tensor? weight_J) -> (Tensor, Tensor)",
)
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_cpu_library: KernelLibrary | None = None


@contextlib.contextmanager
def on_library(library: KernelLibrary) -> Iterator[None]:
    """For tests: within it, operators on CPU tensors call this library, which runs on the CPU."""
    global _cpu_library
    before, _cpu_library = _cpu_library, library
    try:
        yield
    finally:
        _cpu_library = before


def library_of(tensor: torch.Tensor) -> KernelLibrary | None:
    """Kernels for a tensor's device, ready to be called there, or None."""
    if tensor.device.type == "cpu":
        return _cpu_library
    major, minor = torch.cuda.get_device_capability(tensor.device)
    with torch.cuda.device(tensor.device):
        return for_gpu(f"sm_{major}{minor}", tensor.device.index)


class KernelCall:
    """One call of a kernel: makes tensors fit for it and keeps them until it is queued."""

    def __init__(self, library: KernelLibrary, beside: torch.Tensor) -> None:
        self.library, self.device = library, beside.device
        self.kept: list[torch.Tensor] = []

    def ready(self, tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> int | None:
        """Address of a tensor, or of a copy of it that is contiguous, aligned and of the dtype."""
        if tensor is None:
            return None
        tensor = tensor.detach().to(dtype or tensor.dtype).contiguous()
        if tensor.data_ptr() % tensor.element_size():
            tensor = tensor.clone()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def code(self, name: str, *arguments: Any) -> int:
        if self.device.type == "cpu":
            return self.library.code(name, *arguments, None)
        with torch.cuda.device(self.device):
            self.library.call("use_device", torch.cuda.current_device())
            stream = torch.cuda.current_stream(self.device).cuda_stream
            return self.library.code(name, *arguments, stream)

    def run(self, name: str, *arguments: Any) -> None:
        code = self.code(name, *arguments)
        if code:
            raise KernelError(f"kernel {name} failed ({code}): {self.library.message(code)}")


# ---- implementations ----------------------------------------------------------------------------


def _build_index(
    expert_index_TK: torch.Tensor,
    num_experts: int,
    group_of_expert_N: torch.Tensor | None,
    num_groups: int,
) -> tuple[torch.Tensor, ...]:
    given = expert_index_TK, num_experts, group_of_expert_N, num_groups
    library = library_of(expert_index_TK)
    built = None if library is None else _index_by_kernel(library, *given)
    return plain_ops.build_index(*given) if built is None else built


def _index_by_kernel(
    library: KernelLibrary,
    expert_index_TK: torch.Tensor,
    num_experts: int,
    group_of_expert_N: torch.Tensor | None,
    num_groups: int,
) -> tuple[torch.Tensor, ...] | None:
    """None where there are more experts or choices than the kernel is made for."""
    num_tokens, top_k = expert_index_TK.shape
    size = library.code("build_index_workspace", num_tokens * top_k, num_experts, num_groups)
    if size == TOO_LARGE:
        return None
    call = KernelCall(library, expert_index_TK)
    if expert_index_TK.dtype not in (torch.int32, torch.int64):
        expert_index_TK = expert_index_TK.to(torch.int32)
    if group_of_expert_N is not None:  # what is no group must not become one in 32 bits
        group_of_expert_N = group_of_expert_N.clamp(-1, num_groups)
    outputs = _fake_build_index(expert_index_TK, num_experts, group_of_expert_N, num_groups)
    workspace = torch.empty(size, dtype=torch.uint8, device=expert_index_TK.device)
    call.run(
        "build_index",
        call.ready(expert_index_TK),
        expert_index_TK.element_size(),
        num_tokens,
        top_k,
        num_experts,
        call.ready(group_of_expert_N, torch.int32),
        num_groups,
        call.ready(workspace),
        *(output.data_ptr() for output in outputs),
    )
    return outputs


def _copy_rows_(
    out_MD: torch.Tensor,
    row_nD: torch.Tensor,
    source_m: torch.Tensor | None,
    target_m: torch.Tensor | None,
) -> None:
    library = library_of(out_MD)
    if library is None:
        return plain_ops.copy_rows_(out_MD, row_nD, source_m, target_m)
    index_m = source_m if source_m is not None else target_m
    call = KernelCall(library, out_MD)
    call.run(
        "copy_rows",
        call.ready(row_nD),
        len(row_nD),
        out_MD.data_ptr(),
        len(out_MD),
        call.ready(source_m, torch.int64),
        call.ready(target_m, torch.int64),
        len(row_nD if index_m is None else index_m),
        row_nD.shape[1] * row_nD.element_size(),
    )


def _gather_rows(row_nD: torch.Tensor, index_m: torch.Tensor) -> torch.Tensor:
    out_mD = row_nD.new_empty(len(index_m), row_nD.shape[1])
    _copy_rows_(out_mD, row_nD, index_m, None)
    return out_mD


def _combine(
    row_nD: torch.Tensor,
    offset_S1: torch.Tensor,
    index_J: torch.Tensor,
    weight_J: torch.Tensor | None,
) -> torch.Tensor:
    library = library_of(row_nD)
    if library is None:
        return plain_ops.combine(row_nD, offset_S1, index_J, weight_J)
    out_SD = _fake_combine(row_nD, offset_S1, index_J, weight_J)
    call = KernelCall(library, row_nD)
    call.run(
        "combine",
        _DTYPES[row_nD.dtype],
        call.ready(row_nD),
        len(row_nD),
        call.ready(offset_S1, torch.int64),
        call.ready(index_J, torch.int64),
        len(index_J),
        call.ready(weight_J),
        out_SD.data_ptr(),
        *out_SD.shape,
    )
    return out_SD


def _combine_backward(
    grad_SD: torch.Tensor,
    row_nD: torch.Tensor,
    offset_S1: torch.Tensor,
    index_J: torch.Tensor,
    weight_J: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    library = library_of(grad_SD)
    if library is None:
        return plain_ops.combine_backward(grad_SD, row_nD, offset_S1, index_J, weight_J)
    grad_row_nD, grad_weight_J = _fake_combine_backward(
        grad_SD, row_nD, offset_S1, index_J, weight_J
    )
    grad_row_nD.zero_()
    grad_weight_J.zero_()
    call = KernelCall(library, grad_SD)
    call.run(
        "combine_backward",
        _DTYPES[grad_SD.dtype],
        call.ready(grad_SD),
        call.ready(row_nD),
        len(row_nD),
        call.ready(offset_S1, torch.int64),
        call.ready(index_J, torch.int64),
        len(index_J),
        call.ready(weight_J),
        grad_row_nD.data_ptr(),
        None if weight_J is None else grad_weight_J.data_ptr(),
        *grad_SD.shape,
    )
    return grad_row_nD, grad_weight_J


# ---- shapes -------------------------------------------------------------------------------------


def _fake_build_index(
    expert_index_TK: torch.Tensor,
    num_experts: int,
    group_of_expert_N: torch.Tensor | None,
    num_groups: int,
) -> tuple[torch.Tensor, ...]:
    num_tokens, top_k = expert_index_TK.shape
    choices = num_tokens * top_k
    sizes: list[tuple[Any, ...]] = [(choices,), (num_experts,), ()]
    if group_of_expert_N is None:
        sizes += [(0,)] * 3
    else:
        sizes += [(num_tokens * min(top_k, num_groups),), (num_groups,), (choices,)]
    return tuple(expert_index_TK.new_empty(size, dtype=torch.int64) for size in sizes)


def _fake_copy_rows_(*_: Any) -> None:
    return None


def _fake_gather_rows(row_nD: torch.Tensor, index_m: torch.Tensor) -> torch.Tensor:
    return row_nD.new_empty(index_m.shape[0], row_nD.shape[1])


def _fake_combine(
    row_nD: torch.Tensor, offset_S1: torch.Tensor, index_J: torch.Tensor, weight_J: Any
) -> torch.Tensor:
    return row_nD.new_empty(offset_S1.shape[0] - 1, row_nD.shape[1])


def _fake_combine_backward(
    grad_SD: torch.Tensor,
    row_nD: torch.Tensor,
    offset_S1: torch.Tensor,
    index_J: torch.Tensor,
    weight_J: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = accumulation_dtype(grad_SD.dtype)
    terms = 0 if weight_J is None else index_J.shape[0]
    return row_nD.new_empty(row_nD.shape), grad_SD.new_empty(terms, dtype=wide)


# ---- gradients ----------------------------------------------------------------------------------


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    row_nD, index_m = inputs
    ctx.num_rows = row_nD.shape[0]
    ctx.save_for_backward(index_m)


def _gather_backward(ctx: Any, grad_mD: torch.Tensor) -> tuple[torch.Tensor, None]:
    (index_m,) = ctx.saved_tensors
    # Rows may be more than build_index takes on the device, and none at all.
    key_m = torch.where(index_m < 0, ctx.num_rows, index_m.to(torch.int64))
    sorted_m, order_m = torch.sort(key_m, stable=True)
    offset_N1 = torch.searchsorted(
        sorted_m, torch.arange(ctx.num_rows + 1, device=key_m.device, dtype=torch.int64)
    )
    return torch.ops.tamoe.combine(grad_mD.contiguous(), offset_N1, order_m, None), None


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_gradients(ctx: Any, grad_SD: torch.Tensor) -> tuple[Any, ...]:
    *saved, weight_J = ctx.saved_tensors
    grad_row_nD, grad_weight_J = torch.ops.tamoe.combine_backward(
        grad_SD.contiguous(), *saved, weight_J
    )
    return grad_row_nD, None, None, None if weight_J is None else grad_weight_J


@functools.cache
def register() -> torch.library.Library:
    """Define the operators, once in a process; the result keeps them alive."""
    library = torch.library.Library("tamoe", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    implementations: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "build_index": (_build_index, _fake_build_index),
        "copy_rows_": (_copy_rows_, _fake_copy_rows_),
        "gather_rows": (_gather_rows, _fake_gather_rows),
        "combine": (_combine, _fake_combine),
        "combine_backward": (_combine_backward, _fake_combine_backward),
    }
    for name, (implementation, fake) in implementations.items():
        for key in ("CPU", "CUDA"):
            library.impl(name, implementation, key)
        torch.library.register_fake(f"tamoe::{name}", fake, lib=library)
    torch.library.register_autograd(
        "tamoe::gather_rows", _gather_backward, setup_context=_save_gather, lib=library
    )
    torch.library.register_autograd(
        "tamoe::combine", _combine_gradients, setup_context=_save_combine, lib=library
    )
    return library
