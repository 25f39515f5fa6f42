"""The whole chain on one machine: emulate, probe, solve, train in turns, report.

``tamoe demo`` runs it. Three settings are trained by default. Two are alike but for their links: a
steep one, where the exchange takes most of the even step, and one where it takes the share that
measurements on real clusters were published for (up to 67 % of the time). Top-2 on four nodes
leaves a hierarchical exchange little to save; the third setting, short, is one where it pays.
Everything measured here is *emulated*: real traffic on shaped links.

A run that is stopped keeps what it measured, with figures and page.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tamoe.experiments.results import (
    Document,
    all_settings,
    assemble,
    complete_setting,
    load_results,
    save_results,
)
from tamoe.topology.documents import check_writable
from tamoe.topology.errors import InputError, StoppedError
from tamoe.topology.formats import topology_to_document
from tamoe.topology.graph import Topology
from tamoe.topology.spec import ClusterSpec
from tamoe.topology.units import format_time

if TYPE_CHECKING:
    from tamoe.experiments.strategies import Strategy
    from tamoe.experiments.trainee import TrainConfig

STEEP = "4x2:50mbit"
STEPS_ALLOWED = "a whole number >= 12"
TOTAL_S = 352.0  # of everything, where no number of steps is asked for
_REPORT_S = 12.0  # figures and page
_NEXT_S = 18.0  # probe and start of one more setting
_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class _Recipe:
    """One setting to run."""

    name: str
    cluster: str
    weight: float = 1.0  # of its time for training, over that of the settings that follow
    top_k: int = 2
    experts_per_rank: int = 4
    sequences: int = 8  # a rank and step
    # Keep more than four fifths, and nineteen twentieths, of the tokens in the node.
    kls: tuple[float, float] = (0.45, 0.3)
    biases_only: bool = False  # and the even baseline, for a short setting

    def config(self, seed: int) -> TrainConfig:
        from tamoe.experiments.trainee import TrainConfig

        return TrainConfig(
            seed=seed,
            top_k=self.top_k,
            experts_per_rank=self.experts_per_rank,
            sequences=self.sequences,
        )

    def strategies(self) -> tuple[Strategy, ...]:
        from tamoe.experiments.strategies import default_strategies

        shown = ("even", "bias") if self.biases_only else ("even", "capacity", "loss", "bias")
        return tuple(s for s in default_strategies(self.kls) if s.kind in shown)


DEFAULT = (
    _Recipe("steep", STEEP, weight=0.60),
    _Recipe("published share", "4x2:160mbit", weight=0.33),
    _Recipe(
        "top-8",
        "2x4:200mbit",
        weight=0.07,
        top_k=8,
        experts_per_rank=8,
        sequences=4,
        kls=(1.0, 0.45),  # keep .88 and .99 of the tokens in the node
        biases_only=True,
    ),
)


def run_demo(
    cluster: str = STEEP,
    out: str | os.PathLike[str] = "tamoe-demo",
    *,
    steps: int | None = None,
    text: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Document:
    """Run the chain and write ``results.json``, ``figures/`` and ``report.html``.

    Parameters
    ----------
    cluster
        Emulated cluster. The default one is followed by the setting of a published share and by one
        where the hierarchical exchange pays.
    out
        Folder to write to; made if needed.
    steps
        Training steps of each strategy, >= 12; None: as many as fit six minutes on two cores.
    text
        UTF-8 text to train on; None for the one that is shipped.
    seed
        Of initial values and data order, >= 0.

    Returns
    -------
    dict
        The document of ``results.json``, see :mod:`tamoe.experiments.results`.

    Raises
    ------
    InputError
        An argument is out of range or the text is too short or not text.
    StoppedError
        Ctrl-C; what was measured is written.
    """
    began_s = time.monotonic()
    folder = Path(out)
    recipes = _recipes(cluster)
    _check(recipes, folder, steps, text, seed)
    about = {"command": _command(cluster, out, steps, text, seed), "made": _made()}
    clusters = ", ".join(recipe.cluster for recipe in recipes)
    print(f"demo: {clusters}, results go to {folder}; starting ranks", file=sys.stderr, flush=True)
    done: list[Document] = []
    current: Document = {}
    try:
        for number, recipe in enumerate(recipes):
            current = _new_setting(recipe)
            setting = _run_setting(
                recipe,
                current,
                done,
                about,
                folder,
                steps=steps,
                text=text,
                seed=seed,
                began_s=began_s,
                following=recipes[number + 1 :],
            )
            done.append(setting)
            save_results(folder / "results.json", assemble(done, about))
    except (KeyboardInterrupt, StoppedError) as error:
        if _finish(folder, began_s):
            raise StoppedError(f"demo stopped; what was measured is in {folder}") from None
        what = _found(current, folder) or str(error) or "nothing was measured yet"
        raise StoppedError(f"demo stopped before a step was timed: {what}") from None
    document = _finish(folder, began_s)
    assert document is not None
    _print_end(document, folder)
    return document


# ---- one setting ------------------------------------------------------------------------------


def _run_setting(
    recipe: _Recipe,
    setting: Document,
    done: list[Document],
    about: Document,
    folder: Path,
    *,
    steps: int | None,
    text: str | os.PathLike[str] | None,
    seed: int,
    began_s: float,
    following: Sequence[_Recipe],
) -> Document:
    """Probe, solve and train; the ranks write results.json as they go."""
    from tamoe.experiments.predict import choose_exchanges, with_credit_of
    from tamoe.experiments.train import Job, train_rank
    from tamoe.probe_command import run_probe
    from tamoe.solver import solve
    from tamoe.topology.ranks import run_ranks

    spec = setting["cluster"]
    own = _own_folder(setting, folder)
    own.mkdir(parents=True, exist_ok=True)
    probe_began_s = time.monotonic()
    topology = run_probe(spec, own / "topology.json")
    assert topology is not None  # None only inside a running job
    setting["topology"] = topology_to_document(topology)
    setting["probe_s"] = time.monotonic() - probe_began_s
    config, strategies = recipe.config(seed), recipe.strategies()
    workload = config.workload
    # Exchanges follow each other closely, so plans are made for the rates that links sustain.
    sustained = with_credit_of(topology, pause_s=0.0)
    plans = {kl: solve(sustained, workload, method="entropic", kl=kl) for kl in recipe.kls}
    for kl, plan in plans.items():
        plan.save(own / f"plan-kl{kl:g}.json")
    setting["workload"] = _workload(config, workload, topology, text)
    job = Job(
        setting=setting,
        before=tuple(done),
        about=about,
        results_path=(folder / "results.json").absolute(),
        topology=topology,
        strategies=strategies,
        plans=plans,
        choices=choose_exchanges(sustained, workload, strategies, plans),
        config=config,
        text=None if text is None else Path(text).absolute(),
        steps=steps,
        budget_s=_budget_s(time.monotonic() - began_s, recipe, following),
        progress_name=f"train {spec}",
    )
    filled: Document = run_ranks(spec, train_rank, job, timeout_s=_TIMEOUT_S)[0]
    return filled


def _budget_s(spent_s: float, recipe: _Recipe, following: Sequence[_Recipe]) -> float:
    """Time for training one setting, of what is left of the whole."""
    left_s = TOTAL_S - spent_s - _REPORT_S - _NEXT_S * len(following)
    return left_s * recipe.weight / (recipe.weight + sum(other.weight for other in following))


def _new_setting(recipe: _Recipe) -> Document:
    return {
        "setting": recipe.name,
        "cluster": recipe.cluster,
        "label": "emulated",
        "nodes": [list(ranks) for ranks in ClusterSpec.parse(recipe.cluster).nodes],
        "steps": 0,
        "strategies": [],
        "complete": False,
    }


def _workload(
    config: Any, workload: Any, topology: Topology, text: str | os.PathLike[str] | None
) -> Document:
    from tamoe.experiments.text import load_text

    corpus = load_text(text)
    return {
        **dataclasses.asdict(workload),
        **dataclasses.asdict(config),
        "num_ranks": topology.num_ranks,
        "num_experts": workload.num_experts(topology.num_ranks),
        "vocabulary_size": corpus.vocabulary_size,
        "text": corpus.source,
    }


def _own_folder(setting: Document, folder: Path) -> Path:
    return folder / setting["setting"].replace(" ", "-")


def _found(setting: Document, folder: Path) -> str | None:
    """What there is of a setting that was stopped before training; None without a probe."""
    if not setting.get("topology"):
        return None
    return f"the links that were measured are in {_own_folder(setting, folder) / 'topology.json'}"


# ---- the end ----------------------------------------------------------------------------------


def _finish(folder: Path, began_s: float) -> Document | None:
    """Complete the results file, draw the figures and write the page."""
    from tamoe.experiments.figures import draw_all
    from tamoe.experiments.predict import predict_exchanges
    from tamoe.report import write_report

    path = folder / "results.json"
    if not path.exists():
        return None
    document = load_results(path)
    for part in all_settings(document):
        if part["strategies"]:
            predict_exchanges(part)
            complete_setting(part)
    document["elapsed_s"] = time.monotonic() - began_s
    save_results(path, document)
    write_report(document, draw_all(document, folder / "figures"), folder / "report.html")
    return document


def _print_end(document: Document, folder: Path) -> None:
    from tamoe.report import verdict

    for part in all_settings(document):
        if part.get("exchange_share") is None:
            continue
        print(
            f"{part['cluster']} ({part['setting']}, emulated): even step "
            f"{format_time(part['strategies'][0]['step_s'])}, f = {part['exchange_share']:.2f}, "
            f"bound {part['speedup_bound']:.2f}x"
        )
        for strategy in part["strategies"]:
            print(_line(strategy))
        print(verdict(part))
    print(f"{folder / 'report.html'} ({document['elapsed_s']:.0f} s in all)")


def _line(strategy: Mapping[str, Any]) -> str:
    reached = strategy.get("speedup_to_even_loss")
    to_loss = "not reached" if reached is None else f"{reached:.2f}x"
    return (
        f"  {strategy['name']:<22}{strategy['tokens_per_s']:>8,.0f} tokens/s  "
        f"{strategy['speedup_over_even']:.2f}x over even, to its loss {to_loss}, "
        f"loss {strategy['val_loss_own']:.3f} ({strategy['val_loss_over_even']:+.1%})\n"
        f"{'':<24}{_exchanges(strategy)}"
    )


def _exchanges(strategy: Mapping[str, Any]) -> str:
    both = "; ".join(
        f"{kind} {timed['tokens_per_s']:,.0f} tokens/s, f = {timed['exchange_share']:.2f}"
        for kind, timed in strategy["exchanges"].items()
    )
    return f"{both}; auto takes {strategy['auto_exchange']}"


# ---- arguments --------------------------------------------------------------------------------


def _recipes(cluster: str) -> tuple[_Recipe, ...]:
    return (
        DEFAULT if cluster == STEEP else (_Recipe("your cluster", str(ClusterSpec.parse(cluster))),)
    )


def _check(
    recipes: Sequence[_Recipe],
    folder: Path,
    steps: int | None,
    text: str | os.PathLike[str] | None,
    seed: int,
) -> None:
    from tamoe.experiments.text import check_room, load_text

    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 12):
        raise InputError(f"steps is {steps!r}; allowed: {STEPS_ALLOWED}, or none given")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed!r}; allowed: a whole number from 0 to {2**32 - 1}")
    if os.path.isfile(folder):  # pathlib's raises where the folder above may not be read
        raise InputError(f"output is {str(folder)!r}, a file; allowed: a folder, or a new name")
    corpus = load_text(text)
    for spec in (recipe.cluster for recipe in recipes):
        parsed = ClusterSpec.parse(spec)
        if parsed.num_nodes < 2:
            raise InputError(
                f"cluster is {spec!r}, one node; allowed: two nodes or more, since the demo is "
                f"about the links between them"
            )
        check_room(corpus, num_ranks=parsed.num_ranks, length=128)
    check_writable(folder / "results.json")
    (folder / "results.json").unlink(missing_ok=True)


def _command(
    cluster: str,
    out: str | os.PathLike[str],
    steps: int | None,
    text: str | os.PathLike[str] | None,
    seed: int,
) -> str:
    words = ["tamoe", "demo", "-o", os.fspath(out)]
    words += [] if cluster == STEEP else ["--cluster", cluster]
    words += [] if steps is None else ["--steps", str(steps)]
    words += [] if text is None else ["--text", os.fspath(text)]
    words += [] if not seed else ["--seed", str(seed)]
    return shlex.join(words)


def _made() -> dict[str, Any]:
    from importlib.metadata import version

    import tamoe

    return {
        "tamoe": tamoe.__version__,
        "torch": version("torch"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
    }
