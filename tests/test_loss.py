"""TopologyLoss: its row of the plan, fixed point, warnings, casts, plans that change."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from tamoe import TopologyLoss
from tamoe.functional import topology_loss
from tamoe.loss import _warn_softmax
from tamoe.solver import Workload, solve
from tamoe.topology import Topology
from tamoe.topology.errors import InputError
from tests.plan_rows import Rows, two_nodes


@pytest.fixture
def plan() -> Rows:
    return two_nodes()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    probs = torch.randn(64, 8, generator=rng).softmax(1)
    return probs, probs.topk(2, 1).indices


@pytest.mark.parametrize(
    ("tree", "bandwidths"),
    [
        ("2x4", (5, 1)),
        ("[8,4]", (10, 1)),
        ("[[2,2],[2]]", (10, 2.5, 1)),
        ("1x4", (5, 1)),
        (1, (5,)),
    ],
)
@pytest.mark.parametrize("experts_per_rank", [1, 2])
@pytest.mark.parametrize("contention", ["shared", "pairwise"])
def test_loss_of_a_solved_plan_is_one_at_even_routing(
    tree, bandwidths, experts_per_rank, contention
):
    topology = Topology.from_tree(
        tree, bandwidth_bytes_per_s=[1e9 * b for b in bandwidths], contention=contention
    )
    workload = Workload(tokens_per_rank=512, top_k=1, experts_per_rank=experts_per_rank)
    plan = solve(topology, workload)
    probs = torch.full((plan.num_experts, plan.num_experts), 1 / plan.num_experts)
    index = torch.arange(plan.num_experts).unsqueeze(1)
    for rank in range(plan.num_ranks):
        loss = TopologyLoss(plan, rank=rank)
        assert loss(probs, index).item() == pytest.approx(1, abs=1e-6)
        target_N = plan.target_N(rank)
        share_N = torch.from_numpy(target_N / target_N.sum())
        # A batch at the target: every token with the target's probabilities, counts as weights.
        at_target = (
            plan.num_experts * (loss.penalty_N.double() * share_N * share_N).sum()
        ).item() / float(loss.penalty_N.double().mean())
        mean_ratio = len(target_N) / (1 / target_N).sum() / target_N.mean()
        assert at_target == pytest.approx(mean_ratio, rel=1e-5)
        assert at_target <= 1 + 1e-6


def test_each_rank_reads_its_own_row(plan, batch):
    for rank in range(8):
        expected = topology_loss(*batch, torch.from_numpy(plan.penalty_N(rank)).float())
        torch.testing.assert_close(TopologyLoss(plan, rank=rank)(*batch), expected)


def test_gradient_of_one_rank_vanishes_at_the_target_for_sum_norm_only(plan):
    # Gates with free logits: at m = c/S = share, d loss/d logits = N(w_e c_e - mean) m_e.
    _warn_softmax.cache_clear()
    share_N = torch.from_numpy(plan.target_N(0) / plan.target_N(0).sum())
    for norm, vanishes in (("sum", True), ("softmax", False)):
        logits = share_N.log().requires_grad_()
        counts = (share_N * 24).round().long()  # 5 and 1 choices: exactly the shares
        index = torch.repeat_interleave(torch.arange(8), counts).unsqueeze(1)
        warns = pytest.warns(UserWarning, match="fixed point") if not vanishes else nullcontext()
        with warns:
            loss = TopologyLoss(plan, rank=0, norm=norm)
        loss(logits.softmax(0).expand(24, -1), index).backward()
        assert (logits.grad.abs().max() < 1e-6) == vanishes


def test_softmax_norm_warns_once_that_it_misses_the_target(plan, recwarn):
    _warn_softmax.cache_clear()
    for _ in range(3):
        TopologyLoss(plan, rank=0, norm="softmax")
    messages = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
    assert len(messages) == 1
    assert "fixed point of this loss is not the plan's target" in messages[0]
    assert recwarn[0].filename == __file__


def test_set_plan_changes_the_row_and_keeps_the_rank(plan, batch):
    loss = TopologyLoss(plan, rank=5)
    steeper = two_nodes(ratio=20)
    loss.set_plan(steeper)
    torch.testing.assert_close(loss(*batch), TopologyLoss(steeper, rank=5)(*batch))
    with pytest.raises(InputError, match="plan has 4 ranks and 4 experts; allowed: 8 ranks and 8"):
        loss.set_plan(two_nodes(ranks_per_node=2))


def test_plan_is_no_part_of_a_checkpoint_and_survives_casts_copies_and_meta(plan, batch):
    loss = TopologyLoss(plan, rank=3)
    expected = loss(*batch)
    assert loss.state_dict() == {}
    model = nn.Sequential(nn.Linear(2, 2), loss).to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].penalty_N.dtype == torch.float32
    for twin in (model[1], copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(twin(*batch), expected, rtol=0, atol=0)
    with torch.device("meta"):
        late = TopologyLoss(plan, rank=3)
    assert late.penalty_N.is_meta
    late.to_empty(device="cpu")
    late.reset_parameters()
    torch.testing.assert_close(late(*batch), expected, rtol=0, atol=0)


def test_module_compiles_as_one_graph(plan, batch):
    torch._dynamo.reset()
    loss = TopologyLoss(plan, rank=0)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*batch), loss(*batch))


def test_rank_is_required_without_a_group(plan):
    with pytest.raises(InputError, match=r"rank is None and torch\.distributed is not initialised"):
        TopologyLoss(plan)
    with pytest.raises(InputError, match="rank is 8; allowed: 0 to 7"):
        TopologyLoss(plan, rank=8)
    with pytest.raises(InputError, match="norm is 'max'; allowed: 'sum', 'softmax'"):
        TopologyLoss(plan, rank=0, norm="max")


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -1.0])
def test_targets_that_make_no_penalty_are_refused(bad):
    target_PN = np.ones((2, 4))
    target_PN[1, 2] = bad
    TopologyLoss(Rows(target_PN), rank=0)
    with np.errstate(divide="ignore", invalid="ignore"), pytest.raises(InputError, match="plan: "):
        TopologyLoss(Rows(target_PN), rank=1)


def _rank_of_loss(rank: int, size: int) -> tuple[int, str]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))
    ranks = {TopologyLoss(two_nodes(ranks_per_node=1)).rank for _ in range(1)}
    ranks |= {TopologyLoss(two_nodes(ranks_per_node=1), group=mesh["ep"]).rank}
    ranks |= {TopologyLoss(two_nodes(ranks_per_node=1), group=torch.distributed.group.WORLD).rank}
    assert ranks == {rank}
    try:
        TopologyLoss(two_nodes(ranks_per_node=2))
    except InputError as error:
        return rank, str(error)
    return rank, "no error"


@pytest.mark.ranks
def test_group_gives_the_rank_and_must_be_as_large_as_the_plan():
    from tamoe.topology import run_ranks

    for rank, (found, message) in enumerate(run_ranks(2, _rank_of_loss, 2, timeout_s=60)):
        assert found == rank
        assert "group has 2 ranks and the plan 4" in message
