"""The demo's language model and the MoE layers of its strategies, without processes."""

from __future__ import annotations

import math

import pytest
import torch

from tamoe.exchange import Exchange
from tamoe.experiments.model import GPT, FeedForward, ModelConfig, initialise
from tamoe.experiments.strategies import (
    PaddedMoE,
    Strategy,
    default_strategies,
    make_gate,
    make_layer,
)
from tamoe.experiments.trainee import TrainConfig, Trainee
from tamoe.functional import expert_counts
from tamoe.moe import MoE
from tamoe.record import record_exchanges
from tamoe.solver import Plan, Workload, solve
from tamoe.topology.errors import InputError
from tamoe.topology.graph import Topology

CONFIG = ModelConfig(vocabulary_size=50, hidden_size=16, intermediate_size=32, sequence_length=12)


def _model(num_experts: int = 4, strategy: Strategy | None = None) -> GPT:
    strategy = strategy or Strategy("even", "even")

    def make_moe(_: int) -> MoE:
        gate = make_gate(
            strategy, hidden_size=16, num_experts=num_experts, top_k=2, plan=None, rank=0
        )
        return make_layer(strategy, gate, lambda: FeedForward(16, 32), Exchange())

    model = GPT(CONFIG, make_moe)
    initialise(model, seed=0)
    return model


def _tokens(sequences: int = 3) -> torch.Tensor:
    return torch.randint(50, (sequences, 13), generator=torch.Generator().manual_seed(1))


def _perturbed(model: GPT) -> GPT:
    """The model with no parameter at zero, so that every part of it matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_the_loss_starts_at_log_of_the_vocabulary() -> None:
    assert _model()(_tokens()).loss.item() == pytest.approx(math.log(50), rel=1e-6)


def test_no_token_sees_a_later_one() -> None:
    model = _perturbed(_model()).eval()
    tokens = _tokens(1)
    for cut in (1, 6, 11):
        changed = tokens.clone()
        changed[:, cut + 1 :] = (changed[:, cut + 1 :] + 7) % 50
        before, after = (_hidden(model, t) for t in (tokens, changed))
        # Some processors multiply a matrix of fewer rows, an expert's, in another order.
        torch.testing.assert_close(before[:, : cut + 1], after[:, : cut + 1], rtol=0, atol=1e-5)
        assert cut == 11 or not torch.allclose(before[:, cut + 1 :], after[:, cut + 1 :], atol=1e-2)


def _hidden(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return seen[0].view(len(tokens), -1, CONFIG.hidden_size)


def test_a_few_steps_on_one_batch_learn_it() -> None:
    model, tokens = _model(), _tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        out = model(tokens)
        optimizer.zero_grad()
        (out.loss + out.aux_loss).backward()
        optimizer.step()
    assert out.loss.item() < 1.0 < math.log(50)
    assert len(out.routings) == CONFIG.num_blocks


def test_initial_values_do_not_depend_on_strategy_or_on_how_experts_are_shared_out() -> None:
    whole = _model()
    capacity = _model(strategy=Strategy("capacity 1.25", "capacity"))
    for one, other in zip(whole.parameters(), capacity.parameters(), strict=True):
        assert torch.equal(one, other)
    half = _model(num_experts=2)  # what the second of two ranks holds
    initialise(half, seed=0, first_expert=2)
    for block, part in zip(whole.blocks, half.blocks, strict=True):
        for mine, its in zip(block.moe.experts[2:], part.moe.experts, strict=True):
            assert torch.equal(mine.up.weight, its.up.weight)
    other_seed = _model()
    initialise(other_seed, seed=1)
    assert not torch.equal(whole.embedding.weight, other_seed.embedding.weight)


def test_experts_start_different_from_one_another() -> None:
    experts = [e.up.weight for block in _model().blocks for e in block.moe.experts]
    assert len({weight.sum().item() for weight in experts}) == 8


def test_padding_fills_every_capacity_and_changes_no_result() -> None:
    strategy = Strategy("capacity 1.25", "capacity")
    torch.manual_seed(0)
    gate = make_gate(strategy, hidden_size=16, num_experts=4, top_k=2, plan=None, rank=0)
    padded = make_layer(strategy, gate, lambda: FeedForward(16, 32), Exchange())
    assert isinstance(padded, PaddedMoE)
    plain = MoE(gate, padded.experts, num_experts=4, exchange=padded.exchange)
    x_TD = torch.randn(37, 16) + 1.0  # a common direction, so that some experts overflow
    results = []
    for layer in (plain, padded):
        x = x_TD.clone().requires_grad_()
        layer.zero_grad()
        with record_exchanges() as record:
            out = layer(x)
            out.hidden.square().sum().backward()
        gradients = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        results.append((out.hidden, x.grad, *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    capacity = math.ceil(1.25 * 2 * 37 / 4)
    assert record.sent_counts_N == [[capacity] * 4]
    dropped = 37 * 2 - expert_counts(out.routing.expert_index_TK, 4).sum()
    assert dropped > 0  # or the test would not see that padding takes no token's place
    kept_TK = padded._padding(out.routing.expert_index_TK) >= 0
    assert kept_TK.sum(1).eq(1).all()  # a hierarchical exchange would send two for one node as one


def test_every_strategy_trains_and_lowers_its_loss() -> None:
    config = TrainConfig(sequences=2, sequence_length=32, learning_rate=1e-2)
    plans = _plans(config)
    from tamoe.experiments.text import load_text

    starts = set()
    for strategy in default_strategies((0.5, 0.3)):
        plan = plans if strategy.kl else None
        trainee = Trainee(strategy, config, load_text(), Exchange(), plan)
        before = trainee.validate([0])
        starts.add(before)
        times = [trainee.train_step() for _ in range(15)]
        assert trainee.validate([0]) < before - 0.5, strategy.name
        assert all(time.step_s > time.exchange_s >= 0 for time in times)
        assert trainee.steps == 15 and trainee.counts_N.sum() > 0
    assert len(starts) == 1  # same initial weights


def test_losses_without_steering_leave_the_model_as_it_was() -> None:
    config = TrainConfig(sequences=2, sequence_length=32)
    from tamoe.experiments.text import load_text

    for strategy in default_strategies()[2:4]:
        trainee = Trainee(strategy, config, load_text(), Exchange(), _plans(config))
        for _ in range(3):
            trainee.train_step()
        before = {name: value.clone() for name, value in trainee.model.state_dict().items()}
        first = trainee.validate([0])
        trainee.validate([0], steered=False)
        assert trainee.validate([0]) == first
        for name, value in trainee.model.state_dict().items():
            assert torch.equal(value, before[name]), name


def _plans(config: TrainConfig) -> Plan:
    topology = Topology.from_tree(1, bandwidth_bytes_per_s=(1e9,))
    workload = Workload(config.tokens_per_rank, 2, 64, 4, config.experts_per_rank)
    return solve(topology, workload, method="entropic", kl=0.5)


def test_a_strategy_without_the_plan_that_it_needs_is_refused() -> None:
    with pytest.raises(InputError, match="kl is None and kind 'bias'"):
        Strategy("bias", "bias")
    with pytest.raises(InputError, match=r"kl is 0.5 and kind 'even'"):
        Strategy("even", "even", 0.5)
