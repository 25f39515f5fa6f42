"""The comparison with other exchanges: its load, table and file, wrong results, missing peers."""

from __future__ import annotations

import os
import threading
from importlib import util
from pathlib import Path

import pytest
import torch

from tamoe.bench import Setting
from tamoe.experiments import peers, peers_mpi
from tamoe.experiments.peers_entry import Clock, Entry, make_load
from tamoe.experiments.peers_rank import TOLERANCE, Score, _sample, _scores
from tamoe.topology import ClusterSpec, run_ranks
from tamoe.topology.errors import InputError, RankError

SETTING = Setting(tokens=40, top_k=3, skew="local", experts_per_rank=4, hidden_size=8)
TINY = peers.Config(
    "2x2:100mbit", tokens=64, top_k=4, experts_per_rank=2, hidden_size=64, repetitions=1
)
SCORES = [
    Score("even", "tamoe flat rounds", 0.4, 0.4, 0.7, 2e6, None, 0.0, 1e-7),
    Score("even", "tamoe hierarchical", 0.1, 0.1, 0.15, 1e6, None, 0.0, 1e-7),
    Score("even", "a peer", 0.5, 0.3, 0.6, 3e6, 7, 0.125, None),
    Score("local", "tamoe flat rounds", 0.2, 0.2, 0.3, 2e6, None, 0.0, 1e-7),
]


def test_a_gate_with_a_softmax_makes_the_loads_routing() -> None:
    load = make_load(1, ClusterSpec.parse("2x2:1gbit").topology(), SETTING)
    weight_TK, index_TK = load.logits_TN.softmax(1).topk(3)
    order = load.weight_TK.argsort(1, descending=True)
    assert torch.equal(index_TK, load.index_TK.gather(1, order))
    torch.testing.assert_close(weight_TK, load.weight_TK.gather(1, order))
    assert load.factor_E.tolist() == [1 + e / 16 for e in range(4, 8)]  # rank 1 of 4, 16 experts
    token = sum(
        weight * (1 + int(e) / 16) * load.x_TD[5]
        for weight, e in zip(load.weight_TK[5], load.index_TK[5], strict=True)
    )
    torch.testing.assert_close(load.expected_TD[5], token)


def test_table_shows_times_over_the_fastest_of_tamoe(
    capsys: pytest.CaptureFixture,
) -> None:
    peers.print_scores(SCORES, "2x2:100mbit")
    lines = capsys.readouterr().out.splitlines()
    assert "2x2:100mbit (emulated)" in lines[0]
    (row,) = [line for line in lines if "a peer" in line]
    for value in ("500", "300", "800", "600", "4.00x", "3.0", "12.5%"):
        assert value in row
    assert [line.count("1.00x") for line in lines if "│ tamoe" in line] == [0, 1, 1]


def test_scores_come_back_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    document = {"scores": [vars(score) for score in SCORES]}
    peers.write_document(path, {"schema": peers.SCHEMA, "schema_version": "1.9", **document})
    assert peers.load_scores(path)[1] == SCORES
    assert list(peers.by_routing(SCORES)) == ["even", "local"]
    peers.write_document(path, {"schema": "tamoe.bench", "schema_version": "1.0", **document})
    with pytest.raises(InputError, match=r"schema is 'tamoe\.bench'"):
        peers.load_scores(path)


def test_missing_peers_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ClusterSpec.parse("2x2:1gbit")
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    found = peers.missing_peers(spec)
    assert set(found) == {"mpi", "deepspeed", "tutel"}
    assert all("pip install" in why for why in found.values())
    monkeypatch.setattr(util, "find_spec", lambda name: name)
    monkeypatch.setattr(peers.shutil, "which", lambda name: name)
    assert peers.missing_peers(spec) == {}
    apart = ClusterSpec.parse("2x2:1gbit;intra=2gbit")
    assert "intra=RATE" in peers.missing_peers(apart)["mpi"]
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    assert "apt install" in peers.missing_peers(spec)["mpi"]


@pytest.mark.parametrize(
    ("changed", "without", "message"),
    [
        ({"cluster": "1x4:1gbit"}, (), "cluster is '1x4:1gbit', one node; allowed: two"),
        ({"tokens": 0}, (), "tokens is 0; allowed: a whole number >= 1"),
        ({"top_k": 9}, (), "top_k is 9; allowed: 1 to 8"),
        ({}, ("nccl",), "--without is 'nccl'; allowed: mpi, deepspeed, tutel"),
    ],
)
def test_bad_input_is_named(changed: dict, without: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        peers.run(peers.Config(**{**vars(TINY), **changed}), without)


def test_what_comes_through_a_fifo_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "environment0"
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as fifo:
            for part in (b"A=1\0", b"B=2", b"\0\0"):
                fifo.write(part)

    writer = threading.Thread(target=write)
    writer.start()
    assert peers_mpi._read_until(path, b"\0\0") == b"A=1\0B=2"
    writer.join()
    monkeypatch.setattr(peers_mpi, "_START_TIMEOUT_S", 0.0)
    with pytest.raises(RankError, match="Open MPI did not start within 0 s"):
        peers_mpi._read_until(path, b"\0\0")


def score_rank(rank: int, wrong_by: float) -> list[Score]:
    load = make_load(rank, ClusterSpec.parse("2x1:1gbit").topology(), SETTING)

    def run(clock: Clock) -> torch.Tensor:
        with clock.experts():
            pass
        clock.stop()
        return load.expected_TD * (1 + wrong_by * (rank == 1))

    entry = Entry("none", run, dropped_share=0.0)
    return _scores(SETTING, [entry], [[_sample(entry, load)] for _ in range(2)])


@pytest.mark.ranks
def test_a_wrong_result_of_one_rank_is_an_error() -> None:
    (score,), other = run_ranks(2, score_rank, 0.0)
    assert other == [score]  # times are those of the last rank, on every rank
    assert score.error == 0
    assert min(score.dispatch_s, score.combine_s) > 0
    with pytest.raises(RankError, match=r"none on the local routing differs .* by 1\.\d?e-02"):
        run_ranks(2, score_rank, 0.01)


@pytest.mark.emulated
def test_tamoe_alone_is_timed_and_counted() -> None:
    document = peers.run(TINY, ("mpi", "deepspeed", "tutel"))
    assert document["label"] == "emulated"
    assert document["network"]["dropped_packets"] == 0
    assert set(document["skipped"]) == {"mpi", "deepspeed", "tutel"}
    scores = [Score(**score) for score in document["scores"]]
    names = ["tamoe flat single", "tamoe flat rounds", "tamoe hierarchical"]
    assert [(s.routing, s.exchange) for s in scores] == [
        (routing, name) for routing in ("even", "local") for name in names
    ]
    for score in scores:
        assert score.error is not None and score.error <= TOLERANCE
        assert 0 < score.moving_s <= score.total_s
    even, near = scores[:3], scores[3:]
    assert even[2].received_bytes < even[0].received_bytes
    assert near[0].received_bytes < even[0].received_bytes


@pytest.mark.emulated
@pytest.mark.slow
@pytest.mark.parametrize("peer", ["mpi", "deepspeed", "tutel"])
def test_a_peer_that_drops_nothing_gives_what_tamoe_gives(peer: str) -> None:
    missing = peers.missing_peers(ClusterSpec.parse(TINY.cluster))
    if peer in missing:
        pytest.skip(missing[peer])
    others = [name for name in ("mpi", "deepspeed", "tutel") if name != peer]
    scores = peers.run(TINY, others)["scores"]
    theirs = [score for score in scores if not score["exchange"].startswith("tamoe")]
    assert len(theirs) == 2 * {"mpi": 1, "deepspeed": 3, "tutel": 2}[peer]
    for score in theirs:
        assert (score["error"] is None) == (score["dropped_share"] > 0)
        assert score["error"] is None or score["error"] <= TOLERANCE
    assert any(score["error"] is not None for score in theirs)
