"""The newest Megatron-Core, beside the environment (`make frameworks`), in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NEWEST = Path(sys.prefix) / "megatron19"
TRITON = Path(sys.prefix) / "torchtitan"  # which needs it, too
TESTS = Path(__file__).parent


@pytest.mark.ranks
@pytest.mark.emulated
@pytest.mark.slow
@pytest.mark.skipif(
    not (NEWEST.is_dir() and TRITON.is_dir()),
    reason="Megatron-Core 0.19 and Triton are not installed beside: make frameworks",
)
def test_all_of_this_holds_under_megatron_19():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(NEWEST), str(TRITON)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "megatron"]
    files = [TESTS / f"test_{name}.py" for name in ("adapter_others", "adapter_ranks", "docs")]
    run = subprocess.run(
        [*command, *map(str, files)],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert run.stdout.splitlines()[-1].startswith("14 passed"), run.stdout[-1000:]
    check = [sys.executable, "-c", "import megatron.core; print(megatron.core.__version__)"]
    seen = subprocess.run(check, env=environment, capture_output=True, text=True, check=True)
    assert seen.stdout.startswith("0.19")
