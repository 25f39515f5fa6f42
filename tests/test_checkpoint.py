"""Checkpoints: what 8 ranks saved, 4, 2 and 1 ranks read; experts by their global numbers."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tamoe import MoE, Routing
from tamoe.checkpoint import load_checkpoint, save_checkpoint
from tamoe.experts import FeedForward, GroupedFeedForward
from tamoe.scope import mark_scope
from tamoe.tensor_keys import named_tensors
from tamoe.topology import InputError, run_ranks

NUM_EXPERTS = 8


class RankGate(nn.Module):
    """A gate of its own on each rank, with a buffer that differs by rank."""

    tamoe_scope = "rank"

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((NUM_EXPERTS, 4), float(rank)))
        self.register_buffer("state", torch.full((2,), 10.0 + rank))
        mark_scope(self, "rank")

    def forward(self, x_TD: torch.Tensor) -> Routing:
        probs_TN = (x_TD @ self.weight.T).softmax(1)
        weight_TK, index_TK = probs_TN.topk(2)
        return Routing(index_TK, weight_TK, probs_TN, probs_TN.sum() * 0)


def expert_number_weights(moe: MoE, grouped: bool) -> None:
    """Fill every expert with its global number, so that its origin shows."""
    for local, number in enumerate(moe.expert_numbers):
        if grouped:
            tensors = [p[local] for p in moe.experts.parameters()]
        else:
            tensors = list(moe.experts[local].parameters())
        for place, tensor in enumerate(tensors):
            tensor.detach().fill_(number + place / 8)


def build(group: Any, fill: bool, num_experts: int = NUM_EXPERTS) -> nn.ModuleDict:
    """Shared layers, a MoE of listed experts with a per-rank gate, and one of grouped experts."""
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    num_local = num_experts // (dist.get_world_size(group) if dist.is_initialized() else 1)
    listed = MoE(RankGate(rank), partial(FeedForward, 4, 6), num_experts=num_experts, group=group)
    grouped = MoE(
        RankGate(rank), GroupedFeedForward(num_local, 4, 6), num_experts=num_experts, group=group
    )
    model = nn.ModuleDict({"dense": nn.Linear(4, 4), "listed": listed, "grouped": grouped})
    if fill:
        model["dense"].weight.detach().fill_(77.0)
        expert_number_weights(listed, grouped=False)
        expert_number_weights(grouped, grouped=True)
    return model


def optimizer_of(model: nn.Module, rank: int, steps: int) -> torch.optim.Optimizer:
    """AdamW whose moments are the weights' own values, so that they show their origin too."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25, betas=(0.5, 0.75))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(steps):
        optimizer.step()
    for parameter in model.parameters():
        if steps:
            optimizer.state[parameter]["exp_avg"].copy_(parameter.detach() + 100)
    return optimizer


def everything_is_its_own(model: nn.ModuleDict, gate_rank: int, state_rank: int) -> bool:
    """Whether shared weights, experts and per-rank tensors are those that were saved."""
    fine = bool((model["dense"].weight == 77.0).all())
    for layer, is_grouped in ((model["listed"], False), (model["grouped"], True)):
        for local, number in enumerate(layer.expert_numbers):
            owner = layer.experts if is_grouped else layer.experts[local]
            for place, parameter in enumerate(owner.parameters()):
                part = parameter[local] if is_grouped else parameter
                fine &= bool((part == number + place / 8).all())
        fine &= bool((layer.gate.weight == gate_rank).all())
        fine &= bool((layer.gate.state == 10.0 + state_rank).all())
    return fine


def moments_follow(model: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> bool:
    """Whether each moment is its weight + 100, and settings came back."""
    states = [(p, optimizer.state[p]) for p in model.parameters() if p.numel()]
    return (
        all(torch.equal(state["exp_avg"], p.detach() + 100) for p, state in states)
        and all(float(state["step"]) == 3 and state["step"].ndim == 0 for _, state in states)
        and optimizer.param_groups[0]["betas"] == (0.5, 0.75)
        and optimizer.param_groups[0]["lr"] == 0.25
    )


def told(call: Any) -> str:
    """The text of the InputError that a call raises."""
    try:
        call()
    except InputError as error:
        return str(error)
    return "nothing"


def in_four_ranks(rank: int, directory: str) -> dict[str, Any]:
    """Save on 4 ranks; read on 4, on 2 (two groups side by side), and bad ones."""
    model = build(None, fill=True)
    with torch.no_grad():
        optimizer = optimizer_of(model, rank, steps=3)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
    expert_number_weights(model["listed"], grouped=False)  # the steps' decay moved them
    expert_number_weights(model["grouped"], grouped=True)
    with torch.no_grad():
        model["dense"].weight.fill_(77.0)
        for layer in (model["listed"], model["grouped"]):
            layer.gate.weight.fill_(float(rank))
        for parameter in model.parameters():
            optimizer.state[parameter]["exp_avg"].copy_(parameter + 100)
    save_checkpoint(model, directory, optimizer=optimizer, extra={"step": 3})
    fine = []
    same = build(None, fill=False)
    same_optimizer = optimizer_of(same, rank, steps=0)
    same_optimizer.param_groups[0].update(lr=9.0, betas=(0.1, 0.1))
    extra = load_checkpoint(same, directory, optimizer=same_optimizer)
    fine.append(everything_is_its_own(same, rank, rank) and moments_follow(same, same_optimizer))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = pairs[rank // 2]
    half = build(pair, fill=False)
    half_optimizer = optimizer_of(half, rank, steps=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_checkpoint(half, directory, optimizer=half_optimizer, group=pair)
    in_pair = rank % 2  # its experts are those of saved ranks 2·in_pair and the next
    fine.append(everything_is_its_own(half, 2 * in_pair, in_pair))
    fine.append(moments_follow(half, half_optimizer))
    missing = build(None, fill=False)
    if rank == 1:
        missing["more"] = nn.Linear(1, 1)
    return {
        "fine": fine,
        "extra": extra,
        "warned": [str(warning.message) for warning in caught if "ranks" in str(warning.message)],
        "other total": told(lambda: load_checkpoint(build(None, False, 16), directory)),
        "one rank differs": told(lambda: load_checkpoint(missing, directory)),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    directory = tmp_path_factory.mktemp("checkpoint") / "step3"
    return directory, run_ranks(4, in_four_ranks, str(directory), timeout_s=120)


@pytest.mark.ranks
@pytest.mark.slow
def test_four_ranks_read_back_what_they_saved_and_two_read_their_share(saved):
    for answer in saved[1]:
        assert answer["fine"] == [True, True, True]
        assert answer["extra"] == {"step": 3}


@pytest.mark.ranks
@pytest.mark.slow
def test_one_process_reads_what_four_ranks_saved(saved):
    model = build(None, fill=False)
    optimizer = optimizer_of(model, 0, steps=0)
    with pytest.warns(UserWarning, match="of 4 ranks and this group has 1"):
        assert load_checkpoint(model, saved[0], optimizer=optimizer) == {"step": 3}
    assert everything_is_its_own(model, 0, 0)
    assert moments_follow(model, optimizer)


@pytest.mark.ranks
@pytest.mark.slow
def test_another_number_of_ranks_is_told_what_happens_to_per_rank_state(saved):
    for rank, answer in enumerate(saved[1]):
        in_pair = rank % 2
        (text,) = answer["warned"]
        assert f"parameters of rank {in_pair} come from rank {2 * in_pair}" in text
        assert "listed.gate.state, grouped.gate.state stay as they are" in text


@pytest.mark.ranks
@pytest.mark.slow
def test_mistakes_are_named_on_every_rank(saved):
    for answer in saved[1]:
        assert "num_experts of layer 'listed' is 8 and the model has 16" in answer["other total"]
        assert "2 missing there, first more.bias" in answer["one rank differs"]


@pytest.mark.ranks
@pytest.mark.slow
def test_shared_weights_are_stored_once_and_experts_by_number(saved):
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    keys = FileSystemReader(saved[0]).read_metadata().state_dict_metadata
    of_model = {key for key in keys if key.startswith("model.")}
    for number in range(NUM_EXPERTS):
        assert f"model.listed.experts.{number}.up.weight" in of_model
        assert f"model.grouped.experts.{number}.up_EDF" in of_model
    assert "model.dense.weight" in of_model
    assert {f"model.listed.gate.state@rank{rank}" for rank in range(4)} <= of_model
    # 2 of dense; 4 of each expert of 2 layers; 2 of each rank's gates of 2 layers.
    assert len(of_model) == 2 + 2 * 4 * NUM_EXPERTS + 2 * 2 * 4


# ---- one process -------------------------------------------------------------------------------


def test_training_goes_on_as_if_nothing_had_happened(tmp_path):
    def run(steps: int, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(5, 4, generator=generator)).hidden.square().sum().backward()
            optimizer.step()

    def fresh() -> tuple[MoE, torch.optim.Optimizer]:
        moe = MoE(RankGate(0), partial(FeedForward, 4, 6), num_experts=NUM_EXPERTS)
        return moe, torch.optim.AdamW(moe.parameters(), lr=0.1)

    model, optimizer = fresh()
    run(3, model, optimizer, seed=1)
    save_checkpoint(model, tmp_path, optimizer=optimizer)
    run(2, model, optimizer, seed=2)
    other, other_optimizer = fresh()
    load_checkpoint(other, tmp_path, optimizer=other_optimizer)
    run(2, other, other_optimizer, seed=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_momentum_of_sgd_and_scalar_parameters(tmp_path):
    model = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(2.0))})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    (model["scale"] * 3).backward()
    optimizer.step()
    save_checkpoint(model, tmp_path, optimizer=optimizer)
    other = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(0.0))})
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.1)
    load_checkpoint(other, tmp_path, optimizer=other_optimizer)
    assert other["scale"].item() == model["scale"].item() == 0.5
    assert other_optimizer.state[other["scale"]]["momentum_buffer"].item() == 3.0
    assert other_optimizer.param_groups[0]["momentum"] == 0.9


def test_mistakes_are_named(tmp_path):
    model = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"cannot read .*tamoe\.json"):
        load_checkpoint(model, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        save_checkpoint(model, tmp_path / "file")
    with pytest.raises(InputError, match=r"extra .*; allowed: JSON"):
        save_checkpoint(model, tmp_path, extra={"model": model})
    save_checkpoint(model, tmp_path)
    with pytest.raises(InputError, match="unknown here, first bias"):
        load_checkpoint(nn.Linear(2, 2, bias=False), tmp_path)
    with pytest.raises(InputError, match=r"weight has shape \(2, 2\) and the model has \(2, 3\)"):
        load_checkpoint(nn.Linear(3, 2), tmp_path)
    with pytest.raises(InputError, match="saved without an optimizer"):
        load_checkpoint(model, tmp_path, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(InputError, match="scope 'expert' and is not in the experts of a MoE"):
        named_tensors(mark_scope(nn.Linear(1, 1), "expert"), 0)
    (tmp_path / ".metadata").write_bytes(b"\x80")
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        load_checkpoint(model, tmp_path)


def test_a_grouped_module_must_hold_experts_first():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.common = nn.Parameter(torch.zeros(3))

    layer = MoE(RankGate(0), Odd(), num_experts=4)
    with pytest.raises(
        InputError, match=r"experts.common has shape \(3,\); allowed: the 4 experts"
    ):
        named_tensors(layer, 0)
