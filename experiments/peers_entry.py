"""What every compared exchange is given and how it is timed; tamoe's own entries.

Shape suffixes: T tokens, K choices, D hidden size, N experts of the group, R rows received.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tamoe.bench import Setting, random_routing
from tamoe.exchange import Exchange
from tamoe.record import record_exchanges
from tamoe.topology.graph import Topology

_UNCHOSEN_LOGIT = -1e4  # its probability is exactly 0 in float32


@dataclass(frozen=True, eq=False)
class Load:
    """One rank's tokens and where they go; all exchanges get the same."""

    topology: Topology
    rank: int
    num_experts: int
    x_TD: torch.Tensor
    index_TK: torch.Tensor
    weight_TK: torch.Tensor  # rows add up to 1, as gates of the peers make them

    @property
    def experts_per_rank(self) -> int:
        """Experts of each rank."""
        return self.num_experts // self.topology.num_ranks

    @property
    def factor_E(self) -> torch.Tensor:
        """What this rank's experts multiply their rows by: a row at a wrong expert shows."""
        first = self.rank * self.experts_per_rank
        return _factor_N(self.num_experts)[first : first + self.experts_per_rank]

    @property
    def logits_TN(self) -> torch.Tensor:
        """Logits from which a gate with a softmax over all experts makes this routing."""
        logits_TN = torch.full((len(self.x_TD), self.num_experts), _UNCHOSEN_LOGIT)
        return logits_TN.scatter(1, self.index_TK, self.weight_TK.log())

    @property
    def expected_TD(self) -> torch.Tensor:
        """What dispatch, experts and combine come to, without an exchange."""
        share_T = (self.weight_TK * _factor_N(self.num_experts)[self.index_TK]).sum(1)
        return self.x_TD * share_T[:, None]


def _factor_N(num_experts: int) -> torch.Tensor:
    return 1 + torch.arange(num_experts) / num_experts


def make_load(rank: int, topology: Topology, setting: Setting) -> Load:
    """Random tokens and a routing of the setting's skew, the same in every run."""
    generator = torch.Generator().manual_seed(rank)
    index_TK = random_routing(setting, rank, topology, generator)
    return Load(
        topology=topology,
        rank=rank,
        num_experts=setting.experts_per_rank * topology.num_ranks,
        x_TD=torch.randn(setting.tokens, setting.hidden_size, generator=generator),
        index_TK=index_TK,
        weight_TK=torch.rand(index_TK.shape, generator=generator).softmax(1),
    )


class Clock:
    """Times of one dispatch and combine on this rank; starts when all ranks are ready.

    ``moving_s`` is the part in which rows are on their way: the peers' all-to-alls, tamoe's
    recorded phases, which for the hierarchical exchange hold the copies between its hops.
    """

    def __init__(self) -> None:
        self.dispatch_s = self.combine_s = self.moving_s = 0.0
        dist.barrier()
        self._began_s = time.perf_counter()

    @contextmanager
    def experts(self) -> Iterator[None]:
        """The experts' work between dispatch and combine, which does not count."""
        self.dispatch_s = time.perf_counter() - self._began_s
        yield
        dist.barrier()
        self._began_s = time.perf_counter()

    def stop(self) -> None:
        """The combined tokens are there."""
        self.combine_s = time.perf_counter() - self._began_s

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Rows are on their way inside the block."""
        began_s = time.perf_counter()
        yield
        self.moving_s += time.perf_counter() - began_s


@dataclass(frozen=True, eq=False)
class Entry:
    """One exchange, ready for one load.

    ``run`` takes the clock, dispatches, works as the experts inside ``clock.experts()`` and
    returns the combined tokens, ``[T, D]``.
    """

    name: str
    run: Callable[[Clock], torch.Tensor]
    capacity: int | None = None  # rows of each expert's buffer for each source rank; None: exact
    dropped_share: float = 0.0  # of this rank's choices


def tamoe_entries(load: Load) -> list[Entry]:
    """Both schedules of the flat exchange, and the hierarchical one."""
    return [
        Entry(
            "tamoe flat single",
            _run_tamoe(load, Exchange(load.topology, kind="flat", schedule="single")),
        ),
        Entry(
            "tamoe flat rounds",
            _run_tamoe(load, Exchange(load.topology, kind="flat", schedule="rounds")),
        ),
        Entry("tamoe hierarchical", _run_tamoe(load, Exchange(load.topology, kind="hierarchical"))),
    ]


def _run_tamoe(load: Load, exchange: Exchange) -> Callable[[Clock], torch.Tensor]:
    def run(clock: Clock) -> torch.Tensor:
        with record_exchanges() as record:
            row_RD, handle = exchange.dispatch(
                load.x_TD, load.index_TK, load.weight_TK, num_experts=load.num_experts
            )
            with clock.experts():
                row_RD = scale_rows(row_RD, handle.counts_E, load)
            out_TD = exchange.combine(row_RD, handle)
            clock.stop()
        clock.moving_s = record.phase_s("dispatch") + record.phase_s("combine")
        return out_TD

    return run


def scale_rows(row_RD: torch.Tensor, counts_E: tuple[int, ...], load: Load) -> torch.Tensor:
    """The experts' work on rows sorted by expert."""
    return row_RD * load.factor_E.repeat_interleave(torch.tensor(counts_E))[:, None]
