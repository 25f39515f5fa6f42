"""A rank that dies or stops in an exchange: every other rank raises in time and says where."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tamoe import ExchangeError, node_channel
from tamoe.exchange import Exchange, Kind
from tamoe.topology import RankError, Topology, ranks, run_ranks
from tamoe.transfer import Round, Transfer, Waiting

TIMEOUT_S = 3.0
REPETITIONS = int(os.environ.get("TAMOE_FAULTS", "1"))  # of each of 60 cases
VICTIM = 3


def struck(
    rank: int, kind: Kind, schedule: Any, when: str, how: int, moment: str, folder: str
) -> None:
    """An exchange in which one rank is struck; the others note what they were told."""
    topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(1e9, 1e9))
    exchange = Exchange(topology, kind=kind, schedule=schedule, timeout_s=TIMEOUT_S)
    x_TD = torch.ones(64, 2048 if moment == "rows under way" else 32, requires_grad=True)
    index_TK = torch.arange(8).repeat(64, 1)
    weight_TK = torch.ones(64, 8, requires_grad=True)

    def strike(phase: str) -> None:
        if phase != when:
            return
        if rank == VICTIM and moment == "rows under way":
            strike_on_the_way(how)
        elif rank == VICTIM:
            os.kill(os.getpid(), how)
        if moment == "late":
            time.sleep(0.7)  # the others know by then that the connection is gone

    def run(strikes: bool) -> None:
        if strikes:
            strike("dispatch")
        row_RD, handle = exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=8)
        if strikes:
            row_RD.register_hook(lambda _: strike("dispatch_backward"))
            strike("combine")
        out_TD = exchange.combine(row_RD, handle)
        if strikes:
            strike("combine_backward")
        out_TD.sum().backward()
        if strikes:  # rows that were under way may all have come
            exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=8)

    run(False)
    dist.barrier()
    began_s = time.monotonic()
    try:
        run(True)
    except ExchangeError as error:
        with open(f"{folder}/{rank}", "w") as file:
            file.write(f"{time.monotonic() - began_s:.1f} s: {error}")
        raise


def strike_on_the_way(how: int) -> None:
    """Strike this rank as soon as rows of its own are on their way to another node."""
    start = Transfer._start

    def struck_start(self: Transfer, step: Round, where: str, tag: int = 0) -> Waiting:
        wait = start(self, step, where, tag)
        if 0 in step.targets and "counts" not in where:
            os.kill(os.getpid(), how)
        return wait

    Transfer._start = struck_start  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _launcher_lets_all_ranks_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it ends the others soon after one rank has died."""

    def receive_all(self: Any) -> None:
        deadline = time.monotonic() + 10 * TIMEOUT_S
        while len(self.raised) < 3 and self._receive(deadline):
            pass

    monkeypatch.setattr(ranks._Collector, "_receive_causes", receive_all)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("kind", "schedule"), [("flat", "single"), ("flat", "rounds"), ("hierarchical", "auto")]
)
@pytest.mark.parametrize("when", ["dispatch", "combine", "combine_backward", "dispatch_backward"])
@pytest.mark.parametrize(
    ("how", "moment"),
    [
        (signal.SIGKILL, "before"),
        (signal.SIGKILL, "late"),
        (signal.SIGKILL, "rows under way"),
        (signal.SIGSTOP, "before"),
        (signal.SIGSTOP, "rows under way"),
    ],
)
def test_every_other_rank_raises_and_names_the_hop(
    kind: Kind, schedule: str, when: str, how: int, moment: str, tmp_path_factory: Any
) -> None:
    for _ in range(REPETITIONS):
        folder = tmp_path_factory.mktemp("told")
        given = kind, schedule, when, int(how), moment, str(folder)
        with pytest.raises(RankError):
            run_ranks(4, struck, *given, timeout_s=20 * TIMEOUT_S)
        told = {path.name: path.read_text() for path in folder.iterdir()}
        assert set(told) == {"0", "1", "2"}
        for text in told.values():
            assert float(text.split()[0]) < 3 * TIMEOUT_S  # a wait each for counts, rows and back
            assert f"{kind} exchange, " in text, text
            assert "failed with rank" in text
            hop = r"(, hop of level 1)?(, round 1 between nodes|, inside the node|, all ranks)"
            where = f"counts|{when}{hop}" if when == "dispatch" else f"{when}{hop}"
            if moment == "rows under way":  # all of them may have come; what follows then fails
                where = f"counts|(dispatch|combine|combine_backward|dispatch_backward){hop}"
            assert re.search(f"exchange, ({where})", text), text


def struck_while_connecting(rank: int, kind: Kind, how: int, folder: str) -> None:
    """The first exchange of a group, in which the ranks of a node connect."""
    topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(1e9, 1e9))
    exchange = Exchange(topology, kind=kind, timeout_s=TIMEOUT_S)
    if rank == VICTIM:
        node_channel._channel_once._make = lambda *given: os.kill(os.getpid(), how)  # type: ignore[assignment, return-value]
    try:
        exchange.dispatch(torch.ones(4, 2), torch.arange(4).view(4, 1), num_experts=4)
    except ExchangeError as error:
        with open(f"{folder}/{rank}", "w") as file:
            file.write(str(error))
        raise


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["flat", "hierarchical"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_goes_while_its_node_connects_is_noticed(
    kind: Kind, how: int, tmp_path: Any
) -> None:
    with pytest.raises(RankError):
        run_ranks(
            4, struck_while_connecting, kind, int(how), str(tmp_path), timeout_s=20 * TIMEOUT_S
        )
    told = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(told) == {"0", "1", "2"}
    for text in told.values():
        assert f"{kind} exchange, sockets of the node" in text and "failed with rank" in text
    assert "failed with rank 3" in told["2"]
