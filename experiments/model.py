"""A small GPT whose feed-forward layers are Mixtures of Experts.

- Bytes in, bytes out.
- Rotary positions, RMS norm without parameters, normalised queries and keys, squared ReLU.
- What leaves a block, and the model, starts at zero: blocks start as the identity, the loss at
  log(V).
- Attention is dense and the same on every rank; only the experts and, in some strategies, the
  gate differ by rank.
- Initial values depend on the seed and on what a parameter is, never on the rank that holds it or
  on what was built before: every strategy starts from the same model.

Shape suffixes: B sequences, L positions, T = B·L tokens, D hidden size, F intermediate size,
V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tamoe.gates import Gate
from tamoe.routing import Routing

GATE_STD = 0.02  # of logits this times √D: small, so that routing starts close to even


@dataclass(frozen=True)
class ModelConfig:
    """Size of the model."""

    vocabulary_size: int
    hidden_size: int = 64  # D
    intermediate_size: int = 128  # F of one expert
    num_heads: int = 2
    num_blocks: int = 2  # each with attention and one MoE layer
    sequence_length: int = 128  # L


class GPTOutput(NamedTuple):
    """What a forward pass gives: two scalars to add up, and each MoE layer's routing."""

    loss: torch.Tensor  # mean cross-entropy in nats a byte
    aux_loss: torch.Tensor  # sum over layers of what the gates ask for
    routings: list[Routing]


class FeedForward(nn.Module):
    """One expert: D → F → D."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x_TD)).square())


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    cos_LD: torch.Tensor
    sin_LD: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        head_size = D // config.num_heads
        frequency = 10_000 ** -(torch.arange(0, head_size, 2) / head_size)
        angle = torch.arange(config.sequence_length)[:, None] * frequency
        self.register_buffer("cos_LD", angle.cos(), persistent=False)
        self.register_buffer("sin_LD", angle.sin(), persistent=False)

    def _rotate(self, x_BHLD: torch.Tensor) -> torch.Tensor:
        L = x_BHLD.shape[-2]
        left, right = rms_norm(x_BHLD).chunk(2, dim=-1)
        cos_LD, sin_LD = self.cos_LD[:L], self.sin_LD[:L]
        return torch.cat((left * cos_LD + right * sin_LD, right * cos_LD - left * sin_LD), dim=-1)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        B, L, D = x_BLD.shape
        qkv = self.qkv(x_BLD).view(B, L, 3, self.num_heads, D // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        y_BHLD = F.scaled_dot_product_attention(
            self._rotate(query), self._rotate(key), value, is_causal=True
        )
        return self.out(y_BHLD.transpose(1, 2).reshape(B, L, D))


class Block(nn.Module):
    """Attention, then a MoE layer, each added to the stream that it normalises."""

    def __init__(self, config: ModelConfig, moe: nn.Module) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.moe = moe

    def forward(self, x_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        x_BLD = x_BLD + self.attention(rms_norm(x_BLD))
        out = self.moe(rms_norm(x_BLD).flatten(0, 1))
        return x_BLD + out.hidden.view_as(x_BLD), out.aux_loss, out.routing


class GPT(nn.Module):
    """The language model.

    Parameters
    ----------
    config
        Sizes.
    make_moe
        Called with the number of a block, gives its MoE layer: a module that maps ``[T, D]`` to
        an object with ``hidden``, ``aux_loss`` and ``routing``, as :class:`tamoe.MoE` does.
    """

    def __init__(self, config: ModelConfig, make_moe: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, make_moe(number)) for number in range(config.num_blocks)
        )
        self.head = nn.Linear(config.hidden_size, config.vocabulary_size, bias=False)

    def forward(self, tokens_BL: torch.Tensor) -> GPTOutput:
        """Loss of predicting each token of ``[B, L + 1]`` from those before it."""
        x_BLD = self.embedding(tokens_BL[:, :-1])
        aux_loss, routings = x_BLD.new_zeros(()), []
        for block in self.blocks:
            x_BLD, block_aux_loss, routing = block(x_BLD)
            aux_loss = aux_loss + block_aux_loss
            routings.append(routing)
        logits_TV = self.head(rms_norm(x_BLD).flatten(0, 1))
        loss = F.cross_entropy(logits_TV, tokens_BL[:, 1:].flatten())
        return GPTOutput(loss, aux_loss, routings)


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """Scale the last dim to a root mean square of 1."""
    return F.rms_norm(x, (x.shape[-1],))


def initialise(model: GPT, *, seed: int, first_expert: int = 0) -> None:
    """Give every parameter its starting value.

    Parameters
    ----------
    model
        All ranks hold the same dense parameters; experts are found as :class:`FeedForward`
        modules, in the order of their numbers in each block.
    seed
        Same seed, same values.
    first_expert
        Number of this rank's first expert in its group.
    """
    with torch.no_grad():
        _fill(model.embedding.weight, 1.0, seed, "embedding")
        model.head.weight.zero_()
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        for number, block in enumerate(blocks):
            name = f"block {number}"
            attention, moe = block.attention, block.moe
            _fill(attention.qkv.weight, model.config.hidden_size**-0.5, seed, f"{name} qkv")
            attention.out.weight.zero_()
            experts = [part for part in moe.modules() if isinstance(part, FeedForward)]
            for position, expert in enumerate(experts):
                what = f"{name} expert {first_expert + position}"
                _fill(expert.up.weight, model.config.hidden_size**-0.5, seed, what)
                expert.down.weight.zero_()
            for gate in (part for part in moe.modules() if isinstance(part, Gate)):
                _fill(gate.weight, GATE_STD, seed, f"{name} gate")


def _fill(parameter: torch.Tensor, std: float, seed: int, what: str) -> None:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(what.encode()))
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
