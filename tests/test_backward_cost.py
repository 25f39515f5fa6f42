"""What the backward passes of the exchanges cost: by the model, and on emulated links."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from tamoe.calibration import measure
from tamoe.cases import make_case
from tamoe.solver import Workload
from tamoe.solver.choice import choose_exchange
from tamoe.solver.constants import Constants, with_constants
from tamoe.solver.exchange_cost import predict
from tamoe.solver.exchange_rows import ALL_WAYS, EXCHANGES, Exchange, rows_of_group
from tamoe.solver.sampling import sample_routing
from tamoe.topology import ClusterSpec, InputError, Topology, run_ranks

TREE = Topology.from_tree("[[2,1],[2]]", bandwidth_bytes_per_s=(1e9, 1e7, 5e6))
WORKLOAD = Workload(
    tokens_per_rank=512, top_k=2, hidden_size=256, element_bytes=4, experts_per_rank=2
)
GIVEN = {
    (exchange, way): Constants(start_s, 1e-4, 1e-9, token_s)
    for exchange in EXCHANGES
    for way, start_s, token_s in (("dispatch", 0.5, 1e-6), ("combine", 0.25, 2e-9))
}
CLUSTER = ClusterSpec.parse("2x1:100mbit")


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_gradients_move_what_the_forward_pass_moves(exchange: Exchange) -> None:
    target_PN = np.random.default_rng(0).random((5, 10)) + 0.1
    target_PN *= 1024 / target_PN.sum(1, keepdims=True)
    place_N = [expert // 2 for expert in range(10)]
    counts_pN, forward_pMM, sums_pL = sample_routing(TREE, WORKLOAD, target_PN, place_N)
    given = (counts_pN, forward_pMM, place_N, WORKLOAD.token_bytes, [512] * 5, sums_pL)
    rows = rows_of_group(TREE, tuple(range(5)), *given)
    topology = with_constants(TREE, GIVEN)
    found = {way: predict(topology, exchange, way, [rows[exchange, way]]) for way in ALL_WAYS}
    # Gradients of weights go to all of four peers: what 8 messages take, nothing on flat ones.
    weights_s = 8e-4 if exchange == "hierarchical" else 0.0
    took_s = found["dispatch_backward"].time_s - found["combine"].time_s
    assert took_s == pytest.approx(weights_s, abs=1e-9)
    assert found["dispatch_backward"].busy_s == pytest.approx(found["combine"].busy_s)
    there, back = found["dispatch"], found["combine_backward"]
    assert there.busy_s.keys() == back.busy_s.keys()
    # Words about rows do not travel again; links of flat ones fill up in another order.
    told = 0.1 if exchange == "hierarchical" else 2e-3
    for link, busy_s in back.busy_s.items():
        assert busy_s == pytest.approx(there.busy_s[link], rel=told)
    if exchange == "hierarchical":
        assert sum(back.busy_s.values()) < sum(there.busy_s.values())
    if exchange != "hierarchical":
        sent_p = rows[exchange, "dispatch"].hops_pp[0].sum(1)
        assert list(rows[exchange, "combine_backward"].own_bytes_p) == pytest.approx(2 * sent_p)
        # Of two rows of a token on different nodes two sums are made, and of those one.
        assert (rows[exchange, "combine"].own_bytes_p > 1.2 * sent_p).all()
    # It starts as a combine does, and plans nothing: 512 kB of tokens at 1e-6 s a byte.
    assert 0.25 + 0.5 < there.time_s - back.time_s < 0.25 + 0.6


def test_a_choice_counts_the_backward_passes() -> None:
    without = dict.fromkeys(GIVEN, Constants())
    late = Constants(start_s=1.0)
    target_PN = np.full((5, 10), 102.4)

    def seconds(backward: bool, **starts: Constants) -> Mapping[str, float]:
        given = {key: starts.get(key[1], same) for key, same in without.items()}
        topology = with_constants(TREE, given)
        return choose_exchange(topology, WORKLOAD, target_PN, backward=backward).seconds

    for exchange in EXCHANGES:  # of four ways one plans, three start as a combine does
        bare_s = seconds(True)[exchange]
        assert seconds(True, dispatch=late)[exchange] == pytest.approx(bare_s + 1)
        assert seconds(True, combine=late)[exchange] == pytest.approx(bare_s + 3)
        forward_s = seconds(False)[exchange]
        assert seconds(False, combine=late)[exchange] == pytest.approx(forward_s + 1)
        assert forward_s == pytest.approx(bare_s / 2, rel=0.1)


def test_constants_of_some_exchanges_alone_choose_nothing() -> None:
    few = {key: given for key, given in GIVEN.items() if key != ("flat rounds", "combine")}
    with pytest.raises(InputError, match="have no flat rounds combine; allowed: those of every"):
        choose_exchange(with_constants(TREE, few), WORKLOAD, np.full((5, 10), 102.4))


def timed_on_a_rank(rank: int) -> list[tuple[str, str, float]]:
    topology = CLUSTER.topology()
    cases = [make_case(topology, ((0, 1),), "even", 0.1, 2, seed=0)]
    measured = measure(rank, topology, cases, 3, backward=True)
    return [
        (m.exchange, m.way, m.seconds / predict(topology, m.exchange, m.way, m.groups).time_s)
        for m in measured
    ]


@pytest.mark.ranks
@pytest.mark.emulated
def test_measured_backward_passes_take_what_links_take() -> None:
    measured = run_ranks(CLUSTER, timed_on_a_rank, timeout_s=120)[0]
    ways = [(exchange, way) for exchange in EXCHANGES for way in ALL_WAYS]
    assert [(exchange, way) for exchange, way, _ in measured] == ways
    for _, _, over_bare_links in measured:
        assert over_bare_links > 0.9  # a call that moves nothing takes less
