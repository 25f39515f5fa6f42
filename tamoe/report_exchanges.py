"""The report's second table: every strategy with the flat and with the hierarchical exchange."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

KINDS = ("flat", "hierarchical")
NEAR = 0.05  # tokens per second that differ by less are called the same
_HEAD = (
    "<thead><tr><th rowspan='2'>strategy</th><th rowspan='2'>auto takes</th>"
    "<th colspan='2'>flat</th><th colspan='2'>hierarchical</th>"
    "<th rowspan='2'>hierarchical over flat</th>"
    "<th rowspan='2' class='why'>why auto takes it (simulated)</th></tr>"
    "<tr><th>tokens/s</th><th>f</th><th>tokens/s</th><th>f</th></tr></thead>"
)


def exchanges_section(strategies: Sequence[Mapping[str, Any]]) -> str:
    """Table and sentence as HTML; nothing where no strategy was timed with both exchanges.

    Parameters
    ----------
    strategies
        Of one setting of the results document. Files of older versions have no ``exchanges``.

    Returns
    -------
    str

    Examples
    --------
    >>> exchanges_section([{"name": "even", "exchanges": {}}])
    ''
    """
    timed = [strategy for strategy in strategies if strategy.get("exchanges")]
    if not timed:
        return ""
    rows = "".join(_row(strategy) for strategy in timed)
    return (
        "<h3>Flat beside hierarchical</h3>\n<div class='scroll' tabindex='0'>"
        f"<table class='exchanges'>{_HEAD}<tbody>{rows}</tbody></table></div>\n"
        f"<p class='note'>{html.escape(exchanges_verdict(timed))}</p>\n"
    )


def exchanges_verdict(timed: Sequence[Mapping[str, Any]]) -> str:
    """What the hierarchical exchange gained, and whether ``auto`` was right.

    Parameters
    ----------
    timed
        Strategies with both exchanges.

    Returns
    -------
    str

    Examples
    --------
    >>> both = {"flat": {"tokens_per_s": 100.0}, "hierarchical": {"tokens_per_s": 150.0}}
    >>> text = exchanges_verdict([{"name": "even", "auto_exchange": "flat", "exchanges": both}])
    >>> text.split(". ")[0]
    'Hierarchical trains 1.50 times the tokens a second of flat (emulated)'
    >>> text.split("; ")[1]
    'not for “even” (hierarchical is 1.50 times as fast).'
    """
    gains = [_gain(strategy) for strategy in timed]
    low, high = f"{min(gains):.2f}", f"{max(gains):.2f}"
    wrong = []
    for strategy, gain in zip(timed, gains, strict=True):
        other = "flat" if strategy["auto_exchange"] == "hierarchical" else "hierarchical"
        ratio = gain if other == "hierarchical" else 1 / gain
        if ratio > 1 + NEAR:
            wrong.append(f"“{strategy['name']}” ({other} is {ratio:.2f} times as fast)")
    return (
        f"Hierarchical trains {low if low == high else f'{low} to {high}'} times the tokens a "
        f"second of flat (emulated). auto takes the faster of the two, or one within {NEAR:.0%}, "
        f"for {len(timed) - len(wrong)} of {len(timed)} strategies"
        + (f"; not for {', '.join(wrong)}." if wrong else ".")
    )


def _row(strategy: Mapping[str, Any]) -> str:
    numbers = "".join(
        f"<td>{timed['tokens_per_s']:,.0f}</td><td>{_share(timed.get('exchange_share'))}</td>"
        for timed in (strategy["exchanges"][kind] for kind in KINDS)
    )
    return (
        f"<tr><th scope='row'>{html.escape(strategy['name'])}</th>"
        f"<td>{strategy['auto_exchange']}</td>{numbers}<td>{_gain(strategy):.2f}×</td>"
        f"<td class='why'>{html.escape(strategy['auto_reason'])}</td></tr>"
    )


def _gain(strategy: Mapping[str, Any]) -> float:
    flat, hierarchical = (strategy["exchanges"][kind]["tokens_per_s"] for kind in KINDS)
    gain: float = hierarchical / flat
    return gain


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.2f}"
