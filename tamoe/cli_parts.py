"""What the files of the command line share: how commands end, common options, JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
import typer.core

from tamoe.topology.errors import StoppedError


class Commands(typer.core.TyperGroup):
    """Ctrl-C in any command ends with a message; typer would leave without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise StoppedError("stopped; nothing is left running") from None


Cluster = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Emulate this cluster, such as '4x2:200mbit' or '[[2,2],[2]]:400mbit,100mbit'.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))
