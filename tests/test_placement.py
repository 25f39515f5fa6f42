"""Experts anywhere: the layer, checkpoints and plans follow the placement, mistakes are told."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, strategies as st
from torch import nn

from tamoe import MoE, NaiveGate, Routing, TopologyBias
from tamoe.checkpoint import load_checkpoint, save_checkpoint
from tamoe.exchange import Exchange
from tamoe.experts import FeedForward, GroupedFeedForward, NoExperts
from tamoe.parallel import DenseGradients
from tamoe.placement import Placement, contiguous, resolve_placement
from tamoe.solver import Plan, Workload, solve
from tamoe.topology import InputError, run_ranks
from tests.test_checkpoint import (
    RankGate,
    everything_is_its_own,
    expert_number_weights,
    moments_follow,
    optimizer_of,
)
from tests.test_hierarchical import tree

# ---- slots -------------------------------------------------------------------------------------


@given(st.integers(1, 6).flatmap(lambda p: st.tuples(st.just(p), st.lists(st.integers(0, p - 1)))))
def test_every_expert_has_a_slot_of_its_rank_in_the_order_of_numbers(case) -> None:
    num_ranks, ranks = case
    placement = Placement((*ranks, 0), num_ranks)
    homes = [divmod(slot, placement.slots_per_rank) for slot in placement.slot_N]
    assert [rank for rank, _ in homes] == [*ranks, 0]
    for rank, experts_E in enumerate(placement.experts_PE):
        assert [homes[expert] for expert in experts_E] == [(rank, e) for e in range(len(experts_E))]
    sizes = set(map(len, placement.experts_PE))
    assert placement.is_contiguous == (len(sizes) == 1 and [*ranks, 0] == sorted([*ranks, 0]))


def test_bad_placements_are_named() -> None:
    for placement, match in (
        ([0, 1], r"placement\[1\] is 1; allowed: 0 to 0"),
        ([0, 0.5], r"placement\[1\] is 0.5; allowed: a whole number, 0 to 0"),
        ([], r"placement is \[\]; allowed: the rank of each expert, at least one"),
        (3, r"placement is 3; allowed: the rank of each expert, at least one"),
    ):
        with pytest.raises(InputError, match=match):
            Exchange(placement=placement)  # type: ignore[arg-type]
    x_TD, index_TK = torch.ones(1, 2), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(InputError, match="num_experts is 2 and the exchange's placement has 3"):
        Exchange(placement=[0, 0, 0]).dispatch(x_TD, index_TK, num_experts=2)
    with pytest.raises(InputError, match="num_experts is 2 and the exchange's placement has 3"):
        MoE(NaiveGate(2, 2), nn.Identity, num_experts=2, exchange=Exchange(placement=[0, 0, 0]))


def plan_for(shape: str, placement: tuple[int, ...] | None, **change: Any) -> Plan:
    """A plan that a bias can follow."""
    workload = Workload(tokens_per_rank=64, top_k=1, hidden_size=8, placement=placement, **change)
    return solve(tree(shape), workload, floor=0.25)


def test_a_plan_knows_where_its_experts_are() -> None:
    plan = plan_for("1x1", (0, 0, 0))
    assert Exchange(plan).placement == Exchange(plan, placement=[0] * 3).placement is not None
    assert Exchange(plan_for("1x1", None)).placement is None
    with pytest.raises(InputError, match=r"placement is \(0, 0\) and the plan .* \(0, 0, 0\)"):
        Exchange(plan, placement=[0, 0])
    with pytest.raises(InputError, match=r"placement is \(1, 0\) and the plan .* \(0, 1\)"):
        resolve_placement([1, 0], plan_for("2x1", None), 2)
    turned = plan_for("2x1", (0, 0, 1), ep_groups=((1, 0),))  # positions in a group, not ranks
    assert resolve_placement(None, turned, 2) == Placement((1, 1, 0), 2)
    turned = plan_for("2x1", None, ep_groups=((1, 0),))
    assert resolve_placement(None, turned, 2) == Placement((1, 0), 2)
    groups = {"ep_groups": ((0, 2), (1, 3))}
    assert resolve_placement(None, plan_for("2x2", None, **groups), 2) is None
    assert resolve_placement(None, plan_for("2x2", (1, 0, 1), **groups), 2) == Placement(
        (1, 0, 1), 2
    )


# ---- exchanges ---------------------------------------------------------------------------------


def refusals() -> dict[str, str]:
    """What a rank of four is told of mistakes, most of them rank 2's."""
    is_odd = dist.get_rank() == 2
    x_TD, index_TK = torch.ones(3, 2), torch.zeros(3, 1, dtype=torch.int64)

    def told(placement: list[int] | None, num_experts: int, kind: Any = "flat") -> str:
        try:
            Exchange(placement=placement, kind=kind).dispatch(
                x_TD, index_TK, num_experts=num_experts
            )
        except InputError as error:
            return str(error)
        return "nothing"

    answers = {
        "other place": told([0, 0, 2 if is_odd else 3, 1], 4),
        "none there": told(None if is_odd else [0, 0, 3, 1], 4),
        "other length": told([0, 0, 3] if is_odd else [0, 0, 3, 1], 4),
        "not given": told(None, 6),
        "given in vain": told([0, 1, 2, 3], 4) if is_odd else told(None, 4),
        "removed": told([0, 1, 3], 3, "none"),
    }
    exchange = Exchange(placement=[3, 0, 1, 2, 2], kind="none")
    _, handle = exchange.dispatch(x_TD, index_TK, num_experts=5)
    answers["dealt"] = repr(handle.counts_E)
    return answers


# ---- the layer ---------------------------------------------------------------------------------


class Renumbered(nn.Module):
    """A gate whose experts are named by other numbers."""

    def __init__(self, gate: nn.Module, number_N: tuple[int, ...]) -> None:
        super().__init__()
        self.gate, self.number_N = gate, torch.tensor(number_N)

    def forward(self, x_TD: torch.Tensor) -> Routing:
        routing = self.gate(x_TD)
        return routing._replace(expert_index_TK=self.number_N[routing.expert_index_TK])


def train(layer: MoE, rank: int, frozen: bool) -> list[Any]:
    """Three steps; outputs, gradients of tokens, the gate's weights and the experts' by number."""
    if frozen:
        layer.gate.requires_grad_(False)
    dense = DenseGradients(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.5)
    found: list[Any] = []
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + rank)
        x_TD = torch.randn(4 + rank, 6, generator=generator).requires_grad_(not frozen)
        optimizer.zero_grad()
        hidden_TD = layer(x_TD).hidden
        assert hidden_TD.requires_grad  # on every rank, or the others wait for this one
        hidden_TD.square().sum().backward()
        dense.finish()
        optimizer.step()
        found += [hidden_TD.detach(), x_TD.grad]
    dense.close()
    found += [parameter.detach() for parameter in layer.gate.parameters()]
    return found


def layers(placement: list[int], grouped: bool) -> tuple[MoE, MoE]:
    """A layer with a placement, and one of equally many experts a rank where slots are experts."""
    topology = tree("[3,1]")
    placed = Exchange(topology, placement=placement, kind="hierarchical")
    where = placed.placement_of(len(placement))
    made = []
    for exchange, num_experts in ((placed, len(placement)), (Exchange(topology), where.num_slots)):
        num_local = len(exchange.placement_of(num_experts).experts_PE[exchange.rank])
        torch.manual_seed(1)
        gate: Any = NaiveGate(6, len(placement), top_k=2, scope="shared")
        gate = gate if exchange is placed else Renumbered(gate, where.slot_N)
        made.append(
            MoE(
                gate,
                GroupedFeedForward(num_local, 6, 5) if grouped else partial(FeedForward, 6, 5),
                num_experts=num_experts,
                exchange=exchange,
            )
        )
    return made[0], made[1]


def tensors_of(layer: MoE, local: int) -> list[torch.Tensor]:
    """The weights of a local expert."""
    if isinstance(layer.experts, nn.ModuleList):
        return [parameter.data for parameter in layer.experts[local].parameters()]
    return [parameter.data[local] for parameter in layer.experts.parameters()]


def training(rank: int) -> list[str]:
    """Placements for which training differs from that of renumbered experts."""
    wrong = []
    for placement in ([3, 1, 0, 2, 2, 0, 1, 3], [2, 0, 0, 2, 3, 2, 0], [1, 1, 1]):
        for grouped, frozen in ((False, False), (True, False), (False, True)):
            placed, even = layers(placement, grouped)
            mine = range(len(placed.expert_numbers))
            for local in mine:  # an expert's number says how it starts
                for own, other in zip(
                    tensors_of(placed, local), tensors_of(even, local), strict=True
                ):
                    other.copy_(own)
            ours, theirs = train(placed, rank, frozen), train(even, rank, frozen)
            for local in mine:
                ours += tensors_of(placed, local)
                theirs += tensors_of(even, local)
            same = [
                a is b if a is None or b is None else torch.equal(a, b)
                for a, b in zip(ours, theirs, strict=True)
            ]
            if not all(same):
                wrong.append(f"{placement}, grouped={grouped}, frozen={frozen}: {same}")
    return wrong


def starts() -> dict[int, float]:
    """A weight of each expert of this rank."""
    torch.manual_seed(7)
    gate = NaiveGate(4, 5, top_k=1)
    layer = MoE(
        gate,
        partial(FeedForward, 4, 3),
        num_experts=5,
        exchange=Exchange(placement=[3, 1, 1, 0, 3]),
    )
    experts = layer.experts if isinstance(layer.experts, nn.ModuleList) else ()
    assert bool(experts) != isinstance(layer.experts, NoExperts)
    return {
        number: float(expert.up.weight[0, 0].detach())
        for number, expert in zip(layer.expert_numbers, experts, strict=True)
    }


def planned(rank: int) -> tuple[Any, float]:
    """A layer steered by a plan with a placement: its experts, and the choices inside the node."""
    plan = plan_for("2x2", (3, 0, 0, 1, 3))
    exchange = Exchange(plan)
    torch.manual_seed(3)
    gate = NaiveGate(4, 5, top_k=1, scope="shared", steer=TopologyBias(plan))
    layer = MoE(gate, partial(FeedForward, 4, 3), num_experts=5, exchange=exchange)
    for step in range(40):
        x_TD = torch.randn(64, 4, generator=torch.Generator().manual_seed(100 * step + rank))
        output = layer(x_TD)
    output.hidden.sum().backward()
    chosen_N = output.routing.expert_index_TK.flatten().bincount(minlength=5) / 64
    target_N = torch.from_numpy(plan.target_N(rank)) / 64
    return layer.expert_numbers, float((chosen_N - target_N).abs().max())


def stored(num_ranks: int, placement: list[int] | None, fill: bool) -> nn.ModuleDict:
    """A model for test_checkpoint's helpers, its experts placed."""
    rank = dist.get_rank() if num_ranks > 1 else 0
    exchange = Exchange(placement=placement)
    num_local = len(exchange.placement_of(8).experts_PE[rank])
    make = partial(MoE, num_experts=8, exchange=exchange)
    listed = make(RankGate(rank), partial(FeedForward, 4, 6))
    grouped = make(RankGate(rank), GroupedFeedForward(num_local, 4, 6))
    if fill:
        expert_number_weights(listed, grouped=False)
        expert_number_weights(grouped, grouped=True)
    dense = nn.Linear(4, 4)
    dense.weight.detach().fill_(77.0 if fill else 0.0)
    return nn.ModuleDict({"dense": dense, "listed": listed, "grouped": grouped})


def checkpoints(rank: int, directory: str) -> list[bool]:
    """Save with one placement, read with others on as many ranks."""
    model = stored(4, [3, 3, 1, 0, 1, 3, 3, 3], fill=True)
    optimizer = optimizer_of(model, rank, steps=0)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for _ in range(3):
        optimizer.step()  # gradients of 0
    with torch.no_grad():
        for parameter in model.parameters():
            optimizer.state[parameter]["exp_avg"].copy_(parameter + 100)
    save_checkpoint(model, directory, optimizer=optimizer)
    fine = []
    for placement in ([3, 3, 1, 0, 1, 3, 3, 3], [0, 1, 2, 1, 0, 2, 2, 0], [2] * 8, None):
        other = stored(4, placement, fill=False)
        other_optimizer = optimizer_of(other, rank, steps=0)
        load_checkpoint(other, directory, optimizer=other_optimizer)
        fine.append(everything_is_its_own(other, rank, rank))
        fine.append(moments_follow(other, other_optimizer))
        other_optimizer.step()
    return fine


def in_four_ranks(rank: int, directory: str) -> dict[str, Any]:
    """Everything else that needs processes, in one start of them."""
    return {
        "told": refusals(),
        "wrong": training(rank),
        "starts": starts(),
        "planned": planned(rank),
        "stored": checkpoints(rank, directory),
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("placed") / "checkpoint"
    return directory, run_ranks(4, in_four_ranks, str(directory), timeout_s=150)


@pytest.mark.ranks
@pytest.mark.slow
def test_ranks_that_differ_in_placement_are_told(answers) -> None:
    differs = (
        r"topology_or_plan or placement differs .*: layout .* on rank 0, 1, 3; layout .* on rank 2"
    )
    expected = {
        "other place": differs,
        "none there": differs,
        "other length": "rank 2 of the group refused its input",
        "not given": r"num_experts is 6; allowed: a positive multiple of the group's 4 ranks, or "
        r"any number with Exchange\(placement=...\)",
        "given in vain": "nothing",  # the same experts on the same ranks
        "removed": "kind is 'none' and the placement leaves rank 2 without an expert",
    }
    own = {"other length": "num_experts is 4 and the exchange's placement has 3 experts"}
    for rank, answer in enumerate(answers[1]):
        for name, match in expected.items():
            wanted = own.get(name, match) if rank == 2 else match
            assert re.search(wanted, answer["told"][name]), (rank, name, answer["told"][name])
    dealt = [answer["told"]["dealt"] for answer in answers[1]]
    assert dealt == ["(3,)", "(3,)", "(2, 1)", "(3,)"]


@pytest.mark.ranks
@pytest.mark.slow
def test_training_is_that_of_renumbered_experts_to_the_bit(answers) -> None:
    assert [answer["wrong"] for answer in answers[1]] == [[]] * 4


@pytest.mark.ranks
@pytest.mark.slow
def test_experts_start_by_their_numbers_wherever_they_are(answers) -> None:
    torch.manual_seed(7)
    alone = MoE(NaiveGate(4, 5, top_k=1), partial(FeedForward, 4, 3), num_experts=5)
    first = {e: float(expert.up.weight[0, 0].detach()) for e, expert in enumerate(alone.experts)}
    found = [answer["starts"] for answer in answers[1]]
    assert found == [
        {e: first[e] for e in experts_E} for experts_E in Placement((3, 1, 1, 0, 3), 4).experts_PE
    ]


@pytest.mark.ranks
@pytest.mark.slow
def test_a_layer_follows_a_plan_with_a_placement(answers) -> None:
    found = [answer["planned"] for answer in answers[1]]
    assert [numbers for numbers, _ in found] == [(1, 2), (3,), (), (0, 4)]
    assert max(error for _, error in found) < 0.15  # 64 choices: a spread of .06 about the target


@pytest.mark.ranks
@pytest.mark.slow
def test_a_checkpoint_goes_from_one_placement_to_another(answers) -> None:
    directory, by_rank = answers
    assert [answer["stored"] for answer in by_rank] == [[True] * 8] * 4
    model = stored(1, None, fill=False)
    optimizer = optimizer_of(model, 0, steps=0)
    with pytest.warns(UserWarning, match="of 4 ranks and this group has 1"):
        load_checkpoint(model, directory, optimizer=optimizer)
    assert everything_is_its_own(model, 0, 0)
    assert moments_follow(model, optimizer)


def test_contiguous_is_the_placement_without_one() -> None:
    assert Exchange().placement_of(3) == contiguous(3, 1) == Placement((0, 0, 0), 1)
    assert contiguous(6, 3).is_contiguous
