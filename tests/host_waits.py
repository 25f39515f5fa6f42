"""Finds what would make a host wait for a GPU, while code runs on CPU tensors.

On a GPU the project's own operators are kernels, so what their CPU versions do inside is not seen.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

import tamoe

PACKAGE = Path(tamoe.__file__).parent

# Reading a value, or a result whose size is a value.
OPERATORS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
# PyTorch answers these without an operator where the tensor is on the CPU.
METHODS = {
    torch.Tensor.tolist: "tolist",
    torch.Tensor.numpy: "numpy",
    torch.Tensor.cpu: "cpu",
    torch.Tensor.new_tensor: "new_tensor",
}


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        masks = args[1] if name in ("aten::index", "aten::index_put_") else ()
        by_mask = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        counted = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
        if name in OPERATORS or by_mask or counted:
            self.found.append(f"{name} at {_where()}")
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = METHODS.get(func)
        # "cpu" in letters is the host's memory, whatever device the code works on.
        if func is torch.tensor and kwargs.get("device") not in (None, "cpu"):
            name = "torch.tensor on a device"
        if resolve_name(func) in ("torch.Tensor.__getitem__", "torch.Tensor.__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            name = "a list as index" if any(isinstance(i, list) for i in index) else name
        if name is not None:
            self.found.append(f"{name} at {_where()}")
        return func(*args, **kwargs)


@contextlib.contextmanager
def host_waits() -> Iterator[list[str]]:
    """What made, or on a GPU would make, the host wait inside the block; and where."""
    found: list[str] = []
    with _Operators(found), _Methods(found):
        yield found


def _where() -> str:
    """The innermost line of tamoe; of whoever asks where there is none."""
    stack = traceback.extract_stack()[:-2]
    inside = [frame for frame in stack if Path(frame.filename).parent == PACKAGE]
    frame = (inside or stack)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
