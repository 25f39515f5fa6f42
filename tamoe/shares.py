"""The parts that a rank's tokens travel in, and what ranks tell each other about them.

One message of counts serves all parts, since the host waits for it.

Shape suffixes: T tokens, K choices, N experts, M nodes, P ranks, E experts of a rank, C parts, W
counts for a rank, n choices that were not dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from tamoe.host_table import table_on
from tamoe.ops import build_index
from tamoe.relays import Copies, count_copies, list_copies, plan_forwarding
from tamoe.row_order import CountsCPE, repeated
from tamoe.solver.relays import Relays


@dataclass(frozen=True, eq=False)
class Told:
    """What one rank tells another about its tokens: counts that concern the other's node."""

    forward_M: Sequence[int]  # copies that the node sends on to each node
    arrive_M: Sequence[int]  # copies that the node gets from each node
    choices_pE: Sequence[Sequence[int]]  # rows for the experts of each rank of the node


@dataclass(frozen=True, eq=False)
class Share:
    """A part: its tokens, and what this rank and the others told about theirs."""

    tokens: slice
    key: torch.Tensor  # expert of each choice, N where it was dropped
    choice_n: torch.Tensor  # kept flat choices of these tokens, sorted by expert, then by token
    reach_L: Sequence[int]  # tokens with an expert at most 0, 1, 2 … levels of switches away
    top_k: int
    node_N: torch.Tensor  # node of each expert; M at N
    parent_TM: torch.Tensor  # forwarding trees
    own_M: Sequence[Told]  # for the ranks of each node
    told_P: Sequence[Told]

    @cached_property
    def copies(self) -> Copies:
        """Where the tokens are copied to."""
        return list_copies(self.parent_TM, [own.forward_M for own in self.own_M])

    @cached_property
    def position_n(self) -> torch.Tensor:
        """Place on the node of its expert of each choice, sorted by expert."""
        choice_n = self.choice_n
        return self.copies.position_TM[choice_n // self.top_k, self.node_N[self.key[choice_n]]]


@dataclass(frozen=True, eq=False)
class Cut:
    """A rank's choices, cut into parts, each smaller than the one before.

    Nothing hides what is left to do inside a node when the last part has crossed the links, nor, on
    the way back, what has to be done before its sums can set out.
    """

    tokens: tuple[slice, ...]
    key: torch.Tensor  # expert of each choice, N where it was dropped
    top_k: int
    num_local: int  # experts E of a rank
    node_N: torch.Tensor  # node of each expert; M at N


def cut_tokens(
    key: torch.Tensor, top_k: int, num_local: int, num_parts: int, relays: Relays
) -> Cut:
    """Cut the tokens of a rank into parts.

    Examples
    --------
    >>> from tamoe.solver.relays import make_relays
    >>> key = torch.tensor([0, 1, 1, 0, 2, 2])
    >>> cut_tokens(key, 2, 1, 2, make_relays(0, ((0, 1),), ())).tokens
    (slice(0, 2, None), slice(2, 3, None))
    """
    num_tokens = len(key) // top_k
    ends = [0, *itertools.accumulate(range(num_parts, 0, -1))]
    bounds = [num_tokens * end // ends[-1] for end in ends]
    nodes = [node for node in relays.node_of for _ in range(num_local)]
    return Cut(
        tuple(slice(a, b) for a, b in itertools.pairwise(bounds)),
        key,
        top_k,
        num_local,
        table_on(key.device, [*nodes, len(relays.nodes)]),
    )


@dataclass(frozen=True, eq=False)
class Sorted:
    """What a rank finds out about its tokens before the host waits for the counts."""

    word_PW: torch.Tensor  # counts to tell each rank, part by part
    choice: torch.Tensor  # flat choices, the kept ones first: by part, by expert, by token
    parent_TM: torch.Tensor  # forwarding trees
    reach_CL: torch.Tensor  # tokens with an expert at most 0, 1, 2 … levels of switches away
    num_copies: torch.Tensor  # for other nodes


def sort_choices(cut: Cut, relays: Relays) -> Sorted:
    """Sort the choices by part and count, all parts at once; the device is not waited for."""
    num_parts, num_experts = len(cut.tokens), cut.num_local * len(relays.node_of)
    part_T = repeated([part.stop - part.start for part in cut.tokens], cut.key.device)
    key_TK, node_TK = (key.view(-1, cut.top_k) for key in (cut.key, cut.node_N[cut.key]))
    parent_TM = plan_forwarding(node_TK.flatten(), len(part_T), relays)
    end = num_parts * num_experts
    apart_TK = torch.where(key_TK < num_experts, key_TK + num_experts * part_T[:, None], end)
    built = build_index(apart_TK, end)
    forward_CMM = count_copies(parent_TM, part_T, num_parts)
    return Sorted(
        word_PW=count_words(forward_CMM, built.count_N.view(num_parts, num_experts), relays),
        choice=built.choice,
        parent_TM=parent_TM,
        reach_CL=count_reach(node_TK, part_T, num_parts, relays),
        num_copies=forward_CMM.sum(),
    )


def count_reach(
    node_TK: torch.Tensor, part_T: torch.Tensor, num_parts: int, relays: Relays
) -> torch.Tensor:
    """Tokens with a choice at most 0, 1, … L levels of switches away, ``[C, L + 1]``.

    Examples
    --------
    >>> from tamoe.solver.relays import make_relays
    >>> relays = make_relays(0, ((0,), (1,)), ((0, 1),))
    >>> node_TK = torch.tensor([[0, 1], [1, 2], [2, 2]])  # node 2: dropped
    >>> count_reach(node_TK, torch.tensor([0, 0, 1]), 2, relays).tolist()
    [[1, 2], [0, 0]]
    """
    levels = [relays.level(relays.node, node) for node in range(len(relays.nodes))]
    # As bytes: 512 times the least of 8 takes the CPU 6 us, of 64-bit numbers 60.
    level_M1 = table_on(node_TK.device, [*levels, relays.num_levels + 1]).to(torch.int8)
    nearest_T1 = level_M1[node_TK].amin(1, keepdim=True)
    reached_TL = nearest_T1 <= torch.arange(relays.num_levels + 1, device=node_TK.device)
    reach_CL = torch.zeros(
        num_parts, relays.num_levels + 1, dtype=torch.int64, device=part_T.device
    )
    return reach_CL.index_add_(0, part_T, reached_TL.to(torch.int64))


def make_shares(
    cut: Cut,
    sorted_choices: Sorted,
    reached: Sequence[int],
    sent_PW: Sequence[Sequence[int]],
    received_PW: Sequence[Sequence[int]],
    relays: Relays,
) -> list[Share]:
    """The parts, once the counts of all ranks are known; ``reached`` are those of all parts."""
    size, levels = (len(words) // len(cut.tokens) for words in (sent_PW[0], reached))
    shares, begin = [], 0
    for part, tokens in enumerate(cut.tokens):
        words = slice(part * size, (part + 1) * size)
        own_M = [
            _read(sent_PW[ranks[0]][words], node, relays, cut.num_local)
            for node, ranks in enumerate(relays.nodes)
        ]
        told_P = [_read(row[words], relays.node, relays, cut.num_local) for row in received_PW]
        end = begin + sum(map(sum, counts_for_ranks(own_M, relays)))
        first_choice = tokens.start * cut.top_k
        shares.append(
            Share(
                tokens=tokens,
                key=cut.key[first_choice : tokens.stop * cut.top_k],
                choice_n=sorted_choices.choice[begin:end] - first_choice,
                reach_L=reached[part * levels : (part + 1) * levels],
                top_k=cut.top_k,
                node_N=cut.node_N,
                parent_TM=sorted_choices.parent_TM[tokens],
                own_M=own_M,
                told_P=told_P,
            )
        )
        begin = end
    return shares


def counts_of_parts(shares: Sequence[Share], relays: Relays) -> tuple[CountsCPE, CountsCPE]:
    """Rows of each part for the experts of each rank, and from each rank for those of this one."""
    own = relays.nodes[relays.node].index(relays.rank)
    return (
        [counts_for_ranks(share.own_M, relays) for share in shares],
        [[told.choices_pE[own] for told in share.told_P] for share in shares],
    )


def added(counts_CPE: CountsCPE) -> list[list[int]]:
    """Rows of all parts together.

    >>> added([[[1, 2]], [[0, 1]]])
    [[1, 3]]
    """
    return [
        [sum(column) for column in zip(*rows, strict=True)]
        for rows in zip(*counts_CPE, strict=True)
    ]


def count_words(forward_CMM: torch.Tensor, count_CN: torch.Tensor, relays: Relays) -> torch.Tensor:
    """Counts for each rank, ``[P, C · (2M + E · ranks of the largest node)]``: :class:`Told`s."""
    num_ranks, num_parts, device = len(relays.node_of), len(count_CN), count_CN.device
    node_P = table_on(device, relays.node_of)
    count_CPE = count_CN.view(num_parts, num_ranks, -1)
    padded_CPE = torch.cat([count_CPE, torch.zeros_like(count_CPE[:, :1])], 1)
    widest = max(map(len, relays.nodes))
    ranks_Mp = table_on(
        device, [[*ranks, *[num_ranks] * (widest - len(ranks))] for ranks in relays.nodes]
    )
    choices_CPW = padded_CPE[:, ranks_Mp[node_P]].flatten(2)
    word_CPW = torch.cat([forward_CMM[:, node_P], forward_CMM.mT[:, node_P], choices_CPW], 2)
    return word_CPW.transpose(0, 1).flatten(1)


def _read(words: Sequence[int], node: int, relays: Relays, num_local: int) -> Told:
    num_nodes = len(relays.nodes)
    choices = words[2 * num_nodes :]
    return Told(
        words[:num_nodes],
        words[num_nodes : 2 * num_nodes],
        [choices[p * num_local : (p + 1) * num_local] for p in range(len(relays.nodes[node]))],
    )


def counts_for_ranks(own_M: Sequence[Told], relays: Relays) -> list[Sequence[int]]:
    """Rows of this rank for the experts of each rank, ``[P, E]``."""
    counts_PE: list[Sequence[int]] = [()] * len(relays.node_of)
    for ranks, own in zip(relays.nodes, own_M, strict=True):
        for rank, counts_E in zip(ranks, own.choices_pE, strict=True):
            counts_PE[rank] = counts_E
    return counts_PE
