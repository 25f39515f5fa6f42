"""Constants of the exchanges' cost model, from measured times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from tamoe.solver.constants import Constants
from tamoe.solver.exchange_cost import EXCHANGES, WAYS, Exchange, Rows, Way, predict
from tamoe.topology.errors import InputError
from tamoe.topology.graph import Topology

Key = tuple[Exchange, Way]
KEYS: tuple[Key, ...] = tuple(product(EXCHANGES, WAYS))
# Of ms at the start, ms a message, ns a byte, ns a byte of tokens, share that crossing flows keep.
_START = np.array([5.0, 0.1, 1.0, 1.0, 0.9])
_LEAST, _MOST = [0.0, 0.0, 0.0, 0.0, 0.5], [1e3, 1e3, 1e3, 1e3, 1.0]
_STEPS = np.diag([0.3, 0.01, 0.03, 0.05, -0.01])
_LOSSES = ("linear", "soft_l1")  # from a far start the first is faster
_STEPS_EACH = 10
LEAST_SPREAD = 0.05  # steadier times are no better: the model's own errors are of this size
MOST_STEPS = len(_LOSSES) * _STEPS_EACH


@dataclass(frozen=True, eq=False)
class Measured:
    """Median seconds of one way of one exchange in one case, and what it moved.

    ``spread`` is the range of the middle half of its runs, as a share of the median.
    """

    case: str
    exchange: Exchange
    way: Way
    seconds: float
    groups: tuple[Rows, ...]
    spread: float = 0.0


def fit(
    topology: Topology,
    measured: Sequence[Measured],
    at_once: int | None,
    keys: Iterable[Key] = KEYS,
    progress: Callable[[], None] | None = None,
) -> Mapping[tuple[str, str], Constants]:
    """Constants whose predictions are nearest to what was measured, in relative terms.

    Times that vary less count for more.

    Parameters
    ----------
    topology
        The cluster.
    measured
        Times; at least five cases of each exchange and way.
    at_once
        Ranks that can work at the same time: the cores of an emulated cluster, None for a real
        one, where ranks have cores of their own.
    keys
        Exchanges and ways to fit.
    progress
        Called after each of at most ``MOST_STEPS`` steps for each key.

    Raises
    ------
    InputError
        There are fewer cases than constants.
    """
    fitted: dict[tuple[str, str], Constants] = {}
    for key in keys:
        mine = [one for one in measured if (one.exchange, one.way) == key]
        if len(mine) < len(_START):
            raise InputError(
                f"measured has {len(mine)} times of {' '.join(key)}; "
                f"allowed: {len(_START)} or more, one for each constant"
            )
        fitted[key] = _fit_one(topology, mine, at_once, progress)
    return fitted


def _fit_one(
    topology: Topology,
    measured: Sequence[Measured],
    at_once: int | None,
    progress: Callable[[], None] | None,
) -> Constants:
    from scipy.optimize import least_squares

    def constants(values: np.ndarray) -> Constants:
        start_ms, message_ms, work_ns, token_ns, share = values.tolist()
        return Constants(
            start_ms / 1e3, message_ms / 1e3, work_ns / 1e9, token_ns / 1e9, share, at_once
        )

    spread = np.array([one.spread for one in measured])
    weight = LEAST_SPREAD / np.hypot(LEAST_SPREAD, spread)

    def error(values: np.ndarray) -> np.ndarray:
        given = constants(values)
        ratios = [
            predict(topology, one.exchange, one.way, one.groups, given).time_s / one.seconds
            for one in measured
        ]
        return weight * np.log(ratios)

    # Predictions have small steps, so differences over tiny distances would be noise.
    def jacobian(values: np.ndarray) -> np.ndarray:
        if progress is not None:
            progress()
        here = error(values)
        return np.stack([(error(values + step) - here) / step.sum() for step in _STEPS], 1)

    values = _START
    for loss in _LOSSES:
        values = least_squares(
            error,
            values,
            bounds=(_LEAST, _MOST),
            x_scale=[10.0, 0.2, 1.0, 1.0, 0.1],
            jac=jacobian,
            loss=loss,
            f_scale=0.05,
            ftol=1e-3,
            xtol=1e-3,
            max_nfev=_STEPS_EACH,
        ).x
    return constants(values)
