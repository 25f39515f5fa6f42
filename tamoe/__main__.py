"""``python -m tamoe`` is the command ``tamoe``."""

from tamoe.cli import main

main()
