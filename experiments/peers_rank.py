"""What each rank does: every exchange on the same tokens, in turns, timed and checked.

Shape suffixes: T tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tamoe.bench import Setting
from tamoe.experiments.peers_entry import Clock, Entry, Load, make_load, tamoe_entries
from tamoe.progress import progress_line
from tamoe.topology.errors import RankError
from tamoe.topology.graph import Topology
from tamoe.topology.netns import interface_bytes

TOLERANCE = 1e-5  # of the largest output: peers add up in another order


@dataclass(frozen=True)
class Score:
    """One exchange on one routing: medians over the repetitions, each of the last rank."""

    routing: str
    exchange: str
    dispatch_s: float
    combine_s: float
    moving_s: float  # of both, see Clock
    received_bytes: float  # by the busiest node, dispatch and combine together
    capacity: int | None  # rows of a padded buffer; None: exact
    dropped_share: float  # of all choices
    error: float | None  # largest, over the largest output; None where choices were dropped

    @property
    def total_s(self) -> float:
        """Dispatch and combine."""
        return self.dispatch_s + self.combine_s


def compare(
    rank: int,
    topology: Topology,
    settings: Sequence[Setting],
    peers: Sequence[str],
    folder: Path | None,
    repetitions: int,
) -> tuple[list[Score], str | None]:
    """Time every exchange on every setting; all ranks call it and get the scores.

    Parameters
    ----------
    rank, topology
        This rank, and the cluster as it is.
    settings
        Routings to compare on.
    peers
        What takes part beside tamoe.
    folder
        Where MPI's wires are, see :func:`tamoe.experiments.peers_mpi.make_wires`.
    repetitions
        Timed ones; one more is for connecting and for checking the results.

    Returns
    -------
    scores, mpi
        And what the MPI library calls itself, None without.

    Raises
    ------
    RankError
        An exchange that drops nothing, tamoe's own or a peer's, gave a wrong result.
    """
    with contextlib.ExitStack() as stack:
        comm = mpi = None
        if "mpi" in peers:
            from tamoe.experiments.peers_mpi import open_mpi

            assert folder is not None
            comm = stack.enter_context(open_mpi(rank, folder, topology))
            mpi = _mpi_name()
        show = progress_line("peers") if rank == 0 else None
        scores: list[Score] = []
        rounds, began_s = len(settings) * (repetitions + 1), time.monotonic()
        for number, setting in enumerate(settings):
            load = make_load(rank, topology, setting)
            entries = _entries(load, peers, comm)
            samples = []
            for repetition in range(repetitions + 1):
                samples.append([_sample(entry, load) for entry in entries])
                if show is not None:
                    done = number * (repetitions + 1) + repetition + 1
                    left_s = (time.monotonic() - began_s) / done * (rounds - done)
                    show("rounds", done, rounds, left_s)
            scores += _scores(setting, entries, samples)
    return scores, mpi


def _entries(load: Load, peers: Sequence[str], comm: Any) -> list[Entry]:
    entries = tamoe_entries(load)
    if "mpi" in peers:
        from tamoe.experiments.peers_mpi import mpi_entries

        entries += mpi_entries(load, comm)
    if "deepspeed" in peers:
        from tamoe.experiments.peers_padded import deepspeed_entries

        entries += deepspeed_entries(load)
    if "tutel" in peers:
        from tamoe.experiments.peers_padded import tutel_entries

        entries += tutel_entries(load)
    return entries


def _mpi_name() -> str:
    from mpi4py import MPI

    return MPI.Get_library_version().partition(",")[0].strip()


def _sample(entry: Entry, load: Load) -> list[float]:
    """Dispatch, combine and moving seconds, received bytes, error: of this rank."""
    dist.barrier()
    before = interface_bytes()[0]
    clock = Clock()
    with torch.no_grad():
        out_TD = entry.run(clock)
    dist.barrier()
    received = interface_bytes()[0] - before
    expected_TD = load.expected_TD
    error = float((out_TD - expected_TD).abs().max() / expected_TD.abs().max())
    return [clock.dispatch_s, clock.combine_s, clock.moving_s, received, error]


def _scores(
    setting: Setting, entries: Sequence[Entry], samples: Sequence[Sequence[Sequence[float]]]
) -> list[Score]:
    """Medians of the last rank; raises where a result is wrong."""
    last = torch.tensor(samples, dtype=torch.float64)  # repetition, exchange, value
    dist.all_reduce(last, dist.ReduceOp.MAX)
    dropped = torch.tensor([entry.dropped_share for entry in entries])
    dist.all_reduce(dropped)
    dropped /= dist.get_world_size()
    scores = []
    for number, entry in enumerate(entries):
        drops = float(dropped[number])
        error = float(last[:, number, 4].max())
        if drops == 0 and not error <= TOLERANCE:
            raise RankError(
                f"{entry.name} on the {setting.skew} routing differs from what the experts' "
                f"outputs add up to by {error:.1e} of the largest value; allowed: {TOLERANCE:g}"
            )
        dispatch_s, combine_s, moving_s, received = (
            float(value) for value in last[1:, number, :4].median(0).values
        )
        scores.append(
            Score(
                routing=setting.skew,
                exchange=entry.name,
                dispatch_s=dispatch_s,
                combine_s=combine_s,
                moving_s=moving_s,
                received_bytes=received,
                capacity=entry.capacity,
                dropped_share=drops,
                error=None if drops else error,
            )
        )
    return scores
