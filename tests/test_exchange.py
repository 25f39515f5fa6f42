"""The exchange: moves the right rows, sums in the canonical order, agrees before it moves."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tamoe.agreement import INLINE_COUNTS
from tamoe.exchange import Exchange
from tamoe.handle import device_problem, input_problem
from tamoe.record import record_exchanges
from tamoe.topology import InputError, Topology, run_ranks


def tree(shape: Any) -> Topology:
    """A topology of which only the shape matters."""
    from tamoe.topology.tree import parse_tree, tree_depth

    levels = 1 + tree_depth(parse_tree(shape))
    return Topology.from_tree(shape, bandwidth_bytes_per_s=[1e9] * levels)


# ---- one process -------------------------------------------------------------------------------


def random_index(num_tokens: int, num_experts: int, top_k: int, seed: int) -> torch.Tensor:
    """Distinct experts for each token, a fifth of the choices dropped."""
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    index_TK[torch.rand(index_TK.shape, generator=generator) < 0.2] = -1
    return index_TK


def test_gradcheck():
    index_TK = random_index(5, 4, 3, seed=0)
    index_TK[2] = -1
    exchange = Exchange()
    x_TD = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight_TK = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    matrix_NDD = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)

    def layer(x, weight, matrix):
        row_RD, handle = exchange.dispatch(x, index_TK, weight, num_experts=4)
        parts = row_RD.split(handle.counts_E)
        outs = [part @ matrix[expert] for expert, part in enumerate(parts)]
        return exchange.combine(torch.cat(outs).tanh(), handle)

    assert torch.autograd.gradcheck(layer, (x_TD, weight_TK, matrix_NDD))


def test_nan_stays_with_its_token_and_dropped_weights_are_not_looked_at():
    exchange = Exchange()
    index_TK = torch.tensor([[0, 1], [1, -1]])
    weight_TK = torch.tensor([[float("nan"), 1.0], [0.5, float("nan")]])
    row_RD, handle = exchange.dispatch(torch.ones(2, 3), index_TK, weight_TK, num_experts=2)
    out_TD = exchange.combine(row_RD, handle)
    assert out_TD[0].isnan().all()
    assert out_TD[1].tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": [[1.0]]}, "x_TD is list; allowed: torch.Tensor"),
        ({"index": None}, "expert_index_TK is NoneType; allowed: torch.Tensor"),
        ({"weight": 1.0}, "weight_TK is float; allowed: torch.Tensor"),
        ({"x": torch.zeros(2, 3, 4)}, r"x_TD is torch.float32 of shape \(2, 3, 4\); allowed"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, "x_TD is torch.int64.*allowed: .*float32"),
        ({"index": torch.zeros(3, 2, dtype=torch.int64)}, r"expert_index_TK has shape \(3, 2\)"),
        ({"index": torch.zeros(2, 0, dtype=torch.int64)}, "K >= 1"),
        ({"index": torch.zeros(2, 2)}, "expert_index_TK is torch.float32; allowed: int64"),
        ({"index": torch.tensor([[0, 4], [1, 1]])}, "holds 0 to 4; allowed: 0 to 3, or -1"),
        ({"index": torch.tensor([[0, -2], [1, 1]])}, "holds -2 to 1; allowed: 0 to 3, or -1"),
        ({"weight": torch.zeros(2, 1)}, r"weight_TK has shape \(2, 1\); allowed: .*\(2, 2\)"),
        ({"weight": torch.zeros(2, 2, dtype=torch.int64)}, "weight_TK is torch.int64"),
        ({"weight": torch.ones(2, 2, device="meta")}, "weight_TK is on meta; allowed: .* cpu"),
        (
            {"index": torch.zeros(2, 2, dtype=torch.int64, device="meta")},
            "expert_index_TK is on meta; allowed: that of x_TD, cpu",
        ),
        ({"num_experts": 0}, "num_experts is 0; allowed: a positive multiple"),
        ({"num_experts": 8.0}, "num_experts is 8.0; allowed: a positive multiple.*; an integer"),
        ({"num_experts": "8"}, "num_experts is '8'; allowed: a positive multiple.*; an integer"),
        ({"num_experts": None}, "num_experts is None; allowed: a positive multiple"),
    ],
)
def test_bad_input_is_named(change, match):
    given = {
        "x": torch.zeros(2, 3),
        "index": torch.zeros(2, 2, dtype=torch.int64),
        "weight": torch.ones(2, 2),
        "num_experts": 4,
    } | change
    with pytest.raises(InputError, match=match):
        Exchange().dispatch(
            given["x"], given["index"], given["weight"], num_experts=given["num_experts"]
        )


def test_more_choices_than_32_bits_count_are_refused():
    x_TD = torch.empty(2**30, 1, device="meta")
    problem = input_problem(
        x_TD, torch.empty(2**30, 2, dtype=torch.int8, device="meta"), None, 1, 1
    )
    assert problem is not None and "2147483648 choices; allowed: fewer than 2^31" in problem


def test_tokens_must_be_where_the_backend_works():
    group: Any = object()
    for backend in ("gloo", "mpi", None):
        with mock.patch("tamoe.handle.backend_of", return_value=backend):
            problem = device_problem(torch.device("cpu"), group)
            assert problem is None if backend else "x_TD is on cpu; allowed: cuda" in str(problem)
            assert device_problem(torch.device("cuda"), group) is None


def test_bad_construction_is_named():
    with pytest.raises(InputError, match="topology_or_plan has 8 ranks and the group 1"):
        Exchange(tree("4x2"))
    with pytest.raises(
        InputError, match="kind is 'hier'; allowed: 'auto', 'flat', 'hierarchical', 'none'"
    ):
        Exchange(kind="hier")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="schedule is 'rounds' without topology"):
        Exchange(schedule="rounds")
    row_RD, handle = Exchange().dispatch(
        torch.ones(1, 2), torch.zeros(1, 1, dtype=torch.int64), num_experts=1
    )
    with pytest.raises(InputError, match="topology_or_plan is str; allowed: Topology, Plan"):
        Exchange("plan.json")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="handle is NoneType; allowed: what dispatch returned"):
        Exchange().combine(row_RD, None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"row_RD is list; allowed: torch\.Tensor"):
        Exchange().combine([1.0], handle)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"row_RD is torch.float64 of shape \(1, 2\); allowed: to"):
        Exchange().combine(row_RD.double(), handle)
    for timeout_s in (0, -1.0, float("inf"), float("nan"), "60", True):
        with pytest.raises(InputError, match=r"timeout_s is .*; allowed: > 0 seconds, at most"):
            Exchange(timeout_s=timeout_s)  # type: ignore[arg-type]


def test_what_cannot_go_the_way_of_an_earlier_dispatch():
    exchange, index_TK = Exchange(), torch.tensor([[1, 0], [1, -1]])
    _, handle = exchange.dispatch(torch.ones(2, 3), index_TK, num_experts=2)
    for x_TD, match in (
        (torch.ones(1, 3), r"x_TD is torch.float32 of shape \(1, 3\); allowed: .* \(2, 3\)"),
        (torch.ones(2, 3).double(), "x_TD is torch.float64 .* allowed: torch.float32"),
        (torch.ones(2, 3, requires_grad=True), "requires_grad True; allowed: False"),
        (torch.ones(2, 3, device="meta"), r"x_TD is on meta; allowed: cpu"),
    ):
        with pytest.raises(InputError, match=match):
            exchange.dispatch_again(x_TD, handle)
    with torch.no_grad(), pytest.raises(InputError, match=r"gradients are off .* allowed: on"):
        exchange.dispatch_again(torch.ones(2, 3), handle)
    with pytest.raises(InputError, match="handle is of another Exchange"):
        Exchange().dispatch_again(torch.ones(2, 3), handle)
    _, again = exchange.dispatch_again(torch.ones(2, 3), handle)
    assert exchange.dispatch_again(torch.ones(2, 3), again)[0].shape == (3, 3)


# ---- ranks -------------------------------------------------------------------------------------


def identity_on(
    group: Any, topology: Topology | None, tokens: list[int], experts_per_rank: int, top_k: int
) -> None:
    """Payload that tells its origin, order of rows, identity and its gradient, every exchange."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    num_experts = experts_per_rank * num_ranks
    indices = [random_index(t, num_experts, top_k, seed=31 * r) for r, t in enumerate(tokens)]
    origin_TD = torch.stack(
        [torch.full((tokens[rank],), float(rank)), torch.arange(tokens[rank]).float()], dim=1
    )
    expected = [
        [float(source), float(token)]
        for expert in range(rank * experts_per_rank, (rank + 1) * experts_per_rank)
        for source in range(num_ranks)
        for token in range(tokens[source])
        if (indices[source][token] == expert).any()
    ]
    kept_T1 = (indices[rank] >= 0).sum(1, keepdim=True).float()
    bits = []
    ways: Any = [("flat", "single")] * 2  # again, too
    if topology is not None:
        ways += [("flat", "rounds"), ("hierarchical", "auto"), ("hierarchical", "auto")]
    for kind, schedule in ways:
        exchange = Exchange(topology, group=group, kind=kind, schedule=schedule)
        x_TD = origin_TD.clone().requires_grad_()
        row_RD, handle = exchange.dispatch(x_TD, indices[rank], num_experts=num_experts)
        assert row_RD.tolist() == expected
        assert list(handle.sent_counts_N) == [
            int((indices[rank] == expert).sum()) for expert in range(num_experts)
        ]
        back_TD = exchange.combine(row_RD, handle)
        assert torch.equal(back_TD, origin_TD * kept_T1)  # small integers: exact
        grad_TD = torch.randn(back_TD.shape, generator=torch.Generator().manual_seed(rank))
        weight_TK = torch.rand(indices[rank].shape, generator=torch.Generator().manual_seed(7))
        y_TD = (origin_TD + 0.1).requires_grad_()
        row_RD, handle = exchange.dispatch(y_TD, indices[rank], weight_TK, num_experts=num_experts)
        out_TD = exchange.combine(row_RD * 1.7, handle)
        (back_TD * grad_TD).sum().backward()
        (out_TD * grad_TD).sum().backward()
        assert x_TD.grad is not None and y_TD.grad is not None
        assert torch.allclose(x_TD.grad, grad_TD * kept_T1, rtol=1e-6)
        bits.append((out_TD.detach(), x_TD.grad, y_TD.grad))
    for other in bits[1:]:
        assert all(torch.equal(a, b) for a, b in zip(bits[0], other, strict=True))


def refusals(topology: Topology) -> list[str]:
    """What this rank is told when rank 2 alone differs; and the group still works afterwards."""
    rank = dist.get_rank()
    exchange = Exchange(topology)

    def call(
        dtype: torch.dtype = torch.float32,
        hidden_size: int = 4,
        top_k: int = 2,
        num_experts: int = 8,
        index: int = 0,
        grad: bool = False,
        weighted: bool = True,
        schedule: Any = "auto",
        levels: str = "",
        ndim: int = 2,
        device: str = "cpu",
        weight_grad: bool = False,
        kind: Any = "auto",
        chunks: Any = "auto",
        gradients: bool = True,
        pieces: int = 1,
    ) -> None:
        shape = [3] * (ndim - 1) + [hidden_size]
        x_TD = torch.ones(shape, dtype=dtype, device=device, requires_grad=grad)
        index_TK = torch.full((3, top_k), index)
        weight_TK = torch.ones(3, top_k, requires_grad=weight_grad) if weighted else None
        chosen = exchange
        if (schedule, kind) != ("auto", "auto"):
            chosen = Exchange(topology, kind=kind, schedule=schedule, chunks=chunks)
        chosen = Exchange(tree(levels)) if levels else chosen
        with torch.set_grad_enabled(gradients):
            chosen.dispatch(x_TD, index_TK, weight_TK, num_experts=num_experts, num_pieces=pieces)

    changes: list[dict[str, Any]] = [
        {"dtype": torch.float64},
        {"hidden_size": 6},
        {"top_k": 1},
        {"num_experts": 16},
        {"num_experts": 8 * 40},  # the others would send a shorter message with the counts
        {"num_experts": 12},
        {"index": 8},
        {"grad": True},
        {"weighted": False},
        {"schedule": "single"},
        {"levels": "[[2,2],[2,2]]"},  # the same nodes, under other switches
        {"ndim": 3},
        {"device": "meta"},
        {"num_experts": 8.0},
        {"weight_grad": True},
        {"gradients": False},
        {"pieces": 2},
        {"kind": "hierarchical"},
        {"kind": "hierarchical", "chunks": 4},
    ]
    told = []
    for number, change in enumerate(changes):
        others = {"kind": "hierarchical", "chunks": 3} if number + 1 == len(changes) else {}
        try:
            call(**(change if rank == 2 else others))
            told.append("nothing")
        except InputError as error:
            told.append(str(error))
        call()
    return told


def in_eight_ranks(rank: int) -> dict[str, Any]:
    """Everything that needs processes, in one start of them."""
    for num_ranks, shapes in {
        1: ["1x1"],
        2: ["1x2", "2x1"],
        4: ["2x2", "[3,1]", "[[2,1],[1]]"],
        8: ["4x2", "[3,3,2]", "[[2,2],[4]]"],
    }.items():
        group = dist.new_group(list(range(num_ranks)))
        if rank >= num_ranks:
            continue
        for number, shape in enumerate([None, *shapes]):
            topology = None if shape is None else tree(shape)
            for tokens in ([5] * 8, [3, 0, 7, 1, 0, 0, 2, 9], [0] * 8):
                identity_on(group, topology, tokens[:num_ranks], 1 + number, min(1 + number, 3))
    odd = dist.new_group([1, 3, 4, 7])
    if rank in (1, 3, 4, 7):
        identity_on(odd, tree("2x2"), [4, 0, 2, 6], 2, 3)
    mesh = dist.init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "ep"))
    identity_on(mesh["ep"].get_group(), tree("2x2"), [4, 0, 2, 6], 1, 2)
    assert Exchange(tree("2x2"), group=mesh["ep"]).num_ranks == 4
    many = INLINE_COUNTS + 3  # counts that do not fit beside the header
    identity_on(None, tree("4x2"), [30, 0, 7, 1, 5, 0, 2, 9], many, 8)
    with (
        mock.patch("tamoe.schedules.works_by_gloo", return_value=False),  # as on GPUs
        mock.patch("tamoe.transfer.works_by_gloo", return_value=False),
    ):
        identity_on(None, tree("4x2"), [3, 0, 7, 1, 0, 0, 2, 9], 2, 2)
    told = refusals(tree("4x2"))
    with record_exchanges() as record:
        index_TK = torch.arange(8).repeat(2)[:, None]  # two rows to every expert
        x_TD = torch.ones(16, 5, requires_grad=True)
        exchange = Exchange(tree("4x2"))
        row_RD, handle = exchange.dispatch(x_TD, index_TK, num_experts=8)
        exchange.combine(row_RD, handle).sum().backward()
    without = Exchange(tree("4x2"), kind="none")
    local_RD, local = without.dispatch(x_TD, torch.zeros_like(index_TK), num_experts=16)
    return {
        "told": told,
        "sent": dict(record.sent_bytes),
        "far": dict(record.cross_node_bytes),
        "counts": record.sent_counts_N,
        "positive": all(record.seconds[phase] > 0 for phase in record.sent_bytes),
        "removed": (local.counts_E, torch.equal(without.combine(local_RD, local), x_TD)),
        "defaults": (exchange.schedule, Exchange().schedule),
    }


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    return run_ranks(8, in_eight_ranks, timeout_s=200)


@pytest.mark.ranks
def test_identity_order_and_gradients_on_ranks(answers):
    assert len(answers) == 8  # the assertions ran on the ranks


@pytest.mark.ranks
def test_a_rank_that_differs_is_named_on_every_rank(answers):
    others = "rank 0, 1, 3, 4, 5, 6, 7"
    expected = [
        f"dtype differs .*: torch.float32 on {others}; torch.float64 on rank 2; allowed",
        f"hidden_size differs .*: 4 on {others}; 6 on rank 2",
        f"top_k differs .*: 2 on {others}; 1 on rank 2",
        f"num_experts differs .*: 8 on {others}; 16 on rank 2",
        f"num_experts differs .*: 8 on {others}; 320 on rank 2",
        "rank 2 of the group refused its input",
        "rank 2 of the group refused its input",
        f"requires_grad differs .*: False on {others}; True on rank 2",
        f"weight_TK differs .*: given on {others}; None on rank 2",
        f"schedule differs .*: 'rounds' on {others}; 'single' on rank 2",
        f"topology_or_plan or placement differs .*: layout .* on {others}; layout .* on rank 2",
        "rank 2 of the group refused its input",
        "rank 2 of the group refused its input",
        "rank 2 of the group refused its input",
        f"weight_TK differs .*: given on {others}; given, with gradient on rank 2",
        f"requires_grad differs .*: False on {others}; gradients off on rank 2",
        f"overlap differs .*: 1 on {others}; 2 on rank 2",
        f"kind differs .*: 'flat' on {others}; 'hierarchical' on rank 2",
        f"chunks differs .*: 3 on {others}; 4 on rank 2",
    ]
    own = {
        5: "num_experts is 12; allowed: a positive multiple",
        6: "expert_index_TK holds 8 to 8; allowed: 0 to 7",
        11: "x_TD is torch.float32 of shape",
        12: "expert_index_TK is on cpu; allowed: that of x_TD, meta",
        13: "num_experts is 8.0; allowed: a positive multiple",
    }
    for rank, answer in enumerate(answers):
        for number, (match, text) in enumerate(zip(expected, answer["told"], strict=True)):
            wanted = own.get(number, match) if rank == 2 else match
            assert re.search(wanted, text), f"rank {rank}, case {number}: {text}"


@pytest.mark.ranks
def test_record_counts_bytes_and_counts_of_every_phase(answers):
    # Two rows of 5 floats to each of 7 other ranks; 6 of those are on other nodes.
    phases = ("dispatch", "combine", "dispatch_backward", "combine_backward")
    for answer in answers:
        assert answer["sent"] == dict.fromkeys(phases, 2 * 7 * 20)
        assert answer["far"] == dict.fromkeys(phases, 2 * 6 * 20)
        assert answer["counts"] == [[2] * 8]
        assert answer["positive"]


@pytest.mark.ranks
def test_without_the_exchange_the_experts_get_equal_shares(answers):
    # 16 rows, all routed to expert 0 of 16; two local experts get 8 each, and nothing is lost.
    assert {answer["removed"] for answer in answers} == {((8, 8), True)}


@pytest.mark.ranks
def test_rounds_are_the_default_on_gloo_with_nodes(answers):
    assert {answer["defaults"] for answer in answers} == {("rounds", "single")}
