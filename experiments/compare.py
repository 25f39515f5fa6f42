"""Every way to steer in one harness: traffic, quality and time, on emulated clusters.

Run it (about half an hour on two cores; ``--quick`` for one seed and few steps)::

    python -m tamoe.experiments.compare -o compare.json

On each cluster and for each seed all strategies train the demo's model in turns, over real links.
At equal steps it notes where choices go, how even experts are and how far from the target each
rank's choices (of each layer, then the mean), three validation losses (each rank's own text; that
of the next node's ranks; own text without bias, and with the mean of the gates where each rank has
its own; a group limit stays on, so it has none) and the time of a step. All are timed with the flat
and the hierarchical exchange; the time is of the one that ``auto`` takes for even counts or for the
target, of the faster one where a strategy has no target to choose by.
An existing file is continued: runs of as many steps that it has are not repeated.
"""

from __future__ import annotations

import dataclasses
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tamoe.experiments.command import run_command
from tamoe.experiments.predict import choose_exchanges, with_credit_of
from tamoe.experiments.results import Document, complete_setting
from tamoe.experiments.strategies import Strategy, all_strategies
from tamoe.experiments.text import load_text
from tamoe.experiments.train import Job, train_rank
from tamoe.experiments.trainee import TrainConfig
from tamoe.solver import Plan, solve
from tamoe.topology.documents import check_writable, read_document, write_document
from tamoe.topology.errors import InputError
from tamoe.topology.formats import topology_to_document
from tamoe.topology.ranks import run_ranks
from tamoe.topology.spec import ClusterSpec

SCHEMA, SCHEMA_VERSION = "tamoe.experiment.compare", "1.0"
CLUSTERS = ("4x2:160mbit", "[[2,2],[2]]:320mbit,80mbit")
SEEDS, STEPS, QUICK_STEPS = 3, 48, 12
TIMEOUT_S = 3600.0
LOSSES = ("val_loss_own", "val_loss_foreign", "val_loss_no_bias")
NOTED = ("remote_share", "dropped_share", *LOSSES)  # as the trainees measured them
MEASURES = (*NOTED, "step_s", "target_distance", "load_cv", "exchange_share")


def run_seed(spec: str, seed: int, steps: int) -> Document:
    """Train all strategies on one cluster; an entry of the file."""
    cluster = ClusterSpec.parse(spec)
    topology = cluster.topology()
    config = TrainConfig(seed=seed)
    # Exchanges follow each other closely, so plans are made for the rates that links sustain.
    sustained = with_credit_of(topology, pause_s=0.0)
    strategies = all_strategies(topology.num_ranks)
    kls = {strategy.kl for strategy in strategies if strategy.kl is not None}
    plans: dict[float, Plan] = {
        kl: solve(sustained, config.workload, method="entropic", kl=kl) for kl in kls
    }
    setting: Document = {
        "setting": f"seed {seed}",
        "cluster": spec,
        "label": "emulated",
        "nodes": [list(ranks) for ranks in cluster.nodes],
        "topology": topology_to_document(topology),
        "steps": 0,
        "strategies": [],
        "complete": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            setting=setting,
            before=(),
            about={},
            results_path=Path(folder) / "results.json",
            topology=topology,
            strategies=strategies,
            plans=plans,
            choices=choose_exchanges(sustained, config.workload, strategies, plans),
            config=config,
            steps=steps,
            reach_even_loss=False,
            progress_name=f"{spec} seed {seed}",
        )
        filled: Document = run_ranks(spec, train_rank, job, timeout_s=TIMEOUT_S)[0]
    complete_setting(filled)
    of_name = {strategy.name: strategy for strategy in strategies}
    rows = [measures(entry, of_name[entry["name"]]) for entry in filled["strategies"]]
    own = {"cluster": spec, "seed": seed, "steps": steps}
    return {**own, "compute_step_s": filled["compute_step_s"], "strategies": rows}


def measures(entry: Mapping[str, Any], strategy: Strategy) -> Document:
    """What the table has of one strategy and seed."""
    chosen_LPN = np.asarray(entry["chosen_LPN"])
    load_LN = chosen_LPN.sum(1)
    distance = None
    if strategy.has_target:
        apart_LPN = shares(chosen_LPN) - shares(np.asarray(entry["target_PN"]))
        distance = float(abs(apart_LPN).sum(2).mean() / 2)
    timed, kind = entry["exchanges"], entry["auto_exchange"]
    if strategy.kl is not None and not strategy.has_target:
        kind = min(timed, key=lambda one: timed[one]["step_s"])
    noted = {key: entry[key] for key in NOTED}
    if strategy.kind == "groups":
        noted["val_loss_no_bias"] = None
    return {
        "name": strategy.name,
        "kl": strategy.kl if strategy.has_target else None,
        "exchange": kind,
        "target_distance": distance,
        "load_cv": float((load_LN.std(1) / load_LN.mean(1)).mean()),
        "exchange_share": timed[kind].get("exchange_share"),
        "step_s": timed[kind]["step_s"],
        **noted,
    }


def shares(counts: np.ndarray) -> np.ndarray:
    """Counts over their sum along the last axis.

    >>> shares(np.array([[1.0, 3.0]])).tolist()
    [[0.25, 0.75]]
    """
    return counts / counts.sum(-1, keepdims=True)


def summary(runs: Sequence[Mapping[str, Any]]) -> list[Document]:
    """Of each cluster and strategy: mean and standard deviation over seeds of every measure.

    Losses and step times are also given over those of the even run of the same seed, and
    ``speedup_bound`` is 1/(1 - f) of that run: what no exchange at all would give.
    """
    rows = []
    for spec in dict.fromkeys(run["cluster"] for run in runs):
        mine = [run for run in runs if run["cluster"] == spec]
        for name in [row["name"] for row in mine[0]["strategies"]]:
            found = [_relative(run, name) for run in mine]
            row: Document = {"cluster": spec, "name": name, "seeds": len(found)}
            for key in found[0]:
                values = [one[key] for one in found if one[key] is not None]
                row[key] = statistics.mean(values) if values else None
                row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
            rows.append(row)
    return rows


def _relative(run: Mapping[str, Any], name: str) -> Document:
    by_name = {row["name"]: row for row in run["strategies"]}
    row, even = by_name[name], by_name["even"]
    found: Document = {key: row[key] for key in MEASURES}
    for key in LOSSES:
        loss = row[key]
        found[f"{key}_over_even"] = None if loss is None else loss / even["val_loss_own"] - 1
    found["speedup"] = even["step_s"] / row["step_s"]
    found["speedup_bound"] = even["step_s"] / run["compute_step_s"]
    return found


def print_summary(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table, one for each cluster."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 130)
    for spec in dict.fromkeys(row["cluster"] for row in rows):
        mine = [row for row in rows if row["cluster"] == spec]
        seeds = mine[0]["seeds"]
        title = (
            f"{spec} (emulated, {seeds} seeds: mean ± deviation; with no exchange the even step "
            f"would be {mine[0]['speedup_bound']:.2f} times as fast)"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("strategy")
        columns = {
            "remote": ("remote_share", "{:.1%}"),
            "to target": ("target_distance", "{:.1%}"),
            "dropped": ("dropped_share", "{:.1%}"),
            "load CV": ("load_cv", "{:.2f}"),
            "own loss": ("val_loss_own_over_even", "{:+.2%}"),
            "foreign": ("val_loss_foreign_over_even", "{:+.2%}"),
            "no bias": ("val_loss_no_bias_over_even", "{:+.2%}"),
            "step ms": ("step_ms", "{:.0f}"),
            "speed-up": ("speedup", "{:.2f}"),
            "f": ("exchange_share", "{:.2f}"),
        }
        for column in columns:
            table.add_column(column, justify="right")
        for row in mine:
            timed = {
                **row,
                "step_ms": row["step_s"] * 1e3,
                "step_ms_std": None if row["step_s_std"] is None else row["step_s_std"] * 1e3,
            }
            table.add_row(row["name"], *(_cell(timed, *what) for what in columns.values()))
        console.print(table)


def _cell(row: Mapping[str, Any], key: str, form: str) -> str:
    if row[key] is None:
        return "–"
    deviation = row.get(f"{key}_std")
    text = form.format(row[key])
    return text if deviation is None else f"{text} ±{form.replace('+', '').format(deviation)}"


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON; a .png goes beside it.")] = (
        Path("compare.json")
    ),
    steps: Annotated[int, typer.Option(help="Training steps of each strategy.")] = STEPS,
    seeds: Annotated[int, typer.Option(help="Runs on each cluster.")] = SEEDS,
    quick: Annotated[bool, typer.Option(help="One seed, few steps, one cluster.")] = False,
) -> None:
    """Compare all strategies; writes a JSON with every run, a table and a figure."""
    from tamoe.experiments.compare_figure import draw

    check_writable(output)
    if steps < 12:
        raise InputError(f"--steps is {steps}; allowed: a whole number >= 12")
    if seeds < 1:
        raise InputError(f"--seeds is {seeds}; allowed: a whole number >= 1")
    clusters = CLUSTERS[:1] if quick else CLUSTERS
    steps, seeds = (QUICK_STEPS, 1) if quick else (steps, seeds)
    document: Document = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "label": "emulated",
        "command": shlex.join(["python", "-m", "tamoe.experiments.compare", *sys.argv[1:]]),
        "config": dataclasses.asdict(TrainConfig()),
        "text": load_text(None).source,
        "runs": [],
    }
    if output.exists():
        before = read_document(output, SCHEMA, SCHEMA_VERSION)
        if before["config"] != document["config"] or any(
            r["steps"] != steps for r in before["runs"]
        ):
            raise InputError(
                f"{output} has runs of another configuration or of other steps than {steps}; "
                f"allowed: the same, or another --output"
            )
        document["runs"] = before["runs"]
    for seed in range(seeds):
        for spec in clusters:
            have = {(run["cluster"], run["seed"], run["steps"]) for run in document["runs"]}
            if (spec, seed, steps) in have:
                continue
            document["runs"].append(run_seed(spec, seed, steps))
            write_document(output, document | {"summary": summary(document["runs"])})
    document["summary"] = summary(document["runs"])
    draw(document, output.with_suffix(".png"))
    print_summary(document["summary"])
    print(f"wrote {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    run_command(main)
