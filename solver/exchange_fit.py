"""Constants of the exchanges' cost model, from measured times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tamoe.solver.constants import ROUNDS_AHEAD, Constants
from tamoe.solver.exchange_cost import predict
from tamoe.solver.exchange_rows import KEYS, Exchange, Key, Rows, Way
from tamoe.topology.errors import InputError
from tamoe.topology.graph import Topology

# Where the fit begins: ms at the start (in a fit, of the times' own), ms a message, ns a byte, ns a
# byte of its own, share that crossing flows keep.
_START = np.array([5.0, 0.1, 1.0, 1.0, 0.9])
_SCALE = np.array([10.0, 0.2, 1.0, 1.0, 0.1])
_LEAST, _MOST = [0.0, 0.0, 0.0, 0.0, 0.5], [1e3, 1e3, 1e3, 1e3, 1.0]
_STEPS = np.diag([0.3, 0.01, 0.03, 0.05, -0.01])
_LOSSES = ("linear", "soft_l1")  # from a far start the first is faster
_STEPS_EACH = 10
BOUND = 0.01  # error that a constant is worth that lies its scale away from the start
LEAST_ERROR = 0.05  # surer times are no better: the model's own errors are of this size
ERROR_OF_MEDIAN = 0.93  # of values with a normal distribution, times the range of the middle half
START_SHARE = 0.75  # of the shortest time, which next to nothing moves in; the fit begins there
MOST_STEPS = len(_LOSSES) * _STEPS_EACH


@dataclass(frozen=True, eq=False)
class Measured:
    """What one way of one exchange took in one case, and what it moved.

    Parameters
    ----------
    case, exchange, way
        Of what.
    seconds
        Median, of the last rank in each run, > 0.
    groups
        What each group moved.
    spread
        Range of the middle half of the runs, as a share of the median.
    runs
        How many the median is of.
    """

    case: str
    exchange: Exchange
    way: Way
    seconds: float
    groups: tuple[Rows, ...]
    spread: float = 0.0
    runs: int = 1


def fit(
    topology: Topology,
    measured: Sequence[Measured],
    at_once: int | None,
    keys: Iterable[Key] = KEYS,
    progress: Callable[[], None] | None = None,
    rounds_ahead: int = ROUNDS_AHEAD,
) -> Mapping[tuple[str, str], Constants]:
    """Constants whose predictions are nearest to what was measured, in relative terms.

    Times whose medians are surer count for more.

    Parameters
    ----------
    topology
        The cluster.
    measured
        Times; at least five cases of each of ``keys``.
    at_once
        Cores that all ranks share: those of an emulated cluster's machine; None for a real cluster,
        where ranks have cores of their own.
    keys
        Exchanges and ways to fit.
    progress
        Called before each of at most ``MOST_STEPS`` steps for each key.
    rounds_ahead
        Of the constants: 0 where the transport takes no rows early.

    Returns
    -------
    dict
        Constants for each key. Where no two links mix flows, ``crossing_share`` is 1.

    Raises
    ------
    InputError
        There are fewer cases than constants.

    Examples
    --------
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(4e9, 1e6))
    >>> def measured(size: float) -> Measured:
    ...     rows = Rows((0, 1), [np.array([[0.0, size], [0.0, 0.0]])])
    ...     return Measured("", "flat single", "dispatch", 0.02 + size / 1e6, (rows,))
    >>> times = [measured(1000.0 * number) for number in range(1, 7)]
    >>> found = fit(topology, times, None, [("flat single", "dispatch")])
    >>> round(found["flat single", "dispatch"].start_s, 3)
    0.02
    """
    fitted: dict[tuple[str, str], Constants] = {}
    for key in keys:
        mine = [one for one in measured if (one.exchange, one.way) == key]
        if len(mine) < len(_START):
            raise InputError(
                f"measured has {len(mine)} times of {' '.join(key)}; "
                f"allowed: {len(_START)} or more, one for each constant"
            )
        given = Constants(at_once=at_once, rounds_ahead=rounds_ahead)
        fitted[key] = _fit_one(topology, mine, given, progress)
    return fitted


def error_of_median(spread: Any, runs: int) -> Any:
    """Standard error of a median as a share of it, from the middle half's range as a share.

    >>> round(error_of_median(0.3, 9), 3)
    0.093
    """
    return ERROR_OF_MEDIAN * spread / runs**0.5


def _fit_one(
    topology: Topology,
    measured: Sequence[Measured],
    given: Constants,
    progress: Callable[[], None] | None,
) -> Constants:
    from scipy.optimize import least_squares

    error_of = np.array([error_of_median(one.spread, one.runs) for one in measured])
    weight = LEAST_ERROR / np.hypot(LEAST_ERROR, error_of)

    def constants(values: np.ndarray) -> Constants:
        start_ms, message_ms, work_ns, own_ns, share = [*values.tolist(), 1.0][: len(_START)]
        return replace(
            given,
            start_s=start_ms / 1e3,
            message_s=message_ms / 1e3,
            work_s_per_byte=work_ns / 1e9,
            work_s_per_own_byte=own_ns / 1e9,
            crossing_share=share,
        )

    def log_ratios(values: np.ndarray) -> np.ndarray:
        found = constants(values)
        ratios = [
            predict(topology, one.exchange, one.way, one.groups, found).time_s / one.seconds
            for one in measured
        ]
        return np.log(ratios)

    # Where no link mixes flows, as on two nodes, nothing tells what that costs.
    mixes = not np.array_equal(log_ratios(_START), log_ratios(_START + _STEPS[-1]))
    num = len(_START) if mixes else len(_START) - 1
    start, scale = _START[:num].copy(), _SCALE[:num]
    start[0] = min(START_SHARE * 1e3 * min(one.seconds for one in measured), _MOST[0])

    def error(values: np.ndarray) -> np.ndarray:
        # Weakly bound to the start: a constant that hides behind others has no best value.
        return np.concatenate([weight * log_ratios(values), BOUND * (values - start) / scale])

    # Predictions have small steps, so differences over tiny distances would be noise.
    def jacobian(values: np.ndarray) -> np.ndarray:
        if progress is not None:
            progress()
        here = error(values)
        steps = _STEPS[:num, :num]
        return np.stack([(error(values + step) - here) / step.sum() for step in steps], 1)

    values = start
    for loss in _LOSSES:
        values = least_squares(
            error,
            values,
            bounds=(_LEAST[:num], _MOST[:num]),
            x_scale=scale,
            jac=jacobian,
            loss=loss,
            f_scale=LEAST_ERROR,
            ftol=1e-3,
            xtol=1e-3,
            max_nfev=_STEPS_EACH,
        ).x
    return constants(values)
