"""``tamoe bench exchange``: real exchanges, scores within their bounds, bad input named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tamoe.bench import SKEWS, Setting, random_routing
from tamoe.cli import main
from tamoe.topology import ClusterSpec


@pytest.mark.parametrize("skew", SKEWS)
def test_routings_have_distinct_experts_and_their_skew(skew: str) -> None:
    topology = ClusterSpec.parse("2x2:1gbit").topology()
    setting = Setting(400, 3, skew, experts_per_rank=4, hidden_size=8)  # type: ignore[arg-type]
    index_TK = random_routing(setting, 0, topology, torch.Generator().manual_seed(0))
    assert index_TK.shape == (400, 3)
    assert (index_TK.sort(1).values.diff(dim=1) > 0).all()
    near = (index_TK < 8).float().mean()  # ranks 0 and 1 hold experts 0 to 7
    low, high = {"even": (0.45, 0.55), "local": (0.85, 1.0), "one-hot": (1.0, 1.0)}[skew]
    assert low <= near <= high


@pytest.mark.emulated
def test_bench_writes_scores_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "bench.json"
    words = "bench exchange --cluster 2x2:100mbit --tokens 32,64 --top-k 4 --skew even,local"
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), "--hidden-size", "2048", "--repetitions", "3", "-o", str(out)])
    assert ended.value.code in (0, None)
    printed = capsys.readouterr().out
    assert "hierarchical" in printed
    assert f"written to {out}" in printed
    document = json.loads(out.read_text())
    assert (document["schema"], document["label"]) == ("tamoe.bench", "emulated")
    scores = document["scores"]
    assert len(scores) == 2 * 2 * 3
    for score in scores:
        assert 0 < score["share_of_bound"] <= 1.0, score
        assert score["busiest_link_bytes"] > 0
    by_kind = {s["exchange"]: s for s in scores if (s["tokens"], s["skew"]) == (64, "even")}
    moved = {name: score["busiest_link_bytes"] for name, score in by_kind.items()}
    assert moved["flat single"] == moved["flat rounds"] > 1.5 * moved["hierarchical"]
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cluster 2x2:1gbit --top-k 0", "--top-k is 0; allowed: a whole number >= 1"),
        ("--cluster 2x2:1gbit --top-k 64", "--top-k is 64; allowed: 1 to 32, the experts"),
        ("--cluster 2x2:1gbit --tokens a", "--tokens is 'a'; allowed: whole numbers"),
        ("--cluster 2x2:1gbit --skew odd", "--skew is 'odd'; allowed: even, local, one-hot"),
        ("", "--cluster and --topology: give one"),
        ("--cluster 2x:1gbit", "2x:1gbit"),
        ("--cluster 2x2:1gbit -o /nowhere/b.json", "/nowhere"),
    ],
)
def test_bad_input_is_named(words: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "exchange", *words.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
