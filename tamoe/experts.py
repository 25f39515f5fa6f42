"""Experts: a feed-forward network, alone or several of them as one grouped module.

Shape suffixes: R rows, E experts of this rank, D hidden size, F intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from tamoe.topology.errors import whole

Activation = Callable[[torch.Tensor], torch.Tensor]


class FeedForward(nn.Module):
    """Linear, activation, linear: the usual expert.

    Parameters
    ----------
    hidden_size
        D, >= 1.
    intermediate_size
        F, >= 1.
    activation
        Between the two layers; GELU if None.
    bias
        Whether the layers have biases.

    Examples
    --------
    >>> FeedForward(4, 8)(torch.zeros(3, 4)).shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size=hidden_size, intermediate_size=intermediate_size)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = nn.functional.gelu if activation is None else activation

    def forward(self, row_RD: torch.Tensor) -> torch.Tensor:
        """``[R, D]`` to ``[R, D]``; R may be 0."""
        out_RD: torch.Tensor = self.down(self.activation(self.up(row_RD)))
        return out_RD


class NoExperts(nn.Module):
    """What a rank without experts runs.

    Examples
    --------
    >>> NoExperts()(torch.zeros(0, 4), torch.tensor([])).shape
    torch.Size([0, 4])
    """

    def forward(self, row_RD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """The rows, of which there are none."""
        return row_RD


class GroupedFeedForward(nn.Module):
    """The same network for all experts of a rank, their weights in one tensor a layer.

    Every parameter has the local experts as its first dimension; that is what a checkpoint needs
    to store them by global expert number.

    Parameters
    ----------
    num_local_experts
        E, experts of this rank, >= 0.
    hidden_size, intermediate_size, activation
        As for :class:`FeedForward`.

    Examples
    --------
    >>> GroupedFeedForward(2, 4, 8)(torch.zeros(3, 4), torch.tensor([1, 2])).shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        num_local_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        whole("num_local_experts", num_local_experts, 0)
        _check_sizes(hidden_size=hidden_size, intermediate_size=intermediate_size)
        sizes = num_local_experts, hidden_size, intermediate_size
        self.up_EDF = nn.Parameter(torch.empty(*sizes))
        self.up_bias_EF = nn.Parameter(torch.empty(num_local_experts, intermediate_size))
        self.down_EFD = nn.Parameter(torch.empty(sizes[0], sizes[2], sizes[1]))
        self.down_bias_ED = nn.Parameter(torch.empty(num_local_experts, hidden_size))
        self.activation = nn.functional.gelu if activation is None else activation
        for expert in range(num_local_experts):
            self.reset_expert(expert)

    @torch.no_grad()
    def reset_expert(self, expert: int) -> None:
        """Draw one local expert's weights, with the distribution of ``nn.Linear``."""
        layers = ((self.up_EDF, self.up_bias_EF), (self.down_EFD, self.down_bias_ED))
        for weight, bias in layers:
            bound = 1 / math.sqrt(weight.shape[1])
            weight[expert].uniform_(-bound, bound)
            bias[expert].uniform_(-bound, bound)

    def forward(self, row_RD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert, ``counts_E`` of them for each (on the CPU), to ``[R, D]``."""
        out = []
        for expert, row_rD in enumerate(row_RD.split(counts_E.tolist())):
            up = torch.addmm(self.up_bias_EF[expert], row_rD, self.up_EDF[expert])
            down = torch.addmm(
                self.down_bias_ED[expert], self.activation(up), self.down_EFD[expert]
            )
            out.append(down)
        return torch.cat(out) if out else row_RD


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        whole(name, size, 1)
