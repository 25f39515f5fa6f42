"""Experts at work while rows are on the links: the same results, whatever the pieces."""

from __future__ import annotations

import itertools
import threading
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from tamoe import MoE, NaiveGate, SwitchGate
from tamoe.exchange import Exchange, Kind
from tamoe.experts import FeedForward, GroupedFeedForward
from tamoe.overlap import run_overlapped
from tamoe.record import PHASES, record_exchanges
from tamoe.routing import Routing
from tamoe.topology import Topology, run_ranks
from tamoe.topology.errors import InputError

KINDS: tuple[Kind, ...] = ("flat", "hierarchical")
TREE = Topology.from_tree("2x2", bandwidth_bytes_per_s=(1e9, 1e9))
ONE = Topology.from_tree("1x1", bandwidth_bytes_per_s=(1e9, 1e9))
TIMEOUT_S = 30.0


def layer(exchange: Exchange, overlap: int, experts: Any = None, **options: Any) -> MoE:
    """The same weights whatever the overlap, in float64."""
    torch.manual_seed(5)
    gate = NaiveGate(6, 8, top_k=3, scope="shared")
    experts = experts or partial(FeedForward, 6, 7)
    made = MoE(gate, experts, num_experts=8, exchange=exchange, overlap=overlap, **options)
    return made.double()


def tokens(rank: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, 6, dtype=torch.float64, generator=generator)


def step(moe: MoE, x_TD: torch.Tensor, again: bool = False) -> list[torch.Tensor | None]:
    """Output and all gradients."""
    moe.zero_grad()
    hidden_TD = checkpoint(lambda x: moe(x).hidden, x_TD, use_reentrant=False) if again else None
    hidden_TD = moe(x_TD).hidden if hidden_TD is None else hidden_TD
    hidden_TD.square().sum().backward()
    return [hidden_TD.detach(), x_TD.grad, *(p.grad for p in moe.parameters())]


def alike(ours: list[torch.Tensor | None], others: list[torch.Tensor | None]) -> bool:
    """Equal but for how products of other sizes round; None where the other is."""
    pairs = list(zip(ours, others, strict=True))
    return all(
        a is b if a is None or b is None else torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        for a, b in pairs
    )


# ---- one rank -----------------------------------------------------------------------------------


@given(count=st.integers(0, 9), overlap=st.integers(2, 5), grouped=st.booleans())
@settings(deadline=None, max_examples=25)
def test_pieces_change_nothing(count: int, overlap: int, grouped: bool) -> None:
    results = []
    for pieces in (1, overlap):
        experts = GroupedFeedForward(8, 6, 7) if grouped else None
        x_TD = tokens(0, count).requires_grad_()
        results.append(step(layer(Exchange(), pieces, experts), x_TD))
    assert alike(*results)


def test_gradcheck() -> None:
    moe = layer(Exchange(), 3)
    assert torch.autograd.gradcheck(lambda x: moe(x).hidden, (tokens(0, 5).requires_grad_(),))


def test_a_second_derivative_raises() -> None:
    x_TD = tokens(0, 4).requires_grad_()
    (grad_TD,) = torch.autograd.grad(
        layer(Exchange(), 2)(x_TD).hidden.sum(), x_TD, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad_TD.square().sum().backward()


def test_nothing_to_train_makes_no_graph() -> None:
    moe = layer(Exchange(), 2).requires_grad_(False)
    assert not moe(tokens(0, 4)).hidden.requires_grad
    with torch.inference_mode():
        assert not moe(tokens(0, 4)).hidden.requires_grad


def test_graphs_are_kept_as_long_as_others_are() -> None:
    class Noting(nn.Module):
        def forward(self, row_RD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
            rows.append(weakref.ref(row_RD))
            return row_RD.exp()

    rows: list[weakref.ref[torch.Tensor]] = []
    x_TD = tokens(0, 4).requires_grad_()
    loss = layer(Exchange(), 2, Noting())(x_TD).hidden.square().sum()
    grads = [torch.autograd.grad(loss, x_TD, retain_graph=again)[0] for again in (True, False)]
    assert torch.equal(*grads)
    assert len(rows) == 2 and not any(row() is not None for row in rows)  # though loss is here
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_hooks_of_parameters_run_once() -> None:
    """As whoever scales gradients or reduces them over ranks needs it."""
    results = []
    for overlap in (1, 3):
        moe, seen = layer(Exchange(), overlap), []
        for parameter in moe.parameters():
            parameter.register_hook(lambda grad: 0.5 * grad)
            parameter.register_post_accumulate_grad_hook(seen.append)
        results.append(step(moe, tokens(0, 9)))
        assert len(seen) == len(list(moe.parameters()))
        moe.zero_grad()
        results.append(step(moe, tokens(0, 9)))  # hooks are still there
    assert all(alike(results[0], other) for other in results)


class Tied(nn.Module):
    """Experts with a weight that is registered elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.elsewhere = nn.Parameter(torch.tensor(2.0)), [nn.Linear(6, 6)]

    def forward(self, row_RD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        out_RD: torch.Tensor = self.elsewhere[0].to(row_RD.dtype)(row_RD * self.factor)
        return out_RD


def test_gradients_that_would_be_lost_are_refused() -> None:
    moe = layer(Exchange(), 2, Tied())
    with pytest.raises(InputError, match=r"a tensor of shape \(6, 6\) .* none of their parameters"):
        moe(tokens(0, 4))
    with torch.no_grad():
        assert moe(tokens(0, 4)).hidden.shape == (4, 6)
    moe = layer(Exchange(), 2)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        hidden_TD = moe(tokens(0, 4)).hidden
    with pytest.raises(InputError, match="saved_tensors_hooks give back copies"):
        hidden_TD.sum().backward()
    with torch.autograd.graph.save_on_cpu():  # no copy of what is there
        step(moe, tokens(0, 4))


@pytest.mark.parametrize("index", [torch.zeros(3, 2, dtype=torch.int64), torch.tensor(0), [0]])
def test_what_cannot_be_cut_is_refused_by_the_exchange(index: Any) -> None:
    with pytest.raises(InputError, match=r"expert_index_TK (has shape|is list)"):
        run_overlapped(
            Exchange(),
            lambda row_RD, _: row_RD,
            (),
            tokens(0, 4),
            index,
            None,
            num_experts=2,
            num_pieces=2,
        )


def test_gradients_that_only_a_later_piece_would_lose_are_refused() -> None:
    factor, calls = torch.ones(6, dtype=torch.float64, requires_grad=True), itertools.count()

    class Later(nn.Module):
        def forward(self, row_RD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
            return row_RD * factor if next(calls) else row_RD

    with pytest.raises(InputError, match=r"a tensor of shape \(6,\) .* none of their parameters"):
        layer(Exchange(), 2, Later())(tokens(0, 4))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_tokens_without_gradients_are_refused_by_the_exchange(dtype: torch.dtype) -> None:
    given = (lambda row_RD, _: row_RD), (), torch.zeros(4, 2, dtype=dtype)
    index_TK = torch.zeros(4, 1, dtype=torch.int64)
    with pytest.raises(InputError, match=f"x_TD is {dtype} of shape .*; allowed"):
        run_overlapped(Exchange(), *given, index_TK, None, num_experts=2, num_pieces=2)


@pytest.mark.parametrize("gradients", [False, True])
def test_experts_that_make_no_tensor_are_named(gradients: bool) -> None:
    class Nothing(nn.Module):
        def forward(self, row_RD: torch.Tensor, counts_E: torch.Tensor) -> None:
            return None

    with torch.set_grad_enabled(gradients), pytest.raises(InputError, match="row_RD is NoneType"):
        layer(Exchange(), 2, Nothing())(tokens(0, 4))


@pytest.mark.parametrize("overlap", [0, 1.5, "2"])
def test_overlap_is_refused_by_name(overlap: Any) -> None:
    with pytest.raises(InputError, match=r"overlap is .*; allowed: a whole number >= 1"):
        layer(Exchange(), overlap)


def test_experts_that_fail_raise() -> None:
    class Failing(nn.Module):
        def forward(self, row_RD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
            raise ValueError("no more")

    before = threading.active_count()
    with pytest.raises(ValueError, match="no more"):
        layer(Exchange(), 2, Failing())(tokens(0, 4))
    assert threading.active_count() == before


# ---- ranks --------------------------------------------------------------------------------------


def trained(rank: int, kind: Kind) -> list[str]:
    """What differs from a layer that does not overlap."""
    wrong = []
    exchange = Exchange(TREE, kind=kind, timeout_s=TIMEOUT_S)
    plain = layer(exchange, 1)
    for overlap in (2, 3):
        moe = layer(exchange, overlap)
        for counts in ([9, 9, 9, 9], [1, 0, 12, 5], [0, 0, 0, 0]):
            for what in ("all", "no tokens", "experts alone", "experts of some", "checkpoint"):
                for one in (plain, moe):
                    one.requires_grad_(True)
                    one.gate.requires_grad_("experts" not in what)
                    one.experts.requires_grad_(what != "experts of some" or rank in (1, 2))
                needs = what in ("all", "checkpoint")
                given_TD = [tokens(rank, counts[rank]).requires_grad_(needs) for _ in range(2)]
                again = what == "checkpoint"
                ours, others = step(moe, given_TD[0], again), step(plain, given_TD[1], again)
                wrong += [] if alike(ours, others) else [f"{overlap}, {counts}, {what}"]
    return wrong


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_change_nothing_on_ranks(kind: Kind) -> None:
    assert run_ranks(4, trained, kind, timeout_s=120) == [[]] * 4


class Constant(nn.Module):
    """A gate whose weights need no gradients, which would keep the ranks together."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x_TD: torch.Tensor) -> Routing:
        routing: Routing = self.gate(x_TD)
        return routing._replace(weight_TK=routing.weight_TK.detach())


class Losing(nn.Module):
    """Experts that lose the graph of their rows, on some ranks."""

    def __init__(self, loses: bool) -> None:
        super().__init__()
        self.factor, self.loses = nn.Parameter(torch.tensor(2.0)), loses

    def forward(self, row_RD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        return (row_RD.detach() if self.loses else row_RD) * self.factor


def losing(rank: int, kind: Kind) -> bool:
    """Whether results are the same and as many rows move."""
    exchange, results, moved = Exchange(TREE, kind=kind, timeout_s=TIMEOUT_S), [], []
    for overlap in (1, 3):
        moe = layer(exchange, overlap, Losing(rank == 1))
        moe.gate = Constant(moe.gate)
        moe.experts.requires_grad_(rank != 1)
        with record_exchanges() as record:
            results.append(step(moe, tokens(rank, 7).requires_grad_()))
        moved.append([record.sent_bytes[phase] for phase in PHASES if phase != "counts"])
    return alike(*results) and moved[0] == moved[1]


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_lose_the_graph_keep_no_rank_waiting(kind: Kind) -> None:
    assert run_ranks(4, losing, kind) == [True] * 4


def refused(rank: int) -> tuple[int, str, str]:
    """Dispatches that began and what they raise where one rank's tokens have another dtype."""
    exchange, begun = Exchange(TREE, timeout_s=TIMEOUT_S), []
    dispatch = exchange.dispatch

    def noting(*given: Any, **options: Any) -> Any:
        begun.append(given)
        return dispatch(*given, **options)

    exchange.dispatch = noting  # type: ignore[method-assign]
    moe, x_TD = layer(exchange, 3), tokens(rank, 8)
    told = []
    for other in (3, 1):
        with pytest.raises(InputError, match=f"overlap .* 2 on rank 0, 1, 3; {other} on rank 2"):
            layer(exchange, other if rank == 2 else 2)(x_TD)
    for autocast in (rank == 2, False):
        with torch.autocast("cpu", enabled=autocast):
            try:
                moe(x_TD)
            except InputError as error:
                told.append(str(error))
    mesh = dist.init_device_mesh("cpu", (4,))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    given = (lambda row_RD, _: row_RD), [sharded], x_TD, torch.zeros(8, 1, dtype=torch.int64), None
    with pytest.raises(InputError) as caught:
        run_overlapped(exchange, *given, num_experts=4, num_pieces=2)
    return len(begun), *told, str(caught.value)


@pytest.mark.ranks
def test_a_piece_that_is_refused_is_the_last_one() -> None:
    for begun, told, sharded in run_ranks(4, refused):
        assert begun == 1 + 1 + 1 + 3  # three pieces of the call that is fine
        assert "dtype differs between the ranks of the group" in told
        assert "overlap is 2 and parameters of the experts are sharded" in sharded


def skipped(rank: int) -> list[bool]:
    """Calls that are right after one in which all experts failed, on some ranks later than others.

    The piece behind that one has been asked for on all ranks: it has to move, or on none.
    """
    exchange = Exchange(TREE, kind="flat", timeout_s=TIMEOUT_S)
    plain, moe = layer(exchange, 1), layer(exchange, 3)
    calls, experts = itertools.count(), moe._run_experts

    def failing(*given: Any) -> torch.Tensor:
        if next(calls) == 1:
            if rank == 2:
                dist.barrier(group=late)  # the others have left the layer
            raise ValueError("no room")
        return experts(*given)

    late = dist.new_group()
    moe._run_experts = failing  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no room"):
        moe(tokens(rank, 9))
    if rank != 2:
        dist.barrier(group=late)
    return [alike(step(moe, tokens(rank, 9)), step(plain, tokens(rank, 9))) for _ in range(2)]


@pytest.mark.ranks
def test_ranks_stay_in_step_after_experts_that_fail() -> None:
    assert run_ranks(4, skipped) == [[True, True]] * 4


# ---- a GPU --------------------------------------------------------------------------------------


def overlapping(rank: int) -> list[bool]:
    """Whether outputs and gradients are those of a layer whose experts wait for all rows."""
    dist.destroy_process_group()
    store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    exchange, results = Exchange(ONE, kind="flat"), []
    for overlap in (1, 3):
        torch.manual_seed(1)
        gate = SwitchGate(64, 4)
        experts = GroupedFeedForward(4, 64, 256)
        moe = MoE(gate, experts, num_experts=4, exchange=exchange, overlap=overlap, device="cuda")
        for _ in range(3):  # memory of the calls before is used again
            x_TD = torch.randn(999, 64, generator=torch.Generator().manual_seed(2)).to("cuda")
            moe.zero_grad()
            hidden_TD = moe(x_TD.requires_grad_()).hidden
            hidden_TD.square().sum().backward()
        results.append([hidden_TD.detach(), x_TD.grad, *(p.grad for p in moe.parameters())])
    dist.destroy_process_group()
    return [torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True)]


@pytest.mark.ranks
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_experts_that_overlap_with_rows_by_nccl() -> None:
    (same,) = run_ranks(1, overlapping, timeout_s=200)
    assert all(same)
