"""ExpertBias: load balance without a loss, by a bias on selection that follows the sign of errors.

Shape suffixes: N experts of the whole group.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from tamoe.float32_state import Float32State
from tamoe.groups import process_group
from tamoe.topology.errors import InputError, whole

if TYPE_CHECKING:
    from tamoe.groups import Group
    from tamoe.scope import Scope


class ExpertBias(Float32State):
    """A bias for each expert that rises while the expert has less than the mean load, else falls.

    The same on all ranks: loads are those of the whole group (one small all-reduce an update).
    It goes beside a :class:`~tamoe.TopologyBias`, which differs by rank and keeps a rank's share.

    Parameters
    ----------
    num_experts
        N, >= 1.
    speed
        What a step adds or takes, > 0, in the scale of the scores that it is added to. DeepSeek-V3
        used 0.001 on sigmoid scores.
    decay
        The speed is divided by 1 + decay · steps, >= 0: large steps at first, small ones later.
    group
        ProcessGroup, 1-D DeviceMesh or None for the default group.
    device
        Of the bias.

    Raises
    ------
    InputError
        A number is out of range.

    Notes
    -----
    Wang et al. (2024), auxiliary-loss-free load balancing; DeepSeek-V3.

    Examples
    --------
    >>> bias = ExpertBias(2, speed=0.5)
    >>> bias.update(torch.tensor([3, 1]))
    >>> bias.bias_N.tolist()
    [-0.5, 0.5]
    """

    tamoe_scope: Scope = "shared"
    bias_N: torch.Tensor
    steps: torch.Tensor

    def __init__(
        self,
        num_experts: int,
        *,
        speed: float = 1e-3,
        decay: float = 0.0,
        group: Group = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        whole("num_experts", num_experts, 1)
        if not 0 < speed < math.inf:
            raise InputError(f"speed is {speed}; allowed: finite and > 0")
        if not 0 <= decay < math.inf:
            raise InputError(f"decay is {decay}; allowed: finite and >= 0")
        self.speed, self.decay, self.group = float(speed), float(decay), group
        self.register_buffer("bias_N", torch.empty(num_experts, device=device))
        self.register_buffer("steps", torch.empty((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget what was measured."""
        self.bias_N.zero_()
        self.steps.zero_()

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.bias_N)

    @torch.no_grad()
    def update(self, counts_N: torch.Tensor) -> None:
        """One step, from the choices of each expert on this rank; every rank of the group calls it.

        Parameters
        ----------
        counts_N
            ``[N]``, before drops: :func:`tamoe.functional.expert_counts`.
        """
        if counts_N.shape != self.bias_N.shape:
            raise InputError(f"counts_N is {tuple(counts_N.shape)}; allowed: {self.num_experts}")
        total_N = counts_N.to(torch.float64)
        resolved = process_group(self.group)
        if resolved is not None:
            total_N = total_N.clone()
            torch.distributed.all_reduce(total_N, group=resolved)
        speed = self.speed / (1.0 + self.decay * self.steps)
        self.bias_N.add_(speed * torch.sign(total_N.mean() - total_N).to(self.bias_N))
        self.steps.add_(1)

    def extra_repr(self) -> str:
        """Size and speed, for ``print(model)``."""
        return f"{self.num_experts}, speed={self.speed:g}"
