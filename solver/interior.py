"""Interior-point method for the convex programs of the dispatch problem.

    minimise  time_weight·τ + Σ ω x log x
    subject to  E x = e,   R x + r <= τ,   τ >= latency,   floor <= x <= cap

with τ free, or fixed (then time_weight plays no part). Predictor and corrector as of Mehrotra.
The Hessian is diagonal, so a step costs one dense factorisation with one row for each equality
and each row of R that has several entries; rows with a single entry go into the diagonal and a
border for τ, which keeps pairwise contention (a row for every pair) as cheap as shared links.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_STEPS = 150
GOAL = 1e-13  # of residuals and duality gap; a stalled run stops earlier
NEARLY = 1e-8  # where rounding may be what stalls it
SHORT = 0.7  # a step from which less than this share could be taken is doubted
DENSE_ENTRIES = 300_000  # below, a dense matrix is faster than a sparse one


@dataclass(frozen=True, eq=False)
class Program:
    """A convex program; numbers should be scaled to be of order 1."""

    weight_n: np.ndarray  # ω >= 0
    equalities: Any  # csr [m, n]
    equal_to: np.ndarray
    rows: Any  # csr [R, n], every row with an entry
    const_R: np.ndarray
    floor: float
    cap: float
    latency: float = 0.0
    fixed_time: float | None = None
    time_weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Solution:
    """A primal and a dual point, and how well they fit."""

    x: np.ndarray
    time: float
    equality_multipliers: np.ndarray
    price_R: np.ndarray
    error: float  # the largest of the residuals and the duality gap


@dataclass(eq=False)
class _State:
    """An iterate; every inequality has a slack > 0 and a multiplier > 0."""

    x: np.ndarray
    time: float
    lam: np.ndarray
    slack: np.ndarray  # rows, then τ >= latency where τ is free
    price: np.ndarray
    low: np.ndarray  # multipliers of x >= floor
    high: np.ndarray  # multipliers of x <= cap

    def moved(self, step: _State, by: float) -> _State:
        return _State(*(getattr(self, f) + by * getattr(step, f) for f in _FIELDS))


_Products = tuple[np.ndarray, np.ndarray, np.ndarray]
_FIELDS = ("x", "time", "lam", "slack", "price", "low", "high")


class _Rows:
    """The rows of a program, split into those with one entry and those with several."""

    def __init__(self, program: Program) -> None:
        from scipy import sparse

        rows = program.rows.tocsr()
        entries = np.diff(rows.indptr)
        self.num_unknowns = len(program.weight_n)
        self.several = np.flatnonzero(entries > 1)
        self.one = np.flatnonzero(entries == 1)
        self.one_variable = rows.indices[rows.indptr[self.one]]
        self.one_value = rows.data[rows.indptr[self.one]]
        # Equalities, then rows with several entries.
        self.matrix: Any = sparse.csr_array(
            sparse.vstack([program.equalities, rows[self.several]]), dtype=np.float64
        )
        if self.matrix.shape[0] * self.matrix.shape[1] <= DENSE_ENTRIES:
            self.matrix = self.matrix.toarray()

    def weighted_gram(self, scale_n: np.ndarray) -> np.ndarray:
        """matrix @ diag(scale) @ matrix.T."""
        if isinstance(self.matrix, np.ndarray):
            return (self.matrix * scale_n) @ self.matrix.T
        scaled = self.matrix.copy()
        scaled.data *= scale_n[scaled.indices]
        return np.asarray((scaled @ self.matrix.T).toarray())

    def scatter(self, values: np.ndarray) -> np.ndarray:
        """Sums over the rows with one entry, by variable."""
        return np.bincount(self.one_variable, values, minlength=self.num_unknowns)


def minimise(program: Program) -> Solution:
    """Solve a program that has x = 1 strictly inside its bounds.

    Returns the best point found; the caller judges it, by its certificate.
    """
    rows = _Rows(program)
    state = _start(program)
    best, best_error, since = state, np.inf, 0
    for _ in range(MAX_STEPS):
        residual = _residuals(program, state)
        error = _error(program, state, residual)
        if error < 0.9 * best_error:
            since = 0
        if error < best_error:
            best, best_error = state, error
        since += 1
        stalled = since > (4 if best_error < NEARLY else 20)
        if error < GOAL or stalled or not np.isfinite(error):
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the last steps are ill-conditioned by nature
            try:
                state = _next(program, rows, state, residual)
            except (np.linalg.LinAlgError, ValueError):
                break
    num_rows = len(program.const_R)
    return Solution(best.x, best.time, best.lam, best.price[:num_rows], float(best_error))


def _start(program: Program) -> _State:
    num = len(program.weight_n)
    x = np.ones(num)
    loads = program.rows @ x + program.const_R
    if program.fixed_time is None:
        time = max(float(loads.max(initial=0.0)), program.latency) * 1.1 + 0.1
        slack = np.append(time - loads, time - program.latency)
    else:
        time = program.fixed_time
        slack = np.maximum(time - loads, 0.1)
    free_weight = program.time_weight if program.fixed_time is None else 0.0
    scale = float(program.weight_n.mean()) + free_weight / num
    price = np.full(len(slack), 1 / max(len(slack), 1))
    equalities = np.zeros(len(program.equal_to))
    return _State(x, time, equalities, slack, price, np.full(num, scale), np.full(num, scale))


@dataclass(eq=False)
class _Residual:
    x: np.ndarray
    time: float
    equal: np.ndarray
    rows: np.ndarray


def _residuals(program: Program, at: _State) -> _Residual:
    free = program.fixed_time is None
    num_rows = len(program.const_R)
    gradient = program.weight_n * (np.log(at.x) + 1)
    gradient = gradient + program.equalities.T @ at.lam + program.rows.T @ at.price[:num_rows]
    loads = program.rows @ at.x + program.const_R
    over = np.append(loads, program.latency) if free else loads
    return _Residual(
        gradient - at.low + at.high,
        program.time_weight - float(at.price.sum()) if free else 0.0,
        program.equalities @ at.x - program.equal_to,
        over - at.time + at.slack,
    )


def _error(program: Program, at: _State, residual: _Residual) -> float:
    """The largest of the residuals and the duality gap."""
    gap = at.slack @ at.price + _loss(program, at.x, residual.x + at.low - at.high).sum()
    return max(
        float(gap),
        abs(residual.time),
        float(abs(residual.equal).max()),
        float(abs(residual.rows).max(initial=0.0)),
    )


def _loss(program: Program, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """How much better than x another value between the bounds would be, given the prices."""
    weight = np.maximum(program.weight_n, 1e-300)
    with np.errstate(over="ignore", under="ignore"):
        best = np.clip(x * np.exp(-gradient / weight), program.floor, program.cap)
        logs = np.log(best / x, where=best > 0, out=np.zeros_like(x))
    return np.asarray(gradient * (x - best) - program.weight_n * (best * logs - best + x))


def _next(program: Program, rows: _Rows, at: _State, residual: _Residual) -> _State:
    newton = _Newton(program, rows, at)
    count = len(at.slack) + 2 * len(at.x)
    products = _products(program, at)
    gap = _total(products) / count
    guess = newton.step(residual, products)
    far = at.moved(guess, _step_length(program, at, guess))
    target = gap * min(1.0, (_total(_products(program, far)) / count / gap) ** 3)
    step = newton.step(
        residual,
        (
            products[0] + guess.slack * guess.price - target,
            products[1] + guess.x * guess.low - target,
            products[2] - guess.x * guess.high - target,
        ),
    )
    length = _step_length(program, at, step, limit=2.0)
    if length < SHORT:
        # The corrector can run in circles; a plain step towards the centre gets out of them.
        rest = gap / 2
        centred = products[0] - rest, products[1] - rest, products[2] - rest
        plain = newton.step(residual, centred)
        plain_length = _step_length(program, at, plain, limit=2.0)
        if plain_length > length:
            step, length = plain, plain_length
    return at.moved(step, min(1.0, 0.995 * length))


def _products(program: Program, at: _State) -> _Products:
    """Slack times multiplier, of the rows and of both bounds."""
    below, above = at.x - program.floor, program.cap - at.x
    return at.slack * at.price, below * at.low, above * at.high


def _total(products: _Products) -> float:
    return float(sum(part.sum() for part in products))


def _step_length(program: Program, at: _State, step: _State, limit: float = 1.0) -> float:
    longest = limit
    for value, change in (
        (at.slack, step.slack),
        (at.price, step.price),
        (at.low, step.low),
        (at.high, step.high),
        (at.x - program.floor, step.x),
        (program.cap - at.x, -step.x),
    ):
        shrinking = change < 0
        if shrinking.any():
            longest = min(longest, float((-value[shrinking] / change[shrinking]).min()))
    return longest


class _Newton:
    """The linear system of one iterate: bounds, rows with one entry and x are eliminated."""

    def __init__(self, program: Program, rows: _Rows, at: _State) -> None:
        from scipy import linalg

        self.program, self.rows, self.at = program, rows, at
        self.free = program.fixed_time is None
        self.below, self.above = at.x - program.floor, program.cap - at.x
        self.stiff = at.price / at.slack
        self.pull = rows.one_value * self.stiff[rows.one]
        hessian = program.weight_n / at.x + at.low / self.below + at.high / self.above
        self.inverse = 1 / (hessian + rows.scatter(self.pull * rows.one_value))
        self.border = rows.scatter(self.pull)
        self.system = self._system()
        self.scale = 1 / np.sqrt(abs(self.system.diagonal()))
        self.factors = linalg.lu_factor(self.system * self.scale * self.scale[:, None])

    def _system(self) -> np.ndarray:
        rows, num_equal = self.rows, len(self.program.equal_to)
        size = num_equal + len(rows.several)
        system = np.zeros((size + self.free, size + self.free))
        system[:size, :size] = rows.weighted_gram(self.inverse)
        middle = np.arange(num_equal, size)
        system[middle, middle] += 1 / self.stiff[rows.several]
        if self.free:
            mixed = -(rows.matrix @ (self.inverse * self.border))
            mixed[num_equal:] += 1
            system[:size, size] = system[size, :size] = mixed
            stiff = self.stiff[rows.one].sum() + self.stiff[-1]
            system[size, size] = self.border @ (self.inverse * self.border) - stiff
        return system

    def _solve(self, right: np.ndarray) -> np.ndarray:
        from scipy import linalg

        unknown = np.zeros(len(right))
        for _ in range(3):  # refined, as the system is ill-conditioned near the optimum
            left = self.scale * (right - self.system @ unknown)
            unknown += self.scale * linalg.lu_solve(self.factors, left, check_finite=False)
        return unknown

    def step(self, residual: _Residual, products: _Products) -> _State:
        """The step that removes the residuals and, to first order, the products."""
        at, rows, num_equal = self.at, self.rows, len(self.program.equal_to)
        shift = residual.rows - products[0] / at.price
        right_x = -residual.x - products[1] / self.below + products[2] / self.above
        right_x = right_x - rows.scatter(self.pull * shift[rows.one])
        right = rows.matrix @ (self.inverse * right_x)
        right[:num_equal] += residual.equal
        right[num_equal:] += shift[rows.several]
        if self.free:
            shifted = self.stiff[rows.one] @ shift[rows.one] + self.stiff[-1] * shift[-1]
            last = residual.time - shifted - self.border @ (self.inverse * right_x)
            right = np.append(right, last)
        unknown = self._solve(right)
        time = float(unknown[-1]) if self.free else 0.0
        multipliers = unknown[: rows.matrix.shape[0]]
        x = self.inverse * (right_x - rows.matrix.T @ multipliers + self.border * time)
        loads = self.program.rows @ x - time
        slack = -residual.rows - (np.append(loads, -time) if self.free else loads)
        price = -(products[0] + at.price * slack) / at.slack
        price[rows.several] = multipliers[num_equal:]
        low = -(products[1] + at.low * x) / self.below
        high = -(products[2] - at.high * x) / self.above
        return _State(x, time, multipliers[:num_equal], slack, price, low, high)
