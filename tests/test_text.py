"""The text of the demo: tokens, the split, each rank's part, and files that are no text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tamoe.experiments.text import (
    SHIPPED_TEXT,
    check_room,
    load_text,
    rank_part,
    split,
    train_batch,
    validation_batch,
)
from tamoe.topology.errors import InputError

SIZES = {"sequences": 4, "length": 32}


def test_the_shipped_text_is_a_megabyte_of_ascii_with_its_source_stated() -> None:
    content = SHIPPED_TEXT.read_bytes()
    assert len(content) >= 1_000_000 and content.isascii()
    assert b"Gutenberg" not in content  # its licence would come with the name
    note = SHIPPED_TEXT.with_suffix(".md").read_text()
    assert "public domain" in note and "Source" in note


def test_tokens_stand_for_the_bytes_of_the_text() -> None:
    corpus = load_text()
    content = np.frombuffer(SHIPPED_TEXT.read_bytes(), dtype=np.uint8)
    train, validation = split(content)
    vocabulary = np.frombuffer(corpus.vocabulary, dtype=np.uint8)
    assert (vocabulary[corpus.train] == train).all()
    assert (vocabulary[corpus.validation] == validation).all()
    assert corpus.vocabulary_size == len(np.unique(content))


@given(st.integers(1, 300_000))
def test_the_split_gives_every_byte_to_exactly_one_part(size: int) -> None:
    position = np.arange(size)
    train, validation = split(position)
    assert np.array_equal(np.sort(np.concatenate([train, validation])), position)


@given(st.integers(0, 5000), st.integers(1, 64))
def test_ranks_share_out_the_text_without_overlap(size: int, num_ranks: int) -> None:
    position = np.arange(size)
    parts = [rank_part(position, rank, num_ranks) for rank in range(num_ranks)]
    assert np.array_equal(np.concatenate(parts), position)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_batch_depends_on_seed_step_and_rank_alone() -> None:
    corpus = load_text()
    first = train_batch(corpus, seed=1, step=2, rank=3, **SIZES)
    train_batch(corpus, seed=9, step=9, rank=0, **SIZES)
    assert np.array_equal(first, train_batch(corpus, seed=1, step=2, rank=3, **SIZES))
    for other in ({"seed": 2}, {"step": 3}, {"rank": 4}):
        which = {"seed": 1, "step": 2, "rank": 3, **other}
        assert not np.array_equal(first, train_batch(corpus, **which, **SIZES))


def test_validation_windows_lie_in_the_part_of_their_rank() -> None:
    corpus = load_text()
    for rank in (0, 7):
        windows = validation_batch(corpus, index=3, rank=rank, num_ranks=8, **SIZES)
        part = rank_part(corpus.validation, rank, 8)
        assert windows.shape == (4, 33)
        for window in windows:
            assert window.astype(np.uint8).tobytes() in part.tobytes()


def test_every_rank_trains_on_the_whole_text() -> None:
    corpus = load_text()
    for rank in (0, 7):
        batches = [train_batch(corpus, seed=0, step=s, rank=rank, **SIZES) for s in range(200)]
        windows = [window.astype(np.uint8).tobytes() for batch in batches for window in batch]
        text = corpus.train.tobytes()
        place = np.array([text.index(window) for window in windows]) / len(text)
        # 800 uniform draws: every tenth of the text gets 80 on average, 40 is 4.7 deviations off.
        assert np.histogram(place, bins=10, range=(0, 1))[0].min() > 40


def test_validation_windows_of_different_batches_differ() -> None:
    corpus = load_text()
    batches = [validation_batch(corpus, index=i, rank=0, num_ranks=8, **SIZES) for i in range(4)]
    windows = {window.tobytes() for batch in batches for window in batch}
    assert len(windows) == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"To be, or not to be" * 100, r"has 1,900 bytes; allowed: at least 100,000"),
        (b"\x89PNG\r\n\xff\xfe" * 20_000, r"is not text \(byte 0 is no UTF-8\)"),
        (b"plain \x00 words " * 20_000, r"is not text \(20,000 control bytes\)"),
        (b"", r"has 0 bytes"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_text(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none.txt: No such file"):
        load_text(tmp_path / "none.txt")
    with pytest.raises(InputError, match="Is a directory"):
        load_text(tmp_path)


def test_a_text_in_another_language_is_text(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Größe und Würde — 言葉\n" * 5000, encoding="utf-8")
    corpus = load_text(file)
    assert corpus.source == "text.txt" and max(corpus.vocabulary) > 127


def test_more_ranks_than_the_text_has_room_for_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("All the world's a stage. " * 5000)
    corpus = load_text(file)
    check_room(corpus, num_ranks=8, length=128)
    with pytest.raises(InputError, match=r"leaves 192 held-out bytes for each of 64 ranks"):
        check_room(corpus, num_ranks=64, length=128)
