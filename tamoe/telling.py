"""What a dispatch tells other ranks beside its rows: which copies go where, and weights.

Neither is needed before the first rows have arrived, so the messages travel together with rows and
nobody waits for them alone.

Shape suffixes: P ranks, E experts of a rank, n choices that were not dropped, R rows received, W
words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from tamoe.flat import arrangement
from tamoe.precision import accumulation_dtype
from tamoe.relay_route import num_positions, positions_to_tell
from tamoe.schedules import Mover, Waiting
from tamoe.shares import Share
from tamoe.solver.relays import Relays


@dataclass(frozen=True, eq=False)
class Words:
    """32-bit words on their way to and from every rank."""

    wait: Waiting
    heard_W: torch.Tensor
    receive_splits: tuple[int, ...]

    def heard_P(self) -> Sequence[torch.Tensor]:
        """Words from each rank, once they are there."""
        self.wait()
        return self.heard_W.split(list(self.receive_splits))


def tell(mover: Mover, word_P: Sequence[torch.Tensor], receive_splits: Sequence[int]) -> Words:
    """Send words to every rank, without waiting; so many come back from each."""
    wait, heard_W1 = mover.tell(
        torch.cat(list(word_P)).unsqueeze(1), [*map(len, word_P)], receive_splits
    )
    return Words(wait, heard_W1.squeeze(1), tuple(receive_splits))


def tell_positions(mover: Mover, share: Share, relays: Relays) -> Words:
    """Tell the relays which copies of a part's tokens go where; hear the same."""
    position_P = [position_m.to(torch.int32) for position_m in positions_to_tell(share, relays)]
    sizes = [num_positions(told, rank, relays) for rank, told in enumerate(share.told_P)]
    return tell(mover, position_P, sizes)


@dataclass(frozen=True, eq=False)
class Weights:
    """Factors of rows, sent along with a dispatch from the tokens to the experts.

    Parameters
    ----------
    mover
        Moves them.
    weight_n
        Where the tokens are, sorted by expert, with its graph.
    dtype
        Of the rows.
    sent_PE, received_PE
        Rows for the experts of each rank, and from each rank for those of this one.
    """

    mover: Mover
    weight_n: torch.Tensor
    dtype: torch.dtype
    sent_PE: Sequence[Sequence[int]]
    received_PE: Sequence[Sequence[int]]

    def start(self) -> None:
        """Send them, once."""
        _ = self._words

    @cached_property
    def weight_R(self) -> torch.Tensor:
        """Where the experts are, in the order of their rows."""
        weight_R = torch.cat(list(self._words.heard_P())).view(accumulation_dtype(self.dtype))
        return weight_R if self._arrangement_R is None else weight_R[self._arrangement_R]

    def send_back(self, grad_R: torch.Tensor) -> torch.Tensor:
        """Gradients of the weights, where the tokens are."""
        if self._arrangement_R is not None:
            grad_R = torch.empty_like(grad_R).index_copy_(0, self._arrangement_R, grad_R)
        sent, received = ([*map(sum, counts)] for counts in (self.sent_PE, self.received_PE))
        at_once = replace(self.mover, schedule="single")
        grad_n1 = at_once.move(grad_R.unsqueeze(1), received, sent, "dispatch_backward")
        return grad_n1.squeeze(1).to(self.weight_n.dtype)

    @cached_property
    def _arrangement_R(self) -> torch.Tensor | None:
        return arrangement(list(enumerate(self.received_PE)), self.weight_n.device)

    @cached_property
    def _words(self) -> Words:
        wide = accumulation_dtype(self.dtype)
        words = wide.itemsize // 4
        word_W = self.weight_n.detach().to(wide).contiguous().view(torch.int32)
        word_P = word_W.split([words * sum(counts_E) for counts_E in self.sent_PE])
        return tell(self.mover, word_P, [words * sum(counts_E) for counts_E in self.received_PE])
