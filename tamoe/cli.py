"""The command line: thin commands over the library, one message for each mistake.

Exit codes: 0 good, 1 internal, 2 usage or bad input, 3 a dead rank, a timeout or an interrupt (what
was measured is written), 4 measured but under a threshold that the user set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tamoe.cli_bench import bench
from tamoe.cli_kernels import kernels
from tamoe.cli_parts import Cluster, Commands, Json, print_json
from tamoe.topology.errors import StoppedError, TamoeError

app = typer.Typer(
    name="tamoe",
    cls=Commands,
    help="Topology-aware Mixture-of-Experts training: measure the links, solve for the dispatch, "
    "steer the router.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # keeps the line ends of docstrings, in the middle of sentences
    context_settings={"help_option_names": ["-h", "--help"]},
)

TopologyFile = Annotated[Path, typer.Argument(metavar="TOPOLOGY.json", help="A topology file.")]


def _version(wanted: bool) -> None:
    if wanted:
        from tamoe import __version__

        print(f"tamoe {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def doctor(json_output: Json = False) -> None:
    """Try what tamoe needs on this machine: yes or no, and the fix.

    Example: tamoe doctor
    """
    from tamoe.tables import print_checks
    from tamoe.topology.doctor import diagnose

    checks = diagnose()
    if json_output:
        print_json([dataclasses.asdict(check) for check in checks])
    else:
        print_checks(checks)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def emulate(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="A cluster, such as '4x2:200mbit'.")],
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="What every rank runs.")
    ],
) -> None:
    """Run a command on every rank of an emulated cluster, with what torchrun would set.

    Ranks are processes, nodes are network namespaces, links are shaped to the rates of SPEC.
    Returns the exit code of the first rank that fails, 128 + n if signal n ended it.

    Example: tamoe emulate 4x2:200mbit -- python train.py --steps 100
    """
    from tamoe.topology.emulate import emulate as run
    from tamoe.topology.spec import ClusterSpec

    raise typer.Exit(run(ClusterSpec.parse(spec), command))


@app.command()
def probe(
    cluster: Cluster = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Where to write the topology.")
    ] = Path("topology.json"),
    budget_s: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Time that the measurement may take, > 0; default no limit. With --exchange, what "
            "the links leave of it; each exchange is timed once in any case.",
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Ranks on this host; default one a GPU, or one a core.")
    ] = None,
    exchange: Annotated[
        bool,
        typer.Option(
            "--exchange",
            help="Time the exchanges as well, so that plans of the file choose between them.",
        ),
    ] = False,
    json_output: Json = False,
) -> None:
    """Measure the links between ranks and write them as a graph.

    Under torchrun, srun or mpirun it measures the running job; with --cluster an emulated one;
    bare, the GPUs of this host, or its loopback.

    Examples:

      torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m tamoe
    probe -o t.json

      tamoe probe --cluster '4x2:200mbit;node2=50mbit' -o t.json
    """
    from tamoe.probe_command import file_of, run_probe

    topology = run_probe(cluster, output, budget_s=budget_s, ranks=ranks, exchange=exchange)
    if topology is None:  # another rank of a running job; rank 0 prints
        return
    if json_output:
        from tamoe.topology.formats import topology_to_document

        print_json(topology_to_document(topology))
    else:
        from tamoe.tables import print_topology

        print_topology(topology)
        print(f"written to {file_of(topology, output)}")


@app.command()
def show(
    topology_file: TopologyFile,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="A .png or .svg to write.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Show a topology: its levels and links as a table, heatmap and tree as a picture.

    Example: tamoe show topology.json -o figure.png
    """
    from tamoe.topology.graph import Topology

    topology = Topology.load(topology_file)
    if output is not None:
        from tamoe.topology.plot import save_figure

        save_figure(topology, output)
    if json_output:
        from tamoe.topology.formats import topology_to_document

        print_json(topology_to_document(topology))
    else:
        from tamoe.tables import print_topology

        print_topology(topology)
        if output is not None:
            print(f"written to {output}")


@app.command()
def solve(
    topology_file: TopologyFile,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where to write the plan.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens on each rank.")] = 2048,
    top_k: Annotated[int, typer.Option(help="Experts chosen for each token.")] = 2,
    hidden_size: Annotated[int, typer.Option(help="Numbers in a token.")] = 1024,
    element_bytes: Annotated[int, typer.Option(help="Bytes of a number: 2 for bf16.")] = 2,
    experts_per_rank: Annotated[int, typer.Option(help="Experts on each rank.")] = 1,
    method: Annotated[
        Literal["exact", "entropic", "closed_form"],
        typer.Option(help="exact: linear program; entropic: with kl; closed_form: the paper's."),
    ] = "exact",
    floor: Annotated[
        float,
        typer.Option(help="Least part of even that a rank sends to any expert, 0 to 1."),
    ] = 0.0,
    kl: Annotated[
        float, typer.Option(help="Strength of the pull to even; > 0 with entropic.")
    ] = 0.0,
    self_send: Annotated[
        Literal["intra", "copy", "free"], typer.Option(help="Price of a token that stays.")
    ] = "intra",
    exchange: Annotated[
        Literal["auto", "flat", "hierarchical"],
        typer.Option(
            help="What Exchange(plan) is to take; auto: the faster one by the model, where no "
            "constants were measured hierarchical only from a gain of 10 % on."
        ),
    ] = "auto",
    json_output: Json = False,
) -> None:
    """Solve for how many tokens each rank should send to each expert.

    Examples:

      tamoe solve topology.json --tokens 4096 --hidden-size 2048 -o plan.json

      tamoe solve topology.json --method entropic --kl 0.1
    """
    from tamoe.solver import Workload, solve as run
    from tamoe.topology.completeness import check_solvable
    from tamoe.topology.documents import check_writable
    from tamoe.topology.graph import Topology

    workload = Workload(
        tokens_per_rank=tokens,
        top_k=top_k,
        hidden_size=hidden_size,
        element_bytes=element_bytes,
        experts_per_rank=experts_per_rank,
    )
    topology = Topology.load(topology_file)
    if output is not None:
        check_writable(output)
    if warning := check_solvable(topology, str(topology_file)):
        print(f"tamoe: {warning}", file=sys.stderr)
    plan = run(
        topology,
        workload,
        method=method,
        floor=floor,
        kl=kl,
        self_send=self_send,
        exchange=exchange,
    )
    if output is not None:
        plan.save(output)
    if json_output:
        from tamoe.tables import plan_summary

        print_json(plan_summary(plan))
    else:
        from tamoe.tables import print_plan

        print_plan(plan)
        if output is not None:
            print(f"written to {output}")


@app.command()
def demo(
    cluster: Cluster = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Where to write the results.")
    ] = Path("tamoe-demo"),
    steps: Annotated[
        int | None,
        typer.Option(help="Training steps of each strategy, >= 12; default fits six minutes."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Train on this text, not on Shakespeare.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
    json_output: Json = False,
) -> None:
    """Run the whole chain on an emulated cluster and write a report.

    Emulates slow links, measures them, solves for the dispatch, trains a small language model with
    and without topology-aware routing, and shows what that gained and what it cost.

    Examples:

      tamoe demo

      tamoe demo --cluster '2x4:100mbit' -o report --steps 40
    """
    from tamoe.experiments.demo import run_demo

    arguments: dict[str, Any] = {} if cluster is None else {"cluster": cluster}
    with contextlib.redirect_stdout(sys.stderr if json_output else sys.stdout):
        run_demo(out=output, steps=steps, text=text, seed=seed, **arguments)
    if json_output:
        print((output / "results.json").read_text(), end="")


app.add_typer(bench, name="bench")
app.add_typer(kernels, name="kernels")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: one message and the exit code for each kind of failure."""
    try:
        app(arguments)
    except TamoeError as error:
        if isinstance(error, StoppedError) and sys.stderr.isatty():
            print(file=sys.stderr)  # the line has progress on it, and the terminal's ^C
        print(f"tamoe: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
