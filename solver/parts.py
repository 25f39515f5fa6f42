"""In how many parts an exchange moves its rows, and whose turn is next on the slow links.

The exchanges ask it, and so does their cost model.
"""

PART_BYTES = 2**18
MOST_PARTS = 6
# Slices of a flat exchange cost messages and waits, so they are few and of a size that hides them;
# with 4 of them, rows that are packed and under way take a quarter of those sent.
SLICE_BYTES = 2**21
MOST_SLICES = 4
# Rows inside a node go through shared memory some at a time: at most so many that they stay in a
# cache, about a third of all, so that they take little memory, and enough to hide the message that
# goes with them. Halves of outboxes, which are powers of two, hold just so many.
LEAST_INSIDE_BYTES, MOST_INSIDE_BYTES = 2**19, 2**21


def num_parts(rank_bytes: float) -> int:
    """Parts that suit the tokens of a rank, of so many bytes; each costs messages.

    >>> num_parts(0), num_parts(1e6), num_parts(1e9)
    (1, 3, 6)
    """
    return int(min(max(rank_bytes // PART_BYTES, 1), MOST_PARTS))


def slices_for(num_bytes: float) -> int:
    """Slices of a flat exchange in which a rank sends at most so many bytes.

    >>> slices_for(0), slices_for(2**22), slices_for(2**30)
    (1, 2, 4)
    """
    return int(min(max(num_bytes // SLICE_BYTES, 1), MOST_SLICES))


def inside_slice_bytes(largest_bytes: float) -> int:
    """Bytes of a slice inside a node, a power of two, where a rank has so many of the largest part.

    >>> inside_slice_bytes(0), inside_slice_bytes(2**21), inside_slice_bytes(2**30)
    (524288, 1048576, 2097152)
    """
    third = 1 << (int(largest_bytes) // 4).bit_length()  # from a quarter to a half
    return min(max(third, LEAST_INSIDE_BYTES), MOST_INSIDE_BYTES)


def part_shares(num_parts: int) -> list[float]:
    """Shares of the tokens in each part: every part is smaller than the one before.

    >>> part_shares(2)
    [0.6666666666666666, 0.3333333333333333]
    """
    total = num_parts * (num_parts + 1) / 2
    return [number / total for number in range(num_parts, 0, -1)]


def turns(num_parts: int, num_hops: int) -> list[int]:
    """Whose hop is next on the slow links; a part's own hops are apart if there are others.

    >>> turns(3, 1), turns(3, 2)
    ([0, 1, 2], [0, 1, 2, 0, 1, 2])
    """
    slots = [(part + 2 * hop, hop, part) for part in range(num_parts) for hop in range(num_hops)]
    return [part for _, _, part in sorted(slots)]
