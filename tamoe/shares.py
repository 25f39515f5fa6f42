"""The parts that a rank's tokens travel in, and what ranks tell each other about them.

One message of counts serves all parts, since the host waits for it.

Shape suffixes: T tokens, K choices, N experts, M nodes, P ranks, E experts of a rank, W counts for
a rank, n choices that were not dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from tamoe.host_table import table_on
from tamoe.ops import build_index
from tamoe.relays import Copies, list_copies, plan_forwarding
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
    choice: torch.Tensor  # flat choices of these tokens, the kept ones first: by expert, by token
    reach_L: Sequence[int]  # tokens with an expert at most 0, 1, 2 … levels of switches away
    top_k: int
    node_N: torch.Tensor  # node of each expert; M at N
    parent_TM: torch.Tensor  # forwarding trees
    own_P: Sequence[Told]
    told_P: Sequence[Told]
    relays: Relays

    @cached_property
    def copies(self) -> Copies:
        """Where the tokens are copied to."""
        forward_MM = [self.own_P[ranks[0]].forward_M for ranks in self.relays.nodes]
        return list_copies(self.parent_TM, forward_MM)

    @cached_property
    def choice_n(self) -> torch.Tensor:
        """Kept choices, sorted by expert."""
        return self.choice[: sum(map(sum, counts_for_ranks(self.own_P, self.relays)))]

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
    keys: tuple[torch.Tensor, ...]  # expert of each choice of a part, N where it was dropped
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
        key.tensor_split([top_k * bound for bound in bounds[1:-1]]),
        top_k,
        num_local,
        table_on(key.device, [*nodes, len(relays.nodes)]),
    )


@dataclass(frozen=True, eq=False)
class Sorted:
    """What a rank finds out about a part of its tokens before the host waits for the counts."""

    word_PW: torch.Tensor  # counts to tell each rank
    choice: torch.Tensor  # flat choices of the part, the kept ones first: by expert, by token
    parent_TM: torch.Tensor  # forwarding trees
    reach_L: torch.Tensor  # tokens with an expert at most 0, 1, 2 … levels of switches away


def sort_parts(cut: Cut, relays: Relays) -> list[Sorted]:
    """Sort the choices of each part and count; the device is not waited for."""
    parts = []
    for tokens, key in zip(cut.tokens, cut.keys, strict=True):
        node_key = cut.node_N[key]
        parent_TM, forward_MM = plan_forwarding(node_key, tokens.stop - tokens.start, relays)
        built = build_index(key.view(-1, cut.top_k), cut.num_local * len(relays.node_of))
        words = count_words(forward_MM, built.count_N, relays)
        reach_L = count_reach(node_key.view(-1, cut.top_k), relays)
        parts.append(Sorted(words, built.choice, parent_TM, reach_L))
    return parts


def count_reach(node_TK: torch.Tensor, relays: Relays) -> torch.Tensor:
    """Tokens with a choice at most 0, 1, … L levels of switches away, ``[L + 1]``.

    Examples
    --------
    >>> from tamoe.solver.relays import make_relays
    >>> relays = make_relays(0, ((0,), (1,)), ((0, 1),))
    >>> count_reach(torch.tensor([[0, 1], [1, 2], [2, 2]]), relays).tolist()  # node 2: dropped
    [1, 2]
    """
    levels = [relays.level(relays.node, node) for node in range(len(relays.nodes))]
    level_M1 = table_on(node_TK.device, [*levels, relays.num_levels + 1])
    level_TK = level_M1.index_select(0, node_TK.flatten()).view_as(node_TK)
    return torch.stack([(level_TK <= level).any(1).sum() for level in range(relays.num_levels + 1)])


def make_shares(
    cut: Cut,
    parts: Sequence[Sorted],
    reached: Sequence[int],
    sent_PW: Sequence[Sequence[int]],
    received_PW: Sequence[Sequence[int]],
    relays: Relays,
) -> list[Share]:
    """The parts, once the counts of all ranks are known; ``reached`` are those of all parts."""
    size, levels = (len(words) // len(cut.tokens) for words in (sent_PW[0], reached))
    shares = []
    for part, (tokens, key) in enumerate(zip(cut.tokens, cut.keys, strict=True)):
        words = slice(part * size, (part + 1) * size)
        own_P = [
            _read(row[words], node, relays, cut.num_local)
            for row, node in zip(sent_PW, relays.node_of, strict=True)
        ]
        told_P = [_read(row[words], relays.node, relays, cut.num_local) for row in received_PW]
        shares.append(
            Share(
                tokens=tokens,
                key=key,
                choice=parts[part].choice,
                reach_L=reached[part * levels : (part + 1) * levels],
                top_k=cut.top_k,
                node_N=cut.node_N,
                parent_TM=parts[part].parent_TM,
                own_P=own_P,
                told_P=told_P,
                relays=relays,
            )
        )
    return shares


def counts_of_parts(
    shares: Sequence[Share], relays: Relays
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of all parts for the experts of each rank, and from each rank for those of this one."""
    own = relays.nodes[relays.node].index(relays.rank)
    return (
        _added([counts_for_ranks(share.own_P, relays) for share in shares]),
        _added([[told.choices_pE[own] for told in share.told_P] for share in shares]),
    )


def _added(counts_cPE: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    return [
        [sum(column) for column in zip(*rows, strict=True)]
        for rows in zip(*counts_cPE, strict=True)
    ]


def count_words(forward_MM: torch.Tensor, count_N: torch.Tensor, relays: Relays) -> torch.Tensor:
    """Counts for each rank, ``[P, 2M + E · ranks of the largest node]``: a :class:`Told` each."""
    num_ranks = len(relays.node_of)
    node_P = table_on(count_N.device, relays.node_of)
    count_PE = count_N.view(num_ranks, -1)
    padded = torch.cat([count_PE, torch.zeros_like(count_PE[:1])])
    widest = max(map(len, relays.nodes))
    ranks_Mp = table_on(
        count_N.device,
        [[*ranks, *[num_ranks] * (widest - len(ranks))] for ranks in relays.nodes],
    )
    choices_M = padded[ranks_Mp].flatten(1)
    return torch.cat([forward_MM[node_P], forward_MM.T[node_P], choices_M[node_P]], dim=1)


def _read(words: Sequence[int], node: int, relays: Relays, num_local: int) -> Told:
    num_nodes = len(relays.nodes)
    choices = words[2 * num_nodes :]
    return Told(
        words[:num_nodes],
        words[num_nodes : 2 * num_nodes],
        [choices[p * num_local : (p + 1) * num_local] for p in range(len(relays.nodes[node]))],
    )


def counts_for_ranks(own_P: Sequence[Told], relays: Relays) -> list[Sequence[int]]:
    """Rows of this rank for the experts of each rank, ``[P, E]``."""
    counts_PE: list[Sequence[int]] = [()] * len(relays.node_of)
    for ranks in relays.nodes:
        for rank, counts_E in zip(ranks, own_P[ranks[0]].choices_pE, strict=True):
            counts_PE[rank] = counts_E
    return counts_PE


def count_keys(key: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Choices of each expert, ``[N]`` int64; integer sums, so any order gives the same."""
    count = torch.zeros(num_experts + 1, dtype=torch.int64, device=key.device)
    return count.scatter_add_(0, key, torch.ones_like(key))[:num_experts]
