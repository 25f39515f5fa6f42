"""On a GPU: operators and exchanges give the bits of plain PyTorch on the CPU, and do not wait.

Skipped where there is no GPU. One is enough: ranks share it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st

from tamoe import MoE, SwitchGate, ops
from tamoe.exchange import Exchange
from tamoe.experts import GroupedFeedForward
from tamoe.kernel_calls import library_of
from tamoe.peer_store import PeerStore
from tamoe.topology import run_ranks
from tests.op_cases import Sums, choices, make_choices, make_sums, same_bits, sums
from tests.test_hierarchical import DTYPES, routing, tree
from tests.test_peer_store import counts_of, revealing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
often = settings(max_examples=150, deadline=None)
GPU = "cuda"


def on_gpu(value: Any) -> Any:
    """The same on a GPU; a tensor that starts at an odd place still does."""
    if not isinstance(value, torch.Tensor):
        return value
    shift = value.storage_offset() % 16 if value.is_contiguous() else 0
    memory = torch.empty(value.numel() + shift, dtype=value.dtype, device=GPU)
    return memory[shift:].view(value.shape).copy_(value)


def equal(on_device: Any, on_host: Any) -> bool:
    return all(same_bits(a.cpu(), b) for a, b in zip(on_device, on_host, strict=True))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever would wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- operators ----------------------------------------------------------------------------------


def test_there_are_kernels_for_this_gpu() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library_of(torch.empty(0, device=GPU)) is not None


@given(case=choices(), num_groups=st.integers(0, 9))
@often
def test_index(case: Any, num_groups: int) -> None:
    index_TK, experts = case
    group_N = torch.arange(experts) * max(num_groups, 1) // experts if num_groups else None
    plain = ops.build_index(index_TK, experts, group_N, num_groups)
    assert equal(ops.build_index(on_gpu(index_TK), experts, on_gpu(group_N), num_groups), plain)


@pytest.mark.parametrize("num_experts", [1, 256, 3000, 12288, 12289])
def test_index_of_many_choices(num_experts: int) -> None:
    index_TK = make_choices(1, 40_000, 8, num_experts, "any", torch.int64)
    group_N = torch.arange(num_experts) * 5 // num_experts
    plain = ops.build_index(index_TK, num_experts, group_N, 5)
    for _ in range(3):  # blocks that race would not do the same each time
        assert equal(ops.build_index(on_gpu(index_TK), num_experts, on_gpu(group_N), 5), plain)


@given(
    num_rows=st.integers(1, 300),
    width=st.sampled_from([0, 1, 2, 7, 16, 33, 129, 512, 2050]),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64]),
    indices=st.tuples(st.booleans(), st.booleans()),
    shift=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
@often
def test_copies(num_rows, width, dtype, indices, shift, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    row_nD = torch.randint(0, 100, (num_rows + shift, width), generator=generator).to(dtype)[shift:]
    source_m = target_m = None
    if indices[0]:
        source_m = torch.randint(-1, num_rows, (num_rows,), generator=generator)
    if indices[1]:
        target_m = torch.randperm(num_rows + 2, generator=generator)[:num_rows]
        target_m[torch.rand(num_rows, generator=generator) < 0.1] = -1
    plain = torch.full((num_rows + 2, width), 101).to(dtype)
    out = on_gpu(plain)
    ops.copy_rows_(plain, row_nD, source_m, target_m)
    ops.copy_rows_(out, on_gpu(row_nD), on_gpu(source_m), on_gpu(target_m))
    assert equal([out], [plain])


def combined(case: Sums) -> list[torch.Tensor]:
    terms = (case.offset_S1, case.index_J, case.weight_J)
    rows, weights = ops.combine_backward(case.grad_SD, case.row_nD, *terms)
    weights = [] if weights is None else [weights]
    return [ops.combine(case.row_nD, *terms), rows, *weights]


@given(case=sums())
@often
def test_sums(case: Sums) -> None:
    plain = combined(case)
    out = combined(Sums(*map(on_gpu, vars(case).values())))
    assert equal(out[:2], plain[:2])
    if len(plain) == 3:
        size = case.grad_SD.double().norm() * case.row_nD.double().norm()
        tolerance = 1e-13 if case.row_nD.dtype == torch.float64 else 1e-5
        assert bool(((out[2].cpu() - plain[2]).abs() <= tolerance * size).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_sums_at_any_address(dtype: torch.dtype) -> None:
    case = make_sums(5, [3, 0, 1, 8, 2] * 900, 520, dtype, weighted=True, extra=2)
    moved = Sums(*map(on_gpu, vars(case).values()))
    shifted = torch.empty(case.row_nD.numel() + 1, dtype=dtype, device=GPU)[1:]
    odd = Sums(shifted.view(case.row_nD.shape).copy_(case.row_nD), *list(vars(moved).values())[1:])
    for given_case in (moved, odd):
        assert equal(combined(given_case)[:2], combined(case)[:2])


def test_rows_behind_what_32_bits_count() -> None:
    far = 2**31 + 5
    memory_n1 = torch.empty(far + 1, 1, dtype=torch.uint8, device=GPU)
    memory_n1[far] = 77
    out_11 = torch.zeros(1, 1, dtype=torch.uint8, device=GPU)
    ops.copy_rows_(out_11, memory_n1, on_gpu(torch.tensor([far])))
    assert out_11.item() == 77
    del memory_n1
    row_nD = torch.empty(far // 8 + 1, 8, dtype=torch.bfloat16, device=GPU)
    row_nD[far // 8] = 1.5
    index, offset = on_gpu(torch.tensor([far // 8])), on_gpu(torch.tensor([0, 1]))
    assert ops.combine(row_nD, offset, index).tolist() == [[1.5] * 8]


# ---- PyTorch ------------------------------------------------------------------------------------


def arguments(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    case = make_sums(11, [2, 0, 3, 1], 5, dtype, weighted=True, extra=1)
    row_nD, weight_J = torch.randn(7, 5).to(GPU, dtype), torch.randn(6).to(GPU, dtype)
    indices = on_gpu(case.offset_S1), on_gpu(case.index_J)
    return (row_nD.requires_grad_(), *indices, weight_J.requires_grad_())


def test_gradients_and_operators_check_out() -> None:
    assert torch.autograd.gradcheck(ops.combine, arguments(torch.float64))
    index_m = on_gpu(torch.tensor([4, 0, 4, -1]))
    assert torch.autograd.gradcheck(ops.gather_rows, (arguments(torch.float64)[0], index_m))
    row_nD, offset, index, weight = arguments(torch.float32)
    index_TK = on_gpu(make_choices(2, 9, 3, 6, "any", torch.int64))
    cases: dict[str, list[tuple[Any, ...]]] = {
        "build_index": [(index_TK, 6, on_gpu(torch.arange(6) // 2), 3), (index_TK, 6, None, 0)],
        "gather_rows": [(row_nD, index_m)],
        "combine": [(row_nD, offset, index, weight), (row_nD, offset, index, None)],
    }
    for name, calls in cases.items():
        for call in calls:
            torch.library.opcheck(getattr(torch.ops.tamoe, name).default, call)


def test_compiled_without_a_break() -> None:
    row_nD, offset, index, weight = arguments(torch.float32)
    packed_m = on_gpu(torch.tensor([6, 2, 2, 0, 5, 1, 3]))

    def step(row_nD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.combine(ops.gather_rows(row_nD, packed_m) * 2, offset, index, weight).square()

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        out = function(row_nD, weight)
        results.append((out, *torch.autograd.grad(out.sum(), (row_nD, weight))))
    assert all(map(same_bits, *([x.cpu() for x in result] for result in results)))


def pack_and_sum(x_TD: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
    built = ops.build_index(index_TK, 16)
    top_k = index_TK.shape[1]
    row_nD = ops.gather_rows(x_TD, built.choice // top_k)
    by_token = built.choice.argsort(stable=True)
    offset = torch.arange(len(x_TD) + 1, device=x_TD.device) * top_k
    return ops.combine(row_nD, offset, by_token)


def step_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x_TD = torch.randn(300, 64)
    return x_TD, torch.rand(300, 16).argsort(1)[:, :4]


def test_nothing_waits_for_the_device(no_waiting: None) -> None:
    x_TD, index_TK = (
        x.to(GPU, non_blocking=True) for x in map(torch.Tensor.pin_memory, step_inputs())
    )
    out_TD = pack_and_sum(x_TD.requires_grad_(), index_TK)
    out_TD.sum().backward()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(out_TD, 4 * x_TD) and torch.equal(x_TD.grad, torch.full_like(x_TD, 4))


def test_kernels_run_on_the_stream_that_is_current() -> None:
    x_TD, index_TK = map(on_gpu, step_inputs())
    expected_TD, side = pack_and_sum(x_TD, index_TK), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late_TD = torch.zeros_like(x_TD)
        torch.cuda._sleep(200_000_000)  # a tenth of a second, in which other streams would go ahead
        late_TD.copy_(x_TD)
        out_TD = pack_and_sum(late_TD, index_TK)
    side.synchronize()
    assert torch.equal(out_TD, expected_TD)


def test_kernels_are_captured_in_a_graph() -> None:
    x_TD, index_TK = map(on_gpu, step_inputs())
    pack_and_sum(x_TD, index_TK)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = pack_and_sum(x_TD, index_TK)
    for _ in range(3):
        x_TD.normal_()
        index_TK.copy_(torch.rand(300, 16, device=GPU).argsort(1)[:, :4])
        graph.replay()
        assert torch.equal(out_TD, pack_and_sum(x_TD, index_TK))


# ---- exchanges ----------------------------------------------------------------------------------


def through(exchange: Exchange, device: str, given: tuple[Any, ...]) -> list[torch.Tensor]:
    """Rows received, output, gradients; all on the CPU."""
    x_TD, index_TK, weight_TK, experts, grad_TD = given
    x_TD = x_TD.to(device, copy=True).requires_grad_()
    weight_TK = None if weight_TK is None else weight_TK.to(device, copy=True).requires_grad_()
    row_RD, handle = exchange.dispatch(x_TD, index_TK.to(device), weight_TK, num_experts=experts)
    # Doubled, which rounds nothing: what experts compute is not the point here.
    out_TD = exchange.combine(row_RD * 2, handle)
    out_TD.backward(grad_TD.to(device))
    weights = [] if weight_TK is None else [weight_TK.grad]
    return [x.detach().cpu() for x in (row_RD, out_TD, x_TD.grad, *weights) if x is not None]


def differing(rank: int, shape: str, seeds: int = 8) -> list[str]:
    """Cases in which an exchange on the GPU and one on the CPU differ."""
    exchanges = {
        "flat, single": Exchange(tree(shape), kind="flat", schedule="single"),
        "flat, rounds": Exchange(tree(shape), kind="flat", schedule="rounds"),
        "hierarchical": Exchange(tree(shape), kind="hierarchical", chunks=1),
        "hierarchical, parts": Exchange(tree(shape), kind="hierarchical", chunks=3),
        "local": Exchange(tree(shape), kind="none"),
    }
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(100 * seed + rank)
        dtype, tokens = DTYPES[seed % 4], 0 if seed == rank else 40
        x_TD, grad_TD = (torch.randn(tokens, 33, generator=generator).to(dtype) for _ in range(2))
        index_TK = routing(generator, tokens, 8, 3)
        weight_TK = torch.rand(tokens, 3, generator=generator) if seed % 3 else None
        given = (x_TD, index_TK, weight_TK, 8, grad_TD)
        for name, exchange in exchanges.items():
            host, gpu = (through(exchange, device, given) for device in ("cpu", GPU))
            if not all(map(same_bits, host[:3], gpu[:3])):
                found.append(f"{name}, {dtype}, seed {seed}")
            elif weight_TK is not None and not torch.allclose(
                host[3], gpu[3], atol=1e-3, rtol=1e-3
            ):
                found.append(f"{name}, {dtype}, seed {seed}: gradient of weights")
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("shape", ["1x2", "2x2", "[[1,1],[1,[1]]]"])
def test_exchanges_of_ranks_that_share_the_gpu(shape: str) -> None:
    library_of(torch.empty(0, device=GPU))  # compiled once, not by every rank
    ranks = 2 if shape == "1x2" else 4
    assert run_ranks(ranks, differing, shape, timeout_s=250) == [[]] * ranks


def by_nccl(rank: int) -> list[str]:
    dist.destroy_process_group()
    store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    found = differing(0, "1x1", 4)
    exchange = Exchange(tree("1x1"), kind="flat")
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(64, 16, generator=generator).to(GPU).requires_grad_()
    index_TK = routing(generator, 64, 8, 2).to(GPU)
    grad_TD = torch.ones_like(x_TD)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        row_RD, handle = exchange.dispatch(x_TD, index_TK, num_experts=8)
        in_dispatch = len(waits)
        exchange.combine(row_RD * 2, handle).backward(grad_TD)
    torch.cuda.set_sync_debug_mode("default")
    if in_dispatch > 1 or len(waits) > in_dispatch:
        found += [f"{w.filename}:{w.lineno} {w.message}" for w in waits]
    dist.destroy_process_group()
    return found


@pytest.mark.ranks
def test_an_exchange_by_nccl_waits_once() -> None:
    assert run_ranks(1, by_nccl, timeout_s=200) == [[]]


# ---- peer stores --------------------------------------------------------------------------------


def stored(rank: int, rounds: int, width: int, dtype: torch.dtype) -> int:
    """Rows that reached this rank, each looked at, by stores into memory that processes share."""
    ranks, most, moved = dist.get_world_size(), 5, 0
    store = PeerStore(None, capacity_rows=ranks * most, width=width, dtype=dtype, device=GPU)
    for epoch in range(1, rounds + 1):
        count_PP = counts_of(epoch, ranks, most)
        total = int(count_PP[rank].sum())
        row_ND, source = revealing(rank, epoch, total, width, dtype), None
        if epoch % 2:
            source = torch.randperm(total)
            row_ND = torch.empty_like(row_ND).index_copy_(0, source, row_ND)
        received = store.exchange(on_gpu(row_ND), on_gpu(count_PP[rank]), on_gpu(source))
        store.check()
        assert torch.equal(received.cpu(), count_PP[:, rank])
        got_RD, start = store.buffer_RD.cpu(), 0
        for sender in range(ranks):
            sent = revealing(sender, epoch, int(count_PP[sender].sum()), width, dtype)
            mine = sent.split(count_PP[sender].tolist())[rank]
            assert torch.equal(got_RD[start : start + len(mine)], mine), (epoch, sender)
            start += len(mine)
        moved += start
    return moved


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks", "width", "dtype"),
    [(1, 64, torch.float32), (2, 36, torch.int32), (3, 7, torch.uint8), (4, 36, torch.int32)],
)
def test_rows_stored_into_other_processes_memory(ranks: int, width: int, dtype: Any) -> None:
    library_of(torch.empty(0, device=GPU))
    rounds = int(os.environ.get("TAMOE_GPU_ROUNDS", "100"))
    moved = run_ranks(ranks, stored, rounds, width, dtype, timeout_s=280)
    expected = sum(counts_of(epoch, ranks, 5) for epoch in range(1, rounds + 1))
    assert moved == expected.sum(0).tolist()


# ---- layer --------------------------------------------------------------------------------------


def trained(device: str) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    gate = SwitchGate(16, 8, capacity=1.25, drop="probs")
    layer = MoE(gate, GroupedFeedForward(8, 16, 32), num_experts=8).double().to(device)
    x_TD = torch.randn(64, 16, dtype=torch.float64).to(device).requires_grad_()
    out = layer(x_TD)
    (out.hidden.square().sum() + out.aux_loss).backward()
    return (out.hidden, x_TD.grad, *(p.grad for p in layer.parameters()))


def test_a_layer_learns_the_same_as_on_the_cpu() -> None:
    for on_device, on_host in zip(trained(GPU), trained("cpu"), strict=True):
        torch.testing.assert_close(on_device.cpu(), on_host, rtol=1e-9, atol=1e-12)
