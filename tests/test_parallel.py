"""Gradients: averaged where shared, divided where experts, left where per rank; and their norm."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tamoe.parallel import DenseGradients, broadcast_dense, clip_grad_norm
from tamoe.reduction import Worker, make_buckets, node_partition
from tamoe.scope import mark_scope, scope_of
from tamoe.topology import InputError, Topology, run_ranks


class Model(nn.Module):
    """Shared, expert and per-rank weights, and one that some ranks, or all, do not use."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.first, self.last = weight(3, 7), weight(5)
        self.single = nn.Parameter(torch.randn(9, generator=generator))  # another dtype: own bucket
        self.sometimes, self.never = weight(4), weight(2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.expert = mark_scope(nn.Linear(2, 2, bias=False, dtype=torch.float64), "expert")
        self.own = mark_scope(nn.Linear(2, 1, bias=False, dtype=torch.float64), "rank")
        self.register_buffer("table", torch.full((2,), float(seed)))

    def forward(self, rank: int, step: int) -> torch.Tensor:
        factor = 1.0 + rank + 10 * step
        loss = (self.first.sin() * factor).sum() + (self.last.square() * factor).sum()
        loss = loss + (self.single * factor).sum().double()
        if rank % 2:
            loss = loss + (self.sometimes * factor).sum()
        return loss + (self.expert.weight * factor).sum() + (self.own.weight * factor).sum()


def expected_gradients(num_ranks: int, rank: int, step: int, seed: int) -> dict[str, torch.Tensor]:
    """By hand: the mean over ranks, the share of P, or the rank's own."""
    model = Model(seed)
    factors = [1.0 + r + 10 * step for r in range(num_ranks)]
    mean = sum(factors) / num_ranks
    some = sum(f for r, f in enumerate(factors) if r % 2) / num_ranks
    return {
        "first": model.first.detach().cos() * mean,
        "last": model.last.detach() * 2 * mean,
        "single": torch.full((9,), mean),
        "sometimes": torch.full((4,), some, dtype=torch.float64),
        "expert.weight": torch.full((2, 2), factors[rank] / num_ranks, dtype=torch.float64),
        "own.weight": torch.full((1, 2), factors[rank], dtype=torch.float64),
    }


def gradient_error(model: nn.Module, expected: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to each tensor's largest value; infinite for a wrong set."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if set(found) != set(expected):
        return math.inf
    return max(
        float((found[n] - want).abs().max() / want.abs().max()) for n, want in expected.items()
    )


def one_setting(rank: int, nodes: Any, bucket_bytes: int) -> dict[str, Any]:
    """Two steps, one with accumulated gradients; errors, bits, times, norms."""
    num_ranks, model = dist.get_world_size(), Model(seed=1)
    dense = DenseGradients(model, nodes=nodes, bucket_bytes=bucket_bytes)
    errors, times = [], []
    for step in range(2):
        model.zero_grad()
        if step == 0:
            with dense.no_sync():
                model(rank, step).backward()
            # Twice the gradient: the same loss once more.
        model(rank, step).backward()
        launched = dense._launched
        times.append(dense.finish())
        twice = 2 if step == 0 else 1
        expected = expected_gradients(num_ranks, rank, step, seed=1)
        errors.append(gradient_error(model, {n: g * twice for n, g in expected.items()}))
    bits = torch.cat([p.grad.double().flatten() for p in (model.first, model.last, model.single)])
    dense.close()
    model.zero_grad()
    model(rank, 0).backward()  # hooks are gone: nothing waits for the other ranks
    return {"errors": errors, "times": times, "bits": bits, "launched": launched}


def refusals(rank: int) -> list[str]:
    """What each rank is told about models that differ, and about a second backward."""
    told = []
    model = Model(seed=1)
    if rank == 2:
        model.extra = nn.Linear(1, 1)
    for call in (lambda: DenseGradients(model), lambda: broadcast_dense(model)):
        try:
            call()
            told.append("nothing")
        except InputError as error:
            told.append(str(error))
    model = Model(seed=1)
    dense = DenseGradients(model, bucket_bytes=1)
    model(rank, 0).backward()
    try:
        model(rank, 0).backward()
        told.append("nothing")
    except InputError as error:
        told.append(str(error))
    dense.finish()
    dense.close()
    return told


def clipped(rank: int) -> dict[str, float]:
    """The norm over all ranks, and what is left of each rank's gradients."""
    model = Model(seed=1)
    dense = DenseGradients(model)
    model(rank, 0).backward()
    dense.finish()
    dense.close()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    norm = clip_grad_norm(model, 2.0)
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    factors = {float((after[n] / before[n]).double().mean()) for n in before}
    local = sum(float(before[n].square().sum()) for n in ("expert.weight", "own.weight"))
    shared = sum(float(g.double().square().sum()) for n, g in before.items() if "weight" not in n)
    return {
        "norm": norm.item(),
        "again": clip_grad_norm(model, math.inf).item(),
        "shared": shared,
        "local": local,
        "low": min(factors),
        "high": max(factors),
    }


def broadcasted(rank: int) -> dict[str, bool]:
    """Which tensors came from rank 1 and which stayed."""
    model, mine, source = Model(seed=rank), Model(seed=rank), Model(seed=1)
    broadcast_dense(model, source=1)
    now, was, given = model.state_dict(), mine.state_dict(), source.state_dict()
    kept = {"expert.weight", "own.weight"}
    mine_now = {
        n: torch.equal(now[n], (was if n in kept else given)[n]) for n in ("table", "first")
    }
    weights = {n: p for n, p in model.named_parameters() if n not in kept}
    return {
        "shared": all(torch.equal(p, given[n]) for n, p in weights.items())
        and all(mine_now.values())
    }


def in_five_ranks(rank: int) -> dict[str, Any]:
    """Everything that needs processes; five ranks allow unequal nodes."""
    tree = Topology.from_tree("[2,[2,1]]", bandwidth_bytes_per_s=(3e9, 2e9, 1e9))
    return {
        "flat": one_setting(rank, None, 1 << 20),
        "flat again": one_setting(rank, None, 1 << 20),
        "small buckets": one_setting(rank, None, 40),
        "unequal nodes": one_setting(rank, [(0, 3, 4), (1,), (2,)], 40),
        "tree": one_setting(rank, tree, 1 << 20),
        "told": refusals(rank),
        "clipped": clipped(rank),
        "broadcast": broadcasted(rank),
    }


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    return run_ranks(5, in_five_ranks, timeout_s=120)


SETTINGS = ("flat", "flat again", "small buckets", "unequal nodes", "tree")


@pytest.mark.ranks
@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_means_shares_or_own(answers, name):
    for rank, answer in enumerate(answers):
        # float32 in one bucket; its numbers are small multiples of .2.
        assert max(answer[name]["errors"]) <= 1e-6, (rank, answer[name]["errors"])


@pytest.mark.ranks
def test_shared_gradients_have_the_same_bits_on_all_ranks_and_in_a_rerun(answers):
    for name in SETTINGS:
        for answer in answers:
            assert torch.equal(answer[name]["bits"], answers[0][name]["bits"])
    assert torch.equal(answers[0]["flat"]["bits"], answers[0]["flat again"]["bits"])
    # Another order of sums: equal within rounding of the float32 part.
    spread = answers[0]["flat"]["bits"] - answers[0]["tree"]["bits"]
    assert spread.abs().max() <= 1e-6 * answers[0]["flat"]["bits"].abs().max()


@pytest.mark.ranks
def test_sums_start_during_backward_once_its_order_is_known(answers):
    # One bucket for each parameter. Three are used on all ranks; those that rank 0 does not use
    # come first in the guess, reversed order, and last in the settled one.
    for answer in answers:
        assert answer["small buckets"]["launched"] >= 3


@pytest.mark.ranks
def test_time_and_bytes_are_reported(answers):
    # first 21 + last 5 + sometimes 4 + never 2 float64 and 4 flags, 9 float32 and 1 flag.
    for answer in answers:
        for time in answer["flat"]["times"]:
            assert time.sum_bytes == (21 + 5 + 4 + 2 + 4) * 8 + (9 + 1) * 4
            assert time.allreduce_s > 0
            assert time.exposed_s > 0


@pytest.mark.ranks
def test_mistakes_are_named_on_every_rank(answers):
    for answer in answers:
        for text in answer["told"][:2]:
            assert "shared parameters of rank 2 differ from those of rank 0" in text
        assert "backward ran again before finish()" in answer["told"][2]


@pytest.mark.ranks
def test_norm_counts_shared_once_and_every_rank_s_own(answers):
    clipped = [answer["clipped"] for answer in answers]
    expected = math.sqrt(clipped[0]["shared"] + sum(c["local"] for c in clipped))
    for c in clipped:
        assert c["norm"] == clipped[0]["norm"]  # to the bit
        assert math.isclose(c["norm"], expected, rel_tol=1e-7)
        assert math.isclose(c["again"], 2.0, rel_tol=1e-6)
        assert math.isclose(c["low"], 2.0 / expected, rel_tol=1e-6)
        assert math.isclose(c["high"], 2.0 / expected, rel_tol=1e-6)


@pytest.mark.ranks
def test_broadcast_takes_what_is_shared_and_leaves_the_rest(answers):
    assert all(answer["broadcast"]["shared"] for answer in answers)


# ---- one process -------------------------------------------------------------------------------


def test_one_process_changes_nothing():
    model = Model(seed=0)
    dense = DenseGradients(model)
    model(1, 0).backward()
    assert dense.finish().allreduce_s == 0
    assert gradient_error(model, expected_gradients(1, 0, 0, 0)) > 0  # rank 0's factor is another
    model.zero_grad()
    model(0, 0).backward()
    dense.finish()
    expected = expected_gradients(1, 0, 0, 0)
    del expected["sometimes"]  # rank 0 does not use it
    assert gradient_error(model, expected) <= 1e-7
    broadcast_dense(model)


def test_buckets_keep_order_size_and_dtype():
    parameters = [
        nn.Parameter(torch.zeros(n, dtype=d))
        for n, d in ((4, torch.float64), (4, torch.float64), (9, torch.float64), (1, torch.float32))
    ]
    buckets = make_buckets(parameters, 64)
    assert [[p.numel() for p in b.parameters] for b in buckets] == [[4, 4], [9], [1]]
    assert [p for bucket in buckets for p in bucket.parameters] == parameters


def test_worker_runs_in_order_and_hands_errors_over():
    worker, done = Worker(), []
    jobs = [worker.submit(lambda number=number: done.append(number)) for number in range(50)]
    failing = worker.submit(lambda: 1 // 0)
    for job in jobs:
        job.wait()
    assert done == list(range(50))
    with pytest.raises(ZeroDivisionError):
        failing.wait()
    worker.close()


def test_mistakes_are_named():
    model = nn.Linear(1, 1)
    with pytest.raises(InputError, match="bucket_bytes is 0; allowed: > 0"):
        DenseGradients(model, bucket_bytes=0)
    with pytest.raises(InputError, match=r"nodes is \(\(0, 1\),\); allowed: every rank"):
        DenseGradients(model, nodes=[(0, 1)])
    with pytest.raises(InputError, match="max_norm is 0; allowed: > 0"):
        clip_grad_norm(model, 0)
    with pytest.raises(InputError, match="source is 1; allowed: 0 to 0"):
        broadcast_dense(model, source=1)
    assert node_partition(Topology.from_tree("2x2", bandwidth_bytes_per_s=(2.0, 1.0)), 4) == (
        (0, 1),
        (2, 3),
    )


def test_a_deep_copy_keeps_its_experts_and_gates_out_of_the_average() -> None:
    model = nn.ModuleDict(
        {"dense": nn.Linear(2, 2), "expert": mark_scope(nn.Linear(2, 2), "expert")}
    )
    twin = copy.deepcopy(model)
    assert scope_of(twin["expert"].weight) == "shared"  # torch forgets attributes of parameters
    DenseGradients(twin).close()
    assert scope_of(twin["expert"].weight) == "expert"
    assert scope_of(twin["dense"].weight) == "shared"
