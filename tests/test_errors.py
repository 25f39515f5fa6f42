"""A number of a wrong kind is refused by name, whichever part of tamoe it is given to."""

import pytest

from tamoe import NaiveGate, TopologyLoss
from tamoe.solver import Workload, solve
from tamoe.topology import Topology
from tamoe.topology.errors import InputError, whole


@pytest.mark.parametrize("value", [1.5, "1", None, True, float("nan"), -1, 4])
def test_whole_refuses(value):
    allowed = "0 to 3" if value in (-1, 4) else "a whole number, 0 to 3"
    with pytest.raises(InputError, match=f"rank is .*; allowed: {allowed}$"):
        whole("rank", value, 0, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, p: t.subset("a"), "ranks is 'a'; allowed: a whole number, 0 to 3"),
        (lambda t, p: t.route(0, 1.0), "target_rank is 1.0; allowed: a whole number, 0 to 3"),
        (lambda t, p: t.uplink_bytes_per_s("0"), "node is '0'; allowed: a whole number, 0 to 1"),
        (lambda t, p: p.target_N(1.5), "rank is 1.5; allowed: a whole number, 0 to 3"),
        (lambda t, p: TopologyLoss(p, rank=0.5), "rank is 0.5; allowed: a whole number, 0 to 3"),
        (lambda t, p: NaiveGate("8", 4), "hidden_size is '8'; allowed: a whole number >= 1"),
        (lambda t, p: NaiveGate(8, 4, top_k=1.0), "top_k is 1.0; allowed: a whole number, 1 to 4"),
        (lambda t, p: Workload(top_k=1.0), "top_k is 1.0; allowed: a whole number >= 1"),
    ],
)
def test_numbers_of_a_wrong_kind(call, message):
    topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(4e9, 1e9))
    plan = solve(topology, Workload(), floor=0.1)
    with pytest.raises(InputError) as caught:
        call(topology, plan)
    assert message in str(caught.value)
