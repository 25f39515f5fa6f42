"""The tables of ``LOG.md`` about the demo, from its results.

Print them without running anything::

    python -m tamoe.experiments.demo_table experiments/demo.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tamoe.experiments.command import run_command
from tamoe.experiments.results import Document, all_settings, load_results
from tamoe.report_exchanges import KINDS, exchanges_verdict


def tables(document: Document) -> str:
    """What steering gained, then flat beside hierarchical, as Markdown; complete settings only."""
    settings = [s for s in all_settings(document) if s.get("exchange_share") is not None]
    steering = [_steering_row(setting, s) for setting in settings for s in setting["strategies"]]
    both = [_both_row(setting, s) for setting in settings for s in setting["strategies"]]
    verdicts = [
        f"- {setting['cluster']}: {exchanges_verdict(setting['strategies'])}"
        for setting in settings
    ]
    return "\n".join(
        [
            "| setting | f, bound | strategy | tokens/s over even | in-node share | time to even's "
            "loss | own loss against even |",
            "|---|---|---|---|---|---|---|",
            *steering,
            "",
            "| setting | strategy | auto | flat tokens/s, f | hierarchical tokens/s, f |",
            "|---|---|---|---|---|",
            *both,
            "",
            *verdicts,
        ]
    )


def _steering_row(setting: Document, strategy: Mapping[str, Any]) -> str:
    reached = strategy["speedup_to_even_loss"]
    cells = (
        setting["cluster"],
        f"{setting['exchange_share']:.2f}, {setting['speedup_bound']:.1f}x",
        strategy["name"],
        f"{strategy['speedup_over_even']:.2f}x",
        f"{1 - strategy['remote_share']:.2f}",
        "not reached" if reached is None else f"{reached:.2f}x",
        f"{strategy['val_loss_over_even']:+.1%}",
    )
    return f"| {' | '.join(cells)} |"


def _both_row(setting: Document, strategy: Mapping[str, Any]) -> str:
    timed = [strategy["exchanges"][kind] for kind in KINDS]
    numbers = [f"{t['tokens_per_s']:,.0f}, {t['exchange_share']:.2f}" for t in timed]
    cells = (setting["cluster"], strategy["name"], strategy["auto_exchange"], *numbers)
    return f"| {' | '.join(cells)} |"


def main(path: Path) -> None:
    """Print the tables of a results file."""
    print(tables(load_results(path)))


if __name__ == "__main__":
    run_command(main)
