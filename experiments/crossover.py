"""From which size on the hierarchical exchange is faster than the flat ones, on emulated clusters.

Run it (under an hour on two cores; ``--quick`` for one cluster and few sizes)::

    python -m tamoe.experiments.crossover -o experiments/crossover.json

On each cluster every exchange runs on even routings of several sizes and top-k, in turns
(emulated). Constants of the cost model are fitted in the same run, on the calibration cases that
are not local and on nothing else; with them the model gives every exchange's time over a finer
grid (simulated). A gain is the time of the better flat schedule over that of the hierarchical
exchange, dispatch and combine together: above 1 the hierarchical one is faster. Gains may cross 1
more than once, so ranges of sizes are given.

It is also counted how often the exchange that the model prefers is within 5 % of the fastest
measured, beside the best that would always be the same, and how far off its times are. Settings
whose fastest exchange takes less than 5 ms are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tamoe.calibration import calibration_cases
from tamoe.cases import EXPERTS_PER_RANK, HIDDEN_SIZE, Case, everyone
from tamoe.experiments.calibrated import (
    LEAST_S,
    calibrate_and_measure,
    choices_in_words,
    judge_choices,
    judge_errors,
)
from tamoe.experiments.command import run_command
from tamoe.experiments.crossover_figure import save_figure
from tamoe.progress import Count, progress_line
from tamoe.solver import Workload
from tamoe.solver.choice import choose_exchange
from tamoe.solver.constants import FILE_KEY, with_constants
from tamoe.solver.exchange_fit import Measured
from tamoe.solver.exchange_rows import EXCHANGES
from tamoe.topology.documents import check_writable, write_document
from tamoe.topology.errors import StoppedError
from tamoe.topology.graph import Topology
from tamoe.topology.spec import ClusterSpec

SCHEMA, SCHEMA_VERSION = "tamoe.experiment.crossover", "1.0"
ELEMENT_BYTES = 4
Range = tuple[float | None, float | None]  # bytes; None: open at that end
Row = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """What is measured and simulated; every measured setting is also simulated."""

    clusters: tuple[str, ...] = ("2x4:200mbit", "4x2:200mbit", "8x2:200mbit")
    measured_tokens: tuple[int, ...] = tuple(2**power for power in range(4, 11))  # of each rank
    measured_top_k: tuple[int, ...] = (1, 2, 8)
    tokens: tuple[int, ...] = tuple(2**power for power in range(4, 13))
    top_k: tuple[int, ...] = (1, 2, 4, 8)
    repetitions: int = 5
    # Of what varies: times of 30 ms vary by a third on shared cores, so that of 15 runs medians of
    # equally fast exchanges differed by over 5 %.
    most_runs: int = 60


FULL = Grid()
QUICK = Grid(FULL.clusters[:1], (16, 256), (1, 8), (16, 64, 256, 1024), (1, 8), 3, 9)


# ---- what is measured, and what the model says ------------------------------------------------


def even_case(topology: Topology, tokens: int, top_k: int) -> Case:
    """All experts as likely, for every rank."""
    weight_PN = np.ones((topology.num_ranks, topology.num_ranks * EXPERTS_PER_RANK))
    name = f"even, {tokens} tokens, top-{top_k}"
    return Case(name, everyone(topology), tokens, top_k, HIDDEN_SIZE, weight_PN)


def row(tokens: int, top_k: int, seconds: Mapping[str, float]) -> Row:
    """One setting: seconds of dispatch and combine by each exchange, and the gain."""
    return {
        "tokens": tokens,
        "top_k": top_k,
        "bytes_per_rank": tokens * HIDDEN_SIZE * ELEMENT_BYTES,
        "seconds": dict(seconds),
        "gain": min(seconds["flat single"], seconds["flat rounds"]) / seconds["hierarchical"],
    }


def measured_rows(cases: Sequence[Case], measured: Sequence[Measured]) -> list[Row]:
    """Dispatch and combine added up."""
    both = {case.name: dict.fromkeys(map(str, EXCHANGES), 0.0) for case in cases}
    for one in measured:
        both[one.case][one.exchange] += one.seconds
    return [row(case.tokens, case.top_k, both[case.name]) for case in cases]


def measure_cluster(spec: str, grid: Grid, repetitions: int) -> tuple[Topology, dict[str, Any]]:
    """The topology with constants, and what the document says of the cluster so far."""
    topology = ClusterSpec.parse(spec).topology()
    cases = [even_case(topology, t, k) for k in grid.measured_top_k for t in grid.measured_tokens]
    # Local routings take two thirds of the fit's time on 16 ranks, and no routing here is local.
    fitted = [case for case in calibration_cases(topology) if not case.name.startswith("local")]
    constants, measured, dropped = calibrate_and_measure(
        spec, "crossover", topology, fitted, cases, repetitions, most_runs=grid.most_runs
    )
    topology = with_constants(topology, constants)
    return topology, {
        "cluster": spec,
        "nodes": len(topology.nodes),
        "ranks": topology.num_ranks,
        FILE_KEY: topology.extra[FILE_KEY],
        "dropped_packets": dropped,
        "emulated": measured_rows(cases, measured),
    }


def simulated_rows(topology: Topology, grid: Grid) -> list[Row]:
    """What the model says for even routing over the grid."""
    settings = [(tokens, top_k) for top_k in grid.top_k for tokens in grid.tokens]
    count = Count(progress_line("crossover"), "simulated", len(settings))
    rows = []
    for tokens, top_k in settings:
        workload = Workload(tokens, top_k, HIDDEN_SIZE, ELEMENT_BYTES, EXPERTS_PER_RANK)
        shape = topology.num_ranks, workload.num_experts(topology.num_ranks)
        target_PN = np.full(shape, workload.even_tokens(topology.num_ranks))
        choice = choose_exchange(topology, workload, target_PN, backward=False)
        rows.append(row(tokens, top_k, choice.seconds))
        count()
    return rows


def faster_ranges(sizes: Sequence[float], gains: Sequence[float]) -> list[Range]:
    """Ranges of sizes where the gain is above 1; ends lie on straight lines between logarithms.

    Parameters
    ----------
    sizes
        Rising, > 0.
    gains
        As many, > 0.

    Returns
    -------
    list
        Pairs of sizes; None where a range goes on beyond the sizes given.

    Examples
    --------
    >>> faster_ranges([1, 4, 16], [0.5, 2, 4]), faster_ranges([1, 4], [0.5, 0.9])
    ([(2.0, None)], [])
    """
    ranges: list[Range] = []
    begin: float | None = None
    for number in range(1, len(sizes)):
        before, after = gains[number - 1], gains[number]
        if (before > 1) == (after > 1):
            continue
        part = np.log(before) / (np.log(before) - np.log(after))
        size = float(sizes[number - 1] * (sizes[number] / sizes[number - 1]) ** part)
        if after > 1:
            begin = size
        else:
            ranges.append((begin, size))
            begin = None
    return [*ranges, (begin, None)] if gains[-1] > 1 else ranges


def in_words(ranges: Sequence[Range]) -> str:
    """Ranges of bytes as the table prints them.

    >>> in_words([]), in_words([(None, None)]), in_words([(None, 2048.0), (65536.0, None)])
    ('never', 'always', 'up to 2 KiB, from 64 KiB')
    """
    words = []
    for begin, end in ranges:
        low, high = (None if size is None else f"{size / 1024:.3g}" for size in (begin, end))
        if low is None:
            words.append("always" if high is None else f"up to {high} KiB")
        else:
            words.append(f"from {low} KiB" if high is None else f"{low} to {high} KiB")
    return ", ".join(words) or "never"


def crossovers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Where the hierarchical exchange is faster, for each top-k."""
    found = []
    for top_k in dict.fromkeys(row["top_k"] for row in rows):
        mine = [row for row in rows if row["top_k"] == top_k]
        sizes, gains = [r["bytes_per_rank"] for r in mine], [r["gain"] for r in mine]
        ranges = faster_ranges(sizes, gains)
        found.append({"top_k": top_k, "faster_bytes_per_rank": ranges, "words": in_words(ranges)})
    return found


def choices(emulated: Sequence[Row], simulated: Sequence[Row]) -> dict[str, Any]:
    """How good the exchange that the model prefers is, on settings of at least 5 ms."""
    said = {(row["tokens"], row["top_k"]): row["seconds"] for row in simulated}
    scored = [row for row in emulated if min(row["seconds"].values()) >= LEAST_S]
    settings = [
        {e: (said[row["tokens"], row["top_k"]][e], s) for e, s in row["seconds"].items()}
        for row in scored
    ]
    errors = judge_errors(pair for both in settings for pair in both.values())
    left_out = len(emulated) - len(scored)
    return {**judge_choices(settings), "left_out": left_out, "predictions": errors}


# ---- the command ------------------------------------------------------------------------------


def main(
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("crossover.json"),
    repetitions: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of each exchange, in turns, more if it varies; 5, with --quick 3."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="2x4 alone, few sizes.")] = False,
) -> None:
    """Measure (emulated), simulate, compare; writes JSON and a figure beside it."""
    grid = QUICK if quick else FULL
    clusters: list[dict[str, Any]] = []
    document = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "label": "each list of rows says: emulated or simulated",
        "hidden_size": HIDDEN_SIZE,
        "experts_per_rank": EXPERTS_PER_RANK,
        "repetitions": repetitions or grid.repetitions,
        "least_s": LEAST_S,
        "clusters": clusters,
    }
    try:
        check_writable(output)
        for spec in grid.clusters:
            topology, one = measure_cluster(spec, grid, repetitions or grid.repetitions)
            clusters.append(one)
            write_document(output, document)  # so that nothing measured is lost
            one["simulated"] = simulated_rows(topology, grid)
            one["crossovers"] = crossovers(one["simulated"])
            one["choices"] = choices(one["emulated"], one["simulated"])
            write_document(output, document)
            save_figure(clusters, output.with_suffix(".png"))
            print_table(one)
    except KeyboardInterrupt:
        kept = f"{output} has what was measured" if clusters else "nothing was measured"
        raise StoppedError(f"stopped; {kept}") from None
    print(f"wrote {output} and {output.with_suffix('.png')}")


def print_table(one: Mapping[str, Any]) -> None:
    """Where the hierarchical exchange is faster, and how good the model's choices are."""
    print(f"{one['cluster']}: hierarchical faster, tokens of a rank (simulated)")
    for crossover in one["crossovers"]:
        print(f"  top-{crossover['top_k']}: {crossover['words']}")
    found = one["choices"]
    print(
        f"  choices against measured times (emulated): {choices_in_words(found)}; "
        f"{found['left_out']} left out, below {LEAST_S * 1e3:g} ms",
        flush=True,
    )
    if found["settings"]:
        said = found["predictions"]
        print(
            f"  {said['times']} times, of tokens drawn to predict and others to measure: median "
            f"{said['median_error']:.1%} off, worst {said['worst_error']:.0%}",
            flush=True,
        )


if __name__ == "__main__":
    run_command(main)
