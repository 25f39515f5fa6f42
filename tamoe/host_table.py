"""Small tables that the host works out and the device needs, brought there without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def table_on(device: torch.device, values: Sequence[Any]) -> torch.Tensor:
    """Integers, or equally long rows of them, as an int64 tensor on a device.

    A copy from ordinary memory to a GPU waits for all that was queued there before; one from
    pinned memory is queued behind it, and PyTorch keeps that memory until the copy is done.

    Examples
    --------
    >>> table_on(torch.device("cpu"), [[0, 1], [2, 3]]).tolist()
    [[0, 1], [2, 3]]
    """
    table = torch.tensor(values, dtype=torch.int64, device="cpu")  # whatever the default is
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)
