"""Where rows belong that come in blocks: tables of the host made into places, without a sort.

Shape suffixes: P ranks, E experts of a rank, C parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from tamoe.host_table import table_on

CountsCPE = Sequence[Sequence[Sequence[int]]]


def repeated(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Numbers 0, 1, … each as often as counted.

    >>> repeated([2, 0, 1], torch.device("cpu")).tolist()
    [0, 0, 2]
    """
    numbers = torch.arange(len(counts), device=device)
    return numbers.repeat_interleave(table_on(device, counts), output_size=sum(counts))


def ranges(starts: Sequence[int], counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """From each start on, as many numbers as counted, one range behind the other.

    >>> ranges([7, 2, 0], [2, 0, 3], torch.device("cpu")).tolist()
    [7, 8, 0, 1, 2]
    """
    begins = accumulate(counts, initial=0)
    shift = table_on(device, [start - begin for start, begin in zip(starts, begins, strict=False)])
    total = sum(counts)
    shift = shift.repeat_interleave(table_on(device, counts), output_size=total)
    return torch.arange(total, device=device).add_(shift)


def sliced(
    splits: Sequence[int], num_slices: int, device: torch.device
) -> list[tuple[list[int], torch.Tensor]]:
    """For each slice its splits, and which rows are in it; both ends of a pair cut alike.

    >>> [(part, row.tolist()) for part, row in sliced([3, 2], 2, torch.device("cpu"))]
    [([1, 1], [0, 3]), ([2, 1], [1, 2, 4])]
    """
    first_P = [*accumulate(splits, initial=0)][:-1]
    begins_P = [[c * number // num_slices for c in splits] for number in range(num_slices + 1)]
    parts = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(begins_P)]
    starts = [a + b for row in begins_P[:-1] for a, b in zip(first_P, row, strict=True)]
    row_n = ranges(starts, [count for part in parts for count in part], device)
    return list(zip(parts, row_n.split([*map(sum, parts)]), strict=True))


@dataclass(frozen=True, eq=False)
class RowOrder:
    """Where rows of this rank's experts belong: by expert, then by source, then by part.

    Examples
    --------
    >>> order = RowOrder([[[1, 2]], [[1, 0]]])  # two parts, one source, two experts
    >>> cpu = torch.device("cpu")
    >>> [order.places(part, [0], cpu).tolist() for part in (0, 1)], order.by_source(cpu).tolist()
    ([[0, 2, 3], [1]], [0, 2, 3, 1])
    """

    received_CPE: CountsCPE

    @cached_property
    def _start_CPE(self) -> list[list[list[int]]]:
        received_CPE, place = self.received_CPE, 0
        start_CPE = [[list(counts_E) for counts_E in counts_PE] for counts_PE in received_CPE]
        for expert in range(len(received_CPE[0][0])):
            for source in range(len(received_CPE[0])):
                for start_PE, counts_PE in zip(start_CPE, received_CPE, strict=True):
                    start_PE[source][expert] = place
                    place += counts_PE[source][expert]
        return start_CPE

    def places(self, part: int, sources: Sequence[int], device: torch.device) -> torch.Tensor:
        """Of the rows of a part, which arrive by source, as listed, then by expert."""
        return ranges(*self._blocks([(part, source) for source in sources]), device)

    def by_source(self, device: torch.device) -> torch.Tensor:
        """Of all rows, by source, then by part, then by expert."""
        return ranges(*self._by_source(), device)

    def is_by_source(self) -> bool:
        """Whether rows by source, then by part, then by expert are where they belong.

        >>> RowOrder([[[2], [1]]]).is_by_source(), RowOrder([[[0, 1], [1, 0]]]).is_by_source()
        (True, False)
        """
        starts = [start for start, count in zip(*self._by_source(), strict=True) if count]
        return starts == sorted(starts)

    def _by_source(self) -> tuple[list[int], list[int]]:
        parts, sources = range(len(self.received_CPE)), range(len(self.received_CPE[0]))
        return self._blocks([(part, source) for source in sources for part in parts])

    def _blocks(self, blocks: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        counts = [count for c, source in blocks for count in self.received_CPE[c][source]]
        starts = [start for c, source in blocks for start in self._start_CPE[c][source]]
        return starts, counts
