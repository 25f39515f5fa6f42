"""The README's example prints what the README says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_prints_its_output() -> None:
    code, expected = re.findall(r"```(?:python)?\n(.*?)```", README, re.S)[:2]
    torch.manual_seed(0)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    got, want = printed.getvalue().splitlines(), expected.splitlines()
    assert got[:2] == want[:2]
    # The last line depends on random numbers; random routing is nearly even.
    loss = float(re.search(r"[\d.]+", got[2]).group())  # type: ignore[union-attr]
    assert 0.95 < loss < 1.1
    assert len(code.strip().splitlines()) <= 16
