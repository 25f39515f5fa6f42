"""Peak extra memory of dispatch and of combine, beside the bytes that they are given and return.

Run it (about a minute on two cores)::

    python -m tamoe.experiments.memory -o memory.json

**Extra memory** of a call is the highest level of the rank's resident memory while it runs, less the
level before it, plus the rank's whole outbox (memory shared inside the node, which stays between
calls). So the tensor that the call returns counts, what it is given does not, and pages of other
ranks' outboxes count for their owners. **In + out** are the bytes of the tokens or rows that the
call is given and of those that it returns: x_TD and row_RD for dispatch, row_RD and out_TD for
combine. **Rows on the wire** are those that the flat exchange sends and receives, one for each
choice.

The level is the kernel's (VmRSS and VmHWM in ``/proc/self/status``), of pages that were touched.
Blocks from 64 kB go back to the kernel when they are freed, so nothing of earlier calls hides in
the allocator. "first" is the first call of an exchange, when it does not know yet how many tokens
come, "next" the highest of later ones.

Shape suffixes: T tokens, K choices, D hidden size, R rows received.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import torch.distributed as dist
import typer

from tamoe.bench import Setting, random_routing
from tamoe.exchange import Exchange
from tamoe.node_memory import outbox_bytes
from tamoe.topology.documents import check_writable, write_document
from tamoe.topology.errors import TamoeError, whole
from tamoe.topology.graph import Topology
from tamoe.topology.ranks import run_ranks
from tamoe.topology.tree import parse_tree, tree_depth

SCHEMA, SCHEMA_VERSION = "tamoe.experiment.memory", "1.0"
_TIMEOUT_S = 300.0
_CALLS = 4  # of each exchange; the first is kept apart
_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
_SMALLEST_BLOCK_BYTES = 2**16
Result = TypeVar("Result")


@dataclass(frozen=True)
class Peak:
    """Extra memory of one call, on the rank where it is the largest share of in + out."""

    tree: str
    top_k: int
    exchange: str
    call: str  # "dispatch" or "combine"
    when: str  # "first" or "next"
    extra_bytes: int
    in_out_bytes: int
    wire_bytes: int  # of rows that the flat exchange sends and receives

    @property
    def share(self) -> float:
        """Extra memory over in + out."""
        return self.extra_bytes / self.in_out_bytes


def peak_extra(call: Callable[[], Result]) -> tuple[Result, int]:
    """What a call returns, and its peak of resident memory over the level before, in bytes."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _SMALLEST_BLOCK_BYTES)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest level starts anew
    before = _level_bytes("VmRSS")
    result = call()
    return result, _level_bytes("VmHWM") - before


def _level_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def measure(rank: int, tree: str, setting: Setting, names: Sequence[str]) -> list[Peak]:
    """Peaks of every exchange; every rank of the group calls it, and all get them."""
    topology = _topology(tree)
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(setting.tokens, setting.hidden_size, generator=generator)
    index_TK = random_routing(setting, rank, topology, generator)
    weight_TK = torch.rand(index_TK.shape, generator=generator)
    num_experts = setting.experts_per_rank * topology.num_ranks
    peaks: list[Peak] = []
    for name in names:
        kind, _, schedule = name.partition(" ")
        made: list[tuple[str, str, int, int, int]] = []
        for _warm in (True, False):  # pairs connect and outboxes grow once
            exchange = Exchange(topology, kind=kind, schedule=schedule or "auto")  # type: ignore[arg-type]
            for number in range(_CALLS):
                when = "next" if number else "first"
                dist.barrier()
                (row_RD, handle), extra = peak_extra(
                    lambda: exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=num_experts)  # noqa: B023
                )
                wire = index_TK.numel() * x_TD[0].nbytes + row_RD.nbytes
                both = x_TD.nbytes + row_RD.nbytes
                made.append(("dispatch", when, extra, both, wire))
                dist.barrier()
                _, extra = peak_extra(lambda: exchange.combine(row_RD, handle))  # noqa: B023
                made.append(("combine", when, extra, both, wire))
                del row_RD, handle
        shared = outbox_bytes(exchange.group)
        peaks += [
            Peak(tree, setting.top_k, name, call, when, extra + shared, both, wire)
            for call, when, extra, both, wire in made[2 * _CALLS :]
        ]
    everyone: list[Any] = [None] * topology.num_ranks
    dist.all_gather_object(everyone, peaks)
    highest: dict[tuple[str, ...], Peak] = {}
    for peak in (peak for peaks in everyone for peak in peaks):
        key = (peak.exchange, peak.call, peak.when)
        if key not in highest or peak.share > highest[key].share:
            highest[key] = peak
    return list(highest.values())


def _topology(tree: str) -> Topology:
    levels = 1 + tree_depth(parse_tree(tree))
    return Topology.from_tree(tree, bandwidth_bytes_per_s=[1e9] * levels)
