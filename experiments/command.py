"""How the command line of an experiment ends: what is wrong in one message, with its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from tamoe.topology.errors import TamoeError


def run_command(main: Callable[..., None]) -> None:
    """Run a function as a command, its parameters being the options."""
    app = typer.Typer(add_completion=False)
    app.command()(main)
    with one_message():
        app()


@contextmanager
def one_message() -> Iterator[None]:
    """Print an error that tamoe raises on purpose, and exit, where there would be a traceback."""
    try:
        yield
    except TamoeError as error:
        print(f"tamoe: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
