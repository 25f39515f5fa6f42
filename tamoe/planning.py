"""From what a dispatch was asked for to the way that its rows travel.

Shape suffixes: T tokens, K choices, N experts, E experts of a rank, P ranks, D hidden size, n rows
sent (choices that were not dropped), W counts for a rank, X what a rank's own host has to know.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tamoe.agreement import RefusedValues, exchange_counts
from tamoe.flat import FlatRoute, plan_flat
from tamoe.handle import Asked, deal_locally
from tamoe.hierarchical import RelayRoute, plan_relays
from tamoe.ops import build_index
from tamoe.record import timed
from tamoe.schedules import Mover
from tamoe.shares import added, counts_of_parts, cut_tokens, make_shares, sort_choices
from tamoe.solver.parts import MOST_PARTS, num_parts, slices_for
from tamoe.solver.relays import Relays
from tamoe.summation import count_sums

Planned = tuple[FlatRoute | RelayRoute, list[int], list[list[int]]]


class Planner:
    """Plans every dispatch of one exchange; each tells it how many tokens to expect next.

    Parameters
    ----------
    kind
        "flat", "hierarchical" or "none".
    mover
        Moves the rows.
    relays
        Who relays, in a hierarchical exchange.
    groups
        Group of each rank at each level of the sum.
    chunks
        Parts that the tokens of a hierarchical exchange travel in, or "auto".
    """

    def __init__(
        self,
        kind: str,
        mover: Mover,
        relays: Relays,
        groups: Sequence[Sequence[int]],
        chunks: int | str,
    ) -> None:
        self.kind, self.mover, self.relays, self.groups = kind, mover, relays, groups
        self.chunks = chunks
        # Of a rank, in the dispatch before; the same on all ranks.
        self._most_tokens: int | None = None
        self._most_copies = 0  # for other nodes

    def num_parts(self, x_TD: torch.Tensor) -> int:
        """Parts that these tokens are to travel in; the same on all ranks."""
        if self.kind != "hierarchical":
            return 1
        if isinstance(self.chunks, int):
            return self.chunks
        if self._most_tokens is None:
            return MOST_PARTS
        row_bytes = x_TD.shape[-1] * x_TD.dtype.itemsize if x_TD.ndim else 0
        return num_parts(self._most_tokens * row_bytes, self._most_copies * row_bytes)

    def plan(self, asked: Asked) -> Planned:
        """The route, rows for each slot, and rows by source rank and local slot.

        Raises
        ------
        InputError
            On every rank: some rank refused its input, or ranks disagree.
        RefusedValues
            Values on the device are not allowed.
        """
        plans = {"flat": self._flat, "hierarchical": self._relayed, "none": self._kept}
        return plans[self.kind](asked)

    def _flat(self, asked: Asked) -> Planned:
        placement, top_k = asked.placement, asked.header.top_k
        num_ranks = len(self.relays.node_of)
        key_TK = asked.key.view(-1, top_k)
        built = build_index(key_TK, placement.num_slots)
        sums_L = count_sums(key_TK, placement.slots_per_rank, num_ranks, self.groups)
        count_PE = built.count_N.view(num_ranks, -1)
        sent_PE, received_PE, num_sums = self._counts(asked, count_PE, sums_L)
        sent = [count for counts_E in sent_PE for count in counts_E]
        header, choice_n = asked.header, built.choice[: sum(sent)]
        most_rows = (self._most_tokens or 0) * top_k
        num_slices = slices_for(most_rows * header.hidden_size * header.dtype.itemsize)
        rows = header.num_tokens, choice_n // top_k, asked.weight_of(choice_n)
        plan = self.mover, *rows, sent_PE, received_PE, self.groups, num_sums
        route = plan_flat(*plan, num_slices=num_slices)
        return route, sent, received_PE

    def _relayed(self, asked: Asked) -> Planned:
        relays, header = self.relays, asked.header
        num_local = asked.placement.slots_per_rank
        cut = cut_tokens(asked.key, header.top_k, num_local, asked.num_parts, relays)
        in_order = sort_choices(cut, relays)
        told = self._counts(
            asked, in_order.word_PW, in_order.reach_CL.flatten(), in_order.num_copies
        )
        sent_PW, received_PW, reached = told
        shares = make_shares(cut, in_order, reached, sent_PW, received_PW, relays)
        sent_CPE, received_CPE = counts_of_parts(shares, relays)
        sent = [count for counts_E in added(sent_CPE) for count in counts_E]
        weights = None
        if asked.weight_TK is not None:
            weights = asked.weight_TK.flatten(), in_order.choice[: sum(sent)]
        counts = sent_CPE, received_CPE
        route = plan_relays(self.mover, relays, shares, counts, weights, header.dtype)
        return route, sent, added(received_CPE)

    def _kept(self, asked: Asked) -> Planned:
        """Every rank works on its own rows, dealt in turn to its experts."""
        header, num_slots = asked.header, asked.placement.num_slots
        num_local = len(asked.placement.experts_PE[self.mover.rank])
        dealt_key = deal_locally(asked.key, num_slots, num_local).view(-1, header.top_k)
        built = build_index(dealt_key, num_local)
        sums_L = count_sums(dealt_key, num_local, 1, ())
        counts = build_index(asked.key.view(-1, header.top_k), num_slots).count_N.view(1, -1)
        [sent], _, num_sums = self._counts(asked, counts, sums_L)
        share, extra = divmod(sum(sent), num_local)
        dealt_PE = [[share + (expert < extra) for expert in range(num_local)]]
        choice_n = built.choice[: sum(sent)]
        rows = header.num_tokens, choice_n // header.top_k, asked.weight_of(choice_n)
        return plan_flat(self.mover, *rows, dealt_PE, dealt_PE, (), num_sums), sent, dealt_PE

    def _counts(
        self,
        asked: Asked,
        word_PW: torch.Tensor,
        own_X: torch.Tensor,
        num_copies: torch.Tensor | None = None,
    ) -> tuple[list[list[int]], list[list[int]], list[int]]:
        """Words told to each rank and by each rank, and those that this rank keeps to itself.

        All ranks hear of ``num_copies``, those of this rank's tokens for other nodes.
        """
        refused = asked.refused.to(torch.int64).view(1)
        copies = torch.zeros_like(refused) if num_copies is None else num_copies.view(1)
        note_X = torch.cat([refused, copies, own_X])
        if self.mover.group is not None:
            with timed("counts", word_PW.device):
                sent_PW, received_PW, tokens_P, copies_P, note = exchange_counts(
                    asked.header, word_PW, note_X, self.mover
                )
            self._most_tokens, self._most_copies = max(tokens_P), max(copies_P)
            return sent_PW, received_PW, note[2:]
        told = torch.cat([note_X, word_PW.flatten()]).tolist()
        if told[0]:
            raise RefusedValues("the exchange refused values of this rank")
        words = told[len(note_X) :]
        return [words], [words], told[2 : len(note_X)]
