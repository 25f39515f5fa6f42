"""One small message that carries the counts of an exchange and proves that all ranks agree on it.

Rows move only after every rank has seen every other rank's header. A rank that must refuse its
input takes part too and says so, hence all ranks raise and none waits for rows that never come.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tamoe.schedules import Nodes
from tamoe.topology.errors import InputError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Headers travel in a message of fixed size: ranks that disagree on the number of experts must
# still be able to read each other. Up to 24 experts a rank fit in beside the header; the counts of
# further ones follow in a second message, whose size is agreed on by then.
MESSAGE_WORDS = 32
_FIELDS = ("dtype", "hidden_size", "top_k", "num_experts", "requires_grad", "weight_TK", "exchange")


@dataclass(frozen=True)
class Header:
    """What must be equal on all ranks; ``problem`` is this rank's reason to refuse, if any."""

    dtype: torch.dtype
    hidden_size: int
    top_k: int
    num_experts: int
    requires_grad: bool
    weighted: bool
    layout: int
    problem: str | None = None

    def words(self) -> list[int]:
        """The fields as integers, the status first."""
        dtype = DTYPES.index(self.dtype) if self.dtype in DTYPES else -1
        sizes = [self.hidden_size, self.top_k, self.num_experts]
        flags = [int(self.requires_grad), int(self.weighted)]
        return [int(self.problem is not None), dtype, *sizes, *flags, self.layout]


HEADER_WORDS = 1 + len(_FIELDS)
INLINE_COUNTS = MESSAGE_WORDS - HEADER_WORDS


def layout_code(kind: str, schedule: str, nodes: Nodes) -> int:
    """A number that differs, but for chance, between exchanges that cannot work together."""
    return zlib.crc32(repr((kind, schedule, nodes)).encode())


def exchange_counts(
    header: Header,
    count_N: torch.Tensor,
    refused: torch.Tensor,
    group: dist.ProcessGroup,
) -> tuple[list[int], list[list[int]]]:
    """Tell every rank how many rows it gets for each of its experts; learn the same from all.

    Parameters
    ----------
    header
        This rank's side of the agreement.
    count_N
        ``[N]`` int64, rows for each expert, on the device that the group works on.
    refused
        Scalar, nonzero where values on the device are not allowed. Kept on the device so that one
        read brings everything to the host.
    group
        The ranks; N is a multiple of their number unless the header has a problem.

    Returns
    -------
    sent_N, received_PE
        Counts of rows sent to each expert, and received by rank and local expert.

    Raises
    ------
    InputError
        On all ranks: some rank refused its input, or a field of the header is not equal.
    """
    num_ranks = dist.get_world_size(group)
    count_PE = count_N.view(num_ranks, -1)
    inline = min(count_PE.shape[1], INLINE_COUNTS)
    message = torch.zeros(num_ranks, MESSAGE_WORDS, dtype=torch.int64, device=count_N.device)
    message[:, :HEADER_WORDS] = torch.tensor(header.words(), device=count_N.device)
    message[:, 0] += refused.to(torch.int64)
    message[:, HEADER_WORDS : HEADER_WORDS + inline] = count_PE[:, :inline]
    answer = torch.empty_like(message)
    dist.all_to_all_single(answer, message, group=group)
    host = torch.cat([answer.flatten(), count_N, message[:1, 0]]).tolist()
    words = [host[i * MESSAGE_WORDS : (i + 1) * MESSAGE_WORDS] for i in range(num_ranks)]
    _require_equal([row[:HEADER_WORDS] for row in words], header.problem, bool(host[-1]))
    received_PE = [row[HEADER_WORDS : HEADER_WORDS + inline] for row in words]
    if count_PE.shape[1] > inline:
        rest = count_PE[:, inline:].contiguous()
        answer = torch.empty_like(rest)
        dist.all_to_all_single(answer, rest, group=group)
        tails = answer.tolist()
        received_PE = [row + tail for row, tail in zip(received_PE, tails, strict=True)]
    return host[num_ranks * MESSAGE_WORDS : -1], received_PE


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
        return str(bool(value))
    if name == "weight_TK":
        return "given" if value else "None"
    return f"layout {value:08x}" if name == "exchange" else str(value)
