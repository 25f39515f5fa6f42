"""What a library of kernels must get right: small fixed cases that planted bugs are tried on."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable

import torch

from tamoe import ops
from tamoe.kernel_library import KernelLibrary
from tests.op_cases import Sums, make_choices, make_sums, same_bits, unaligned
from tests.shim_library import SEEDS, on_shim


def check_index(library: KernelLibrary) -> None:
    for tokens, top_k, experts in ((2100, 3, 40), (300, 8, 7), (33, 1, 1), (1000, 2, 1500)):
        index_TK = make_choices(tokens, tokens, top_k, experts, "any", torch.int64)
        group_N = torch.arange(experts) * 5 // experts
        plain = ops.build_index(index_TK, experts, group_N, 5)
        for seed in SEEDS:
            with on_shim(seed, library):
                built = ops.build_index(index_TK, experts, group_N, 5)
            assert all(map(torch.equal, built, plain)), f"seed {seed}"


def check_copy(library: KernelLibrary) -> None:
    for width, dtype in ((512, torch.float32), (130, torch.bfloat16), (33, torch.uint8)):
        rows = torch.randint(0, 99, (21, width)).to(dtype)
        for row_nD in (rows, unaligned(rows)):
            source, target = torch.randint(-1, 21, (15,)), torch.randperm(16)[:15]
            source[0], target[0] = -1, 16  # zeros up to the last byte
            plain, out = torch.zeros(17, width, dtype=dtype), torch.zeros(17, width, dtype=dtype)
            ops.copy_rows_(plain, row_nD, source, target)
            with on_shim(1, library):
                ops.copy_rows_(out, row_nD, source, target)
            assert torch.equal(out, plain)


def check_far_rows(library: KernelLibrary) -> None:
    """More bytes, and more elements, than an int32 counts; the pages in between are not touched."""
    far = 2**31 + 5
    with on_shim(0, library):
        memory_n1 = torch.empty(far + 1, 1, dtype=torch.uint8)
        memory_n1[far] = 77
        out_11 = torch.zeros(1, 1, dtype=torch.uint8)
        ops.copy_rows_(out_11, memory_n1, torch.tensor([far]))
        assert out_11.item() == 77
        del memory_n1
        row_nD = torch.empty(far // 8 + 1, 8, dtype=torch.bfloat16)
        row_nD[far // 8] = 1.5
        index, offset = torch.tensor([far // 8]), torch.tensor([0, 1])
        assert ops.combine(row_nD, offset, index).tolist() == [[1.5] * 8]


def check_sums(library: KernelLibrary) -> None:
    for dtype in ops.ROW_DTYPES:
        for width, weighted in ((64, True), (64, False), (33, True), (520, True)):
            case = make_sums(width, [3, 0, 1, 5, 2] * 6, width, dtype, weighted, extra=2)
            moved = unaligned(case.row_nD)
            for row_nD in (case.row_nD, moved):
                _compare(library, Sums(row_nD, *list(vars(case).values())[1:]))


def _compare(library: KernelLibrary, case: Sums) -> None:
    terms = (case.offset_S1, case.index_J, case.weight_J)
    plain = ops.combine(case.row_nD, *terms)
    plain_row, plain_weight = ops.combine_backward(case.grad_SD, case.row_nD, *terms)
    with on_shim(1, library):
        assert same_bits(ops.combine(case.row_nD, *terms), plain)
        grad_row, grad_weight = ops.combine_backward(case.grad_SD, case.row_nD, *terms)
    assert same_bits(grad_row, plain_row)
    if plain_weight is not None and grad_weight is not None:
        scale = plain_weight.abs().max() * 1e-4
        assert bool(((grad_weight - plain_weight).abs() <= scale).all())


def check_peers(library: KernelLibrary) -> None:
    """Three processes exchange rows that tell their sender, epoch and place, 100 times."""
    ranks, width, most, rounds = 3, 12, 9, 100
    capacity = ranks * most
    header = library.code("peer_header_bytes", ranks)
    stride = (header + capacity * width * 4 + 4095) // 4096 * 4096
    memory = torch.frombuffer(mmap.mmap(-1, stride * ranks), dtype=torch.uint8)
    children = []
    for rank in range(1, ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _peer(library, memory, rank, ranks, width, most, rounds, stride)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    try:
        _peer(library, memory, 0, ranks, width, most, rounds, stride)
    finally:
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * len(codes)


def _peer(library: KernelLibrary, memory: torch.Tensor, me: int, ranks: int, *sizes: int) -> None:
    """One process; if it fails, it raises every flag, so that the others need not wait for it."""
    try:
        _rounds(library, memory, me, ranks, *sizes)
    except AssertionError:
        for peer in memory.view(torch.int64).view(ranks, -1):
            peer[8 : 8 + 2 * ranks] = 2**62
        raise


def _rounds(
    library: KernelLibrary,
    memory: torch.Tensor,
    me: int,
    ranks: int,
    width: int,
    most: int,
    rounds: int,
    stride: int,
) -> None:
    header = library.code("peer_header_bytes", ranks)
    addresses = (ctypes.c_void_p * ranks)(*(memory.data_ptr() + stride * r for r in range(ranks)))
    mine = memory[stride * me + header : stride * (me + 1)].view(torch.int32)
    received, status = torch.zeros(ranks, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    library.call("shim_seed", me)
    for epoch in range(1, rounds + 1):
        generator = torch.Generator().manual_seed(epoch)
        count_PP = torch.randint(0, most, (ranks, ranks), generator=generator)
        send = count_PP[me].contiguous()
        total = int(send.sum())
        row = torch.arange(total * width, dtype=torch.int32) + epoch * 7919 + me * 104729
        library.call(
            "peer_store",
            *(addresses, ranks, me, epoch, row.data_ptr(), None, total, total, width * 4),
            *(ranks * most, send.data_ptr(), received.data_ptr(), status.data_ptr()),
            *(4_000_000_000, None),
        )
        assert int(status) == 0, f"status {int(status)} in epoch {epoch}"
        assert torch.equal(received, count_PP[:, me]), f"counts of epoch {epoch}"
        start = 0
        for sender in range(ranks):
            first = int(count_PP[sender, :me].sum()) * width
            size = int(count_PP[sender, me]) * width
            expected = torch.arange(first, first + size, dtype=torch.int32)
            expected += epoch * 7919 + sender * 104729
            assert torch.equal(mine[start : start + size], expected), f"rows of epoch {epoch}"
            start += size


CHECKS: dict[str, Callable[[KernelLibrary], None]] = {
    "index": check_index,
    "copy": check_copy,
    "far": check_far_rows,
    "sums": check_sums,
    "peers": check_peers,
}
