"""Gates and losses against DeepSpeed, Transformers and Megatron-Core: 1,000 random inputs each."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tamoe.experiments.oracles import COMPARISONS, largest_error


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: f"{c.function} = {c.oracle}")
def test_equal_to_the_code_of_others(comparison):
    if find_spec(comparison.package) is None:
        pytest.skip(f"{comparison.package} is not installed")
    assert largest_error(comparison, inputs=1000) <= 1e-6
