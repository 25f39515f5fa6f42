"""``tamoe kernels``: build the CUDA kernels, or check them without a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from tamoe.cli_parts import Commands, Json, print_json

kernels = typer.Typer(
    cls=Commands,
    help="Build the CUDA kernels, or check what can be checked of them without a GPU.",
    no_args_is_help=True,
)


@kernels.command("build")
def kernels_build(
    arch: Annotated[
        list[str] | None,
        typer.Option(metavar="SM", help="Such as sm_90; may be repeated. Default: all, and PTX."),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Where to write the library.")
    ] = Path("libtamoe.so"),
    ptx: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write PTX for compute_90 here instead of a library."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Compile the kernels with nvcc into one library, or into PTX to read or run elsewhere.

    A GPU's first use builds what it needs by itself; this makes the library of a release.

    Examples:

      tamoe kernels build --arch sm_90 -o libtamoe.so

      tamoe kernels build --ptx ptx
    """
    from tamoe.kernels_command import build

    built = build(arch, output, ptx)
    if json_output:
        print_json(built)
    else:
        for file in built["files"]:
            print(f"{file['path']}: {file['bytes']} bytes")


@kernels.command("check")
def kernels_check(
    arch: Annotated[
        list[str] | None,
        typer.Option(metavar="SM", help="Such as sm_90; may be repeated. Default: all."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Compile the kernels strictly for every architecture; registers, spills, 16-byte accesses.

    Fails on a compiler's warning, a spilled register, use of local memory, or a copying kernel
    whose machine code lacks loads or stores of 16 bytes. Says nothing about speed.

    Example: tamoe kernels check --arch sm_90
    """
    from tamoe.kernels_command import check, print_facts

    facts = check(arch)
    if json_output:
        print_json([dataclasses.asdict(fact) for fact in facts])
    else:
        print_facts(facts)
