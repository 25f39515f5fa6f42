"""Peak extra memory of dispatch and of combine, beside the bytes that they are given and return.

Run it (about three minutes on two cores)::

    python -m tamoe.experiments.memory -o memory.json

Ranks are processes of one host without an emulated network; the tree says how they are grouped into
nodes. Every figure is of the rank where it is the largest share of in + out.

**Extra memory** of a call is the highest level of the rank's resident memory while it runs, less
the level before it, plus the rank's whole outbox (memory shared inside the node, which stays
between calls). So the tensor that the call returns counts, what it is given does not, and pages of
other ranks' outboxes count for their owners. **In + out** are the bytes of the tokens or rows that
the call is given and of those that it returns: x_TD and row_RD for dispatch, row_RD and out_TD for
combine. **Rows on the wire** are those that the flat exchange sends and receives, one for each
choice.

The level is the kernel's (VmRSS and VmHWM in ``/proc/self/status``), of pages that were touched.
Blocks from 64 kB go back to the kernel when they are freed, so nothing of earlier calls hides in
the allocator. "first" is the first call of an exchange, when it does not know yet how many tokens
come, "next" the highest of later ones.

Shape suffixes: T tokens, K choices, D hidden size, R rows received.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import torch.distributed as dist
import typer

from tamoe.bench import EXCHANGES, Setting, random_routing
from tamoe.exchange import Exchange
from tamoe.experiments.command import run_command
from tamoe.node_memory import outbox_bytes
from tamoe.progress import progress_line
from tamoe.topology import linux
from tamoe.topology.documents import check_writable, write_document
from tamoe.topology.errors import whole
from tamoe.topology.graph import Topology
from tamoe.topology.ranks import run_ranks
from tamoe.topology.tree import parse_tree, tree_depth

SCHEMA, SCHEMA_VERSION = "tamoe.experiment.memory", "1.0"
_TIMEOUT_S = 300.0
_CALLS = 3  # of each exchange; the first is kept apart
_SMALLEST_BLOCK_BYTES = 2**16
Result = TypeVar("Result")


@dataclass(frozen=True)
class Config:
    """Sizes; float32, even routing."""

    trees: tuple[str, ...] = ("2x4", "4x2", "[[2,2],[2,2]]")
    top_k: tuple[int, ...] = (2, 8)
    tokens: int = 8192  # of each rank
    experts_per_rank: int = 8
    hidden_size: int = 512


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
    linux.return_freed_memory(_SMALLEST_BLOCK_BYTES)
    Path("/proc/self/clear_refs").write_text("5")  # the highest level starts anew
    before = _level_bytes("VmRSS")
    result = call()
    return result, _level_bytes("VmHWM") - before


def _level_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def measure(rank: int, tree: str, setting: Setting, names: Sequence[str] = EXCHANGES) -> list[Peak]:
    """Peaks of exchanges; every rank of the group calls it, and all get them."""
    linux.return_freed_memory(_SMALLEST_BLOCK_BYTES)  # before there are holes for buffers
    topology = _topology(tree)
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(setting.tokens, setting.hidden_size, generator=generator)
    index_TK = random_routing(setting, rank, topology, generator)
    weight_TK = torch.rand(index_TK.shape, generator=generator)
    num_experts = setting.experts_per_rank * topology.num_ranks
    peaks: list[Peak] = []
    for name in names:
        kind, _, schedule = name.partition(" ")
        for warm in (False, True):  # once before, so that pairs connect and outboxes grow
            exchange = Exchange(topology, kind=kind, schedule=schedule or "auto")  # type: ignore[arg-type]
            for number in range(_CALLS if warm else 2):
                extra, row_bytes = _dispatch_and_combine(
                    exchange, x_TD, index_TK, weight_TK, num_experts
                )
                if not warm:
                    continue
                shared = outbox_bytes(exchange.group)
                wire_bytes = index_TK.numel() * x_TD[0].nbytes + row_bytes
                peaks += [
                    Peak(
                        tree,
                        setting.top_k,
                        name,
                        call,
                        "next" if number else "first",
                        extra_bytes + shared,
                        x_TD.nbytes + row_bytes,
                        wire_bytes,
                    )
                    for call, extra_bytes in zip(("dispatch", "combine"), extra, strict=True)
                ]
    everyone: list[Any] = [None] * topology.num_ranks
    dist.all_gather_object(everyone, peaks)
    highest: dict[tuple[str, ...], Peak] = {}
    for peak in (peak for peaks in everyone for peak in peaks):
        key = (peak.exchange, peak.call, peak.when)
        if key not in highest or peak.share > highest[key].share:
            highest[key] = peak
    return list(highest.values())


def _dispatch_and_combine(
    exchange: Exchange,
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    num_experts: int,
) -> tuple[tuple[int, int], int]:
    """Extra bytes of both calls, and bytes of the rows between them."""
    dist.barrier()
    (row_RD, handle), of_dispatch = peak_extra(
        lambda: exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=num_experts)
    )
    dist.barrier()
    _, of_combine = peak_extra(lambda: exchange.combine(row_RD, handle))
    return (of_dispatch, of_combine), row_RD.nbytes


def _topology(tree: str) -> Topology:
    levels = 1 + tree_depth(parse_tree(tree))
    return Topology.from_tree(tree, bandwidth_bytes_per_s=[1e9] * levels)


def run(config: Config) -> list[Peak]:
    """All peaks.

    Raises
    ------
    InputError
        A number or a tree that is not allowed.
    """
    for name in ("tokens", "experts_per_rank", "hidden_size"):
        whole(name, getattr(config, name), 1)
    settings = {}
    for tree in config.trees:
        num_ranks = _topology(tree).num_ranks
        settings[tree] = (
            num_ranks,
            [
                Setting(
                    config.tokens,
                    whole("top_k", top_k, 1, config.experts_per_rank * num_ranks),
                    "even",
                    config.experts_per_rank,
                    config.hidden_size,
                )
                for top_k in config.top_k
            ],
        )
    show = progress_line("memory")
    peaks: list[Peak] = []
    total = len(config.trees) * len(config.top_k)
    began_s = time.monotonic()
    for tree, (num_ranks, of_tree) in settings.items():
        for setting in of_tree:
            peaks += run_ranks(num_ranks, measure, tree, setting, timeout_s=_TIMEOUT_S)[0]
            done = len(peaks) // (4 * len(EXCHANGES))
            show("settings", done, total, (time.monotonic() - began_s) / done * (total - done))
    return peaks


def print_peaks(peaks: Sequence[Peak]) -> None:
    """A table: a line for each exchange in each setting."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Peak extra memory over in + out (measured)", title_justify="left")
    for column in ("nodes", "top-k", "exchange"):
        table.add_column(column, no_wrap=True)
    for column in (
        "dispatch MB",
        "of in + out",
        "combine MB",
        "of in + out",
        "of rows on the wire",
    ):
        table.add_column(column, justify="right")
    rows: dict[tuple[str, int, str], dict[str, list[Peak]]] = {}
    for peak in peaks:
        calls = rows.setdefault((peak.tree, peak.top_k, peak.exchange), {})
        calls.setdefault(peak.call, []).append(peak)
    for (tree, top_k, exchange), calls in rows.items():
        dispatch, combine = (
            max(calls[call], key=lambda peak: peak.share) for call in ("dispatch", "combine")
        )
        wire = max(peak.extra_bytes / peak.wire_bytes for peak in (dispatch, combine))
        table.add_row(
            tree,
            str(top_k),
            exchange,
            f"{dispatch.extra_bytes / 1e6:.1f}",
            f"{dispatch.share:.2f}",
            f"{combine.extra_bytes / 1e6:.1f}",
            f"{combine.share:.2f}",
            f"{wire:.2f}",
        )
    Console(width=None if Console().is_terminal else 110, highlight=False).print(table)


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="JSON file to write.")] = Path(
        "memory.json"
    ),
    tree: Annotated[
        list[str] | None, typer.Option(help="Nodes, such as 2x4; may be given again.")
    ] = None,
    top_k: Annotated[list[int] | None, typer.Option(help="May be given again.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each rank.")] = Config.tokens,
    experts_per_rank: Annotated[int, typer.Option()] = Config.experts_per_rank,
    hidden_size: Annotated[
        int, typer.Option(help="Numbers in a token, 4 bytes each.")
    ] = Config.hidden_size,
) -> None:
    """Measure peak extra memory of every exchange; writes a JSON file and prints a table."""
    check_writable(out, "--out")
    config = Config(
        tuple(tree or Config.trees),
        tuple(top_k or Config.top_k),
        tokens,
        experts_per_rank,
        hidden_size,
    )
    peaks = run(config)
    scores = [asdict(peak) | {"share": peak.share} for peak in peaks]
    document = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "label": "measured"}
    write_document(out, document | {"config": asdict(config), "peaks": scores})
    print_peaks(peaks)
    print(f"written to {out}")


if __name__ == "__main__":
    run_command(main)
