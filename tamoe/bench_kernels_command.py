"""``tamoe bench kernels``: rates of pack, copy and combine on this machine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tamoe.topology.errors import InputError, whole

if TYPE_CHECKING:
    from tamoe.bench_kernels import Rate

SCHEMA = "tamoe.bench_kernels"


def run_kernel_bench(
    output: Path,
    *,
    dtypes: Sequence[str],
    top_k: Sequence[int],
    tokens: int,
    hidden_size: int,
    repetitions: int,
    device: str,
) -> list[Rate]:
    """Time every op for every dtype and K, and write ``output``.

    Raises
    ------
    InputError
        A number or dtype is not allowed, or the output cannot be written.
    """
    from tamoe.bench_kernels import DTYPES, Case, bench_cases, machine

    for name, value in (
        *(("--top-k", value) for value in top_k),
        ("--tokens", tokens),
        ("--hidden-size", hidden_size),
        ("--repetitions", repetitions),
    ):
        whole(name, value, 1)
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise InputError(f"--dtypes is {dtype!r}; allowed: {', '.join(DTYPES)}")
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"--output is {str(output)!r}; allowed: a file in a folder that is there")
    _check_device(device)
    cases = [Case(d, k, tokens, hidden_size) for d, k in itertools.product(dtypes, top_k)]
    rates = bench_cases(cases, repetitions, device=device)
    document = {
        "schema": SCHEMA,
        "schema_version": "1.0",
        "label": "measured",
        "device": device,
        "machine": machine(device),
        "repetitions": repetitions,
        "rates": [rate.document() for rate in rates],
    }
    output.write_text(json.dumps(document, indent=1) + "\n")
    return rates


def _check_device(device: str) -> None:
    import torch

    from tamoe.kernel_calls import library_of

    if device not in ("cpu", "cuda"):
        raise InputError(f"--device is {device!r}; allowed: cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is 'cuda' and PyTorch sees no GPU here; allowed: cpu")
    if device == "cuda" and library_of(torch.empty(0, device=device)) is None:
        raise InputError("--device is 'cuda' and there are no kernels for it; see `tamoe kernels`")


def print_rates(rates: Sequence[Rate], device: str) -> None:
    """A table: bytes, time, rate, and its share of a memcpy's."""
    from rich.console import Console
    from rich.table import Table

    case, where = rates[0].case, "one thread" if device == "cpu" else "one GPU"
    title = f"Rows of {case.tokens:,} tokens of {case.hidden_size:,} (measured, {where})"
    table = Table(title=title, title_justify="left")
    for column in ("dtype", "top-k", "op"):
        table.add_column(column, justify="right" if column == "top-k" else "left")
    for column in ("MB", "ms", "GB/s", "of memcpy"):
        table.add_column(column, justify="right")
    for _, group in itertools.groupby(rates, key=lambda rate: rate.case):
        for rate in group:
            table.add_row(
                rate.case.dtype,
                str(rate.case.top_k),
                rate.op,
                f"{rate.moved_bytes / 1e6:.1f}",
                f"{rate.time_s * 1e3:.2f}",
                f"{rate.bytes_per_s / 1e9:.1f}",
                f"{rate.share_of_memcpy:.2f}",
            )
        table.add_section()
    Console(width=None if Console().is_terminal else 110).print(table)
