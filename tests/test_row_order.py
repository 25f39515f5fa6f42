"""Places made from tables are those that sorting gives."""

from itertools import pairwise

import torch
from hypothesis import given, strategies as st

from tamoe.row_order import RowOrder, ranges, repeated, sliced

CPU = torch.device("cpu")
COUNTS = st.lists(st.integers(0, 5), max_size=8)
TABLES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 3)).flatmap(
    lambda shape: st.lists(
        st.lists(
            st.lists(st.integers(0, 4), min_size=shape[2], max_size=shape[2]),
            min_size=shape[1],
            max_size=shape[1],
        ),
        min_size=shape[0],
        max_size=shape[0],
    )
)


@given(COUNTS, st.data())
def test_ranges_go_one_behind_the_other(counts, data):
    starts = [data.draw(st.integers(-100, 2**40)) for _ in counts]
    wanted = [s + i for s, count in zip(starts, counts, strict=True) for i in range(count)]
    assert ranges(starts, counts, CPU).tolist() == wanted
    assert repeated(counts, CPU).tolist() == [n for n, c in enumerate(counts) for _ in range(c)]


@given(TABLES)
def test_rows_belong_where_a_sort_puts_them(received_CPE):
    order = RowOrder(received_CPE)
    rows = [  # as they arrive, by source, then by part, then by expert
        (expert, source, part)
        for source in range(len(received_CPE[0]))
        for part in range(len(received_CPE))
        for expert, count in enumerate(received_CPE[part][source])
        for _ in range(count)
    ]
    sorted_rows = sorted(range(len(rows)), key=lambda row: rows[row])  # stable
    place = [sorted_rows.index(row) for row in range(len(rows))]
    assert order.by_source(CPU).tolist() == place
    assert order.is_by_source() == (place == list(range(len(rows))))
    sources = range(len(received_CPE[0]))
    placed = torch.cat([order.places(part, sources, CPU) for part in range(len(received_CPE))])
    assert placed.sort().values.tolist() == list(range(len(rows)))  # every place once
    if len(received_CPE) == 1:
        assert placed.tolist() == place


@given(COUNTS, st.integers(1, 4))
def test_slices_hold_every_row_once_and_as_many_of_each_pair(splits, num_slices):
    slices = sliced(splits, num_slices, CPU)
    firsts = [0, *torch.tensor([0, *splits]).cumsum(0).tolist()[1:]]
    assert sorted(row for _, row_n in slices for row in row_n.tolist()) == [*range(sum(splits))]
    for number, (part, row_n) in enumerate(slices):
        for count, split, (first, end) in zip(part, splits, pairwise(firsts), strict=True):
            assert abs(count - split / num_slices) < 1, number
            assert sum(first <= row < end for row in row_n.tolist()) == count
        assert row_n.tolist() == sorted(row_n.tolist())
