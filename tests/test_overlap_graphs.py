"""Graphs of experts that overlap with rows: compiled ones, and ones that pieces share."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tamoe import MoE, NaiveGate
from tamoe.exchange import Exchange


class Gated(nn.Module):
    """An expert whose backward pass, compiled, writes over what the forward pass kept."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, 32), nn.Linear(6, 32)
        self.down = nn.Linear(32, 6)

    def forward(self, row_RD: torch.Tensor) -> torch.Tensor:
        made_RD: torch.Tensor = self.down(nn.functional.silu(self.gate(row_RD)) * self.up(row_RD))
        return made_RD


def gradients(expert: nn.Module, overlap: int, retain_graph: bool = False) -> list[torch.Tensor]:
    moe = MoE(
        NaiveGate(6, 1, top_k=1, scope="shared"),
        nn.ModuleList([expert]),
        num_experts=1,
        exchange=Exchange(),
        overlap=overlap,
    )
    moe.zero_grad()
    x_TD = torch.randn(9, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
    loss = moe(x_TD).hidden.square().sum()
    loss.backward(retain_graph=retain_graph)
    if retain_graph:
        loss.backward()
    found = [x_TD.grad, *(p.grad for p in expert.parameters())]
    return [one.clone() for one in found if one is not None]


def same(ours: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    pairs = zip(ours, others, strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)


def test_experts_may_be_compiled() -> None:
    torch.manual_seed(7)
    expert = Gated()
    plain = gradients(expert, 1)
    compiled = torch.compile(expert, backend="aot_eager")
    for overlap in (2, 3):  # pieces of other sizes: compiled anew, for sizes that vary
        assert same(gradients(compiled, overlap), plain)


@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_weight_that_is_made_once_for_all_pieces_keeps_its_graph(retain_graph: bool) -> None:
    torch.manual_seed(7)
    expert = parametrizations.weight_norm(nn.Linear(6, 6))
    found = []
    for overlap in (1, 3):
        with parametrize.cached():
            found.append(gradients(expert, overlap, retain_graph))
    assert same(*found)
