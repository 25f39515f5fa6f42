"""The exchange in training code that does unusual things: devices, graphs, experts, failures."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from tamoe import ExchangeError
from tamoe.exchange import Exchange, Kind
from tamoe.handle import Handle
from tamoe.topology import Topology, run_ranks
from tamoe.transfer import Transfer, Waiting
from tamoe.waiting import Patience

pytestmark = pytest.mark.ranks
KINDS: tuple[Kind, ...] = ("flat", "hierarchical")
TREE = Topology.from_tree("2x2", bandwidth_bytes_per_s=(1e9, 1e9))
TIMEOUT_S = 30.0


def given(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, experts and weights; nothing for the experts 6 and 7 of rank 3."""
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(9 + rank, 5, generator=generator).requires_grad_()
    index_TK = torch.rand(len(x_TD), 6, generator=generator).argsort(1)[:, :3]
    return x_TD, index_TK, torch.rand(index_TK.shape, generator=generator).requires_grad_()


# ---- a default device ---------------------------------------------------------------------------


def under_a_default_device(rank: int, kind: Kind) -> bool:
    results = []
    for device in ("meta", None):  # the first run connects
        x_TD, index_TK, weight_TK = given(rank)
        torch.set_default_device(device)
        exchange = Exchange(TREE, kind=kind, timeout_s=TIMEOUT_S)
        row_RD, handle = exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=8)
        out_TD = exchange.combine(row_RD.tanh(), handle)
        out_TD.square().sum().backward()
        torch.set_default_device(None)
        results.append((row_RD, out_TD, x_TD.grad, weight_TK.grad))
    return all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", KINDS)
def test_a_default_device_changes_nothing(kind: Kind) -> None:
    assert run_ranks(4, under_a_default_device, kind) == [True] * 4


# ---- derivatives --------------------------------------------------------------------------------


def second_derivative(rank: int, kind: Kind) -> bool:
    x_TD, index_TK, weight_TK = given(rank)
    exchange = Exchange(TREE, kind=kind, timeout_s=TIMEOUT_S)
    grads = []
    for create_graph in (False, True):
        row_RD, handle = exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=8)
        out_TD = exchange.combine(row_RD, handle)
        (grad_TK,) = torch.autograd.grad(out_TD.sum(), weight_TK, create_graph=create_graph)
        grads.append(grad_TK.detach())
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad_TK.square().sum().backward()
    return torch.equal(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_derivative_raises_and_is_not_left_out(kind: Kind) -> None:
    assert run_ranks(4, second_derivative, kind) == [True] * 4


def experts_that_lose_the_graph(rank: int, kind: Kind) -> bool:
    """Those of rank 3 have no rows and return new ones, those of rank 1 return detached ones.

    What they return has no graph at all, or one that leads to their parameter alone.
    """
    exchange, grads = Exchange(TREE, kind=kind, timeout_s=TIMEOUT_S), []
    for lost in ("all", "rows", ""):
        x_TD, index_TK, weight_TK = given(rank)
        two = torch.tensor(2.0, requires_grad=lost == "rows")
        weight_TK = weight_TK.detach()  # they would keep the ranks together
        row_RD, handle = exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=8)
        if rank == 3:
            assert not len(row_RD)
            out_RD = (torch.empty(0, 5) if lost else row_RD) * two
        elif rank == 1:
            out_RD = (row_RD.detach() if lost else row_RD * 0 + row_RD.detach()) * two
        else:
            out_RD = row_RD * 2
        exchange.combine(out_RD, handle).square().sum().backward()
        grads.append(x_TD.grad)
    return all(torch.equal(grads[0], other) for other in grads[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_lose_the_graph_keep_no_rank_waiting(kind: Kind) -> None:
    assert run_ranks(4, experts_that_lose_the_graph, kind) == [True] * 4


def some_experts_train(rank: int, kind: Kind, through: bool) -> list[bool]:
    """Experts of all ranks, of two, or of none train; tokens and weights need no gradients."""
    exchange, grads, needs = Exchange(TREE, kind=kind, timeout_s=TIMEOUT_S), [], []
    for training in ((0, 1, 2, 3), (1, 3), ()):
        factor = torch.tensor(2.0, requires_grad=rank in training)
        head = torch.tensor(3.0, requires_grad=True)  # each rank has something to train
        x_TD, index_TK, weight_TK = (t.detach() for t in given(rank))
        for _ in range(2):  # layers: tokens of the second need gradients where any expert trains
            with torch.set_grad_enabled(through):
                row_RD, handle = exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=8)
            x_TD = exchange.combine(row_RD * factor, handle)
        needs.append(x_TD.requires_grad)
        (x_TD * head).square().sum().backward()
        grads.append((head.grad, factor.grad))
    same = torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][0], grads[2][0])
    return [same and (rank not in (1, 3) or torch.equal(grads[0][1], grads[1][1])), *needs]


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_experts_pass_gradients_on_where_others_train(kind: Kind, through: bool) -> None:
    assert run_ranks(4, some_experts_train, kind, through) == [[True, True, True, False]] * 4


# ---- checkpoints and evaluations ----------------------------------------------------------------


def noted(exchange: Exchange) -> list[int]:
    """The parts of every dispatch from now on, also of those that a checkpoint leaves early."""
    planner, parts = exchange._planner, []
    num_parts = planner.num_parts

    def noting(x_TD: torch.Tensor) -> int:
        parts.append(num_parts(x_TD))
        return parts[-1]

    planner.num_parts = noting  # type: ignore[method-assign]
    return parts


def checkpointed(rank: int, kind: Kind, weighted: bool, combines: bool) -> list[list[int]]:
    """Parts of every dispatch; gradients are those of the layer without a checkpoint.

    The experts of rank 3 keep nothing for their backward pass, those of the others do. A checkpoint
    is of the whole layer, or of all but combine.
    """
    grads, parts = [], []
    for wrapped in (False, True):
        exchange = Exchange(TREE, kind=kind, timeout_s=TIMEOUT_S)
        parts.append(noted(exchange))

        def experts(
            x_TD: torch.Tensor,
            weight_TK: torch.Tensor,
            index_TK: torch.Tensor,
            exchange: Exchange = exchange,
        ) -> tuple[torch.Tensor, Handle]:
            factor_TK = weight_TK.softmax(1) if weighted else None
            row_RD, handle = exchange.dispatch(x_TD.tanh(), index_TK, factor_TK, num_experts=8)
            return row_RD + 1 if rank == 3 else row_RD.exp(), handle

        def layer(*inputs: torch.Tensor, exchange: Exchange = exchange) -> torch.Tensor:
            return exchange.combine(*experts(*inputs))

        def again(function: Callable[..., Any], *inputs: torch.Tensor) -> Any:
            return checkpoint(function, *inputs, use_reentrant=False)

        for step in range(2):
            x_TD, index_TK, weight_TK = given(rank + 4 * step)
            inputs = x_TD, weight_TK, index_TK
            if not wrapped:
                out_TD = layer(*inputs)
            elif combines:
                out_TD = again(layer, *inputs)
            else:
                out_TD = exchange.combine(*again(experts, *inputs))
            out_TD.square().sum().backward()
            grads.append((x_TD.grad, weight_TK.grad))
    for plain, anew in zip(grads[:2], grads[2:], strict=True):
        assert torch.equal(plain[0], anew[0])
        assert torch.equal(plain[1], anew[1]) if weighted else anew[1] is None
    return parts


@pytest.mark.parametrize("combines", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_changes_no_gradient(kind: Kind, weighted: bool, combines: bool) -> None:
    # What a checkpoint runs anew is another dispatch, in as many parts as suit the one before.
    first = 6 if kind == "hierarchical" else 1
    expected = [[first, 1], [first, 1, 1, 1]]
    assert run_ranks(4, checkpointed, kind, weighted, combines) == [expected] * 4


def evaluated_in_between(rank: int, kind: Kind) -> bool:
    """Every second pass trains; the others have more tokens."""
    exchange, grads = Exchange(TREE, kind=kind, timeout_s=TIMEOUT_S), []
    for trains in (False, True, False, True):
        with torch.inference_mode(not trains):
            x_TD, index_TK, weight_TK = given(rank)
            if not trains:
                x_TD, index_TK, weight_TK = (t.repeat(99, 1) for t in (x_TD, index_TK, weight_TK))
            row_RD, handle = exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=8)
            out_TD = exchange.combine(row_RD, handle)
        if trains:
            out_TD.square().sum().backward()
            grads.append((x_TD.grad, weight_TK.grad))
    return all(map(torch.equal, *grads))


@pytest.mark.parametrize("kind", KINDS)
def test_training_follows_evaluations_in_inference_mode(kind: Kind) -> None:
    assert run_ranks(4, evaluated_in_between, kind) == [True] * 4


# ---- failures -----------------------------------------------------------------------------------


def a_failure_of_its_own(rank: int) -> str:
    """Rank 0 fails between nodes and goes on living: what the others are told."""
    store: Any = dist.distributed_c10d._get_default_store()
    timeout_s = {1: TIMEOUT_S}.get(rank, 3.0)
    exchange = Exchange(TREE, kind="hierarchical", timeout_s=timeout_s)
    x_TD, index_TK, weight_TK = given(rank)
    exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=8)

    def fail(self: Transfer, number: int) -> Waiting:
        raise MemoryError("no room")

    if rank == 0:
        Transfer.start = fail  # type: ignore[method-assign]
    try:
        exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=8)
    except (ExchangeError, MemoryError) as error:
        store.set(f"told {rank}", "")
        store.wait([f"told {other}" for other in range(4)], timedelta(seconds=60))
        return str(error)
    return "nothing"


def test_a_rank_that_fails_by_itself_tells_its_node() -> None:
    told = run_ranks(4, a_failure_of_its_own)
    assert told[0] == "no room"
    assert "dispatch, inside the node: failed with rank 0" in told[1]
    assert "rank 0 closed its connection" in told[1] or "rank 0 cannot be told" in told[1]


class Work:
    """Notes how it is waited for."""

    def __init__(self) -> None:
        self.waits: list[Any] = []

    def wait(self, *timeout: Any) -> None:
        self.waits.append(timeout)


@pytest.mark.parametrize(
    ("timeout_s", "by_host", "expected"),
    [(2.0, True, (timedelta(seconds=2),)), (2.0, False, ()), (None, True, ()), (None, False, ())],
)
def test_a_timeout_of_its_own_only_where_the_host_waits(timeout_s, by_host, expected) -> None:
    work = Work()
    Patience("exchange", timeout_s).wait([(work, (1,))], "here", by_host=by_host)  # type: ignore[list-item]
    assert work.waits == [expected]
