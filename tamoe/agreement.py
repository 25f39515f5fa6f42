"""One small message that carries the counts of an exchange and proves that all ranks agree on it.

Rows move only after every rank has seen every other rank's header. A rank that must refuse its
input takes part too and says so, hence all ranks raise and none waits for rows that never come.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tamoe.groups import works_by_gloo
from tamoe.host_table import table_on
from tamoe.node_channel import MOST_BYTES
from tamoe.schedules import Mover, Nodes
from tamoe.topology.errors import InputError
from tamoe.word_swap import word_swap

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Headers travel in a message of fixed size: ranks that disagree on the number of experts must
# still be able to read each other. Up to 241 counts for a peer fit in beside the header; further
# ones follow in a second message, whose size is agreed on by then.
MESSAGE_WORDS = 256
_LAYOUT = "topology_or_plan or placement"
_FIELDS = (
    *("device", "dtype", "hidden_size", "top_k", "num_experts", "requires_grad", "weight_TK"),
    *("kind", "schedule", "chunks", "overlap", _LAYOUT),
)
_NAMES = {
    "device": ("cpu", "cuda", "neither cpu nor cuda"),
    "kind": ("flat", "hierarchical"),
    "schedule": ("single", "rounds"),
}


@dataclass(frozen=True)
class Header:
    """What must be equal on all ranks, and tokens T; ``problem``: this rank's reason to refuse."""

    device: str  # type of the tokens'
    dtype: torch.dtype
    hidden_size: int
    top_k: int
    num_experts: int
    requires_grad: int  # 0: gradients are off, 1: tokens need none, 2: they need some
    weighted: int  # 0: no weights, 1: weights, 2: weights that need a gradient
    kind: str
    schedule: str
    chunks: int
    pieces: int  # of the layer's tokens, of which this is one
    layout: int  # from layout_code
    num_tokens: int  # need not be equal
    problem: str | None = None

    def words(self) -> list[int]:
        """The fields as integers, the status first."""
        device = _NAMES["device"].index(self.device) if self.device in _NAMES["device"] else 2
        dtype = DTYPES.index(self.dtype) if self.dtype in DTYPES else -1
        sizes = [self.hidden_size, self.top_k, self.num_experts]
        flags = [self.requires_grad, self.weighted]
        ways = [_NAMES["kind"].index(self.kind), _NAMES["schedule"].index(self.schedule)]
        ends = [self.chunks, self.pieces, self.layout, self.num_tokens]
        return [int(self.problem is not None), device, dtype, *sizes, *flags, *ways, *ends]


HEADER_WORDS = 3 + len(_FIELDS)  # the last: copies for other nodes, known on the device
INLINE_COUNTS = MESSAGE_WORDS - HEADER_WORDS


def layout_code(nodes: Nodes, groups: Sequence[Sequence[int]], rank_of_N: Sequence[int]) -> int:
    """A number that differs, but for chance, where ranks or experts are in other places.

    ``groups`` are those of the canonical sum: nodes, then switches of every level.
    """
    text = repr((nodes, [list(group) for group in groups], list(rank_of_N)))
    return zlib.crc32(text.encode()) >> 1  # fits 32 bits with a sign


def exchange_counts(
    header: Header,
    count_PW: torch.Tensor,
    note_X: torch.Tensor,
    mover: Mover,
) -> tuple[list[list[int]], list[list[int]], list[int], list[int], list[int]]:
    """Tell every rank the counts that it has to know; learn from all what this rank has to know.

    The host waits for the device once, twice beyond :data:`INLINE_COUNTS` counts for a rank.

    Parameters
    ----------
    header
        This rank's side of the agreement.
    count_PW
        ``[P, W]`` int64, W counts for each rank, on the device that the group works on.
    note_X
        ``[X]`` int64, X >= 2, what this rank's own host has to know, of which all ranks hear the
        first two: nonzero where values on the device are not allowed, and copies of its tokens for
        other nodes. Kept on the device so that one read brings everything.
    mover
        Of the group, with its nodes.

    Returns
    -------
    sent_PW, received_PW, tokens_P, copies_P, note_X
        Counts told to each rank and by each rank; tokens of each rank, and copies of them for other
        nodes; the notes.

    Raises
    ------
    InputError
        On all ranks: some rank refused its input, or a field of the header is not equal.
    """
    assert mover.group is not None
    num_ranks, num_counts = count_PW.shape
    inline = min(num_counts, INLINE_COUNTS)
    message = torch.zeros(num_ranks, MESSAGE_WORDS, dtype=torch.int32, device=count_PW.device)
    message[:, : HEADER_WORDS - 1] = table_on(count_PW.device, header.words())
    message[:, 0] += note_X[0].to(torch.int32)
    message[:, HEADER_WORDS - 1] = note_X[1]
    message[:, HEADER_WORDS : HEADER_WORDS + inline] = count_PW[:, :inline]
    swap = word_swap(mover.group, mover.rank)
    answer = swap.swap(message, mover.patience)
    told = torch.cat([answer.flatten(), count_PW.flatten(), note_X]).tolist()
    num_words = num_ranks * MESSAGE_WORDS
    words, note = _rows(told[:num_words], MESSAGE_WORDS), told[len(told) - len(note_X) :]
    _require_equal([row[:HEADER_WORDS] for row in words], header.problem, bool(note[0]))
    small = message.numel() * message.element_size() <= MOST_BYTES
    if small and works_by_gloo(mover.group, message.device):
        swap.agree(mover.nodes, mover.patience)  # headers tell that all ranks have these nodes
    received_PW = [row[HEADER_WORDS : HEADER_WORDS + inline] for row in words]
    if num_counts > inline:
        rest = count_PW[:, inline:].to(torch.int32)  # rows of one rank, so that they fit
        tails = swap.swap(rest, mover.patience).tolist()
        received_PW = [row + tail for row, tail in zip(received_PW, tails, strict=True)]
    tokens_P, copies_P = ([row[HEADER_WORDS + word] for row in words] for word in (-2, -1))
    sent_PW = _rows(told[num_words : len(told) - len(note_X)], num_counts)
    return sent_PW, received_PW, tokens_P, copies_P, note


def true_anywhere(value: bool, like: torch.Tensor, mover: Mover) -> bool:
    """Whether a value is true on any rank of the group; all ranks call it, and their hosts wait.

    ``like`` is on the device that the group works on.
    """
    if mover.group is None:
        return value
    word_P1 = like.new_full((mover.group.size(), 1), int(value), dtype=torch.int32)
    return bool(word_swap(mover.group, mover.rank).swap(word_P1, mover.patience).any())


def _rows(values: list[int], size: int) -> list[list[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


class RefusedValues(InputError):
    """Values on the device are not allowed; the caller knows which and says so."""


def _require_equal(headers: Sequence[Sequence[int]], problem: str | None, refused: bool) -> None:
    if problem is not None:
        raise InputError(problem)
    if refused:
        raise RefusedValues("the exchange refused values of this rank")
    refusing = [str(rank) for rank, words in enumerate(headers) if words[0]]
    if refusing:
        raise InputError(
            f"rank {', '.join(refusing)} of the group refused its input to the exchange; its own "
            f"error says why, and nothing was moved"
        )
    for field, name in enumerate(_FIELDS, start=1):
        by_value: dict[int, list[str]] = {}
        for rank, words in enumerate(headers):
            by_value.setdefault(words[field], []).append(str(rank))
        if len(by_value) > 1:
            found = "; ".join(
                f"{_shown(name, value)} on rank {', '.join(ranks)}"
                for value, ranks in by_value.items()
            )
            raise InputError(
                f"{name} differs between the ranks of the group: {found}; allowed: the same on "
                f"all ranks. Nothing was moved"
            )


def _shown(name: str, value: int) -> str:
    if name == "dtype":
        return str(DTYPES[value])
    if name == "requires_grad":
        return ("gradients off", "False", "True")[value]
    if name == "weight_TK":
        return ("None", "given", "given, with gradient")[value]
    if name in _NAMES:
        return repr(_NAMES[name][value])
    return f"layout {value:08x}" if name == _LAYOUT else str(value)
