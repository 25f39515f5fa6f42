"""Rows in pieces and in wide words: the same bits as one by one, whatever the shape."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings, strategies as st

import tamoe.pieces
from tamoe import ops
from tamoe.pieces import pieces
from tamoe.precision import accumulation_dtype, dot, weigh
from tests.op_cases import make_sums, same_bits, sums_by_hand

often = settings(max_examples=80, deadline=None)
dtypes = st.sampled_from(ops.ROW_DTYPES)
widths = st.sampled_from([0, 1, 2, 7, 8, 33, 128])
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """16 rows a piece, so that a few rows make several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tamoe.pieces, "PIECE_NUMBERS", 1)
        yield


def normal(seed: int, *size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)


@given(num_rows=st.integers(0, 70), width=widths)
@often
def test_pieces_cover_every_row_once_in_order(num_rows, width):
    covered = [
        row for piece in pieces(torch.zeros(num_rows, width)) for row in range(num_rows)[piece]
    ]
    assert covered == list(range(num_rows))


@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.one_of(
        st.lists(st.integers(0, 5), max_size=70),
        st.builds(lambda k, s: [k] * s, st.integers(1, 8), st.integers(0, 70)),
    ),
    width=widths,
    dtype=dtypes,
    weighted=st.booleans(),
)
@often
def test_sums_in_pieces_are_those_made_term_by_term(seed, lengths, width, dtype, weighted):
    case = make_sums(seed, lengths, width, dtype, weighted, extra=2)
    got_SD = ops.combine(case.row_nD, case.offset_S1, case.index_J, case.weight_J)
    assert same_bits(got_SD, sums_by_hand(case))


@given(
    seed=st.integers(0, 2**32 - 1),
    num_rows=st.integers(0, 70),
    width=widths,
    before=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    dtype=st.sampled_from([torch.uint8, *ops.ROW_DTYPES]),
    chosen=st.booleans(),
)
@often
def test_rows_are_stored_bit_for_bit_wherever_they_lie(
    seed, num_rows, width, before, dtype, chosen
):
    """Any bits, NaNs of every kind too; rows begin ``before`` so many numbers of their memory."""
    generator = torch.Generator().manual_seed(seed)

    def memory(start: int, rows: int) -> torch.Tensor:
        size_bytes = (start + rows * width) * dtype.itemsize
        random = torch.randint(256, (size_bytes,), dtype=torch.uint8, generator=generator)
        return random.view(dtype)[start:].view(rows, width)

    def bits(rows: torch.Tensor) -> torch.Tensor:
        return rows.clone().view(BITS.get(dtype.itemsize, dtype))

    row_nD, out_MD = memory(before[0], num_rows), memory(before[1], num_rows + 3)
    source_m = (
        torch.randint(num_rows, (num_rows,), generator=generator) if chosen and num_rows else None
    )
    target_m = torch.randperm(num_rows + 3, generator=generator)[:num_rows]
    expected = bits(out_MD)
    expected[target_m] = bits(row_nD if source_m is None else row_nD[source_m])
    ops.copy_rows_(out_MD, row_nD, source_m, target_m)
    assert torch.equal(bits(out_MD), expected)


def test_one_row_with_the_stride_of_wider_rows_is_stored():
    wide_MD = torch.zeros(3, 9, dtype=torch.bfloat16)
    out_MD = wide_MD[:1, :8]  # contiguous to torch, though the stride is 18 bytes
    ops.copy_rows_(out_MD, torch.ones(1, 8, dtype=torch.bfloat16), None, torch.tensor([0]))
    assert wide_MD.tolist() == [[1.0] * 8 + [0.0], [0.0] * 9, [0.0] * 9]


@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(0, 70), width=widths, dtype=dtypes)
@often
def test_weighing_and_dots_in_pieces_are_those_of_all_rows_at_once(seed, num_rows, width, dtype):
    wide = accumulation_dtype(dtype)
    row_nD, other_nD = (normal(seed + i, num_rows, width, dtype=dtype) for i in range(2))
    weight_n = normal(seed + 2, num_rows, dtype=torch.float32)
    product_nD = row_nD.to(wide) * weight_n.to(wide).unsqueeze(1)
    assert same_bits(weigh(row_nD, weight_n), product_nD.to(dtype))
    two_nD = [torch.cat([rows, rows]).to(wide) for rows in (row_nD, other_nD)]
    assert same_bits(dot(row_nD, other_nD), (two_nD[0] * two_nD[1]).sum(1)[:num_rows])


def test_a_long_row_alone_has_the_dot_product_that_it_has_among_others():
    # Above 32,768 numbers torch deals one row out to threads, which adds up in another order.
    a_nD, b_nD = (normal(seed, 17, 200_003, dtype=torch.float32) for seed in (1, 2))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        alone_n = torch.cat([dot(a_nD[i : i + 1], b_nD[i : i + 1]) for i in range(17)])
        assert same_bits(dot(a_nD, b_nD), alone_n)
        assert same_bits(alone_n, (a_nD * b_nD).sum(1))
    finally:
        torch.set_num_threads(threads)
