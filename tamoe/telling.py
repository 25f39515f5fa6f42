"""What a dispatch tells other ranks beside its rows: which copies go where, and weights.

Neither is needed before the first rows have arrived, so the messages travel together with rows and
nobody waits for them alone.

Shape suffixes: P ranks, E experts of a rank, C parts, n choices that were not dropped, R rows
received, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from tamoe.precision import accumulation_dtype
from tamoe.relay_route import num_positions, positions_to_tell
from tamoe.row_order import CountsCPE, RowOrder
from tamoe.schedules import Mover
from tamoe.shares import Share, added
from tamoe.solver.relays import Relays
from tamoe.transfer import Waiting


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
    weight
        Of all flat choices of this rank's tokens, with its graph. The order below depends on the
        number of parts, which may be another when a checkpoint runs this dispatch anew: so no graph
        is made of it.
    choice_n
        Those that were not dropped, sorted by part, by expert, then by token.
    dtype
        Of the rows.
    sent_CPE
        Rows of each part for the experts of each rank.
    order
        Where the rows that come belong.
    """

    mover: Mover
    weight: torch.Tensor
    choice_n: torch.Tensor
    dtype: torch.dtype
    sent_CPE: CountsCPE
    order: RowOrder

    def start(self) -> None:
        """Send them, once."""
        _ = self._words

    @cached_property
    def weight_R(self) -> torch.Tensor:
        """Where the experts are, in the order of their rows."""
        heard_R = torch.cat(list(self._words.heard_P())).view(accumulation_dtype(self.dtype))
        return torch.empty_like(heard_R).index_copy_(0, self._place_R, heard_R)

    def send_back(self, grad_R: torch.Tensor) -> torch.Tensor:
        """Gradients of the weights, where the tokens are; 0 for choices that were dropped."""
        sizes_PC = [*zip(*self._sizes_CP, strict=True)]
        sent, received = [*map(sum, sizes_PC)], self._received_P
        at_once = replace(self.mover, schedule="single")
        grad_R1 = grad_R[self._place_R].unsqueeze(1)
        grad_n = at_once.move(grad_R1, received, sent, "dispatch_backward").squeeze(1)
        pieces = grad_n.split([size for sizes_C in sizes_PC for size in sizes_C])
        num_parts = len(self._sizes_CP)
        by_part = [piece for part in range(num_parts) for piece in pieces[part::num_parts]]
        grad = torch.zeros_like(self.weight)
        return grad.index_add_(0, self.choice_n, torch.cat(by_part).to(grad.dtype))

    @cached_property
    def _place_R(self) -> torch.Tensor:
        return self.order.by_source(self.weight.device)

    @property
    def _sizes_CP(self) -> list[list[int]]:
        return [[*map(sum, counts_PE)] for counts_PE in self.sent_CPE]

    @property
    def _received_P(self) -> list[int]:
        return [*map(sum, added(self.order.received_CPE))]

    @cached_property
    def _words(self) -> Words:
        wide = accumulation_dtype(self.dtype)
        words = wide.itemsize // 4
        weight_n = self.weight.detach().index_select(0, self.choice_n)
        word_W = weight_n.to(wide).view(torch.int32)
        pieces = word_W.split([words * size for sizes_P in self._sizes_CP for size in sizes_P])
        num_ranks = len(self.sent_CPE[0])
        word_P = [torch.cat(pieces[rank::num_ranks]) for rank in range(num_ranks)]
        return tell(self.mover, word_P, [words * size for size in self._received_P])
