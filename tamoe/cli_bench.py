"""``tamoe bench``: parts of tamoe against their bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tamoe.cli_parts import Cluster, Commands, Json
from tamoe.topology.errors import InputError

bench = typer.Typer(
    cls=Commands, help="Time parts of tamoe against their bounds.", no_args_is_help=True
)


@bench.callback()
def _bench() -> None:
    pass


@bench.command("exchange")
def bench_exchange(
    cluster: Cluster = None,
    topology: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Topology of the running job, from tamoe probe."),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="JSON; a .png goes beside it.")
    ] = Path("bench-exchange.json"),
    tokens: Annotated[str, typer.Option(help="Tokens of each rank, such as 128,512.")] = "128,512",
    top_k: Annotated[str, typer.Option(help="Experts of each token, such as 1,2,8.")] = "1,2,8",
    skew: Annotated[str, typer.Option(help="even, local, one-hot; several with commas.")] = "even",
    experts_per_rank: Annotated[int, typer.Option(help="Experts on each rank.")] = 8,
    hidden_size: Annotated[int, typer.Option(help="Numbers in a token, 4 bytes each.")] = 512,
    repetitions: Annotated[int, typer.Option(help="Of each exchange, in turns.")] = 5,
    json_output: Json = False,
) -> None:
    """Time every exchange, dispatch and combine, against the bound of its bytes.

    On an emulated cluster, or under torchrun with the topology of the job. Times are medians of the
    last rank; "of bound" is the busiest link's time for its rows over the measured time.

    Examples:

      tamoe bench exchange --cluster 2x4:200mbit

      torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m tamoe
    bench exchange --topology topology.json
    """
    from tamoe.bench_command import print_scores, run_bench

    scores = run_bench(
        cluster,
        topology,
        output,
        tokens=_numbers("--tokens", tokens),
        top_k=_numbers("--top-k", top_k),
        skew=[part.strip() for part in skew.split(",")],
        experts_per_rank=experts_per_rank,
        hidden_size=hidden_size,
        repetitions=repetitions,
    )
    if scores is None:  # another rank of a running job
        return
    if json_output:
        print(output.read_text(), end="")
    else:
        print_scores(scores, cluster or str(topology))
        print(f"written to {output} and {output.with_suffix('.png')}")


@bench.command("kernels")
def bench_kernels(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="JSON with every rate.")
    ] = Path("bench-kernels.json"),
    dtypes: Annotated[str, typer.Option(help="Of rows: float32, float64, bfloat16, float16.")] = (
        "float32,bfloat16"
    ),
    top_k: Annotated[str, typer.Option(help="Experts of each token, such as 2,8.")] = "2,8",
    tokens: Annotated[int, typer.Option(help="Tokens of the rank.")] = 4096,
    hidden_size: Annotated[int, typer.Option(help="Numbers in a token.")] = 1024,
    repetitions: Annotated[int, typer.Option(help="Of each op, in turns.")] = 9,
    device: Annotated[str, typer.Option(help="cpu, or cuda for the kernels.")] = "cpu",
    json_output: Json = False,
) -> None:
    """Time pack, copy and combine against a memcpy of as many bytes.

    One thread or one GPU, caches emptied before every call, medians; "of memcpy" is the rate of an
    op over that of the memcpy timed beside it.

    Examples:

      tamoe bench kernels

      tamoe bench kernels --dtypes bfloat16 --top-k 1,2,4,8 --tokens 8192

      tamoe bench kernels --device cuda --tokens 32768
    """
    from tamoe.bench_kernels_command import print_rates, run_kernel_bench

    rates = run_kernel_bench(
        output,
        dtypes=[part.strip() for part in dtypes.split(",")],
        top_k=_numbers("--top-k", top_k),
        tokens=tokens,
        hidden_size=hidden_size,
        repetitions=repetitions,
        device=device,
    )
    if json_output:
        print(output.read_text(), end="")
    else:
        print_rates(rates, device)
        print(f"written to {output}")


def _numbers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"{name} is {text!r}; allowed: whole numbers with commas between them")
    return [int(part) for part in parts]
