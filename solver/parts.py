"""In how many parts an exchange moves its rows, and whose turn is next on the slow links.

The exchanges ask it, and so does their cost model.
"""

# Parts hide work inside nodes behind the slow links. What is not hidden is a share of the shorter
# of the two, which falls with their number, while each costs messages: so their number goes with
# the square root of the bytes that leave a node. With as many as suit even routing, top-2 routing
# to experts that are 64 times as likely on the own node took 1.5 to 2.2 times as long (emulated,
# 2x4 and 4x2 at 100 Mbit/s).
PART_BYTES, FAR_BYTES = 2**18, 5 * 2**14
MOST_PARTS = 6
# More of them where the largest would have more bytes for other nodes: messages beyond what sockets
# hold keep ranks in a round for long, nodes get out of step, and links idle. 110 MB a link in six
# parts took 1.11 to 1.20 times as long as in 24 (emulated, 4x2 at 50 Mbit/s), 25 MB as long.
LARGEST_PART_BYTES, MOST_SMALL_PARTS = 2**22, 32
# Slices of a flat exchange cost messages and waits, so they are few and of a size that hides them;
# with 4 of them, rows that are packed and under way take a quarter of those sent.
SLICE_BYTES = 2**21
MOST_SLICES = 4
# Rows inside a node go through shared memory some at a time: at most so many that they stay in a
# cache, about a third of all, so that they take little memory, and enough to hide the message that
# goes with them. Halves of outboxes, which are powers of two, hold just so many.
LEAST_INSIDE_BYTES, MOST_INSIDE_BYTES = 2**19, 2**21


def num_parts(rank_bytes: float, far_bytes: float) -> int:
    """Parts that suit a rank's tokens, of so many bytes, whose copies for other nodes have so many.

    >>> num_parts(0, 0), num_parts(1e6, 3e6), num_parts(3e7, 3e7), num_parts(1e9, 3e9)
    (1, 3, 14, 32)
    >>> [num_parts(4e6, far_bytes) for far_bytes in (0, 1e5, 3e5, 1e6, 3e6)]
    [1, 1, 2, 3, 6]
    """
    parts = min(rank_bytes // PART_BYTES, round((far_bytes / FAR_BYTES) ** 0.5), MOST_PARTS)
    small = min(2 * far_bytes // LARGEST_PART_BYTES, MOST_SMALL_PARTS)  # of n, 2 / (n + 1)
    return int(max(parts, small, 1))


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
