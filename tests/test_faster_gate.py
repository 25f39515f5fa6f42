"""FasterMoE's gate: what leaves the node, what is redirected, and the original's flaw."""

from __future__ import annotations

import torch
from hypothesis import given, settings, strategies as st

from tamoe import FasterGate, NaiveGate
from tests.gate_inputs import plan_of, tokens


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 60),
    share=st.sampled_from([0.0, 0.1, 0.14, 0.3, 1.0]),
    top_k=st.integers(1, 4),
    rank=st.integers(0, 7),
    lean=st.sampled_from([-3.0, 0.0, 3.0]),
)
@settings(max_examples=200, deadline=None)
def test_at_most_the_budget_leaves_the_node(seed, count, share, top_k, rank, lean):
    torch.manual_seed(seed)
    plan = plan_of("2x4", top_k=2)
    gate = FasterGate(16, 8, plan=plan, rank=rank, top_k=top_k, remote_share=share)
    x = torch.randn(count, 16)
    with torch.no_grad():  # lean towards or away from the other node
        far = ~gate.near.near_N
        gate.weight[far] += lean * x.mean(0) if count else 0.0
    index = gate(x).expert_index_TK
    remote = far[index]
    budget = int(count * share)
    assert int(remote.sum()) <= budget
    assert (index.sort(1).values.diff(dim=1) > 0).all() if top_k > 1 else True
    free = NaiveGate(16, 8, top_k=top_k).eval()
    free.weight = gate.weight
    wanted = free(x).expert_index_TK
    if int(far[wanted].sum()) <= budget:
        assert torch.equal(index, wanted)  # nothing is redirected without need
    else:  # the budget goes to the tokens that want it most
        prefers = far[wanted[:, 0]]
        assert int(remote.sum()) == min(budget, int(prefers.sum()))


def test_second_choices_escape_only_where_asked_for():
    torch.manual_seed(0)
    plan = plan_of("2x4")
    x = tokens(200)
    weight = torch.randn(8, 16)
    weight[:4] += 0.2 * x.mean(0)
    remote = {}
    for escape in (False, True):
        gate = FasterGate(16, 8, plan=plan, rank=0, remote_share=0.6, second_choices_escape=escape)
        with torch.no_grad():
            gate.weight.copy_(weight)
        remote[escape] = int((gate(x).expert_index_TK >= 4).sum())
    assert remote[False] <= 120 < remote[True]


def test_padding_takes_nothing_of_the_budget():
    torch.manual_seed(0)
    gate = FasterGate(16, 8, plan=plan_of("2x4"), rank=0, remote_share=0.25)
    x, mask = tokens(40), torch.arange(40) < 16
    index = gate(x, mask).expert_index_TK
    assert torch.equal(index[:16], gate(x[:16]).expert_index_TK)
    assert (index[16:] == -1).all()
