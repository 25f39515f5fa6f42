"""The gates: a token's vector in, its experts and their weights out.

All are top-k over linear logits (:class:`tamoe.Gate`) and differ in how they score, weigh, drop and
balance. DeepSeek-V3's is :class:`SigmoidGate` with ``expert_bias`` and ``limit``. How a Plan steers
them is one argument, ``steer``:

- ``scope="rank"`` with :class:`~tamoe.TopologyLoss`: each rank trains a gate of its own towards
  its target, as in TA-MoE. What happens to a token then depends on the rank that it sits on.
- ``scope="shared"`` with :class:`~tamoe.TopologyBias`: one gate for all ranks, a bias per rank for
  selection. :func:`steering` switches the bias off, to see what it costs in quality.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from tamoe.faster_gate import FasterGate
from tamoe.gate import Gate, GateOptions, Scored
from tamoe.gate_checks import check_choice
from tamoe.noisy_gate import NoisyGate
from tamoe.sigmoid_gate import SigmoidGate
from tamoe.steering_loss import SteeringLoss

if TYPE_CHECKING:
    from typing import Unpack

__all__ = [
    "FasterGate",
    "GShardGate",
    "Gate",
    "NaiveGate",
    "NoisyGate",
    "SigmoidGate",
    "SwitchGate",
    "steering",
]


class NaiveGate(Gate):
    """Top-k and nothing else: no drops, no loss unless one is asked for.

    Parameters
    ----------
    hidden_size, num_experts, top_k, options
        See :class:`tamoe.Gate`: capacities, drops, jitter, losses, steering and more.

    Examples
    --------
    >>> gate = NaiveGate(16, 8, top_k=2)
    >>> routing = gate(torch.randn(4, 16))
    >>> routing.expert_index_TK.shape, routing.aux_loss.item()
    (torch.Size([4, 2]), 0.0)
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        **options: Unpack[GateOptions],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k=top_k, **options)

    def _default_aux_weight(self) -> float:
        return 0.01 if isinstance(self.steer, SteeringLoss) else 0.0


class SwitchGate(Gate):
    """Top-1 with the full probability as weight, and a balance loss (Switch Transformer).

    Parameters
    ----------
    hidden_size, num_experts, options
        See :class:`tamoe.Gate`: capacities, drops, jitter, losses, steering and more.
    jitter_on
        ``"input"``, or ``"logits"``, to which FastMoE *adds* U(1 - jitter, 1 + jitter).

    Examples
    --------
    >>> routing = SwitchGate(16, 8, capacity=1.25, drop="probs")(torch.randn(64, 16))
    >>> int((routing.expert_index_TK == 3).sum()) <= 10
    True
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        jitter_on: Literal["input", "logits"] = "input",
        **options: Unpack[GateOptions],
    ) -> None:
        check_choice("jitter_on", jitter_on, ("input", "logits"))
        super().__init__(hidden_size, num_experts, top_k=1, **options)
        self.jitter_on = jitter_on

    def _default_aux_weight(self) -> float:
        return 0.01

    def _jittered(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD if self.jitter_on == "logits" else super()._jittered(x_TD)

    def _score(self, x_TD: torch.Tensor) -> Scored:
        scored = super()._score(x_TD)
        if not (self.training and self.jitter and self.jitter_on == "logits"):
            return scored
        noise_TN = 1 + self.jitter * (2 * self._uniform(scored.logits_TN) - 1)
        return Scored(scored.logits_TN + noise_TN)


class GShardGate(Gate):
    """Top-2 with weights over the chosen, and a balance loss over all choices (GShard).

    Parameters
    ----------
    hidden_size, num_experts, top_k, options
        See :class:`tamoe.Gate`: capacities, drops, jitter, losses, steering and more.
    random_routing
        True: in training each choice after the first is dropped where twice its share of the
        token's weight is below U(0, 1), before capacity is granted. GShard does so; here it is
        off unless asked for, so that nothing is dropped unseen.

    Examples
    --------
    >>> routing = GShardGate(16, 8)(torch.randn(64, 16))
    >>> bool((routing.weight_TK.sum(1) - 1).abs().max() < 1e-6)
    True
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        random_routing: bool = False,
        **options: Unpack[GateOptions],
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k=top_k, **options)
        self.random_routing = random_routing

    def _default_aux_weight(self) -> float:
        return 0.01

    def _drop_at_random(self, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.random_routing):
            return index_TK
        share_TK = weight_TK / weight_TK.sum(1, keepdim=True)
        drop_TK = 2 * share_TK < self._uniform(weight_TK)
        drop_TK[:, 0] = False
        return index_TK.masked_fill(drop_TK, -1)


@contextmanager
def steering(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Switch the bias of every gate in a module off (or on) for a while.

    Without it a gate selects by its own logits: what the model does where no bias is known. In
    training mode the bias is not updated meanwhile. A TopologyLoss is not concerned: it does not
    act on selection.

    Examples
    --------
    >>> gate = NaiveGate(8, 4)
    >>> with steering(gate, False):
    ...     gate.steering
    False
    >>> gate.steering
    True
    """
    gates = [child for child in module.modules() if isinstance(child, Gate)]
    before = [gate.steering for gate in gates]
    try:
        for gate in gates:
            gate.steering = enabled
        yield
    finally:
        for gate, value in zip(gates, before, strict=True):
            gate.steering = value
