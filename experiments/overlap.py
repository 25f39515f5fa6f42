"""A layer whose experts work while rows are on the links, against one whose experts wait.

Run it (about two minutes on two cores)::

    python -m tamoe.experiments.overlap -o overlap.json

One MoE layer runs forward and backward on an emulated cluster, its tokens in 1, 2 … pieces, in
turns; so do its experts alone, on as many rows without an exchange. Times are medians of the last
rank. A layer that waits takes about exchange and experts together, one that overlaps at least the
longer of both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import typer

from tamoe.exchange import Exchange
from tamoe.experiments.command import run_command
from tamoe.experts import FeedForward
from tamoe.gates import NaiveGate
from tamoe.moe import MoE
from tamoe.progress import Count, progress_line
from tamoe.timing import line_up, refill_s
from tamoe.topology.documents import check_writable, write_document
from tamoe.topology.errors import whole
from tamoe.topology.graph import Topology
from tamoe.topology.ranks import run_ranks
from tamoe.topology.spec import ClusterSpec

SCHEMA, SCHEMA_VERSION = "tamoe.experiment.overlap", "1.0"
ALONE = "experts alone"
_TIMEOUT_S = 900.0
_EXPERTS_PER_RANK = 4
Kind = Literal["flat", "hierarchical"]
KINDS: tuple[Kind, ...] = ("flat", "hierarchical")


@dataclass(frozen=True)
class Config:
    """What runs where; float32, four experts a rank."""

    cluster: str = "2x4:100mbit"
    tokens: int = 512  # of each rank
    top_k: int = 2
    hidden_size: int = 256
    intermediate_size: int = 1024
    most_pieces: int = 4
    repetitions: int = 9


def names(config: Config) -> list[str]:
    """What is timed: experts alone, and both exchanges in so many pieces."""
    pieces = range(1, config.most_pieces + 1)
    return [ALONE, *(f"{kind}, {number}" for kind in KINDS for number in pieces)]


def measure(rank: int, topology: Topology, config: Config) -> dict[str, list[float]]:
    """Seconds of the last rank in every step; every rank calls it."""
    num_experts = _EXPERTS_PER_RANK * topology.num_ranks
    torch.manual_seed(0)
    gate = NaiveGate(config.hidden_size, num_experts, top_k=config.top_k, scope="shared")
    sizes = config.hidden_size, config.intermediate_size
    make = partial(MoE, gate, num_experts=num_experts)
    first = make(partial(FeedForward, *sizes), exchange=Exchange(topology, kind="none"))
    layers = {ALONE: first}
    for kind in KINDS:
        exchange = Exchange(topology, kind=kind)
        for pieces in range(1, config.most_pieces + 1):
            layers[f"{kind}, {pieces}"] = make(first.experts, exchange=exchange, overlap=pieces)
    generator = torch.Generator().manual_seed(1 + rank)
    x_TD = torch.randn(config.tokens, config.hidden_size, generator=generator).requires_grad_()
    pause_s, show = refill_s(topology), progress_line("overlap") if rank == 0 else None
    count = Count(show, "steps", (1 + config.repetitions) * len(layers))
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(1 + config.repetitions):
        for name, layer in layers.items():
            line_up(pause_s)
            began_s = time.perf_counter()
            layer(x_TD).hidden.square().mean().backward()
            seconds[name].append(time.perf_counter() - began_s)
            count()
    count.end()
    last = torch.tensor([of_one[1:] for of_one in seconds.values()], dtype=torch.float64)
    dist.all_reduce(last, dist.ReduceOp.MAX)
    return dict(zip(seconds, last.tolist(), strict=True))


def print_steps(seconds: dict[str, Sequence[float]]) -> None:
    """A table: a line for each way to run the layer."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="A layer, forward and backward (emulated)", title_justify="left")
    for column in ("exchange", "pieces"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "over one piece", "hidden of the experts"):
        table.add_column(column, justify="right")
    middle_s = {name: median(times_s) for name, times_s in seconds.items()}
    table.add_row(ALONE, "", f"{middle_s[ALONE] * 1e3:.0f}", "", "")
    for name, time_s in middle_s.items():
        if name == ALONE:
            continue
        kind, pieces = name.split(", ")
        waiting_s = middle_s[f"{kind}, 1"]
        hidden = (waiting_s - time_s) / middle_s[ALONE]
        table.add_row(
            kind, pieces, f"{time_s * 1e3:.0f}", f"{waiting_s / time_s:.2f}x", f"{hidden:.2f}"
        )
    Console(width=None if Console().is_terminal else 110, highlight=False).print(table)


def main(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE")] = Path("overlap.json"),
    cluster: Annotated[str, typer.Option(help="To emulate.")] = Config.cluster,
    tokens: Annotated[int, typer.Option(help="Tokens of each rank.")] = Config.tokens,
    top_k: Annotated[int, typer.Option(help="Experts of each token.")] = Config.top_k,
    hidden_size: Annotated[int, typer.Option(help="Numbers in a token.")] = Config.hidden_size,
    intermediate_size: Annotated[
        int, typer.Option(help="Numbers inside an expert.")
    ] = Config.intermediate_size,
    most_pieces: Annotated[int, typer.Option(help="Pieces to try, from 1.")] = Config.most_pieces,
    repetitions: Annotated[int, typer.Option(help="Of each, in turns.")] = Config.repetitions,
) -> None:
    """Time a layer with and without overlap; writes a JSON file and prints a table (emulated)."""
    check_writable(output, "--output")
    sizes = tokens, top_k, hidden_size, intermediate_size, most_pieces, repetitions
    config = Config(cluster, *sizes)
    for name, value in list(asdict(config).items())[1:]:
        whole(name, value, 1)
    spec = ClusterSpec.parse(cluster)
    topology = spec.topology()
    seconds = run_ranks(spec, measure, topology, config, timeout_s=_TIMEOUT_S)[0]
    document = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "label": "emulated"}
    write_document(output, document | {"config": asdict(config), "seconds": seconds})
    print_steps(seconds)
    print(f"written to {output}")


if __name__ == "__main__":
    run_command(main)
