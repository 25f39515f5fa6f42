"""tamoe's exchange against the real code of its peers, on the same emulated links, in one run.

Run it (about three minutes on two cores)::

    python -m tamoe.experiments.peers --cluster 2x4:200mbit -o peers.json

Every exchange gets the same tokens and the same choices and runs in the same processes, in turns:
tamoe's flat (two schedules) and hierarchical ones, Open MPI's MPI_Alltoallv, DeepSpeed's MOELayer,
Tutel's linear and 2DH all-to-all. Peers that are not installed are left out, with a line that says
how to get them. Experts multiply by a number of their own, so that results can be compared: every
exchange that drops nothing must give what a computation without an exchange gives.

Times are medians over the repetitions, each of the last rank. Gating is in none of them; tamoe's
and MPI's dispatch hold the planning and the exchange of counts, those of DeepSpeed and Tutel only
the copy into their buffers and the all-to-all.
"""

from __future__ import annotations

import itertools
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tamoe.experiments.command import run_command
from tamoe.topology.documents import check_writable, read_document, write_document
from tamoe.topology.errors import InputError, StoppedError, whole
from tamoe.topology.spec import ClusterSpec

if TYPE_CHECKING:
    from tamoe.experiments.peers_rank import Score

SCHEMA, SCHEMA_VERSION = "tamoe.experiment.peers", "1.0"
_TIMEOUT_S = 900.0
_INSTALL = {
    "mpi": "apt install openmpi-bin && pip install mpi4py",
    "deepspeed": "pip install --no-deps deepspeed==0.19.8 && pip install hjson einops msgpack "
    "ninja psutil py-cpuinfo pydantic tqdm",
    "tutel": "pip install --no-build-isolation git+https://github.com/microsoft/Tutel@ac0e51b",
}


@dataclass(frozen=True)
class Config:
    """Sizes of the comparison; float32 throughout."""

    cluster: str = "2x4:200mbit"
    tokens: int = 512  # of each rank
    top_k: int = 8
    experts_per_rank: int = 8
    hidden_size: int = 256
    repetitions: int = 5
    routings: tuple[str, ...] = ("even", "local")


def missing_peers(spec: ClusterSpec) -> dict[str, str]:
    """Peers that cannot take part here, and why."""
    found: dict[str, str] = {}
    for peer, package in (("mpi", "mpi4py"), ("deepspeed", "deepspeed"), ("tutel", "tutel")):
        if util.find_spec(package) is None:
            found[peer] = f"{package} is not installed: {_INSTALL[peer]}"
    if shutil.which("orted") is None:  # other MPIs have an mpirun, too
        found["mpi"] = f"Open MPI 4 is not installed: {_INSTALL['mpi']}"
    elif spec.intra_bit_per_s is not None:
        found["mpi"] = "its daemon cannot reach ranks with a network of their own (intra=RATE)"
    return found


def run(config: Config, without: Sequence[str] = ()) -> dict[str, Any]:
    """Everything, as JSON values.

    Parameters
    ----------
    config
        Cluster and sizes.
    without
        Peers to leave out though they are installed.

    Raises
    ------
    InputError
        A number out of range, one node, or a peer that is not known.
    RankError
        A result was wrong, or a rank ended.
    StoppedError
        Ctrl-C.
    """
    from tamoe.bench import Setting
    from tamoe.experiments.peers_rank import compare
    from tamoe.topology.ranks import run_ranks_with_report

    spec = ClusterSpec.parse(config.cluster)
    if spec.num_nodes < 2:
        raise InputError(f"cluster is {config.cluster!r}, one node; allowed: two nodes or more")
    for name in ("tokens", "experts_per_rank", "hidden_size", "repetitions"):
        whole(name, getattr(config, name), 1)
    whole("top_k", config.top_k, 1, config.experts_per_rank * spec.num_ranks)
    for peer in without:
        if peer not in _INSTALL:
            raise InputError(f"--without is {peer!r}; allowed: {', '.join(_INSTALL)}")
    skipped = missing_peers(spec) | dict.fromkeys(without, "left out by --without")
    peers = [peer for peer in _INSTALL if peer not in skipped]
    topology = spec.topology()
    settings = [
        Setting(config.tokens, config.top_k, skew, config.experts_per_rank, config.hidden_size)  # type: ignore[arg-type]
        for skew in config.routings
    ]
    with tempfile.TemporaryDirectory(prefix="tamoe-mpi-") as folder:
        if "mpi" in peers:
            from tamoe.experiments.peers_mpi import make_wires

            make_wires(Path(folder), topology)
        arguments = (topology, settings, peers, Path(folder), config.repetitions)
        try:
            ran = run_ranks_with_report(spec, compare, *arguments, timeout_s=_TIMEOUT_S)
        except KeyboardInterrupt:
            raise StoppedError("stopped; nothing was written") from None
    scores, mpi = ran.results[0]
    assert ran.network is not None
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "label": "emulated",
        "config": asdict(config),
        "made": _made(mpi),
        "network": {
            "congestion_control": ran.network.congestion_control,
            "dropped_packets": ran.network.dropped_packets,
        },
        "skipped": skipped,
        "scores": [asdict(score) for score in scores],
    }


def _made(mpi: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "kernel": platform.release()}
    found["cores"] = len(os.sched_getaffinity(0))
    for package in ("tamoe", "torch", "deepspeed", "tutel", "mpi4py"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found | {
        "mpi": mpi,
        "command": shlex.join(["python", "-m", "tamoe.experiments.peers", *sys.argv[1:]]),
    }


def load_scores(path: Path) -> tuple[dict[str, Any], list[Score]]:
    """The document that :func:`run` gave, from a file, and its scores.

    Raises
    ------
    InputError
        The file is missing, truncated or of another schema.
    """
    from tamoe.experiments.peers_rank import Score

    document = read_document(path, SCHEMA, SCHEMA_VERSION)
    return document, [Score(**score) for score in document["scores"]]


def print_scores(scores: Sequence[Score], cluster: str) -> None:
    """A table: times, also over the fastest of tamoe's; bytes into the busiest node; capacities."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Exchanges on {cluster} (emulated)", title_justify="left")
    for column in ("routing", "exchange"):
        table.add_column(column, no_wrap=True)
    for column in (
        "dispatch ms",
        "combine ms",
        "total ms",
        "moving ms",
        "over tamoe",
        "MB in",
        "capacity",
        "dropped",
    ):
        table.add_column(column, justify="right")
    for routing, rows in by_routing(scores).items():
        best_s = best_of_tamoe_s(rows)
        for row in rows:
            table.add_row(
                routing,
                row.exchange,
                f"{row.dispatch_s * 1e3:.0f}",
                f"{row.combine_s * 1e3:.0f}",
                f"{row.total_s * 1e3:.0f}",
                f"{row.moving_s * 1e3:.0f}",
                f"{row.total_s / best_s:.2f}x",
                f"{row.received_bytes / 1e6:.1f}",
                str(row.capacity or "–"),
                f"{row.dropped_share:.1%}" if row.dropped_share else "–",
            )
        table.add_section()
    Console(width=None if Console().is_terminal else 130, highlight=False).print(table)


def by_routing(scores: Sequence[Score]) -> dict[str, list[Score]]:
    """Scores of each routing, in order."""
    groups = itertools.groupby(scores, key=lambda score: score.routing)
    return {routing: list(group) for routing, group in groups}


def best_of_tamoe_s(scores: Sequence[Score]) -> float:
    """Time of the fastest exchange of tamoe, dispatch and combine."""
    return min(score.total_s for score in scores if score.exchange.startswith("tamoe"))


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="JSON file to write.")] = Path(
        "peers.json"
    ),
    cluster: Annotated[str, typer.Option(help="Cluster to emulate.")] = Config.cluster,
    tokens: Annotated[int, typer.Option(help="Tokens of each rank.")] = Config.tokens,
    top_k: Annotated[int, typer.Option(help="Experts of each token.")] = Config.top_k,
    experts_per_rank: Annotated[int, typer.Option()] = Config.experts_per_rank,
    hidden_size: Annotated[int, typer.Option(help="Numbers in a row.")] = Config.hidden_size,
    repetitions: Annotated[int, typer.Option(help="Timed ones.")] = Config.repetitions,
    without: Annotated[
        list[str] | None, typer.Option(help="Peer to leave out: mpi, deepspeed, tutel.")
    ] = None,
) -> None:
    """Compare exchanges on an emulated cluster; writes a JSON file and prints a table."""
    check_writable(out, "--out")
    config = Config(cluster, tokens, top_k, experts_per_rank, hidden_size, repetitions)
    document = run(config, without or ())
    write_document(out, document)
    for peer, why in document["skipped"].items():
        print(f"{peer} left out: {why}")
    print_scores(load_scores(out)[1], config.cluster)
    print(f"written to {out}")


if __name__ == "__main__":
    run_command(main)
