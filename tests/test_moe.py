"""The MoE layer on any number of ranks equals a dense loop over tokens and experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tamoe import MoE, MoEOutput, Routing
from tamoe.exchange import Exchange
from tamoe.experts import FeedForward, GroupedFeedForward
from tamoe.gates import NaiveGate
from tamoe.parallel import DenseGradients
from tamoe.scope import scope_of
from tamoe.topology import InputError, Topology, run_ranks

HIDDEN, INTERMEDIATE, NUM_EXPERTS = 6, 10, 8
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
TOKENS = {"even": [6] * 8, "uneven": [7, 2, 9, 1, 5, 3, 8, 4], "zero": [0, 11, 0, 3, 0, 0, 2, 6]}
TREES = {1: "1x1", 2: "2x1", 4: "[3,1]", 8: "4x2"}


class DroppingGate(nn.Module):
    """Softmax top-k; drops each choice whose place in a fixed pattern is hit; a smooth loss."""

    def __init__(self, top_k: int, drops: bool) -> None:
        super().__init__()
        self.weight_ND = nn.Parameter(torch.empty(NUM_EXPERTS, HIDDEN))
        self.top_k, self.drops = top_k, drops

    def forward(self, x_TD: torch.Tensor) -> Routing:
        probs_TN = (x_TD @ self.weight_ND.T).softmax(1)
        weight_TK, index_TK = probs_TN.topk(self.top_k)
        if self.drops:
            hit = torch.arange(index_TK.numel()).view_as(index_TK) % 5 == 2
            index_TK, weight_TK = index_TK.masked_fill(hit, -1), weight_TK.masked_fill(hit, 0.0)
        return Routing(index_TK, weight_TK, probs_TN, probs_TN.square().sum() * 0.01)


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of gate and experts, and every rank's tokens and targets: the same everywhere."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "gate": normal(NUM_EXPERTS, HIDDEN),
        "up": normal(NUM_EXPERTS, INTERMEDIATE, HIDDEN) * 0.4,
        "up_bias": normal(NUM_EXPERTS, INTERMEDIATE) * 0.4,
        "down": normal(NUM_EXPERTS, HIDDEN, INTERMEDIATE) * 0.4,
        "down_bias": normal(NUM_EXPERTS, HIDDEN) * 0.4,
        "x": normal(8, 16, HIDDEN),
        "target": normal(8, 16, HIDDEN),
    }


def dense_reference(
    dtype: torch.dtype, tokens: list[int], top_k: int, drops: bool
) -> dict[str, torch.Tensor]:
    """The whole group in one process and float64, token by token; no tamoe code."""
    given = {name: value.double() for name, value in tensors(dtype).items()}
    leaves = {n: v.clone().requires_grad_() for n, v in given.items() if n != "target"}
    out = torch.zeros(len(tokens), 16, HIDDEN, dtype=torch.float64)
    index = torch.full((len(tokens), 16, top_k), -7)
    objective = sum(0 * leaf.sum() for leaf in leaves.values())
    for rank, count in enumerate(tokens):
        loss = torch.zeros((), dtype=torch.float64)
        for token in range(count):
            x_D = leaves["x"][rank, token]
            scores_N = leaves["gate"] @ x_D
            probs_N = scores_N.exp() / scores_N.exp().sum()
            chosen = sorted(range(NUM_EXPERTS), key=lambda e: -float(probs_N[e].detach()))[:top_k]
            hidden_D = torch.zeros(HIDDEN, dtype=torch.float64)
            for place, expert in enumerate(chosen):
                if drops and (token * top_k + place) % 5 == 2:
                    index[rank, token, place] = -1
                    continue
                index[rank, token, place] = expert
                inner_F = leaves["up"][expert] @ x_D + leaves["up_bias"][expert]
                inner_F = nn.functional.gelu(inner_F)
                made_D = leaves["down"][expert] @ inner_F + leaves["down_bias"][expert]
                hidden_D = hidden_D + probs_N[expert] * made_D
            out[rank, token] = hidden_D.detach()
            loss = loss + (hidden_D * given["target"][rank, token]).sum() / count
            loss = loss + 0.01 * probs_N.square().sum()
        objective = objective + loss / len(tokens)
    objective.backward()
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    return {"out": out, "index": index} | {n: g for n, g in grads.items() if g is not None}


def build(
    dtype: torch.dtype, top_k: int, drops: bool, exchange: Exchange, grouped: bool
) -> tuple[MoE, dict[str, torch.Tensor]]:
    """A layer with the given weights, and the reference's names for its parameters."""
    given = tensors(dtype)
    num_local = NUM_EXPERTS // exchange.num_ranks
    experts: Any = (
        GroupedFeedForward(num_local, HIDDEN, INTERMEDIATE)
        if grouped
        else partial(FeedForward, HIDDEN, INTERMEDIATE)
    )
    gate = DroppingGate(top_k, drops)
    layer = MoE(gate, experts, num_experts=NUM_EXPERTS, exchange=exchange, dtype=dtype)
    local = list(layer.expert_numbers)
    with torch.no_grad():
        gate.weight_ND.copy_(given["gate"])
        if grouped:
            layer.experts.up_EDF.copy_(given["up"][local].transpose(1, 2))
            layer.experts.up_bias_EF.copy_(given["up_bias"][local])
            layer.experts.down_EFD.copy_(given["down"][local].transpose(1, 2))
            layer.experts.down_bias_ED.copy_(given["down_bias"][local])
        else:
            for number, expert in zip(layer.expert_numbers, layer.experts, strict=True):
                expert.up.weight.copy_(given["up"][number])
                expert.up.bias.copy_(given["up_bias"][number])
                expert.down.weight.copy_(given["down"][number])
                expert.down.bias.copy_(given["down_bias"][number])
    return layer, given


def gradients(layer: MoE) -> dict[str, torch.Tensor]:
    """Gradients under the reference's names, experts stacked."""
    if layer.is_grouped:
        experts = layer.experts
        found = {
            "up": experts.up_EDF.grad.transpose(1, 2),
            "up_bias": experts.up_bias_EF.grad,
            "down": experts.down_EFD.grad.transpose(1, 2),
            "down_bias": experts.down_bias_ED.grad,
        }
    else:
        found = {
            "up": torch.stack([expert.up.weight.grad for expert in layer.experts]),
            "up_bias": torch.stack([expert.up.bias.grad for expert in layer.experts]),
            "down": torch.stack([expert.down.weight.grad for expert in layer.experts]),
            "down_bias": torch.stack([expert.down.bias.grad for expert in layer.experts]),
        }
    return {"gate": layer.gate.weight_ND.grad} | found


class Setting:
    """A layer on a group of ranks, with what averages its gradients; made on all ranks at once."""

    def __init__(self, group: Any, dtype: torch.dtype, schedule: Any, with_nodes: bool) -> None:
        self.num_ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        topology = None
        if with_nodes:
            topology = Topology.from_tree(TREES[self.num_ranks], bandwidth_bytes_per_s=(2e9, 1e9))
        exchange = Exchange(topology, group=group, schedule=schedule)
        grouped = (self.num_ranks in (2, 8)) == (dtype == torch.float64)
        self.layer, self.given = build(dtype, 1, False, exchange, grouped)
        self.dense = DenseGradients(self.layer, nodes=topology, group=group)

    def step(self, count: int, top_k: int, drops: bool) -> dict[str, torch.Tensor]:
        """One forward and backward on this rank; results under the reference's names."""
        self.layer.zero_grad()
        self.layer.gate.top_k, self.layer.gate.drops = top_k, drops
        x = self.given["x"][self.rank, :count].clone().requires_grad_()
        output = self.layer(x)
        loss = (output.hidden * self.given["target"][self.rank, :count]).sum() / max(count, 1)
        (loss + output.aux_loss).backward()
        self.dense.finish()
        results = {
            "out": output.hidden,
            "index": output.routing.expert_index_TK,
            "x": x.grad / self.num_ranks,  # the objective is the mean of the ranks' losses
            **gradients(self.layer),
        }
        return {name: value.detach().clone() for name, value in results.items()}


def cases() -> list[tuple[int, str, int, bool, torch.dtype]]:
    """(ranks, token pattern, k, drops, dtype): every k on every number of ranks."""
    patterns = list(TOKENS)
    return [
        (num_ranks, patterns[(top_k + number) % 3], top_k, top_k % 2 == 0, dtype)
        for number, num_ranks in enumerate(TREES)
        for dtype in (torch.float64, torch.float32)
        for top_k in range(1, NUM_EXPERTS + 1)
    ]


def in_eight_ranks(rank: int) -> list[Any]:
    """Results of every case, and whether variants equal it; smaller groups run side by side."""
    groups = {
        size: [dist.new_group(list(range(first, first + size))) for first in range(0, 8, size)]
        for size in TREES
    }
    made: dict[Any, Setting] = {}

    def setting(*key: Any) -> Setting:
        if key not in made:
            num_ranks, *how = key
            made[key] = Setting(groups[num_ranks][rank // num_ranks], *how)
        return made[key]

    answers: list[Any] = []
    for num_ranks, pattern, top_k, drops, dtype in cases():
        run = (TOKENS[pattern][rank % num_ranks], top_k, drops)
        first = setting(num_ranks, dtype, "single", True).step(*run)
        again = setting(num_ranks, dtype, "single", True).step(*run)
        rounds = setting(num_ranks, dtype, "rounds", True).step(*run)
        # Another order of summation: near, not equal.
        flat_order = setting(num_ranks, dtype, "single", False).step(*run)
        same = [
            all(torch.equal(first[name], other[name]) for name in first)
            for other in (again, rounds)
        ]
        answers.append((first, same, flat_order["out"]))
    torch.manual_seed(5)
    started = MoE(DroppingGate(1, False), partial(FeedForward, 2, 3), num_experts=8)
    return [*answers, started.experts[0].up.weight.detach()]


@pytest.fixture(scope="module")
def answers() -> list[list[Any]]:
    return run_ranks(8, in_eight_ranks, timeout_s=250)


def share(tensor: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    """A rank's experts of a stacked tensor."""
    num_local = NUM_EXPERTS // num_ranks
    return tensor[rank * num_local : (rank + 1) * num_local]


@pytest.mark.ranks
@pytest.mark.slow
def test_equals_the_dense_loop_in_outputs_and_all_gradients(answers):
    worst: dict[torch.dtype, float] = dict.fromkeys(TOLERANCE, 0.0)
    for case, (num_ranks, pattern, top_k, drops, dtype) in enumerate(cases()):
        tokens = TOKENS[pattern][:num_ranks]
        expected = dense_reference(dtype, tokens, top_k, drops)
        by_rank = [answers[rank][case] for rank in range(num_ranks)]
        for name, reference in expected.items():
            scale = float(reference.abs().max()) or 1.0
            for rank, (got, _, flat_order) in enumerate(by_rank):
                if name in ("out", "x", "index"):
                    want = reference[rank, : tokens[rank]]
                else:
                    want = reference if name == "gate" else share(reference, rank, num_ranks)
                assert got[name].shape == want.shape
                if name == "index":
                    assert torch.equal(got[name], want)
                    continue
                for value in (got[name], flat_order) if name == "out" else (got[name],):
                    error = float((value.double() - want).abs().max()) if want.numel() else 0.0
                    worst[dtype] = max(worst[dtype], error / scale)
    print({str(dtype): f"{error:.2e}" for dtype, error in worst.items()})
    assert all(error <= TOLERANCE[dtype] for dtype, error in worst.items()), worst


@pytest.mark.ranks
@pytest.mark.slow
def test_a_rerun_and_the_other_schedule_give_the_same_bits(answers):
    for rank, by_case in enumerate(answers):
        for case, answer in zip(cases(), by_case[:-1], strict=True):
            assert answer is None or answer[1] == [True, True], (rank, case)


@pytest.mark.ranks
@pytest.mark.slow
def test_experts_start_equal_on_any_number_of_ranks(answers):
    torch.manual_seed(5)
    alone = MoE(DroppingGate(1, False), partial(FeedForward, 2, 3), num_experts=8)
    for rank, by_case in enumerate(answers):
        assert torch.equal(by_case[-1], alone.experts[rank].up.weight)
    assert not torch.equal(alone.experts[0].up.weight, alone.experts[1].up.weight)


# ---- one process -------------------------------------------------------------------------------


def layer_of(**change: Any) -> MoE:
    """A small layer in one process."""
    options = {"num_experts": NUM_EXPERTS} | change
    gate = options.pop("gate", None) or DroppingGate(2, False)
    if isinstance(gate, DroppingGate):
        nn.init.normal_(gate.weight_ND)
    experts = options.pop("experts", partial(FeedForward, HIDDEN, INTERMEDIATE))
    return MoE(gate, experts, **options)


@pytest.mark.parametrize("shape", [(HIDDEN,), (3, HIDDEN), (2, 3, HIDDEN), (0, 4, HIDDEN)])
def test_any_leading_shape(shape):
    layer = layer_of()
    x = torch.randn(shape)
    output = layer(x)
    assert isinstance(output, MoEOutput)
    assert output.hidden.shape == shape
    assert torch.equal(output.hidden.reshape(-1, HIDDEN), layer(x.reshape(-1, HIDDEN)).hidden)


def test_only_experts_are_marked():
    layer = layer_of()
    assert {scope_of(p) for p in layer.experts.parameters()} == {"expert"}
    assert scope_of(layer.gate.weight_ND) == "shared"
    assert layer.expert_numbers == tuple(range(8))


def test_experts_without_tokens_get_gradients_of_zero():
    layer = layer_of()
    layer(torch.randn(0, HIDDEN)).hidden.sum().backward()
    assert all(not p.grad.any() for p in layer.experts.parameters())


def test_a_factory_is_called_once_for_each_expert():
    made: list[FeedForward] = []

    def factory() -> FeedForward:
        made.append(FeedForward(HIDDEN, INTERMEDIATE))
        return made[-1]

    assert list(layer_of(experts=factory).experts) == made
    assert len(made) == NUM_EXPERTS


def test_grouped_and_listed_experts_agree():
    exchange = Exchange()
    x = torch.randn(9, HIDDEN, dtype=torch.float64)
    listed, _ = build(torch.float64, 3, True, exchange, grouped=False)
    grouped, _ = build(torch.float64, 3, True, exchange, grouped=True)
    assert torch.allclose(listed(x).hidden, grouped(x).hidden, rtol=0, atol=1e-14)


def test_a_layer_can_be_made_without_memory():
    with torch.device("meta"):
        layer = MoE(NaiveGate(8, 4), lambda: nn.Linear(8, 8), num_experts=4)
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():  # whatever was in memory may be no number
        nn.init.ones_(parameter)
    assert layer(torch.ones(3, 8)).hidden.shape == (3, 8)


def test_grouped_experts_start_by_their_numbers():
    torch.manual_seed(3)
    one = layer_of(experts=GroupedFeedForward(8, HIDDEN, INTERMEDIATE))
    torch.manual_seed(4)
    other = GroupedFeedForward(8, HIDDEN, INTERMEDIATE)
    torch.manual_seed(3)
    GroupedFeedForward(8, HIDDEN, INTERMEDIATE)  # the same draws as above
    two = layer_of(experts=other)
    assert torch.equal(one.experts.up_EDF, two.experts.up_EDF)


def test_gradients_flow_under_autocast_in_bfloat16():
    layer = layer_of()
    x = torch.randn(5, HIDDEN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = layer(x).hidden
    assert hidden.dtype == torch.bfloat16
    hidden.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_experts": 0}, "num_experts is 0; allowed: a positive multiple"),
        ({"experts": nn.ModuleList([nn.Linear(6, 6)])}, "experts has 1 modules; allowed: 8"),
        ({"exchange": "hierarchical"}, "kind is 'hierarchical' without topology_or_plan"),
    ],
)
def test_bad_construction_is_named(change, match):
    with pytest.raises(InputError, match=match):
        layer_of(**change)


def test_a_gate_that_returns_something_else_is_named():
    layer = layer_of(gate=lambda x_TD: (x_TD, x_TD))
    with pytest.raises(InputError, match=r"gate returned tuple; allowed: tamoe\.Routing"):
        layer(torch.zeros(2, HIDDEN))


def test_an_expert_that_changes_the_shape_is_named():
    layer = layer_of(experts=lambda: nn.Linear(HIDDEN, HIDDEN + 1))
    with pytest.raises(InputError, match=r"row_RD .* Experts must keep shape, dtype and device"):
        layer(torch.randn(2, HIDDEN))


def test_deepcopy_shares_the_exchange():
    from copy import deepcopy

    layer = layer_of()
    assert deepcopy(layer).exchange is layer.exchange


def test_a_gate_of_another_number_of_experts_is_refused() -> None:
    gate = NaiveGate(8, 4)
    with pytest.raises(InputError, match="num_experts is 8 and the gate has 4"):
        MoE(gate, lambda: torch.nn.Identity(), num_experts=8)
    with pytest.raises(InputError, match="experts is 3; allowed: a factory"):
        MoE(gate, 3, num_experts=4)  # type: ignore[arg-type]
