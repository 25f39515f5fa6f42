"""Other versions of Transformers than the newest: 4.57, and one whose routers return probabilities.

They lie beside the environment (`make frameworks`) and run in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

OLD = Path(sys.prefix) / "transformers4"
POSING = Path(sys.prefix) / "transformers52"
STEERING = Path(__file__).with_name("test_adapter_transformers.py")
EVERY = os.environ.get("TAMOE_FAMILIES") == "all"


@pytest.mark.slow
@pytest.mark.skipif(
    not OLD.is_dir(), reason="Transformers 4.57 is not installed beside: make frameworks"
)
def test_all_of_this_holds_under_transformers_4():
    environment = os.environ | {"PYTHONPATH": str(OLD)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(STEERING)]
    ranks = "" if EVERY else " and not ranks"
    run = subprocess.run(
        [*command, "-k", f"not (steps and (qwen or greedy or gpt)){ranks}"],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    check = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    seen = subprocess.run(check, env=environment, capture_output=True, text=True, check=True)
    assert seen.stdout.startswith("4.57")


# ---- a version 5 whose routers return probabilities ---------------------------------------------

_POSING = """
import json, warnings
import torch
import transformers
from tamoe.adapters.transformers import steer
from tamoe.experiments.tiny_models import FAMILIES, batch, tiny_model
from tamoe.topology.errors import InputError
from tests.test_adapter_transformers import even

found = {}
# DeepSeek-V2 with groups fails in 5.2 itself.
for family in [name for name in FAMILIES if not name.startswith("deepseek_v2")]:
    model = tiny_model(family).eval()
    with torch.no_grad():
        before = model(batch()).logits
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                handle = steer(model, even(), rank=0)
            except InputError as error:
                found[family] = str(error)
                continue
        after = model(batch()).logits
        handle.detach()
        same = torch.allclose(after, before, rtol=1e-4, atol=1e-5)
        own = model(batch(), output_router_logits=True).router_logits
    posing = any("returns probabilities" in str(one.message) for one in caught)
    logits = torch.cat([one.reshape(-1, 8) for one in own])
    sums_to_one = torch.allclose(logits.sum(1), torch.ones(len(logits)), atol=1e-4)
    found[family] = [posing, same, sums_to_one]
print(json.dumps([transformers.__version__, found]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not POSING.is_dir(), reason="Transformers 5.2 is not installed beside: make frameworks"
)
def test_routers_that_pose_probabilities_as_logits_are_named_and_read_as_they_are():
    run = subprocess.run(
        [sys.executable, "-c", _POSING],
        env=os.environ | {"PYTHONPATH": str(POSING)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    version, found = json.loads(run.stdout.splitlines()[-1])
    assert version.startswith("5.2")
    refused = {family: told for family, told in found.items() if isinstance(told, str)}
    assert set(refused) == {"deepseek_v3"}
    for told in refused.values():
        assert "without top_k: the block around it chooses the experts" in told
    steered = {family: told for family, told in found.items() if family not in refused}
    assert any(posing for posing, _, _ in steered.values())
    for family, (posing, same, sums_to_one) in steered.items():
        assert same, family
        assert posing == sums_to_one, family
