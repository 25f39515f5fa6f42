"""``tamoe probe``: in the running job, on an emulated cluster, or on this host alone."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tamoe.progress import progress_line
from tamoe.topology.documents import check_writable
from tamoe.topology.errors import InputError, ProbeError, RankError, StoppedError
from tamoe.topology.graph import Topology
from tamoe.topology.units import counted

PROBE_TIMEOUT_S = 900.0
_LAUNCHERS = (  # what srun, Open MPI and PMI launchers call rank, world size and local rank
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
TORCHRUN_LINE = (
    "torchrun --nnodes N --nproc-per-node GPUS --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
    "-m tamoe probe -o FILE"
)


def run_probe(
    cluster: str | None,
    output: Path,
    *,
    budget_s: float | None = None,
    ranks: int | None = None,
    exchange: bool = False,
) -> Topology | None:
    """Measure and write the file; None on the ranks of a running job that do not print.

    Only a complete measurement is written to ``output``. What there is of an incomplete one goes
    to a name of its own beside it, see :func:`file_of`, so that it never takes a good file's place.
    With ``exchange`` the file also gets the constants of the exchanges' cost model.

    Raises
    ------
    InputError
        ``cluster`` inside a running job, a budget that is not positive, an unwritable output.
    StoppedError
        Ctrl-C; the message names the partial file.
    RankError
        A rank died; the message names the partial file.
    """
    if budget_s is not None and not budget_s > 0:
        raise InputError(f"--budget-s is {budget_s}; allowed: > 0 seconds")
    if ranks is not None and ranks < 1:
        raise InputError(f"--ranks is {ranks}; allowed: 1 or more")
    if cluster is not None and ranks is not None:
        raise InputError("--ranks and --cluster: give one; the cluster says how many ranks it has")
    job = job_environment(os.environ)
    if job is not None and (cluster is not None or ranks is not None):
        raise InputError(
            "--cluster and --ranks start ranks; this process is a rank of a running job"
        )
    if job is None or job["RANK"] == "0":  # the others write nothing, perhaps on other hosts
        check_writable(output)
    partial = partial_file(output)
    before = _version(partial)
    try:
        if job is not None:
            topology = _probe_job(job, partial, budget_s, exchange)
        else:
            topology = _probe_own_ranks(cluster, ranks, output, budget_s, exchange)
    except KeyboardInterrupt:
        raise StoppedError(f"probe stopped{_kept(partial, before)}") from None
    except RankError as error:
        raise type(error)(f"{error}{_kept(partial, before)}", error.rank) from error
    if topology is not None:
        written = file_of(topology, output)
        topology.save(written)
        if written == output and _version(partial) != before:
            partial.unlink()
    return topology


def file_of(topology: Topology, output: Path) -> Path:
    """Where a measurement belongs: ``output`` if it is complete, else :func:`partial_file`."""
    complete = topology.provenance.get("status", "complete") == "complete"
    return output if complete else partial_file(output)


def partial_file(output: Path) -> Path:
    """The name beside ``output`` for a measurement that is not complete.

    >>> partial_file(Path("out/topology.json")).name
    'topology.partial.json'
    """
    return output.with_name(f"{output.name.removesuffix('.json')}.partial.json")


def _version(path: Path) -> tuple[int, int] | None:
    """Changes when the file is written anew; None without one."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _kept(partial: Path, before: tuple[int, int] | None) -> str:
    """The end of a message: where the part is that was measured, if any was."""
    if _version(partial) in (None, before):  # none, or of an earlier run
        return ""
    if not Topology.load(partial).pairs:
        partial.unlink()
        return "; nothing was measured yet"
    return f"; what was measured until then is in {partial}"


def job_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """RANK, WORLD_SIZE and LOCAL_RANK of the running job, whoever launched it; None outside one.

    >>> job_environment({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"})
    {'RANK': '3', 'WORLD_SIZE': '8', 'LOCAL_RANK': '1'}
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    for theirs in (names, *_LAUNCHERS):
        if theirs[0] in environment and theirs[1] in environment:
            local_rank = environment.get(theirs[2], "0")
            values = (environment[theirs[0]], environment[theirs[1]], local_rank)
            for name, value in zip(theirs, values, strict=True):
                if not value.isdecimal():
                    raise InputError(f"{name} is {value!r} in the environment; allowed: a number")
            if int(values[0]) >= int(values[1]):
                allowed = f"below {theirs[1]}, which is {values[1]}"
                raise InputError(f"{theirs[0]} is {values[0]}; allowed: {allowed}")
            return dict(zip(names, values, strict=True))
    return None


def _probe_job(
    job: dict[str, str], partial: Path, budget_s: float | None, exchange: bool
) -> Topology | None:
    import torch
    import torch.distributed as dist

    if "MASTER_ADDR" not in os.environ:
        raise InputError(
            "MASTER_ADDR is not set; this launcher does not set it. Export MASTER_ADDR (the first "
            "host) and MASTER_PORT (a free port there) before starting the job"
        )
    os.environ.update(job)
    os.environ.setdefault("MASTER_PORT", "29500")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(job["LOCAL_RANK"])) if gpu else None
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device)
    try:
        return _probe_rank(dist.get_rank(), str(partial), budget_s, exchange, None)
    finally:
        dist.destroy_process_group()


def _probe_own_ranks(
    cluster: str | None, ranks: int | None, output: Path, budget_s: float | None, exchange: bool
) -> Topology:
    from tamoe.topology.ranks import run_ranks
    from tamoe.topology.spec import ClusterSpec

    target: ClusterSpec | int
    if cluster is not None:
        target = ClusterSpec.parse(cluster)
        if target.num_nodes == 1 and (target.uplink_bit_per_s or target.node_bit_per_s):
            raise InputError(
                f"--cluster is {cluster!r}: one node, and nothing crosses its uplink; allowed: two "
                f"nodes or more, or no uplink rate; 'intra=RATE' shapes links inside nodes"
            )
        print(f"probe: starting {counted(target.num_ranks, 'rank')} on {target}", file=sys.stderr)
    elif _visible_gpus():
        return _probe_own_gpus(ranks or _visible_gpus(), output, budget_s, exchange)
    else:
        target = ranks or max(2, os.cpu_count() or 2)
        print(
            f"no GPU here: measuring this host's loopback with {counted(target, 'rank')}. "
            f"For a cluster: {TORCHRUN_LINE}",
            file=sys.stderr,
        )
    partial = str(partial_file(output))
    cores = os.cpu_count()  # all ranks share them, whatever the nodes
    results = run_ranks(
        target, _probe_rank, partial, budget_s, exchange, cores, timeout_s=PROBE_TIMEOUT_S
    )
    topology: Topology = results[0]
    if cluster is None:
        return topology
    # Ranks cannot see what carries their traffic; whoever shaped the links can.
    label = {**topology.provenance, "label": "emulated", "cluster": str(target)}
    return dataclasses.replace(topology, provenance=label)


def _probe_own_gpus(ranks: int, output: Path, budget_s: float | None, exchange: bool) -> Topology:
    """One rank a GPU under torchrun, where the group is NCCL's and CUDA starts in each rank."""
    partial = partial_file(output)
    before = _version(partial)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "tamoe", "probe", "-o", str(output)]
    command += [] if budget_s is None else ["--budget-s", str(budget_s)]
    command += ["--exchange"] if exchange else []
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode != 0:
        raise ProbeError(f"probe of {ranks} GPUs failed; what the ranks said stands above")
    return Topology.load(output if _version(partial) in (None, before) else partial)


def _visible_gpus() -> int:
    """GPUs of this host without importing torch; 0 where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    named = [name.strip() for name in visible.split(",")]
    # CUDA takes the list up to the first entry that is no device.
    return min(count, sum(1 for _ in itertools.takewhile(lambda n: n not in ("", "-1"), named)))


def _probe_rank(
    rank: int, partial: str, budget_s: float | None, exchange: bool, at_once: int | None
) -> Topology | None:
    from tamoe.topology.probing import probe

    show, began_s = progress_line("probe"), time.monotonic()
    topology = probe(budget_s=budget_s, progress=show, partial_path=partial)
    complete = topology.provenance.get("status", "complete") == "complete"
    if exchange and not complete and rank == 0:
        print("probe: not complete, so exchanges were not timed", file=sys.stderr)
    if exchange and complete:
        from tamoe.calibration import calibrate

        left_s = None if budget_s is None else began_s + budget_s - time.monotonic()
        shown = show if rank == 0 else None
        topology = calibrate(rank, topology, at_once=at_once, budget_s=left_s, progress=shown)
    return topology if rank == 0 else None
