"""A dispatch waits for the device once, twice with many counts; combine and backward never."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tamoe import planning as planning_module
from tamoe.agreement import INLINE_COUNTS
from tamoe.exchange import Exchange
from tamoe.hierarchical import RelayRoute
from tamoe.schedules import Mover
from tamoe.summation import plan_stage, plan_sum
from tamoe.topology import run_ranks
from tamoe.transfer import Transfer
from tamoe.word_swap import WordSwap
from tests.host_waits import host_waits
from tests.test_hierarchical import experts_of, routing, tree

# 0 to 3 levels of links between nodes; the last two have nodes, or ranks, that differ.
SHAPES = {"1x4": 0, "2x2": 1, "4x1": 1, "[[1,1],[1,1]]": 2, "[[1,1],[1,[1]]]": 3, "[3,1]": 1}
ONE_READ = ["tolist at agreement.py"]


def step(exchange: Exchange, experts: int, weighted: bool, seed: int) -> list[str]:
    """Waits of one step forward and backward."""
    generator = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(0, 9, (), generator=generator))
    x_TD = torch.randn(tokens, 5, generator=generator, requires_grad=True)
    index_TK = routing(generator, tokens, experts, 3)
    weight_TK = torch.rand(tokens, 3, generator=generator, requires_grad=True) if weighted else None
    with host_waits() as waits:
        row_RD, handle = exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=experts)
    local = exchange.placement_of(experts).experts_PE[exchange.rank]
    counted = zip(local, handle.counts_E, strict=True)
    expert_R = torch.tensor([e for e, n in counted for _ in range(n)], dtype=torch.int64)
    out_RD = experts_of(row_RD, expert_R)
    with host_waits() as later:
        out_TD = exchange.combine(out_RD, handle)
        again_RD, again = exchange.dispatch_again(x_TD, handle)
        out_TD = out_TD + exchange.combine(again_RD, again)
        out_TD.backward(torch.ones_like(out_TD))
    assert x_TD.grad is not None and (weight_TK is None or weight_TK.grad is not None)
    if exchange.kind == "hierarchical":
        assert isinstance(handle.route, RelayRoute)
    return [*waits, *(f"after the dispatch: {wait}" for wait in later)]


def in_every_shape(rank: int) -> dict[str, list[str]]:
    """Waits of each exchange by name; reads of counts without their line."""
    found = {}
    many = 4 * INLINE_COUNTS + 4  # one count more for each rank than a message carries
    with pytest.MonkeyPatch.context() as patch:
        # On a GPU there is no shared memory of the CPU, and no counts by node: what the ranks of a
        # node have for each other goes by the process group, too.
        patch.setattr(Mover, "_memory", None)
        patch.setattr(WordSwap, "agree", lambda *_: None)
        patch.setattr("tamoe.summation.PIECES_ON", ())
        patch.setattr("tamoe.solver.parts.SLICE_BYTES", 64)  # several slices
        for shape, levels in SHAPES.items():
            exchanges = {
                "flat, single": Exchange(tree(shape), kind="flat", schedule="single"),
                "flat, rounds": Exchange(tree(shape), kind="flat", schedule="rounds"),
                "flat, placed": Exchange(tree(shape), kind="flat", placement=[3, 0, 0, 1] * 2),
                "local": Exchange(tree(shape), kind="none"),
            }
            for chunks in (1, 3):
                name = f"hierarchical, {chunks}"
                exchanges[name] = Exchange(tree(shape), kind="hierarchical", chunks=chunks)
                exchanges[f"{name}, placed"] = Exchange(
                    tree(shape), kind="hierarchical", chunks=chunks, placement=[3, 0, 0, 1] * 2
                )
            assert all(
                e._planner.relays.num_levels == levels
                for e in exchanges.values()
                if e._planner.groups
            )
            for name, exchange in exchanges.items():
                for seed in range(2):
                    waits = step(exchange, 8, bool(seed % 2), 10 * seed + rank)
                    found[f"{shape}, {name}, seed {seed}"] = waits
        for kind in ("flat", "hierarchical"):
            exchange = Exchange(tree("2x2"), kind=kind)
            found[f"many, {kind}"] = step(exchange, many, True, rank)
    return {name: [wait.rpartition(":")[0] or wait for wait in w] for name, w in found.items()}


@pytest.mark.ranks
def test_a_step_waits_for_its_counts_alone() -> None:
    for by_name in run_ranks(4, in_every_shape, timeout_s=200):
        assert len(by_name) == len(SHAPES) * 8 * 2 + 2
        for name, waits in by_name.items():
            wanted = ONE_READ * 2 if name.startswith("many") else ONE_READ
            if ", local" in name:
                wanted = ["tolist at planning.py"]
            assert waits == wanted, name


def test_one_rank_waits_once() -> None:
    assert [w.rpartition(":")[0] for w in step(Exchange(), 4, True, 1)] == ["tolist at planning.py"]


def without_values(rank: int) -> list[str]:
    """Steps on tensors that have no values, with the counts of a real one; those that differ."""
    differing, real, answers = [], planning_module.exchange_counts, []

    def noted(*arguments: Any) -> Any:
        answers.append(real(*arguments))
        return answers[-1]

    def sizes(on: str, kind: Any, shape: str, chunks: int) -> list[torch.Size]:
        generator = torch.Generator().manual_seed(rank)
        x_TD = torch.randn(9, 5, generator=generator).to(on).requires_grad_()
        index_TK = routing(generator, 9, 8, 3).to(on)
        weight_TK = torch.rand(9, 3, generator=generator).to(on).requires_grad_(chunks == 3)
        moves = Exchange(tree(shape), kind=kind, chunks=chunks)
        row_RD, handle = moves.dispatch(x_TD, index_TK, weight_TK, num_experts=8)
        out_TD = moves.combine(row_RD * 2, handle)
        out_TD.sum().backward()
        tensors = [row_RD, out_TD, x_TD.grad, *([weight_TK.grad] if chunks == 3 else [])]
        assert all(tensor is not None and tensor.device.type == on for tensor in tensors)
        return [tensor.shape for tensor in tensors if tensor is not None]

    for shape in SHAPES:
        for kind, chunks in (("flat", 1), ("hierarchical", 1), ("hierarchical", 3)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(planning_module, "exchange_counts", noted)
                wanted = sizes("cpu", kind, shape, chunks)
                patch.setattr(planning_module, "exchange_counts", lambda *_: answers[-1])
                for name in ("_start", "start_at_once"):  # rows without values cannot travel
                    patch.setattr(Transfer, name, lambda *_: lambda: None)
                if sizes("meta", kind, shape, chunks) != wanted:
                    differing.append(f"{kind}, {shape}, {chunks} parts")
    return differing


@pytest.mark.ranks
def test_nothing_but_counts_is_read() -> None:
    assert run_ranks(4, without_values, timeout_s=120) == [[]] * 4


WAITING: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool(x[0]),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "mask": lambda x: x[x > 1],
    "masked store": lambda x: x.__setitem__(x > 1, torch.ones(1, dtype=x.dtype)),
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: x.bincount(),
    "equal": lambda x: torch.equal(x, x + 1),
    "repeat_interleave": lambda x: torch.arange(3).repeat_interleave(x),
    "table": lambda x: torch.tensor([1], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1]),
    "list as index": lambda x: x[[0, 1]],
    "unknown number of sums": lambda x: plan_stage(x, x, 4, None),
    "unknown numbers of sums": lambda x: plan_sum(x, x, 4, ()),
}


@pytest.mark.parametrize("how", WAITING)
def test_each_way_to_wait_is_seen(how: str) -> None:
    with host_waits() as waits:
        WAITING[how](torch.tensor([1, 2, 1]))
    assert waits


def waits_in_backward(rank: int) -> list[str]:
    """A planted wait in each backward pass; where it is found."""
    from tamoe import flat

    def reading(a_nD: torch.Tensor, b_nD: torch.Tensor) -> torch.Tensor:
        return dot(a_nD, b_nD) * float(a_nD.sum() * 0 + 1)

    dot = flat.dot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "dot", reading)
        exchange = Exchange(tree("2x1"), kind="flat")
        return step(exchange, 8, True, rank)


@pytest.mark.ranks
def test_a_wait_in_the_backward_pass_is_seen() -> None:
    for rank, waits in enumerate(run_ranks(2, waits_in_backward)):
        assert any("after the dispatch: aten::_local_scalar_dense" in w for w in waits), (
            rank,
            waits,
        )
