"""Random inputs for the comparisons with the code of others, and how far two results differ.

Shape suffixes: T tokens, K choices, N experts.
"""

from __future__ import annotations

import torch

from tamoe.gates import Gate
from tamoe.routing import Routing


def draw_logits(
    generator: torch.Generator, most_experts: int = 12, least_experts: int = 2
) -> torch.Tensor:
    """``[T, N]`` logits of some spread, without ties."""
    tokens = int(torch.randint(4, 40, (), generator=generator))
    experts = int(torch.randint(least_experts, most_experts + 1, (), generator=generator))
    spread = (0.1, 1.0, 5.0)[int(torch.randint(0, 3, (), generator=generator))]
    return spread * torch.randn(tokens, experts, generator=generator)


def draw_whole(generator: torch.Generator, low: int, high: int) -> int:
    """A whole number from low to high."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def routed(gate: Gate, logits_TN: torch.Tensor) -> Routing:
    """What a gate does with given logits: its weight is the identity."""
    with torch.no_grad():
        gate.weight.copy_(torch.eye(logits_TN.shape[1]))
    routing: Routing = gate(logits_TN)
    return routing


def chosen_map(index_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """``[T, N]`` bool, True where a token goes to an expert."""
    found_TN = torch.zeros(len(index_TK), num_experts + 1, dtype=torch.bool)
    found_TN.scatter_(1, torch.where(index_TK < 0, num_experts, index_TK), True)
    return found_TN[:, :num_experts]


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of numbers, or how many flags differ."""
    if a.dtype == torch.bool or b.dtype == torch.bool:
        return float((a.bool() != b.bool()).sum())
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
