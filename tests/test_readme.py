"""The README's examples print what the README says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.S)


def test_all_examples_are_found() -> None:
    assert len(EXAMPLES) == README.count("```python") == 2
    assert len(EXAMPLES[0][0].strip().splitlines()) <= 16


@pytest.mark.parametrize("number", [0, 1])
def test_an_example_prints_its_output(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, expected = EXAMPLES[number]
    monkeypatch.chdir(tmp_path)  # examples write files
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == expected
