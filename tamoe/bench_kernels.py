"""Times what the exchange does to rows, in turns with a memcpy of as many bytes.

One process with one thread, as a rank runs. Bytes count when an op reads or writes them, and a
memcpy is timed with as many. A sweep over other memory empties the caches before every call; on a
GPU it also keeps the device busy until the call is queued. The ops copy into memory that was in use
before, all but one: fresh memory can cost more than the work.

Shape suffixes: T tokens, K choices, D hidden size, n rows sent (T * K of them).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tamoe.ops import ROW_DTYPES, copy_rows_, gather_rows
from tamoe.progress import progress_line
from tamoe.row_order import RowOrder
from tamoe.summation import add_up, plan_sum
from tamoe.topology.inventory import software

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in ROW_DTYPES}
OPS = (
    "pack",  # tokens to rows in the order of sending
    "copy",  # rows that arrived to the order of experts
    "combine",  # weighted sums of each token's rows
    "combine, no weights",
    "combine, reads alone",  # its rows drawn into the cache: a ceiling for what adds them up
    "pack, fresh memory",
)
SWEEP_BYTES = 512 * 2**20  # above any last-level cache that a core sees


@dataclass(frozen=True)
class Case:
    """Rows to work on: those of T tokens, each sent to K of 64 experts."""

    dtype: str
    top_k: int
    tokens: int
    hidden_size: int

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * int(DTYPES[self.dtype].itemsize)


@dataclass(frozen=True)
class Rate:
    """One op in one case: medians over the repetitions."""

    case: Case
    op: str
    moved_bytes: int  # read and written
    time_s: float
    memcpy_s: float  # of a memcpy that reads and writes as many

    @property
    def bytes_per_s(self) -> float:
        """Bytes read and written in a second."""
        return self.moved_bytes / self.time_s

    @property
    def share_of_memcpy(self) -> float:
        """Rate over that of memcpy."""
        return self.memcpy_s / self.time_s

    def document(self) -> dict[str, Any]:
        """As JSON writes it."""
        values = dataclasses.asdict(self)
        derived = {"bytes_per_s": self.bytes_per_s, "share_of_memcpy": self.share_of_memcpy}
        return {**values.pop("case"), **values, **derived}


def bench_cases(
    cases: Sequence[Case],
    repetitions: int,
    sweep_bytes: int = SWEEP_BYTES,
    device: torch.device | str = "cpu",
) -> list[Rate]:
    """Time every op in every case, in turns, with one thread; shows progress.

    Parameters
    ----------
    cases
        What to work on.
    repetitions
        Timed calls of each op, >= 1.
    sweep_bytes
        Memory to walk over before every call.
    device
        Where the rows are. On a GPU the ops are tamoe's kernels.

    Examples
    --------
    >>> case = Case("float32", top_k=2, tokens=64, hidden_size=8)
    >>> rates = bench_cases([case], repetitions=1, sweep_bytes=0)
    >>> [(rate.op, rate.moved_bytes) for rate in rates][:3]
    [('pack', 8192), ('copy', 8192), ('combine', 6144)]
    """
    show, total, done = progress_line("bench"), len(cases) * (repetitions + 1), itertools.count(1)
    began_s = time.monotonic()
    show("rounds", 0, total, None)

    def round_done() -> None:
        number = next(done)
        left_s = (time.monotonic() - began_s) / number * (total - number)
        show("rounds", number, total, left_s)

    sweep = torch.zeros(sweep_bytes, dtype=torch.uint8, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            rate for case in cases for rate in _bench_case(case, repetitions, sweep, round_done)
        ]
    finally:
        torch.set_num_threads(threads)


def _bench_case(
    case: Case, repetitions: int, sweep: torch.Tensor, round_done: Callable[[], None]
) -> list[Rate]:
    steps = _steps(case, sweep.device)
    most_bytes = max(moved_bytes for moved_bytes, _ in steps.values()) // 2
    source = torch.randint(256, (most_bytes,), dtype=torch.uint8, device=sweep.device)
    copied = torch.zeros_like(source)

    def timed_s(step: Callable[[], Any]) -> float:
        sweep.add_(1)
        if sweep.is_cuda:
            return _queued_s(step)
        start_s = time.perf_counter()
        step()
        return time.perf_counter() - start_s

    times: dict[str, list[tuple[float, float]]] = {op: [] for op in steps}
    for _ in range(repetitions + 1):
        for op, (moved_bytes, step) in steps.items():
            half = moved_bytes // 2  # is read, and as much is written
            memcpy = partial(copied[:half].copy_, source[:half])
            times[op].append((timed_s(step), timed_s(memcpy)))
        round_done()
    return [
        Rate(case, op, steps[op][0], *map(statistics.median, zip(*of_op[1:], strict=True)))
        for op, of_op in times.items()  # the first call warms up
    ]


def _queued_s(step: Callable[[], Any]) -> float:
    """Seconds that the device takes for a step."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _steps(case: Case, device: torch.device) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Bytes that each op reads and writes, and a call of it; the calls are the exchange's own."""
    generator = torch.Generator().manual_seed(0)
    num_experts = max(64, case.top_k)
    dtype, num_tokens, num_rows = DTYPES[case.dtype], case.tokens, case.tokens * case.top_k

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, case.hidden_size, generator=generator).to(device, dtype)

    x_TD, row_nD = normal(num_tokens), normal(num_rows)
    packed_nD, placed_nD = torch.zeros_like(row_nD), torch.zeros_like(row_nD)
    index_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(case.top_k).indices
    token_n = (index_TK.flatten().argsort(stable=True) // case.top_k).to(device)
    weight_n = torch.rand(num_rows, generator=generator).to(device)
    plan = plan_sum(token_n, torch.zeros_like(token_n), num_tokens, ())
    # Rows arrive from 8 ranks, those of each for 8 experts.
    block_n = torch.randint(64, (num_rows,), generator=generator)
    blocks = torch.bincount(block_n, minlength=64).view(8, 8).tolist()
    place_n = RowOrder([blocks]).by_source(device)
    by_token_n = token_n.argsort(stable=True)
    cached_mD = (x_TD[:64] if device.type == "cpu" else row_nD).clone()  # a GPU reads all at once

    def read() -> None:
        for index_m in by_token_n.split(len(cached_mD)):
            torch.index_select(row_nD, 0, index_m, out=cached_mD[: len(index_m)])

    copied_bytes = 2 * num_rows * case.row_bytes
    summed_bytes = (num_rows + num_tokens) * case.row_bytes
    calls: tuple[tuple[int, Callable[[], Any]], ...] = (
        (copied_bytes, lambda: copy_rows_(packed_nD, x_TD, token_n)),
        (copied_bytes, lambda: copy_rows_(placed_nD, row_nD, None, place_n)),
        (summed_bytes, lambda: add_up(row_nD, plan, weight_n)),
        (summed_bytes, lambda: add_up(row_nD, plan)),
        (summed_bytes, read),
        (copied_bytes, lambda: gather_rows(x_TD, token_n)),
    )
    return dict(zip(OPS, calls, strict=True))


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the rates are of: processor or GPU, cores, vector instructions, versions."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    gpu = {}
    if torch.device(device).type == "cuda":
        gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return {
        **gpu,
        "processor": names[0] if names else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "threads": 1,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "versions": software(),
    }
