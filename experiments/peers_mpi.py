"""Open MPI inside the ranks of an emulated cluster, and its MPI_Alltoallv as an exchange.

The ranks are processes of tamoe, not of ``mpirun``. So rank 0 starts an ``mpirun`` that places one
idle process a rank; each hands its environment to its rank, which then is that MPI process for the
library. Another node's daemon is not started over ssh: the command goes through a FIFO to the first
rank of that node. MPI and gloo thus run in the same processes and take turns on the same links.

Shape suffixes: P ranks, E experts of a rank, D hidden size, n rows sent, R rows received.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tamoe.experiments.peers_entry import Clock, Entry, Load, scale_rows
from tamoe.flat import plan_flat
from tamoe.handle import sort_keys
from tamoe.placement import contiguous
from tamoe.record import Phase, record_exchanges
from tamoe.schedules import Mover
from tamoe.solver.relays import sum_groups
from tamoe.topology.errors import RankError
from tamoe.topology.graph import Topology
from tamoe.waiting import Patience

_START_TIMEOUT_S = 60.0
_END = b"\0\0"  # of an environment
_AGENT = 'host=$1; shift; printf "%s\\n" "$*" > "{folder}/$host"\n'  # mpirun adds HOST COMMAND…
_IDLE = (
    'r=$OMPI_COMM_WORLD_RANK; {{ env -0; printf "\\0"; }} > "{folder}/environment$r"; '
    'read end < "{folder}/done$r"'
)


def make_wires(folder: Path, topology: Topology) -> None:
    """The FIFOs and the agent through which mpirun, its daemons and the ranks meet."""
    names = [f"node{node}" for node in range(1, topology.num_nodes)]
    names += [f"{kind}{r}" for kind in ("environment", "done") for r in range(topology.num_ranks)]
    for name in names:
        os.mkfifo(folder / name)
    (folder / "agent").write_text(_AGENT.format(folder=folder))


@contextmanager
def open_mpi(rank: int, folder: Path, topology: Topology) -> Iterator[Any]:
    """MPI's communicator of all ranks; every rank of the cluster calls it, once in a process.

    Parameters
    ----------
    rank
        This rank.
    folder
        Where :func:`make_wires` was called.
    topology
        Nodes of the ranks; host names are ``node0``, ``node1``, …

    Raises
    ------
    RankError
        mpirun or a daemon did not start in time; what they said is on standard error.
    """
    node = topology.node_of[rank]
    daemon = None
    if rank == 0:
        daemon = _start_mpirun(folder, topology)
    elif rank == topology.nodes[node][0]:
        daemon = subprocess.Popen(["sh", "-c", _read_until(folder / f"node{node}", b"\n").decode()])
    environment = _read_until(folder / f"environment{rank}", _END).decode().split("\0")
    given = dict(line.partition("=")[::2] for line in environment)
    os.environ.update({k: v for k, v in given.items() if k.startswith(("PMIX_", "OMPI_"))})

    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    MPI.Init()
    assert (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size) == (rank, topology.num_ranks)
    yield MPI.COMM_WORLD
    MPI.Finalize()
    (folder / f"done{rank}").write_text("\n")
    if daemon is not None:
        daemon.wait()


def _start_mpirun(folder: Path, topology: Topology) -> subprocess.Popen[bytes]:
    hosts = ",".join(f"node{node}:{len(ranks)}" for node, ranks in enumerate(topology.nodes))
    settings = {
        "plm_rsh_agent": f"sh {folder}/agent",
        "btl_tcp_if_include": "eth0",
        "oob_tcp_if_include": "eth0",
        "mpi_yield_when_idle": "1",  # ranks share cores
        "orte_tmpdir_base": str(folder),
        "btl_vader_backing_directory": str(folder),
    }
    words = [word for name, value in settings.items() for word in ("--mca", name, value)]
    command = ["mpirun", "--host", hosts, "-np", str(topology.num_ranks), *words]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    idle = ["sh", "-c", _IDLE.format(folder=folder)]
    return subprocess.Popen([*command, *idle], env={**os.environ, **root})


def _read_until(path: Path, end: bytes) -> bytes:
    """What is written to a FIFO, up to ``end``."""
    descriptor = os.open(path, os.O_RDWR)  # also open for writing: opening does not wait
    deadline = time.monotonic() + _START_TIMEOUT_S
    text = b""
    while not text.endswith(end):
        if not select.select([descriptor], [], [], max(deadline - time.monotonic(), 0.0))[0]:
            raise RankError(
                f"Open MPI did not start within {_START_TIMEOUT_S:g} s ({path.name}); its messages "
                f"stand above. Leave it out with --without mpi"
            )
        text += os.read(descriptor, 65536)
    os.close(descriptor)
    return text.removesuffix(end)


@dataclass(frozen=True, eq=False)
class MpiMover(Mover):
    """Moves rows by MPI_Alltoallv in place of torch.distributed."""

    comm: Any

    def move(
        self,
        row_nD: torch.Tensor,
        send_splits: Sequence[int],
        receive_splits: Sequence[int],
        phase: Phase,
        into_RD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Send rows to every rank; received rows are in order of rank."""
        width = row_nD.shape[1]
        received_RD = row_nD.new_empty(sum(receive_splits), width) if into_RD is None else into_RD
        with self.recorded(phase, row_nD, lambda: [send_splits]):
            self.comm.Alltoallv(
                [row_nD.contiguous().numpy(), [rows * width for rows in send_splits]],
                [received_RD.numpy(), [rows * width for rows in receive_splits]],
            )
        return received_RD


def mpi_entries(load: Load, comm: Any) -> list[Entry]:
    """MPI_Alltoall for counts, MPI_Alltoallv for rows; packed and added up as in tamoe's flat."""
    topology = load.topology
    mover = MpiMover(None, topology.nodes, load.rank, "single", Patience("MPI exchange"), comm)
    return [Entry("Open MPI Alltoallv", _run_mpi(load, mover))]


def _run_mpi(load: Load, mover: MpiMover) -> Callable[[Clock], torch.Tensor]:
    groups = sum_groups(load.topology)
    num_tokens, top_k = load.index_TK.shape

    def run(clock: Clock) -> torch.Tensor:
        with record_exchanges() as record:
            key, _ = sort_keys(load.index_TK, contiguous(load.num_experts, load.topology.num_ranks))
            count_N = torch.bincount(key, minlength=load.num_experts + 1)[:-1]
            sent_PE = count_N.view(-1, load.experts_per_rank)
            received_PE = torch.empty_like(sent_PE)
            mover.comm.Alltoall(sent_PE.numpy(), received_PE.numpy())
            choice_n = torch.argsort(key, stable=True)
            route = plan_flat(
                mover,
                num_tokens,
                choice_n // top_k,
                load.weight_TK.flatten()[choice_n],
                sent_PE.tolist(),
                received_PE.tolist(),
                groups,
            )
            row_RD, weight_n, anchor_0D = route.dispatch(load.x_TD)
            with clock.experts():
                row_RD = scale_rows(row_RD, tuple(received_PE.sum(0).tolist()), load)
            out_TD = route.combine(row_RD, weight_n, anchor_0D)
            clock.stop()
        clock.moving_s = record.phase_s("dispatch") + record.phase_s("combine")
        return out_TD

    return run
