"""The probe command: what it writes where when the measurement ends early, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tamoe.probe_command import partial_file, run_probe
from tamoe.topology import ClusterSpec, RankError, Topology
from tamoe.topology.errors import StoppedError
from tamoe.topology.link import Pair

GOOD = ClusterSpec.parse("2x1:100mbit").topology()


def marked(status: str, *, pairs: bool = True) -> Topology:
    found = {(0, 1): Pair(1e-4, 1e-7)} if pairs else {}
    return dataclasses.replace(GOOD, pairs=found, provenance={"status": status})


def probe_that(
    monkeypatch: pytest.MonkeyPatch, do: Callable[[Path], list[Topology | None]]
) -> None:
    """Ranks that do nothing but what the test says, with the path of the partial file."""

    def ranks(_cluster: Any, _fn: Any, path: str, *_: Any, **__: Any) -> list[Topology | None]:
        return do(Path(path))

    monkeypatch.setattr("tamoe.topology.ranks.run_ranks", ranks)


@pytest.mark.parametrize(
    ("error", "expected"),
    [(KeyboardInterrupt(), StoppedError), (RankError("rank 1 died", 1), RankError)],
)
def test_an_early_end_leaves_a_good_file_alone_and_names_the_partial_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, expected: type
) -> None:
    output = tmp_path / "t.json"
    GOOD.save(output)
    before = output.read_bytes()

    def stop(path: Path) -> list[Topology | None]:
        marked("partial").save(path)
        raise error

    probe_that(monkeypatch, stop)
    with pytest.raises(expected, match=r"what was measured until then is in .*t\.partial\.json"):
        run_probe("2x1:100mbit", output)
    assert output.read_bytes() == before
    assert Topology.load(tmp_path / "t.partial.json").provenance["status"] == "partial"


def test_an_early_end_names_no_file_of_an_earlier_run_and_none_without_a_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output, partial = tmp_path / "t.json", tmp_path / "t.partial.json"
    marked("partial").save(partial)

    def stop_at_once(_: Path) -> list[Topology | None]:
        raise KeyboardInterrupt

    probe_that(monkeypatch, stop_at_once)
    with pytest.raises(StoppedError, match=r"^probe stopped$"):
        run_probe("2x1:100mbit", output)

    def stop_early(path: Path) -> list[Topology | None]:
        marked("partial", pairs=False).save(path)
        raise KeyboardInterrupt

    probe_that(monkeypatch, stop_early)
    with pytest.raises(StoppedError, match=r"^probe stopped; nothing was measured yet$"):
        run_probe("2x1:100mbit", output)
    assert not partial.exists() and not output.exists()


def test_only_a_complete_measurement_gets_the_name_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    output, partial = tmp_path / "t.json", tmp_path / "t.partial.json"

    def end(status: str) -> Callable[[Path], list[Topology | None]]:
        def measure(path: Path) -> list[Topology | None]:
            marked(status).save(path)
            return [marked(status), None]

        return measure

    probe_that(monkeypatch, end("partial"))  # cut short by a budget
    run_probe("2x1:100mbit", output)
    assert partial.exists() and not output.exists()
    probe_that(monkeypatch, end("complete"))
    run_probe("2x1:100mbit", output)
    assert output.exists() and not partial.exists()


@pytest.mark.ranks
@pytest.mark.slow
def test_ctrl_c_while_measuring_keeps_the_older_file(tmp_path: Path) -> None:
    output = tmp_path / "t.json"
    GOOD.save(output)
    before = output.read_bytes()
    command = [sys.executable, "-m", "tamoe", "probe", "--ranks", "4", "-o", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    partial = partial_file(output)
    while process.poll() is None:
        if partial.exists() and '"target_rank"' in partial.read_text():
            os.kill(process.pid, signal.SIGINT)
            break
        threading.Event().wait(0.005)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert f"is in {partial}" in err and "Traceback" not in err
    assert output.read_bytes() == before
    assert Topology.load(partial).provenance["status"] == "partial"
