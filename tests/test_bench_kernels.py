"""``tamoe bench kernels``: bytes counted, shares positive, JSON, bad input named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tamoe.bench_kernels import DTYPES, OPS, Case, bench_cases
from tamoe.cli import main


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 3])
def test_every_op_is_timed_and_its_bytes_are_counted(dtype: str, top_k: int) -> None:
    threads = torch.get_num_threads()
    rates = bench_cases([Case(dtype, top_k, tokens=65, hidden_size=7)], 2, sweep_bytes=0)
    assert torch.get_num_threads() == threads
    assert tuple(rate.op for rate in rates) == OPS
    row_bytes = 7 * {"float64": 8, "float32": 4}.get(dtype, 2)
    for rate in rates:
        # A sum reads K rows and writes one; everything else reads and writes K for a token.
        rows = top_k + 1 if rate.op.startswith("combine") else 2 * top_k
        assert rate.moved_bytes == 65 * rows * row_bytes
        assert rate.bytes_per_s > 0
        assert rate.share_of_memcpy == pytest.approx(rate.memcpy_s / rate.time_s)
        assert rate.share_of_memcpy > 0


def test_rates_are_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "kernels.json"
    words = "bench kernels --dtypes bfloat16 --top-k 2 --tokens 40 --hidden-size 9 --repetitions 1"
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), "-o", str(out), "--json"])
    assert ended.value.code in (0, None)
    document = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == document
    assert (document["schema"], document["label"]) == ("tamoe.bench_kernels", "measured")
    assert document["machine"]["threads"] == 1
    assert document["machine"]["versions"]["torch"]
    assert [rate["op"] for rate in document["rates"]] == list(OPS)
    for rate in document["rates"]:
        assert (rate["dtype"], rate["top_k"], rate["tokens"]) == ("bfloat16", 2, 40)
        assert rate["bytes_per_s"] == pytest.approx(rate["moved_bytes"] / rate["time_s"])
        assert rate["share_of_memcpy"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--top-k 0", "--top-k is 0; allowed: a whole number >= 1"),
        ("--top-k two", "--top-k is 'two'; allowed: whole numbers"),
        ("--tokens 0", "--tokens is 0; allowed: a whole number >= 1"),
        ("--hidden-size -1", "--hidden-size is -1; allowed: a whole number >= 1"),
        ("--repetitions 0", "--repetitions is 0; allowed: a whole number >= 1"),
        ("--device tpu", "--device is 'tpu'; allowed: cpu, cuda"),
        ("--dtypes int8", "--dtypes is 'int8'; allowed: float32, float64, bfloat16, float16"),
        ("-o /nowhere/b.json", "--output is '/nowhere/b.json'; allowed: a file in a folder"),
    ],
)
def test_bad_input_is_named(words: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "kernels", *words.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
