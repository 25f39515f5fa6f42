"""``tamoe bench exchange``: on an emulated cluster, or in the running job with its topology."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tamoe.probe_command import PROBE_TIMEOUT_S, job_environment
from tamoe.topology.errors import InputError, StoppedError, whole
from tamoe.topology.graph import Topology

if TYPE_CHECKING:
    from tamoe.bench import Score, Setting

SCHEMA = "tamoe.bench"


def run_bench(
    cluster: str | None,
    topology_file: Path | None,
    output: Path,
    *,
    tokens: Sequence[int],
    top_k: Sequence[int],
    skew: Sequence[str],
    experts_per_rank: int,
    hidden_size: int,
    repetitions: int,
) -> list[Score] | None:
    """Time every exchange; write ``output`` and a figure beside it. None on other ranks of a job.

    Raises
    ------
    InputError
        Neither or both of a cluster and a topology, or a number out of range.
    StoppedError
        Ctrl-C.
    """
    from tamoe.bench import SKEWS, Setting, bench_rank

    for name, values in (("--tokens", tokens), ("--top-k", top_k)):
        for value in values:
            whole(name, value, 1)
    for name, value in (
        ("--experts-per-rank", experts_per_rank),
        ("--hidden-size", hidden_size),
        ("--repetitions", repetitions),
    ):
        whole(name, value, 1)
    for kind in skew:
        if kind not in SKEWS:
            raise InputError(f"--skew is {kind!r}; allowed: {', '.join(SKEWS)}")
    if (cluster is None) == (topology_file is None):
        raise InputError(
            "--cluster and --topology: give one; a cluster to emulate, or the topology file of "
            "the running job"
        )
    if output.suffix == ".png":
        raise InputError(f"--output is {str(output)!r}; allowed: a name for JSON, such as b.json")
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"--output is {str(output)!r}; allowed: a file in a folder that is there")
    settings = [
        Setting(t, k, s, experts_per_rank, hidden_size)  # type: ignore[arg-type]
        for t, k, s in itertools.product(tokens, top_k, skew)
    ]
    if topology_file is not None:
        topology = Topology.load(topology_file)
        _check_top_k(settings, topology)
        scores = _in_job(topology, settings, repetitions)
        label = "measured"
    else:
        from tamoe.topology.ranks import run_ranks
        from tamoe.topology.spec import ClusterSpec

        spec = ClusterSpec.parse(str(cluster))
        topology = spec.topology()
        _check_top_k(settings, topology)
        try:
            scores = run_ranks(
                spec, bench_rank, topology, settings, repetitions, timeout_s=PROBE_TIMEOUT_S
            )[0]
        except KeyboardInterrupt:
            raise StoppedError("bench stopped; nothing was written") from None
        label = "emulated"
    if scores is None:
        return None
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": "1.0",
        "label": label,
        "cluster": cluster or str(topology_file),
        "repetitions": repetitions,
        "scores": [score.document() for score in scores],
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    save_bench_figure(scores, label, str(document["cluster"]), output.with_suffix(".png"))
    return scores


def _check_top_k(settings: Sequence[Setting], topology: Topology) -> None:
    for setting in settings:
        experts = setting.experts_per_rank * topology.num_ranks
        if setting.top_k > experts:
            raise InputError(f"--top-k is {setting.top_k}; allowed: 1 to {experts}, the experts")


def _in_job(
    topology: Topology, settings: Sequence[Setting], repetitions: int
) -> list[Score] | None:
    import torch.distributed as dist

    from tamoe.bench import bench_rank

    job = job_environment(os.environ)
    if job is None:
        raise InputError(
            "--topology is for a running job; start it with torchrun, or give --cluster SPEC"
        )
    os.environ.update(job)
    dist.init_process_group("gloo")
    try:
        if dist.get_world_size() != topology.num_ranks:
            raise InputError(
                f"--topology has {topology.num_ranks} ranks and the job {dist.get_world_size()}; "
                f"allowed: the topology of this job"
            )
        scores = bench_rank(dist.get_rank(), topology, settings, repetitions)
        return scores if dist.get_rank() == 0 else None
    finally:
        dist.destroy_process_group()


def print_scores(scores: Sequence[Score], cluster: str) -> None:
    """A table: times, share of the bound, and how much faster than the better flat schedule."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Exchanges on {cluster}", title_justify="left")
    for column in ("tokens", "top-k", "skew", "exchange"):
        table.add_column(column, justify="right" if column in ("tokens", "top-k") else "left")
    for column in ("dispatch ms", "combine ms", "busiest MB", "of bound", "over flat"):
        table.add_column(column, justify="right")
    for setting, group in itertools.groupby(scores, key=lambda score: score.setting):
        rows = list(group)
        flat_s = min(_total_s(row) for row in rows if row.exchange.startswith("flat"))
        for row in rows:
            table.add_row(
                str(setting.tokens),
                str(setting.top_k),
                setting.skew,
                row.exchange,
                f"{row.dispatch_s * 1e3:.1f}",
                f"{row.combine_s * 1e3:.1f}",
                f"{row.busiest_link_bytes / 1e6:.2f}",
                f"{row.share_of_bound:.2f}",
                f"{flat_s / _total_s(row):.2f}x",
            )
        table.add_section()
    Console(width=None if Console().is_terminal else 110).print(table)


def _total_s(score: Score) -> float:
    return score.dispatch_s + score.combine_s


def save_bench_figure(scores: Sequence[Score], label: str, cluster: str, path: Path) -> None:
    """Share of the bound, and speed-up over the better flat schedule, against bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    share, speed = figure.subplots(1, 2)
    colours = {"flat single": "#999999", "flat rounds": "#0072b2", "hierarchical": "#d55e00"}
    top_ks = sorted({score.setting.top_k for score in scores})
    markers = dict(zip(top_ks, itertools.cycle("os^Dv<>p"), strict=False))
    by_setting = itertools.groupby(scores, key=lambda score: dataclasses.astuple(score.setting))
    for _, group in by_setting:
        rows = list(group)
        flat_s = min(_total_s(row) for row in rows if row.exchange.startswith("flat"))
        for row in rows:
            look = {"color": colours[row.exchange], "marker": markers[row.setting.top_k]}
            share.scatter(row.busiest_link_bytes / 1e6, row.share_of_bound, s=28, **look)
            if row.exchange == "hierarchical":
                flat_mb = max(r.busiest_link_bytes for r in rows) / 1e6
                speed.scatter(flat_mb, flat_s / _total_s(row), s=28, **look)
    share.axhline(1, color="black", linewidth=0.8)
    share.set(xscale="log", ylim=(0, 1.08), xlabel="MB over the busiest link (own bytes)")
    share.set_ylabel(f"share of the bound ({label})")
    speed.axhline(1, color="black", linewidth=0.8)
    speed.set(xscale="log", xlabel="MB over the busiest link (flat)")
    speed.set_ylabel(f"hierarchical over the better flat ({label})")
    speed.set_ylim(bottom=0)
    for name, colour in colours.items():
        share.scatter([], [], color=colour, label=name, s=28)
    for top_k, marker in markers.items():
        share.scatter([], [], color="black", marker=marker, label=f"top-{top_k}", s=28)
    for axes in (share, speed):
        for axis_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    share.legend(fontsize=8, loc="lower right")
    figure.suptitle(f"Exchange on {cluster}", fontsize=11)
    figure.savefig(path, dpi=130)
