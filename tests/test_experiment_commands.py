"""Commands of the experiments: what is wrong in one line, without a traceback."""

from __future__ import annotations

import runpy
import sys

import pytest

from tamoe.topology.errors import InputError


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("steering_cost", ["--steps", "1"], "--steps is 1; allowed: a whole number >= 2"),
        ("compare", ["--steps", "3"], "--steps is 3; allowed: a whole number >= 12"),
        ("oracles", ["--only", "nothing"], "--only is 'nothing'; allowed: deepspeed"),
        ("peers", ["--without", "nobody"], "nobody"),
        ("memory", ["--tokens", "-1"], "tokens is -1; allowed"),
        ("overlap", ["--top-k", "0"], "top_k is 0; allowed: a whole number >= 1"),
        ("compare_figure", ["none.json", "none.png"], "none.json"),
        ("controller", ["-o", "file"], "--out is"),
        ("controller", ["--processes", "0"], "--processes is 0; allowed: a whole number >= 1"),
    ],
)
def test_wrong_input_is_one_message(module, arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, f"tamoe.experiments.{module}", raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"tamoe.experiments.{module}", run_name="__main__")
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("tamoe: ") and said.count("\n") == 1 and message in said


def test_oracles_of_what_is_not_installed_leave_the_file_as_it_was(monkeypatch, tmp_path):
    from tamoe.experiments import oracles

    deepspeed = [one for one in oracles.COMPARISONS if one.package == "deepspeed"]
    monkeypatch.setattr(oracles, "available", lambda: iter(deepspeed))
    path = tmp_path / "oracles.json"
    path.write_text("kept")
    with pytest.raises(InputError, match=r"--only is 'torchtitan', .* allowed here: deepspeed"):
        oracles.main(path, only="torchtitan")
    assert path.read_text() == "kept"
