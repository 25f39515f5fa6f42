"""Gates and losses against the code of other frameworks, on random inputs.

A part of the 1,000 inputs of ``python -m tamoe.experiments.oracles``; TAMOE_ORACLE_INPUTS asks for
more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tamoe.experiments.oracles import COMPARISONS, largest_error

ROOT = Path(__file__).parents[1]
INPUTS = int(os.environ.get("TAMOE_ORACLE_INPUTS", "100"))


HERE = [comparison for comparison in COMPARISONS if comparison.package != "torchtitan"]


@pytest.mark.parametrize("comparison", HERE, ids=lambda c: f"{c.function} = {c.oracle}")
def test_equal_to_the_code_of_others(comparison):
    if find_spec(comparison.package) is None:
        pytest.skip(f"{comparison.package} is not installed")
    assert largest_error(comparison, INPUTS) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "package", "version", "least"),
    [
        ("transformers4", "transformers", "4.57", 10),
        ("torchtitan", "torchtitan", "0.3", 2),
        ("megatron19", "megatron", "0.19", 4),
    ],
)
def test_equal_to_frameworks_installed_beside(tmp_path, folder, package, version, least):
    beside = Path(sys.prefix) / folder
    triton = Path(sys.prefix) / "torchtitan"  # Megatron imports it, too
    if not beside.is_dir() or (package == "megatron" and not triton.is_dir()):
        pytest.skip(f"{package} {version} is not installed beside: make frameworks")
    out = tmp_path / "oracles.json"
    command = [sys.executable, "-m", "tamoe.experiments.oracles", "--only", package]
    command += ["--inputs", str(INPUTS), "-o", str(out)]
    path = os.pathsep.join([str(beside), str(triton), str(ROOT)])
    subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, check=True, timeout=280
    )
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) >= least
    for row in rows:
        assert row["version"].startswith(version)
        assert row["largest_error"] <= 1e-6, row
