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


@given(TABLES, st.randoms(use_true_random=False))
def test_rows_belong_where_a_sort_puts_them(received_CPE, random):
    order = RowOrder(received_CPE)
    num_parts, num_sources = len(received_CPE), len(received_CPE[0])

    def rows_of(blocks):
        """Expert, source and part of the rows of blocks of a part and a source, as they arrive."""
        return [
            (expert, source, part, number)
            for part, source in blocks
            for expert, count in enumerate(received_CPE[part][source])
            for number in range(count)
        ]

    blocks = [(part, source) for source in range(num_sources) for part in range(num_parts)]
    place_of = {row: place for place, row in enumerate(sorted(rows_of(blocks)))}
    places = [place_of[row] for row in rows_of(blocks)]
    assert order.by_source(CPU).tolist() == places
    assert order.is_by_source() == (places == sorted(places))
    for part in range(num_parts):  # of which the sources arrive in any order
        sources = random.sample(range(num_sources), num_sources)
        arriving = rows_of([(part, source) for source in sources])
        assert order.places(part, sources, CPU).tolist() == [place_of[row] for row in arriving]


@given(COUNTS, st.integers(1, 4))
def test_slices_hold_every_row_once_and_as_many_of_each_pair(splits, num_slices):
    slices = sliced(splits, num_slices, CPU)
    firsts = [0, *torch.tensor([0, *splits]).cumsum(0).tolist()[1:]]
    assert sorted(row for _, row_n in slices for row in row_n.tolist()) == [*range(sum(splits))]
    alone = [sliced([count], num_slices, CPU) for count in splits]  # the other end of each pair
    for number, (part, row_n) in enumerate(slices):
        assert part == [of_pair[number][0][0] for of_pair in alone]
        for count, split, (first, end) in zip(part, splits, pairwise(firsts), strict=True):
            assert abs(count - split / num_slices) < 1, number
            assert sum(first <= row < end for row in row_n.tolist()) == count
        assert row_n.tolist() == sorted(row_n.tolist())
