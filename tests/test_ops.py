"""Operators: kernels on the CPU = plain PyTorch = results worked out by hand, in every schedule."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tamoe import ops
from tamoe.precision import weigh
from tamoe.summation import add_up, plan_sum
from tamoe.topology.errors import InputError, KernelError
from tests.op_cases import (
    Sums,
    choices,
    index_by_hand,
    make_choices,
    make_sums,
    same_bits,
    sums,
    sums_by_hand,
    unaligned,
)
from tests.shim_library import SEEDS, needs_gxx, on_shim

seeds = st.sampled_from(SEEDS)
# The sanitizers look at the same kernels once more; a part of the cases will do.
often = settings(max_examples=40 if os.environ.get("TAMOE_TEST_SANITIZE") else 120, deadline=None)


def combined(case: Sums) -> torch.Tensor:
    return ops.combine(case.row_nD, case.offset_S1, case.index_J, case.weight_J)


def gradients(case: Sums) -> tuple[torch.Tensor, torch.Tensor | None]:
    return ops.combine_backward(
        case.grad_SD, case.row_nD, case.offset_S1, case.index_J, case.weight_J
    )


# ---- index build --------------------------------------------------------------------------------


@given(case=choices(), num_groups=st.integers(0, 9), data=st.data())
@often
def test_plain_index_is_what_a_sort_by_hand_gives(case, num_groups, data):
    index_TK, num_experts = case
    of_expert = None
    if num_groups:
        group = st.integers(0, num_groups - 1)
        of_expert = data.draw(st.lists(group, min_size=num_experts, max_size=num_experts))
    group_N = None if of_expert is None else torch.tensor(of_expert)
    built = ops.build_index(index_TK, num_experts, group_N, num_groups)
    assert [x.tolist() for x in built] == index_by_hand(
        index_TK, num_experts, of_expert, num_groups
    )


@needs_gxx
@given(case=choices(), num_groups=st.integers(0, 9), seed=seeds)
@often
def test_index_kernel_is_the_plain_one(case, num_groups, seed):
    index_TK, num_experts = case
    group_N = torch.arange(num_experts) * max(num_groups, 1) // num_experts if num_groups else None
    plain = ops.build_index(index_TK, num_experts, group_N, num_groups)
    with on_shim(seed):
        built = ops.build_index(index_TK, num_experts, group_N, num_groups)
    assert all(torch.equal(a, b) for a, b in zip(built, plain, strict=True))


@needs_gxx
@pytest.mark.parametrize("num_experts", [1, 1024, 3000, 12288, 12289])
def test_index_kernel_with_any_number_of_experts(num_experts):
    # 8, 4 (the limit of 48 KB), 1 warps a block; beyond 12,288 plain PyTorch steps in.
    index_TK = make_choices(1, 900, 5, num_experts, "any", torch.int64)
    plain = ops.build_index(index_TK, num_experts)
    with on_shim():
        assert all(map(torch.equal, ops.build_index(index_TK, num_experts), plain))


# ---- copies -------------------------------------------------------------------------------------


@needs_gxx
@given(
    num_rows=st.integers(0, 40),
    width=st.sampled_from([0, 1, 2, 7, 16, 33, 129, 512, 2050]),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64]),
    indices=st.tuples(st.booleans(), st.booleans()),
    start=st.booleans(),
    seed=seeds,
    data=st.data(),
)
@often
def test_copy_kernel_is_the_plain_one(num_rows, width, dtype, indices, start, seed, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    row_nD = torch.randint(0, 100, (num_rows, width), generator=generator).to(dtype)
    copies = data.draw(st.integers(0, 2 * num_rows)) if num_rows and indices[0] else num_rows
    out_rows = copies + data.draw(st.integers(0, 3))
    source_m = target_m = None
    if indices[0]:
        source_m = torch.randint(-1, num_rows or 1, (copies,), generator=generator)
    if indices[1]:
        target_m = torch.randperm(out_rows, generator=generator)[:copies]
        target_m[torch.rand(copies, generator=generator) < 0.1] = -1
    before = torch.full((out_rows, width), 101).to(dtype)
    if start:
        row_nD, before = unaligned(row_nD), unaligned(before)
    plain = before.clone()
    ops.copy_rows_(plain, row_nD, source_m, target_m)
    by_hand = before.clone()
    for m in range(copies):
        s, t = (m if i is None else int(i[m]) for i in (source_m, target_m))
        if t >= 0:
            by_hand[t] = row_nD[s] if s >= 0 else 0
    assert torch.equal(plain, by_hand)
    with on_shim(seed):
        ops.copy_rows_(before, row_nD, source_m, target_m)
    assert torch.equal(before, plain)


@needs_gxx
@pytest.mark.parametrize("shift", [1, 2, 4, 8])
def test_copy_at_any_address(shift):
    memory, out = torch.arange(8192, dtype=torch.int32).view(torch.uint8), torch.zeros(4096).byte()
    row_nD, out_MD = memory[shift : shift + 1920].view(15, 128), out[16 : 16 + 1920].view(15, 128)
    with on_shim():
        ops.copy_rows_(out_MD, row_nD)
    assert torch.equal(out_MD, row_nD)
    assert not out[:16].any() and not out[16 + 1920 :].any()


def test_gather_sums_the_gradient_in_the_order_of_the_index():
    row_nD = torch.randn(5, 7, dtype=torch.bfloat16, requires_grad=True)
    index_m = torch.tensor([3, 0, 3, -1, 3, 1])
    grad_mD = torch.randn(6, 7).to(torch.bfloat16)
    gathered = ops.gather_rows(row_nD, index_m)
    gathered.backward(grad_mD)
    assert torch.equal(gathered[3], torch.zeros(7))
    wide = grad_mD.float()
    assert same_bits(row_nD.grad[3], ((wide[0] + wide[2]) + wide[4]).to(torch.bfloat16))
    assert same_bits(row_nD.grad[[0, 1]], grad_mD[[1, 5]])
    assert not row_nD.grad[[2, 4]].any()


@pytest.mark.parametrize("num_rows", [0, 1, 20_000])  # the last is more than build_index sorts
@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_gxx)])
def test_gather_has_a_gradient_for_any_number_of_rows(native, num_rows):
    row_nD = torch.randn(num_rows, 3, requires_grad=True)
    index_m = torch.arange(-2, min(num_rows, 50)).repeat(2)
    with on_shim() if native else torch.enable_grad():
        ops.gather_rows(row_nD, index_m).sum().backward()
    wanted = torch.zeros(num_rows, 3)
    wanted[:50] = 2
    assert torch.equal(row_nD.grad, wanted)


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_gxx)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_small_integers_are_indices(native, dtype):
    row_nD, weight_J = torch.randn(5, 3), torch.rand(300)
    offset_S1, index_J = torch.tensor([0, 100, 120]), torch.arange(300) % 5
    source_m, target_m = torch.tensor([4, -1, 0]), torch.tensor([1, 2, -1])

    def results(*indices: torch.Tensor) -> list[torch.Tensor]:
        offset_S1, index_J, source_m, target_m = indices
        out_MD = torch.ones(4, 3)
        ops.copy_rows_(out_MD, row_nD, source_m, target_m)
        terms = row_nD, offset_S1, index_J[:120], weight_J[:120]
        first = torch.tensor([0, 5, 5], dtype=offset_S1.dtype), index_J[:5], weight_J[:5]
        grads = ops.combine_backward(torch.ones(2, 3), row_nD, *first)
        return [out_MD, ops.gather_rows(row_nD, source_m), ops.combine(*terms), *grads]

    indices = offset_S1, index_J, source_m, target_m
    with on_shim() if native else torch.enable_grad():
        small = results(*(index.to(dtype) for index in indices))
        for got, wanted in zip(small, results(*indices), strict=True):
            assert same_bits(got, wanted)


# ---- sums ---------------------------------------------------------------------------------------


@given(case=sums())
@often
def test_plain_sums_are_those_made_term_by_term(case):
    assert same_bits(combined(case), sums_by_hand(case))


@needs_gxx
@given(case=sums(), seed=seeds)
@often
def test_combine_kernel_is_the_plain_one(case, seed):
    plain = combined(case)
    with on_shim(seed):
        assert same_bits(combined(case), plain)


@needs_gxx
@given(case=sums(), seed=seeds)
@often
def test_backward_kernel_is_the_plain_one(case, seed):
    plain_row, plain_weight = gradients(case)
    with on_shim(seed):
        grad_row, grad_weight = gradients(case)
    assert same_bits(grad_row, plain_row)
    if case.weight_J is None:
        assert grad_weight is None and plain_weight is None
    else:
        size = case.grad_SD.double().norm() * case.row_nD.double().norm()
        tolerance = 1e-13 if case.row_nD.dtype == torch.float64 else 1e-5
        assert grad_weight.dtype == plain_weight.dtype
        assert bool(((grad_weight - plain_weight).abs() <= tolerance * size).all())


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_gxx)])
@pytest.mark.parametrize("length", [2, 300])  # beyond a piece
def test_weights_of_a_row_in_several_sums_have_gradients_of_their_own(native, length):
    row_nD = torch.randn(5, 1024, dtype=torch.float64)
    index_J = torch.randint(0, 5, (4 * length,))
    offset_S1 = torch.arange(0, 4 * length + 1, length)
    weight_J = torch.rand(4 * length, dtype=torch.float64, requires_grad=True)
    grad_SD = torch.randn(4, 1024, dtype=torch.float64)
    with on_shim() if native else torch.enable_grad():
        ops.combine(row_nD, offset_S1, index_J, weight_J).backward(grad_SD)
    expected_J = (grad_SD.repeat_interleave(length, 0) * row_nD[index_J]).sum(1)
    torch.testing.assert_close(weight_J.grad, expected_J, rtol=1e-12, atol=1e-12)


@needs_gxx
@pytest.mark.parametrize("dtype", ops.ROW_DTYPES)
def test_unaligned_rows_give_the_same_sums(dtype):
    case = make_sums(3, [2, 0, 5, 1], 64, dtype, weighted=True)
    moved = Sums(unaligned(case.row_nD), case.offset_S1, case.index_J, case.weight_J, case.grad_SD)
    with on_shim():
        assert same_bits(combined(moved), combined(case))
        assert same_bits(gradients(moved)[0], gradients(case)[0])


@pytest.mark.parametrize("dtype", ops.ROW_DTYPES)
def test_combine_is_the_canonical_sum_of_the_exchange(dtype):
    index_TK = make_choices(5, 50, 4, 9, "distinct", torch.int64)
    built = ops.build_index(index_TK, 9)
    choice_n = built.choice[: int(built.count_N.sum())]
    token_n = choice_n // 4
    row_nD, weight_n = torch.randn(len(choice_n), 33).to(dtype), torch.rand(len(choice_n))
    plan = plan_sum(token_n, torch.zeros_like(token_n), 50, ())
    order = torch.argsort(token_n, stable=True)
    offset = torch.nn.functional.pad(torch.bincount(token_n, minlength=50).cumsum(0), (1, 0))
    expected_TD = add_up(weigh(row_nD, weight_n), plan)
    assert same_bits(ops.combine(row_nD, offset, order, weight_n[order]), expected_TD)


# ---- PyTorch ------------------------------------------------------------------------------------


def arguments(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    case = make_sums(11, [2, 0, 3, 1], 5, dtype, weighted=True, extra=1)
    assert case.weight_J is not None
    row_nD, weight_J = torch.randn(7, 5).to(dtype), torch.randn(6).to(dtype)
    return (row_nD.requires_grad_(), case.offset_S1, case.index_J, weight_J.requires_grad_())


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_gxx)])
def test_gradcheck(native):
    with on_shim() if native else torch.enable_grad():
        assert torch.autograd.gradcheck(ops.combine, arguments())
        rows, index = arguments()[0], torch.tensor([4, 0, 4, -1])
        assert torch.autograd.gradcheck(ops.gather_rows, (rows, index))


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_gxx)])
def test_opcheck(native):
    row_nD, offset, index, weight = arguments(torch.float32)
    rows = row_nD.detach()
    index_TK, group_N = make_choices(2, 9, 3, 6, "any", torch.int64), torch.arange(6) // 2
    cases = {
        "build_index": [(index_TK, 6, group_N, 3), (index_TK, 6, None, 0)],
        "copy_rows_": [(torch.zeros(9, 5), rows, None, torch.tensor([8, 1, 2, 3, 4, 0, 7]))],
        "gather_rows": [(row_nD, torch.tensor([4, 0, 4, -1]))],
        "combine": [(row_nD, offset, index, weight), (row_nD, offset, index, None)],
        "combine_backward": [
            (torch.randn(4, 5), rows_, offset, index, weight.detach())
            for rows_ in (rows, rows.t().contiguous().t())
        ],
    }
    with on_shim() if native else torch.enable_grad():
        for name, calls in cases.items():
            for call in calls:
                torch.library.opcheck(getattr(torch.ops.tamoe, name).default, call)


@pytest.mark.slow
@needs_gxx
@pytest.mark.timeout(900)  # a busy machine's compiler
@pytest.mark.parametrize(
    ("native", "backend"), [(False, "inductor"), (False, "aot_eager"), (True, "aot_eager")]
)
def test_compiled_without_a_break(native, backend):
    row_nD, offset, index, weight = arguments(torch.float32)
    packed_m = torch.tensor([6, 2, 2, 0, 5, 1, 3])

    def step(row_nD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.combine(ops.gather_rows(row_nD, packed_m) * 2, offset, index, weight).square()

    results = []
    with on_shim() if native else torch.enable_grad():
        for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
            out = function(row_nD, weight)
            results.append((out, *torch.autograd.grad(out.sum(), (row_nD, weight))))
    for eager, compiled in zip(*results, strict=True):
        assert same_bits(eager, compiled)


def test_a_gradient_without_strides_is_taken_as_it_is():
    # sum().backward() hands over an expanded scalar: one number, strides 0.
    for context in (on_shim(), torch.enable_grad()):
        row_nD, offset, index, weight = arguments()
        with context:
            ops.combine(row_nD, offset, index, weight).sum().backward()
        assert torch.equal(row_nD.grad[index], weight.detach().unsqueeze(1).expand(-1, 5))


# ---- bad input ----------------------------------------------------------------------------------

ROWS, INDEX = torch.zeros(3, 4), torch.tensor([0, 1])


def back(grad_SD: torch.Tensor, row_nD: torch.Tensor, weight: torch.Tensor | None = None) -> None:
    """Gradients of one sum of two rows."""
    ops.combine_backward(grad_SD, row_nD, torch.tensor([0, 2]), INDEX, weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.build_index(INDEX, 2), r"shape \(2,\); allowed: \[T, K\], K >= 1"),
        (lambda: ops.build_index(ROWS, 2), "expert_index_TK is torch.float32; allowed: int64"),
        (lambda: ops.build_index(INDEX[None], 0), "num_experts is 0; allowed: 1 to"),
        (lambda: ops.build_index(INDEX[None], 3, INDEX, 2), r"shape \(2,\); allowed: \[3\]"),
        (lambda: ops.build_index(INDEX[None], 3, None, 2), "num_groups, .*, is 2; allowed: 0"),
        (lambda: ops.build_index(INDEX[None], 2, INDEX + 1, 2), "holds 1 to 2; allowed: 0 to 1"),
        (lambda: ops.build_index(INDEX[None], 2, -INDEX, 2), "holds -1 to 0; allowed: 0 to 1"),
        (lambda: ops.copy_rows_(ROWS.t(), ROWS.t()), r"strides \(1, 4\); allowed: a contiguous"),
        (lambda: ops.copy_rows_(ROWS, ROWS[:, :3]), r"\(3, 4\) and \(3, 3\); allowed: \[M, D\]"),
        (lambda: ops.copy_rows_(ROWS, ROWS.half()), "torch.float16; allowed: that of out_MD"),
        (lambda: ops.copy_rows_(ROWS[:1], ROWS), "out_MD has 1 rows; allowed: >= 3"),
        (lambda: ops.copy_rows_(ROWS, ROWS[:1], None, INDEX), "row_nD has 1 rows; allowed: >= 2"),
        (lambda: ops.copy_rows_(ROWS, ROWS, INDEX, INDEX[:1]), "1 entries; allowed: 2"),
        (lambda: ops.gather_rows(ROWS.int(), INDEX), "row_nD is torch.int32 .* allowed: two dims"),
        (lambda: ops.gather_rows(ROWS, INDEX[None]), r"index_m has shape \(1, 2\); allowed: one"),
        (lambda: ops.combine(ROWS, INDEX[:0], INDEX), "offset_S1 has no entry"),
        (lambda: ops.combine(ROWS, INDEX, INDEX, ROWS[0]), r"weight_J is .*allowed: .*, \[2\]"),
        (lambda: ops.combine(ROWS, INDEX, INDEX, INDEX), "weight_J is torch.int64 .* floating"),
        (lambda: ops.combine(ROWS, INDEX, INDEX.to("meta")), "index_J is on meta; allowed: .* cpu"),
        (lambda: back(ROWS[:1], ROWS.half()), "grad_SD is torch.float32 .* allowed: torch.float16"),
        (lambda: back(ROWS[:1, :2], ROWS), r"grad_SD is .* \(1, 2\); allowed: .* \(1, 4\)"),
        (lambda: back(ROWS, ROWS), r"grad_SD is .* \(3, 4\); allowed: .* \(1, 4\)"),
        (lambda: back(ROWS[:1], ROWS, ROWS[0]), r"weight_J is .*allowed: .*, \[2\]"),
        (lambda: back(ROWS[:1].to("meta"), ROWS), "grad_SD is on meta; allowed: .* cpu"),
    ],
)
def test_arguments_that_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


@needs_gxx
@pytest.mark.parametrize("value", [3, 2**40])
def test_kernels_stop_at_an_index_out_of_range(value):
    index = torch.tensor([0, value])
    with on_shim():
        for call in (
            lambda: ops.gather_rows(ROWS, index),
            lambda: ops.copy_rows_(ROWS.clone(), ROWS, None, torch.tensor([0, 1, value])),
            lambda: ops.combine(ROWS, torch.tensor([0, 2]), index),
            lambda: ops.combine(ROWS, torch.tensor([0, value]), INDEX),
            lambda: ops.combine_backward(ROWS[:1], ROWS, torch.tensor([0, 2]), index),
            lambda: ops.build_index(INDEX[None], 2, torch.tensor([0, value]), 2),
            lambda: ops.build_index(INDEX[None], 2, torch.tensor([-value, 1]), 2),
            lambda: ops.build_index(INDEX[None], 2, torch.tensor([0, 2**32]), 2),  # 0 in 32 bits
        ):
            with pytest.raises(KernelError, match=r"thread .* (out of range|beyond the terms)"):
                call()


@needs_gxx
def test_nan_and_infinite_values_pass_through():
    rows = torch.tensor([[float("nan"), 1.0], [float("inf"), 70000.0], [-float("inf"), 1e-8]])
    for dtype in ops.ROW_DTYPES:
        row_nD, offset = rows.to(dtype), torch.tensor([0, 1, 3])
        case = (row_nD, offset, torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, float("nan")]))
        plain = ops.combine(*case)
        with on_shim():
            assert same_bits(ops.combine(*case), plain)
