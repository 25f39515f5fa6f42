"""What experiments with the cost model share: runs of cases, constants, how good choices are."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from statistics import median
from typing import Any

from tamoe.calibration import measure
from tamoe.cases import Case
from tamoe.progress import progress_line
from tamoe.solver.choice import preferred
from tamoe.solver.constants import Constants
from tamoe.solver.exchange_fit import Measured, fit
from tamoe.solver.exchange_rows import ALL_WAYS, EXCHANGES, KEYS, WAYS
from tamoe.topology.graph import Topology
from tamoe.topology.ranks import run_ranks_with_report

LEAST_S = 5e-3  # below, emulated times are not scored
NEAR = 0.05  # of the fastest, for a good choice
WITHIN = (0.05, 0.08, 0.15)  # errors of predictions that are counted
# Standard error of a median above which an exchange is timed more often: of nine times with half of
# them within 8 % of each other it is 2.5 %.
STEADY = 0.015
_TIMEOUT_S = 7200.0


def calibrate_and_measure(
    spec: str,
    task: str,
    topology: Topology,
    fitted: Sequence[Case],
    cases: Sequence[Case],
    repetitions: int,
    backward: bool = False,
    most_runs: int | None = None,
) -> tuple[Mapping[tuple[str, str], Constants], list[Measured], int]:
    """Constants, fitted on some cases alone, times of the others, dropped packets: of one run.

    The run is of every exchange in every case, on an emulated cluster; ``most_runs`` as in
    :func:`tamoe.calibration.measure`.
    """
    given = [*fitted, *cases]
    print(f"{spec}: {len(given)} routings", flush=True)
    # Mixed, so that a machine that is slower for a while is so for both.
    order = random.Random(0).sample(range(len(given)), len(given))
    mixed = [given[number] for number in order]
    run = run_ranks_with_report(
        spec, _rank, task, topology, mixed, repetitions, backward, most_runs, timeout_s=_TIMEOUT_S
    )
    assert run.network is not None
    if dropped := run.network.dropped_packets:
        print(f"{spec}: {dropped} packets were dropped; these times are not scored", flush=True)
    measured = run.results[0]
    each = len(EXCHANGES) * len(ALL_WAYS if backward else WAYS)
    of_case = {number: measured[i * each : (i + 1) * each] for i, number in enumerate(order)}
    in_order = [one for number in range(len(given)) for one in of_case[number]]
    split = len(fitted) * each
    print(f"{spec}: fitting constants to {split} times", flush=True)
    alike = (repeat(topology), repeat(in_order[:split]), repeat(os.cpu_count()))
    with ProcessPoolExecutor(os.cpu_count()) as pool:  # a fit of sixteen ranks takes half a minute
        fits = list(pool.map(fit, *alike, [[key] for key in KEYS]))
    return {key: one[key] for key, one in zip(KEYS, fits, strict=True)}, in_order[split:], dropped


def _rank(
    rank: int,
    task: str,
    topology: Topology,
    cases: Sequence[Case],
    repetitions: int,
    backward: bool,
    most_runs: int | None,
) -> list[Measured] | None:
    show = progress_line(task) if rank == 0 else None
    asked: dict[str, Any] = {"steady": STEADY, "most_runs": most_runs, "backward": backward}
    measured = measure(rank, topology, cases, repetitions, show, **asked)
    return measured if rank == 0 else None


def judge_errors(both: Iterable[tuple[float, float]]) -> dict[str, Any]:
    """How far predicted seconds are from measured ones, of pairs of them.

    >>> judge_errors([(1.0, 1.0), (1.06, 1.0), (0.9, 1.0)])["within"]
    {'0.05': 1, '0.08': 2, '0.15': 3}
    """
    errors = [abs(predicted_s / measured_s - 1) for predicted_s, measured_s in both]
    return {
        "times": len(errors),
        "median_error": median(errors) if errors else None,
        "worst_error": max(errors, default=None),
        "within": {str(share): sum(e <= share for e in errors) for share in WITHIN},
    }


def judge_choices(settings: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, Any]:
    """How often the exchange that the model prefers is near the fastest, and the worst miss.

    ``always`` is the same for the one exchange that would do best if it were taken everywhere.

    Parameters
    ----------
    settings
        Predicted and measured seconds of each exchange, for each setting.

    Examples
    --------
    >>> found = judge_choices([{"flat rounds": (1.0, 3.0), "hierarchical": (2.0, 2.0)}])
    >>> found["near_best"], found["worst_choice"], found["always"]["exchange"]
    (0.0, 0.5, 'hierarchical')
    """
    given = list(settings)
    lost = [
        _losses(both)[preferred({name: times[0] for name, times in both.items()})] for both in given
    ]
    names = [name for name in EXCHANGES if all(name in both for both in given)]
    everywhere = {name: [_losses(both)[name] for both in given] for name in names}
    best = max(names, key=lambda name: (_near(everywhere[name]), -max(everywhere[name], default=0)))
    return {
        "settings": len(lost),
        "near_best": _near(lost),
        "worst_choice": max(lost, default=None),
        "always": {
            "exchange": best,
            "near_best": _near(everywhere[best]),
            "worst_choice": max(everywhere[best], default=None),
        },
    }


def _losses(both: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """What each exchange takes longer than the fastest, as a share."""
    least_s = min(times[1] for times in both.values())
    return {name: times[1] / least_s - 1 for name, times in both.items()}


def _near(lost: Sequence[float]) -> float | None:
    return sum(loss <= NEAR for loss in lost) / len(lost) if lost else None


def choices_in_words(found: Mapping[str, Any]) -> str:
    """What :func:`judge_choices` found, for a table.

    >>> always = {"exchange": "hierarchical", "near_best": 0.5, "worst_choice": 0.2}
    >>> choices_in_words({"settings": 4, "near_best": 0.75, "worst_choice": 0.1, "always": always})
    '4 settings, near best 75%, worst +10% (always hierarchical: 50%, +20%)'
    """
    if not found["settings"]:
        return "0 settings"
    always = found["always"]
    return (
        f"{found['settings']} settings, near best {found['near_best']:.0%}, "
        f"worst {found['worst_choice']:+.0%} (always {always['exchange']}: "
        f"{always['near_best']:.0%}, {always['worst_choice']:+.0%})"
    )
