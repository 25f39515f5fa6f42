"""What the demo measures, as one JSON document, and what follows from it by arithmetic.

A *setting* is one emulated cluster with everything that was trained on it. The document's top level
is the first setting; further ones are listed under ``settings`` with the same keys. Times are in
seconds, losses in nats a byte. Keys are added over time and never renamed.

A strategy's step and tokens per second are those with the exchange that ``auto`` takes for it
(``auto_exchange``, ``auto_reason``); ``exchanges`` has them for the flat and the hierarchical one.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tamoe.topology.documents import read_document, write_document
from tamoe.topology.errors import InputError

SCHEMA = "tamoe.results"
SCHEMA_VERSION = "1.0"
Document = dict[str, Any]


def save_results(path: Path, document: Mapping[str, Any]) -> None:
    """Write the document; a reader never sees half of it."""
    write_document(path, {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **document})


def load_results(path: Path) -> Document:
    """Read a document that :func:`save_results` wrote.

    Raises
    ------
    InputError
        The file is missing, truncated or of another schema.
    """
    return read_document(path, SCHEMA, SCHEMA_VERSION)


def assemble(settings: Sequence[Document], about: Mapping[str, Any]) -> Document:
    """One document from settings in the order in which they ran, and how they were made."""
    first, *others = settings
    return {**about, **first, "settings": others}


def all_settings(document: Document) -> list[Document]:
    """The first setting, which is the document itself, and those beside it."""
    return [document, *document.get("settings", ())]


def even_strategy(setting: Mapping[str, Any]) -> Mapping[str, Any]:
    """The baseline: the strategy whose name begins with ``even``.

    Raises
    ------
    InputError
        There is none.
    """
    for strategy in setting["strategies"]:
        if strategy["name"].startswith("even"):
            return strategy
    names = [strategy["name"] for strategy in setting["strategies"]]
    raise InputError(f"strategies are {names}; one must begin with 'even': the baseline")


def time_to_loss(curve: Sequence[Mapping[str, float]], loss: float) -> float | None:
    """From when on a curve stays at or below a loss, straight lines drawn between its points.

    A single lucky point does not count: the curve must not rise above the loss again.

    Parameters
    ----------
    curve
        Points with ``time_s`` and ``val_loss``, in the order of time.
    loss
        The loss to reach.

    Returns
    -------
    float or None
        Seconds of training; None where the curve ends above.

    Examples
    --------
    >>> curve = [{"time_s": 0.0, "val_loss": 4.0}, {"time_s": 10.0, "val_loss": 2.0}]
    >>> time_to_loss(curve, 3.0), time_to_loss(curve, 1.0)
    (5.0, None)
    """
    above = [number for number, point in enumerate(curve) if point["val_loss"] > loss]
    if not above:
        return curve[0]["time_s"] if curve else None
    if above[-1] == len(curve) - 1:
        return None
    before, after = curve[above[-1]], curve[above[-1] + 1]
    part = (before["val_loss"] - loss) / (before["val_loss"] - after["val_loss"])
    return before["time_s"] + part * (after["time_s"] - before["time_s"])


def flat_exchange_s(strategy: Mapping[str, Any]) -> float | None:
    """The flat exchange's time in training, which predictions are for; older files have no other.

    >>> flat_exchange_s({"exchange_s": 2.0})
    2.0
    >>> flat_exchange_s({"exchange_s": 2.0, "exchanges": {"flat": {"exchange_s": 3.0}}})
    3.0
    """
    timed: Mapping[str, Any] = (strategy.get("exchanges") or {}).get("flat", strategy)
    exchange_s: float | None = timed["exchange_s"]
    return exchange_s


def complete_setting(setting: Document) -> Document:
    """Fill in what follows from the measurements: speed-ups, the exchange's share and the bound.

    The share f of any step is what it takes more than the even step with its exchange removed; the
    setting's is that of the even step with the exchange that ``auto`` takes. The bound is what no
    exchange can beat: that even step over the one without, 1/(1 − f). Both are left out until all
    strategies have done their equal steps: the median of a few early steps can give a bound below
    the speed-ups that it should bound. A strategy that was not measured yet keeps nulls.
    """
    even = even_strategy(setting)
    equal_steps = all(strategy["val_loss_own"] is not None for strategy in setting["strategies"])
    if equal_steps and even["step_s"] and setting.get("compute_step_s"):
        share = _exchange_share(setting, even)
        setting["exchange_share"] = share
        setting["speedup_bound"] = 1 / (1 - share)
        for strategy in setting["strategies"]:
            for timed in (strategy.get("exchanges") or {}).values():
                timed["exchange_share"] = _exchange_share(setting, timed)
    end = final_point(even)
    even_s = None if end is None else time_to_loss(even["curve"], end["val_loss"])
    for strategy in setting["strategies"]:
        # The flat exchange in training, and alone on idle links and cores.
        for ratio, measured_s, predicted_s in (
            ("training_over_predicted", flat_exchange_s(strategy), "predicted_exchange_s"),
            ("alone_over_predicted", strategy["exchange_alone_s"], "predicted_alone_s"),
        ):
            if measured_s and strategy[predicted_s]:
                strategy[ratio] = measured_s / strategy[predicted_s]
        if strategy["tokens_per_s"] and even["tokens_per_s"]:
            strategy["speedup_over_even"] = strategy["tokens_per_s"] / even["tokens_per_s"]
        if end is None or strategy["val_loss_own"] is None:
            continue
        reached_s = time_to_loss(strategy["curve"], end["val_loss"])
        strategy["time_to_even_loss_s"] = reached_s
        if reached_s and even_s:
            strategy["speedup_to_even_loss"] = even_s / reached_s
        strategy["val_loss_over_even"] = strategy["val_loss_own"] / even["val_loss_own"] - 1
    return setting


def _exchange_share(setting: Document, timed: Mapping[str, Any]) -> float:
    share: float = max(0.0, 1 - setting["compute_step_s"] / timed["step_s"])
    return share


def final_point(even: Mapping[str, Any]) -> Mapping[str, float] | None:
    """The end of the even run's curve; None where the run ended early.

    Curves are drawn on fewer held-out batches than the losses at the end, so the loss to reach is
    the curve's.
    """
    return even["curve"][-1] if even["val_loss_own"] is not None else None


def empty_strategy(name: str, kind: str, kl: float | None, router: str) -> Document:
    """A strategy's entry before anything was measured."""
    numbers = (
        "tokens_per_s",
        "step_s",
        "exchange_s",
        "predicted_exchange_s",
        "remote_share",
        "val_loss_own",
        "val_loss_foreign",
        "val_loss_no_bias",
        "allreduce_s",
        "speedup_over_even",
        "time_to_even_loss_s",
        "speedup_to_even_loss",
        "val_loss_over_even",
        "exchange_alone_s",
        "alone_pause_s",
        "predicted_alone_s",
        "target_exchange_s",
        "training_over_predicted",
        "alone_over_predicted",
        "dropped_share",
        "busiest_expert",
    )
    fixed = {"name": name, "kind": kind, "kl": kl, "router": router}
    chosen: Document = {"auto_exchange": None, "auto_reason": None, "exchanges": {}}
    lists: Document = {"counts_PN": None, "chosen_LPN": None, "target_PN": None, "curve": []}
    return {**fixed, **chosen, **dict.fromkeys(numbers), **lists}


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median, and half the distance between the quartiles.

    >>> median_and_spread([1.0, 2.0, 3.0, 4.0, 100.0])
    (3.0, 25.25)
    """
    if len(values) < 2:
        return (values[0], 0.0) if values else (0.0, 0.0)
    low, _, high = statistics.quantiles(values, n=4)
    return statistics.median(values), (high - low) / 2
