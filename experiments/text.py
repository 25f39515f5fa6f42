"""The text that the demo trains on, as tokens: bytes, numbered in the order of their value.

- A token is a byte that occurs in the text, so the vocabulary is small and any UTF-8 file works.
- Every tenth block of 4 KiB is held out for validation. Both parts come from the same works, and
  no byte is in both.
- Every rank trains on windows from the whole text, so ranks see the same kind of data: what a
  local router gains then comes from routing, not from text that belongs to a node. Each rank
  validates on its own stretch of the held-out part.
- A batch is a pure function of (seed, step, rank): every strategy sees the same data in the same
  order, whatever ran before it.

The text that is shipped is described in ``shakespeare.md`` beside it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tamoe.topology.errors import InputError

SHIPPED_TEXT = Path(__file__).parent / "shakespeare.txt"
MIN_TEXT_BYTES = 100_000  # ten held-out blocks of 4 KiB hold at least two of them
BLOCK_BYTES = 4096
HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Corpus:
    """A text as tokens, split in two parts that share no byte."""

    train: np.ndarray  # [tokens] uint8
    validation: np.ndarray  # [tokens] uint8
    vocabulary: bytes  # token t stands for the byte vocabulary[t]
    source: str  # where the text came from, for the report

    @property
    def vocabulary_size(self) -> int:
        """Number of different tokens."""
        return len(self.vocabulary)


def load_text(path: str | os.PathLike[str] | None = None) -> Corpus:
    """Read a text file and split it for training and validation.

    Parameters
    ----------
    path
        A UTF-8 text of at least 100,000 bytes; the plays that come with tamoe if None.

    Returns
    -------
    Corpus

    Raises
    ------
    InputError
        The file cannot be read, is too short or is not text.

    Examples
    --------
    >>> corpus = load_text()
    >>> corpus.vocabulary_size, len(corpus.train) > 1_800_000
    (80, True)
    """
    source = SHIPPED_TEXT if path is None else Path(path)
    try:
        content = source.read_bytes()
    except OSError as error:
        raise InputError(f"text: cannot read {source}: {error.strerror}") from None
    _check_is_text(content, source)
    values = np.frombuffer(content, dtype=np.uint8)
    present = np.unique(values)
    number_of = np.zeros(256, dtype=np.uint8)
    number_of[present] = np.arange(len(present), dtype=np.uint8)
    train, validation = split(number_of[values])
    name = "Shakespeare, 15 plays and the sonnets (public domain)" if path is None else source.name
    return Corpus(train, validation, present.tobytes(), name)


def check_room(corpus: Corpus, *, num_ranks: int, length: int) -> None:
    """Raise :class:`InputError` where a rank's part of the text holds too few windows."""
    needed = 4 * (length + 1)
    smallest = len(corpus.validation) // num_ranks
    if smallest < needed:
        raise InputError(
            f"text: {corpus.source} leaves {smallest:,} held-out bytes for each of {num_ranks} "
            f"ranks; allowed: at least {needed:,}, that is a text of about "
            f"{needed * num_ranks * HELD_OUT_EVERY:,} bytes"
        )


def split(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(train, validation): every tenth block of 4 KiB is held out.

    >>> train, validation = split(np.arange(20 * 4096))
    >>> len(train) // 4096, len(validation) // 4096, len(np.intersect1d(train, validation))
    (18, 2, 0)
    """
    block = np.arange(len(tokens)) // BLOCK_BYTES
    held_out = block % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return tokens[~held_out], tokens[held_out]


def train_batch(
    corpus: Corpus,
    *,
    seed: int,
    step: int,
    rank: int,
    sequences: int,
    length: int,
    only_part_of: int | None = None,
) -> np.ndarray:
    """Windows of the training text, drawn afresh for every step and rank.

    Parameters
    ----------
    seed, step, rank
        Non-negative; the batch depends on nothing else.
    sequences, length
        Size of the batch. A window has one token more than ``length``: the last target.
    only_part_of
        Number of ranks: draw from this rank's stretch of the text only, as loaders that shard
        data do. None: from the whole text.

    Returns
    -------
    numpy.ndarray
        ``[sequences, length + 1]``, int64.
    """
    draw = np.random.default_rng([seed, step, rank])
    part = corpus.train if only_part_of is None else rank_part(corpus.train, rank, only_part_of)
    return _windows(part, draw.integers(0, len(part) - length, size=sequences), length)


def validation_batch(
    corpus: Corpus, *, index: int, rank: int, num_ranks: int, sequences: int, length: int
) -> np.ndarray:
    """Windows of the held-out text that lies within a rank's part; fixed, spread evenly over it.

    Parameters
    ----------
    index
        Number of the batch, non-negative; large ones overlap with earlier ones.
    rank, num_ranks, sequences, length
        As for :func:`train_batch`.

    Returns
    -------
    numpy.ndarray
        ``[sequences, length + 1]``, int64.
    """
    part = rank_part(corpus.validation, rank, num_ranks)
    golden = 0.6180339887498949  # its multiples cover an interval evenly, however many they are
    place = (np.arange(sequences) + sequences * index) * golden % 1.0
    return _windows(part, (place * (len(part) - length)).astype(np.int64), length)


def rank_part(tokens: np.ndarray, rank: int, num_ranks: int) -> np.ndarray:
    """The stretch of a text that belongs to a rank; neighbours stay neighbours.

    >>> rank_part(np.arange(10), 1, 4).tolist()
    [2, 3, 4]
    """
    edges = [len(tokens) * r // num_ranks for r in (rank, rank + 1)]
    return tokens[edges[0] : edges[1]]


def _windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)


def _check_is_text(content: bytes, source: Path) -> None:
    if len(content) < MIN_TEXT_BYTES:
        raise InputError(
            f"text: {source} has {len(content):,} bytes; allowed: at least {MIN_TEXT_BYTES:,}, "
            f"or no --text for the plays that come with tamoe"
        )
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"text: {source} is not text (byte {error.start:,} is no UTF-8); "
            f"allowed: a plain text file in UTF-8"
        ) from None
    # A text has almost no control characters besides line ends, tabs and form feeds.
    control = sum(
        content.count(bytes([value])) for value in range(32) if value not in (9, 10, 12, 13)
    )
    if b"\0" in content or control > len(content) // 1000:
        raise InputError(
            f"text: {source} is not text ({control:,} control bytes); "
            f"allowed: a plain text file in UTF-8"
        )
