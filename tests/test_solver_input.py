"""solve() and the cost model refuse what makes no sense, by name, and load nothing heavy early."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tamoe.solver import Workload, exchange_time_s, solve
from tamoe.topology.errors import InputError
from tamoe.topology.graph import Topology

TOPOLOGY = Topology.from_tree("2x2", bandwidth_bytes_per_s=(1e10, 1e9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "fast"}, "method is 'fast'; allowed: exact, entropic, closed_form"),
        ({"method": "merged"}, "method is 'merged'; allowed: exact, entropic, closed_form"),
        ({"floor": -0.1}, "floor is -0.1; allowed: 0 to 1"),
        ({"floor": 1.5}, "floor is 1.5; allowed: 0 to 1"),
        ({"floor": float("nan")}, "floor is nan; allowed"),
        ({"floor": "half"}, "floor is 'half'; allowed"),
        ({"floor": True}, "floor is True; allowed"),
        ({"kl": -1.0}, "kl is -1.0; allowed: 0 to 1e"),
        ({"kl": float("inf")}, "kl is inf; allowed"),
        ({"kl": float("nan"), "method": "entropic"}, "kl is nan; allowed"),
        ({"kl": None}, "kl is None; allowed"),
        ({"method": "entropic"}, "kl is 0 with method 'entropic'; allowed: > 0"),
        ({"kl": 0.1}, "kl is 0.1 with method 'exact'; allowed: 0, or method 'entropic'"),
        ({"self_send": "never"}, "self_send is 'never'; allowed: intra, copy, free"),
        ({"self_send": "copy"}, "self_send is 'copy' and the topology has no copy_bytes_per_s"),
        ({"exchange": "none"}, "exchange is 'none'; allowed: auto, flat, hierarchical"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        solve(TOPOLOGY, Workload(), **arguments)


def test_topology_and_workload_must_be_what_they_are() -> None:
    with pytest.raises(InputError, match="topology is '4x2'; allowed: a Topology"):
        solve("4x2", Workload())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="workload is None; allowed: a Workload"):
        solve(TOPOLOGY, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="top_k is 5; allowed: 1 to the number of experts, 4"):
        solve(TOPOLOGY, Workload(top_k=5))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.ones((4, 3)), r"counts_PN has shape \(4, 3\); allowed: .* \(4, 4\)"),
        (np.full((4, 4), np.nan), r"counts_PN\[0, 0\] is nan; allowed"),
        (np.diag([1.0, 1.0, 1.0, -1.0]), r"counts_PN\[3, 3\] is -1.0; allowed"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        exchange_time_s(TOPOLOGY, Workload(), counts)


def test_unknown_direction_is_refused() -> None:
    with pytest.raises(InputError, match="direction is 'up'; allowed: dispatch, combine"):
        exchange_time_s(TOPOLOGY, Workload(), np.ones((4, 4)), direction="up")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["exact", "entropic", "closed_form"])
@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_bounds_that_leave_no_choice_are_solved(method: str, floor: float, top_k: int) -> None:
    workload = Workload(tokens_per_rank=100, top_k=top_k)
    kl = 0.1 if method == "entropic" else 0.0
    plan = solve(TOPOLOGY, workload, method=method, kl=kl, floor=floor)  # type: ignore[arg-type]
    if floor == 1 or top_k == 4:
        np.testing.assert_allclose(plan.target_PN, 25 * top_k, rtol=1e-12)
    assert plan.target_PN.max() <= 100 and plan.target_PN.min() >= floor * 25 * top_k


@pytest.mark.parametrize("self_send", ["intra", "free"])
@pytest.mark.parametrize("method", ["exact", "entropic"])
def test_one_rank_keeps_its_tokens(method: str, self_send: str) -> None:
    topology = Topology.from_tree(1, bandwidth_bytes_per_s=(1e9,))
    kl = 0.1 if method == "entropic" else 0.0
    workload = Workload(tokens_per_rank=10, top_k=1, experts_per_rank=2)
    plan = solve(topology, workload, method=method, kl=kl, self_send=self_send)  # type: ignore[arg-type]
    assert plan.target_PN.tolist() == [[5.0, 5.0]]
    assert plan.gap == pytest.approx(0, abs=1e-12) and len(plan.notes) == 1
    assert plan.level_shares().tolist() == [1.0, 0.0]


def output_of(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    heavy = ("torch", "scipy", "cvxpy", "matplotlib", "pyroute2")
    code = (
        "import sys, tamoe.solver; from tamoe.solver import Plan, Workload, solve;"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_solving_loads_no_torch_and_no_cvxpy() -> None:
    code = (
        "import sys; from tamoe.solver import Workload, solve;"
        "from tamoe.topology.graph import Topology;"
        "t = Topology.from_tree('2x2', bandwidth_bytes_per_s=(1e10, 1e9));"
        "solve(t, Workload()); solve(t, Workload(), method='entropic', kl=0.1);"
        "print([name for name in ('torch', 'cvxpy', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
