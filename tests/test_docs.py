"""The examples of the framework pages run and reach what they print as wanted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PACKAGES = {
    "transformers": "transformers",
    "deepspeed": "deepspeed",
    "megatron": "megatron",
    "torchtitan": "torchtitan",
    "fastmoe": None,  # by its contract
}


@pytest.mark.slow
@pytest.mark.parametrize("page", PACKAGES)
def test_the_example_of_a_page_reaches_its_target(page: str, tmp_path: Path) -> None:
    package, beside = PACKAGES[page], Path(sys.prefix) / page
    if package is not None and find_spec(package) is None and not beside.is_dir():
        pytest.skip(f"{package} is not installed")
    path = [str(beside), *filter(None, [os.environ.get("PYTHONPATH")])]
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.S)
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    line = re.search(
        r"leaves the node: ([.\d]+) of the choices, the plan says ([.\d]+)", run.stdout
    )
    assert line is not None, run.stdout
    share, wanted = map(float, line.groups())
    assert share == pytest.approx(wanted, abs=0.025)


def test_every_adapter_has_a_page() -> None:
    from tamoe.adapters.versions import FRAMEWORKS

    assert {page.stem for page in DOCS.glob("*.md")} == set(FRAMEWORKS)
