"""Memory of ranks: freed buffers, every exchange's peak, flat rows in slices with the same bits."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tamoe.bench import Setting, random_routing
from tamoe.exchange import Exchange
from tamoe.experiments.memory import measure, peak_extra
from tamoe.flat import FlatRoute
from tamoe.solver import parts
from tamoe.topology import Topology, run_ranks

MOST_OF_IN_AND_OUT = 1.25


def held_of_freed_buffers(rank: int) -> float:
    """Resident MiB that stay when buffers of 64 MiB in all are freed."""

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident_bytes()
    buffers = [torch.zeros(mebibytes * 2**18) for mebibytes in (8, 8, 48)]
    del buffers
    return (resident_bytes() - before) / 2**20


@pytest.mark.ranks
def test_freed_buffers_stay_with_their_rank_unless_its_user_chose_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run_ranks(1, held_of_freed_buffers)[0] > 60
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert run_ranks(1, held_of_freed_buffers)[0] < 10


def in_rank(rank: int) -> list[int]:
    def call(temporary_mb: int) -> torch.Tensor:
        torch.ones(temporary_mb * 2**18)
        return torch.ones(4 * 2**18)

    peaks = []
    for temporary_mb in (1, 48, 48, 1):  # the first loads code
        kept, extra = peak_extra(lambda: call(temporary_mb))  # noqa: B023
        peaks.append(extra)
        del kept
    return peaks


@pytest.mark.ranks
def test_a_peak_is_that_of_the_call_alone() -> None:
    _, big, again, small = (extra / 2**20 for extra in run_ranks(1, in_rank)[0])
    # The 4 MB that it returns come after the 48; the kernel counts pages in batches.
    assert 46 < big < 50 and 46 < again < 50
    assert 2 < small < 6


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("tree", "rows", "top_k"),
    [
        ("2x4", 2**15, 8),
        ("4x2", 2**15, 2),
        ("4x2", 2**12, 8),
        ("2x4", 2**12, 8),
        ("[[2,2],[2,2]]", 2**13, 8),
    ],
)
def test_an_exchange_takes_little_more_memory_than_its_tensors(
    tree: str, rows: int, top_k: int
) -> None:
    setting = Setting(rows // top_k, top_k, "even", 8, 512)  # rows of 2 kB
    peaks = run_ranks(8, measure, tree, setting, timeout_s=200)[0]
    assert len(peaks) == 12
    for peak in peaks:
        # The call returns at least the smaller of its two sides.
        assert 0.1 < peak.share <= MOST_OF_IN_AND_OUT, peak


def sliced_and_whole(rank: int, schedule: Any) -> list[bool]:
    topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(1e9, 1e9))
    setting = Setting(30 + 11 * rank, 3, "local", 2, 8)
    generator = torch.Generator().manual_seed(rank)
    index_TK = random_routing(setting, rank, topology, generator)
    index_TK[::5, 1] = -1
    results = []
    for slice_bytes in (2**21, 128):
        parts.SLICE_BYTES = slice_bytes
        exchange = Exchange(topology, kind="flat", schedule=schedule)
        x_TD = torch.arange(setting.tokens * 8.0).view(-1, 8).sin().requires_grad_()
        weight_TK = torch.linspace(-1, 2, index_TK.numel()).view_as(index_TK).requires_grad_()
        row_RD, handle = exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=8)
        assert isinstance(handle.route, FlatRoute)
        slices = 1 if slice_bytes == 2**21 else parts.MOST_SLICES
        assert len(handle.route.slices) == slices
        out_TD = exchange.combine(row_RD.square() * (1 + rank), handle)
        out_TD.cos().sum().backward()
        results.append((row_RD, out_TD, x_TD.grad, weight_TK.grad))
    dist.barrier()
    return [torch.equal(a, b) for a, b in zip(*results, strict=True)]


@pytest.mark.ranks
@pytest.mark.parametrize("schedule", ["single", "rounds"])
def test_flat_rows_in_slices_have_the_same_bits(schedule: str) -> None:
    assert run_ranks(4, sliced_and_whole, schedule) == [[True] * 4] * 4
