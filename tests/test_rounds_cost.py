"""What rounds and groups cost by the model: rows taken early, or only when their round has come."""

import numpy as np
import pytest

from tamoe.solver import Workload
from tamoe.solver.choice import choose_exchange
from tamoe.solver.constants import Constants
from tamoe.solver.exchange_cost import predict
from tamoe.solver.exchange_rows import WAYS, Rows
from tamoe.solver.parts import part_shares
from tamoe.topology import ClusterSpec, Topology


def tree(shape):
    return Topology.from_tree(shape, bandwidth_bytes_per_s=(1e9, 1e7))


def test_rounds_that_wait_for_each_other_keep_rows_back():
    topology = ClusterSpec.parse("4x1:100mbit;node2=25mbit").topology()
    size, burst = 4e6, 131072
    fast, slow = (topology.uplink_bytes_per_s(node)[0] for node in (1, 2))
    bytes_pp = np.zeros((4, 4))
    bytes_pp[1:, 0] = size  # to rank 0, from rank 3 in round 1, from ranks 2 and 1 in 2 and 3
    rows = [Rows((0, 1, 2, 3), [bytes_pp])]
    ahead_s, waiting_s = (
        predict(topology, "flat rounds", "dispatch", rows, Constants(rounds_ahead=n)).time_s
        for n in (3, 0)
    )
    assert ahead_s == pytest.approx((size - burst) / slow, rel=0.05)
    # Else node 2 starts once rank 0 has all rows of rank 3, and rank 1 after both.
    assert waiting_s == pytest.approx(ahead_s + 2 * size / fast, rel=0.05)


@pytest.mark.parametrize("way", WAYS)
def test_a_group_inside_a_node_works_on_all_of_its_parts(way):
    topology = tree("2x2")
    hop_pp = np.array([[0.0, 1e6], [1e6, 0.0]])
    given, shares = Constants(work_s_per_byte=1e-6), ((1.0,), tuple(part_shares(6)))
    whole_s, parts_s = (
        predict(
            topology,
            "hierarchical",
            way,
            [Rows((0, 1), [hop_pp], [1e6, 1e6], parts=parts)],
            given,
        ).time_s
        for parts in shares
    )
    assert parts_s == pytest.approx(whole_s, rel=1e-3) == 2.0


def test_a_transport_that_takes_no_rows_early_is_predicted_so():
    topology = tree("4x1")
    workload = Workload(tokens_per_rank=4096, top_k=1, hidden_size=256, element_bytes=4)
    counts_PN = np.full((4, 4), 1.0) + 4096 * np.eye(4)[[1, 2, 0, 0]]  # a ring of unequal rounds
    ahead, waiting = (
        choose_exchange(topology, workload, counts_PN, rounds_ahead=n).seconds["flat rounds"]
        for n in (3, 0)
    )
    assert waiting > 1.02 * ahead
