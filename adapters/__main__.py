"""``python -m tamoe.adapters``: what is installed, and what is supported."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table

from tamoe.adapters.versions import FRAMEWORKS, installed


def main() -> None:
    """Print the table."""
    table = Table("framework", "installed", "supported", "what is steered", box=None)
    for framework, (distribution, known, steered) in FRAMEWORKS.items():
        version = installed(distribution)
        here = "-" if version is None else version
        if version is not None and not SpecifierSet(known).contains(version, prereleases=True):
            here += " (unknown)"
        table.add_row(framework, here, known, steered)
    Console().print(table)


if __name__ == "__main__":
    main()
