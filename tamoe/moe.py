"""MoE: a gate, this rank's experts and the exchange between them, as one layer.

Shape suffixes: T tokens, K choices, N experts of the group, E experts of a rank, D hidden size, R
rows that this rank's experts work on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn

from tamoe.exchange import Exchange
from tamoe.experts import NoExperts
from tamoe.groups import process_group
from tamoe.overlap import run_overlapped
from tamoe.routing import Routing
from tamoe.scope import mark_scope
from tamoe.topology.errors import InputError, whole

if TYPE_CHECKING:
    from tamoe.groups import Group

Experts = nn.Module | Callable[[], nn.Module]


class MoEOutput(NamedTuple):
    """What the layer returns.

    Parameters
    ----------
    hidden
        As the input: ``(…, D)``. Tokens of which every choice was dropped are 0.
    aux_loss
        The gate's, to add to the task loss as it is.
    routing
        The gate's decision, for metrics.
    """

    hidden: torch.Tensor
    aux_loss: torch.Tensor
    routing: Routing


class MoE(nn.Module):
    """Mixture-of-Experts layer over an expert-parallel group.

    Expert e of N lives on rank e // E, with E = N / P, or where the exchange's placement says; a
    rank may then be without experts (:class:`~tamoe.experts.NoExperts`). Expert parameters are
    marked with scope ``"expert"``; the gate's are left as the gate marked them.

    Parameters
    ----------
    gate
        Module or function ``x_TD -> Routing``.
    experts
        Function that makes one expert (``[R, D]`` to ``[R, D]``, R may be 0), called once for each
        expert of this rank; or one module for all of them, called with ``(row_RD, counts_E)``,
        rows sorted by expert and ``counts_E`` an int64 tensor on the CPU; or an ``nn.ModuleList``
        of this rank's experts, by number.
    num_experts
        N, of the whole group: a multiple of its ranks, or as many as the exchange's placement has.
    group
        ProcessGroup, 1-D DeviceMesh, or None for the default group, or for that of ``exchange``.
    exchange
        An :class:`Exchange`, or the kind of one to make.
    overlap
        Pieces, >= 1, that the tokens of a call go in, the same on all ranks: the experts work on
        one while others are on the links (:mod:`tamoe.overlap`). Each piece costs its messages and
        a smaller matrix product, so 2 is the one to try first, where experts take as long as rows.
        Experts are then called once for each piece (dropout draws otherwise, norms over rows see
        fewer), must register all that they train, cannot hold checkpoints with
        ``use_reentrant=True`` and must call no collective of the exchange's group: rows of another
        piece are on their way there, and ranks would pair the wrong ones.
    device, dtype
        Where to put gate and experts; None leaves them.

    Raises
    ------
    InputError
        The experts cannot be shared out so, or group and exchange do not belong together.

    Notes
    -----
    Expert e starts from the same weights on any number of ranks, wherever it is: each is made under
    a seed drawn from (torch's default generator, e), and the generator moves on by one draw
    whatever E is. So seed all ranks alike. A grouped module gets the same if it has
    ``reset_expert(local_index)``.

    Under autocast tokens travel in the autocast dtype.

    Examples
    --------
    >>> from functools import partial
    >>> from tamoe import GShardGate
    >>> from tamoe.experts import FeedForward
    >>> layer = MoE(GShardGate(8, 4), partial(FeedForward, 8, 16), num_experts=4)
    >>> layer(torch.zeros(2, 3, 8)).hidden.shape
    torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        gate: Callable[[torch.Tensor], Routing],
        experts: Experts,
        *,
        num_experts: int,
        group: Group = None,
        exchange: Exchange | Literal["auto", "flat", "none"] = "auto",
        overlap: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.exchange = _exchange(exchange, group)
        placement = self.exchange.placement_of(num_experts)
        of_gate = getattr(gate, "num_experts", num_experts)
        if of_gate != num_experts:
            raise InputError(
                f"num_experts is {num_experts} and the gate has {of_gate}; allowed: the same number"
            )
        self.num_experts, self.overlap = num_experts, whole("overlap", overlap, 1)
        self.expert_numbers = placement.experts_PE[self.exchange.rank]  # global ones, ascending
        self.gate = gate
        self.experts = mark_scope(self._make_experts(experts), "expert")
        self.to(device=device, dtype=dtype)

    @property
    def is_grouped(self) -> bool:
        """Whether one module holds all of this rank's experts."""
        return not isinstance(self.experts, nn.ModuleList)

    def _make_experts(self, experts: Experts) -> nn.Module:
        if not callable(experts) and not isinstance(experts, nn.ModuleList):
            raise InputError(
                f"experts is {experts!r}; allowed: a factory of one expert, a grouped module "
                f"(x_RD, counts_E) or an nn.ModuleList"
            )
        if isinstance(experts, nn.ModuleList) and len(experts) != len(self.expert_numbers):
            raise InputError(
                f"experts has {len(experts)} modules; allowed: {len(self.expert_numbers)}, one "
                f"for each expert of this rank"
            )
        seed = int(torch.randint(2**40, (), device="cpu"))
        made: list[nn.Module] = []
        with torch.random.fork_rng():
            for index, number in enumerate(self.expert_numbers):
                torch.manual_seed(seed + number)
                if not isinstance(experts, nn.Module):
                    made.append(experts())
                elif callable(reset := getattr(experts, "reset_expert", None)):
                    reset(index)
        if not self.expert_numbers:
            return NoExperts()
        return experts if isinstance(experts, nn.Module) else nn.ModuleList(made)

    def forward(self, x: torch.Tensor) -> MoEOutput:
        """Route each token to its experts and add up what they make of it.

        Parameters
        ----------
        x
            ``(…, D)``: any leading shape, which may hold 0 tokens and may differ between ranks.

        Returns
        -------
        MoEOutput

        Raises
        ------
        InputError
            The gate returned no Routing, or the exchange refuses what it returned.
        """
        x_TD = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        routing = self.gate(x_TD)
        if not isinstance(routing, Routing):
            raise InputError(
                f"gate returned {type(routing).__name__}; allowed: tamoe.Routing("
                f"expert_index_TK, weight_TK, probs_TN, aux_loss)"
            )
        if torch.is_autocast_enabled(x.device.type):
            x_TD = x_TD.to(torch.get_autocast_dtype(x.device.type))
        given = x_TD, routing.expert_index_TK, routing.weight_TK
        if self.overlap == 1:
            row_RD, handle = self.exchange.dispatch(*given, num_experts=self.num_experts)
            hidden_TD = self.exchange.combine(self._run_experts(row_RD, handle.counts_E), handle)
        else:
            hidden_TD = run_overlapped(
                self.exchange,
                self._run_experts,
                tuple(self.experts.parameters()),
                *given,
                num_experts=self.num_experts,
                num_pieces=self.overlap,
            )
        return MoEOutput(hidden_TD.reshape(x.shape), routing.aux_loss, routing)

    def _run_experts(self, row_RD: torch.Tensor, counts_E: tuple[int, ...]) -> torch.Tensor:
        if not isinstance(self.experts, nn.ModuleList):
            out_RD: torch.Tensor = self.experts(row_RD, torch.tensor(counts_E, device="cpu"))
            return out_RD
        # Experts without rows run too: their gradients are then 0 and not None, on every rank.
        rows = zip(self.experts, row_RD.split(counts_E), strict=True)
        return torch.cat([expert(row_rD) for expert, row_rD in rows])

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return (
            f"num_experts={self.num_experts}, num_local_experts={len(self.expert_numbers)}, "
            f"overlap={self.overlap}"
        )


def _exchange(exchange: Exchange | Literal["auto", "flat", "none"], group: Group) -> Exchange:
    if not isinstance(exchange, Exchange):
        return Exchange(group=group, kind=exchange)
    if group is not None and process_group(group) is not exchange.group:
        raise InputError("group is not that of exchange; give one of them, or both the same")
    return exchange
