"""Float32State: a module whose buffers stay float32 when a model is cast to a narrower type."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from typing import Self


class Float32State(nn.Module):
    """Base of modules with buffers that need more digits than a narrow type has.

    bfloat16 keeps three: a target needs more, and steps of a bias vanish in it.

    Examples
    --------
    >>> module = Float32State()
    >>> module.register_buffer("share", torch.zeros(2))
    >>> module.to(torch.bfloat16).share.dtype
    torch.float32
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                source = new if old.is_meta else old
                self._buffers[name] = source.to(device=new.device, dtype=old.dtype)
        return self
