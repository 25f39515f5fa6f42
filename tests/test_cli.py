"""The command line: tables and JSON for good input; for bad input exit 2 and one message."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

from tamoe.cli import main
from tamoe.solver.constants import FILE_KEY, Constants, with_constants
from tamoe.topology import ClusterSpec, Pair, Topology
from tamoe.topology.plot import topology_figure


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    code = end.value.code
    return (0 if code is None else int(str(code))), captured.out, captured.err


@pytest.fixture
def topology_file(tmp_path: Path) -> Path:
    path = tmp_path / "t.json"
    bandwidths = (2e9, 48e6, 12e6)
    Topology.from_tree("[[2,2],[2]]", bandwidth_bytes_per_s=bandwidths).save(path)
    return path


def test_solve_prints_levels_times_bound_and_bottlenecks(
    capsys: pytest.CaptureFixture[str], topology_file: Path, tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "solve", topology_file, "-o", tmp_path / "p.json")
    assert code == 0
    for words in ("same node", "lower bound", "bottleneck links:", "simulated", "gap"):
        assert words in out
    assert "\nexchange: flat: dispatch and combine, forward and backward, take flat rounds " in out
    assert json.loads((tmp_path / "p.json").read_text())["schema"] == "tamoe.plan"


def test_solve_json_is_json(capsys: pytest.CaptureFixture[str], topology_file: Path) -> None:
    code, out, _ = run(capsys, "solve", topology_file, "--json", "--exchange", "hierarchical")
    summary = json.loads(out)
    assert code == 0
    assert summary["label"] == "simulated"
    assert summary["predicted_speedup"] > 1
    assert summary["exchange"] == "hierarchical"
    assert summary["exchange_reason"] == "hierarchical: what the plan was solved with"
    assert sum(summary["level_shares"].values()) == pytest.approx(1)


def test_show_writes_a_picture_and_the_table(
    capsys: pytest.CaptureFixture[str], topology_file: Path, tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "show", topology_file, "-o", tmp_path / "f.png")
    assert code == 0
    assert "6 ranks on 3 nodes" in out
    assert "12.0 MB/s" in out
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_show_tells_constants_of_exchanges_if_the_file_has_them(
    capsys: pytest.CaptureFixture[str], topology_file: Path
) -> None:
    assert "message" not in run(capsys, "show", topology_file)[1]
    constants = {("flat rounds", "combine"): Constants(2e-3, 3e-5, 4e-9, 5e-9, 0.75)}
    with_constants(Topology.load(topology_file), constants).save(topology_file)
    code, out, _ = run(capsys, "show", topology_file)
    assert code == 0
    (row,) = [line for line in out.splitlines() if "flat rounds, combine" in line]
    for shown in ("2.00 ms", "30.0 µs", "4.00 ns/B", "5.00 ns/B", "75%"):
        assert shown in row
    older = dataclasses.replace(
        Topology.load(topology_file), extra={FILE_KEY: {"x": {"y": {"z": 1}}}}
    )
    older.save(topology_file)
    code, out, _ = run(capsys, "show", topology_file)
    assert code == 0 and "run `tamoe probe --exchange` again" in out


def test_show_json_is_the_file(capsys: pytest.CaptureFixture[str], topology_file: Path) -> None:
    _, out, _ = run(capsys, "show", topology_file, "--json")
    assert json.loads(out) == json.loads(topology_file.read_text())


def ended_early(folder: Path, origin: str) -> Path:
    """A file of a probe that was stopped, with uplinks of the given origin."""
    topology = ClusterSpec.parse("2x1:100mbit").topology()
    graph = nx.DiGraph(topology.graph)
    for edge in graph.edges.values():
        edge["origin"] = origin
    provenance = {"status": "partial", "reason": "interrupted"}
    path = folder / "early.json"
    pairs = {(0, 1): Pair(1e-4, 1e-7)}
    dataclasses.replace(topology, graph=graph, pairs=pairs, provenance=provenance).save(path)
    return path


def test_show_says_that_a_measurement_is_partial_and_what_static_means(
    capsys: pytest.CaptureFixture[str], topology_file: Path, tmp_path: Path
) -> None:
    early, picture = ended_early(tmp_path, "static"), tmp_path / "early.svg"
    _, out, _ = run(capsys, "show", early, "-o", picture)
    assert "2 ranks on 2 nodes" in out
    assert "PARTIAL: the measurement ended early (interrupted); 1 of 2 ways from node to " in out
    assert "not timed: " in out and "nic0 → switch0 (static)" in out
    assert "static: not timed" in out
    figure = topology_figure(Topology.load(early))
    assert "PARTIAL" in figure.get_suptitle()
    _, out, _ = run(capsys, "show", topology_file)
    assert "PARTIAL" not in out and "static" not in out


def test_solve_refuses_placeholders_and_warns_of_an_early_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = run(capsys, "solve", ended_early(tmp_path, "static"))
    assert (code, out) == (2, "")
    assert "early.json is partial: the measurement ended early (interrupted)" in err
    assert "allowed: a file in which every uplink was timed" in err
    code, out, err = run(capsys, "solve", ended_early(tmp_path, "measured"), "--floor", "0.2")
    assert code == 0 and "lower bound" in out
    assert "warning" in err and "is partial" in err


def test_help_wraps_sentences_and_names_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "demo", "--help")
    assert ">= 12; default fits six minutes" in " ".join(out.split())
    sentence = next(line for line in out.splitlines() if "Emulates slow links" in line)
    assert len(sentence) > 60  # not broken where the source is
    _, out, _ = run(capsys, "probe", "--help")
    assert "> 0; default no limit" in " ".join(out.split())


def test_one_rank_is_on_one_node(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    Topology.from_tree(2, bandwidth_bytes_per_s=[1e9]).save(path)
    assert "2 ranks on 1 node, shared" in run(capsys, "show", path)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["solve", "FILE", "--bogus"], "No such option"),
        (["solve", "missing.json"], "cannot read missing.json"),
        (["solve", "FILE", "--top-k", "7"], "top_k is 7"),
        (["solve", "FILE", "--top-k", "0"], "top_k is 0"),
        (["solve", "FILE", "--tokens", "0"], "tokens_per_rank is 0"),
        (["solve", "FILE", "--hidden-size", "-1"], "hidden_size is -1"),
        (["solve", "FILE", "--floor", "1.5"], "floor is 1.5"),
        (["solve", "FILE", "--kl", "-1"], "kl is -1"),
        (["solve", "FILE", "--kl", "nan"], "kl is nan"),
        (["solve", "FILE", "--method", "entropic"], "kl is 0"),
        (["solve", "FILE", "--method", "magic"], "'magic' is not one of"),
        (["solve", "FILE", "--self-send", "copy"], "copy_bytes_per_s"),
        (["solve", "FILE", "--self-send", "dear"], "'dear' is not one of"),
        (["solve", "FILE", "--self-send", "free", "--top-k", "1"], "floor"),
        (["show", "FILE", "-o", "figure.bmp"], "ending in .png or .svg"),
        (["probe", "--cluster", "4x2:fast"], "fast"),
        (["probe", "--cluster", "4x2:0mbit"], "0mbit"),
        (["probe", "--cluster", "2x1:1gbit", "--budget-s", "0"], "--budget-s is 0"),
        (["probe", "--ranks", "0"], "--ranks is 0"),
        (["probe", "--cluster", "2x1:1gbit", "-o", "."], "a folder; allowed"),
        (["solve", "FILE", "-o", "."], "--output is '.', a folder; allowed: the name of a file"),
        (["solve", "FILE", "-o", "/proc/nowhere/p.json"], "--output is '/proc/nowhere/p.json'"),
        (["probe", "--ranks", "2", "-o", "/proc/nowhere/p.json"], "cannot write there"),
        (["demo", "-o", "/proc/nowhere/d"], "cannot write there"),
        (["probe", "--ranks", "2", "-o", "/dev/null/p.json"], "/dev/null is not a folder"),
        (["emulate", "4y2", "--", "true"], "4y2"),
        (["demo", "--cluster", "4x2:50mbit,1gbit"], "4x2"),
        (["demo", "--steps", "0"], "steps is 0; allowed: a whole number >= 12, or none given"),
        (["probe", "--cluster", "1x2:200mbit"], "nothing crosses its uplink; allowed: two nodes"),
        (["demo", "--text", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    capsys: pytest.CaptureFixture[str],
    topology_file: Path,
    arguments: list[str],
    message: str,
) -> None:
    code, out, err = run(capsys, *[topology_file if a == "FILE" else a for a in arguments])
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""


@pytest.fixture
def closed_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that this user may not enter; root becomes an ordinary user for it."""
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o700)


@pytest.mark.parametrize(
    "arguments", [["probe", "--ranks", "2", "-o", "q.json"], ["demo", "-o", "d"]]
)
def test_a_place_without_permission_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], closed_folder: Path, arguments: list[str]
) -> None:
    code, out, err = run(capsys, *arguments[:-1], closed_folder / arguments[-1])
    assert (code, out) == (2, "")
    assert "Permission denied" in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_probe_inside_a_job_refuses_a_cluster(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(capsys, "probe", "--cluster", "2x1:1gbit")
    assert (code, "running job" in err) == (2, True)
    monkeypatch.setenv("WORLD_SIZE", "x")
    code, _, err = run(capsys, "probe")
    assert (code, "WORLD_SIZE is 'x'" in err) == (2, True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(capsys, "probe")
    assert (code, "MASTER_ADDR is not set" in err) == (2, True)
