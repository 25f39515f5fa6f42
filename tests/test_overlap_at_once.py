"""Rows and experts at the same time: what overlaps in a layer, and what the experiment times."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tamoe import MoE, NaiveGate
from tamoe.exchange import Exchange
from tamoe.experiments.overlap import Config, main, names
from tamoe.topology import Topology, run_ranks

TREE = Topology.from_tree("2x2", bandwidth_bytes_per_s=(1e9, 1e9))
TIMEOUT_S = 30.0


def at_the_same_time(rank: int, backward: bool) -> list[bool]:
    """Whether experts are at work on a piece before rows of the next one have come."""
    exchange, seen = Exchange(TREE, kind="flat", timeout_s=TIMEOUT_S), []
    dispatch, combine = exchange.dispatch, exchange.combine
    number, begun = itertools.count(), threading.Semaphore(0)

    def wait(*_: Any) -> None:
        if next(number):
            seen.append(begun.acquire(timeout=TIMEOUT_S / 3))

    def late(*given: Any, **options: Any) -> Any:
        wait()
        return dispatch(*given, **options)

    def late_in_backward(*given: Any) -> torch.Tensor:
        out_tD = combine(*given)
        out_tD.register_hook(wait)
        return out_tD

    class Working(nn.Module):
        def forward(self, row_RD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
            made_RD = 2 * row_RD
            if backward:
                made_RD.register_hook(lambda _: begun.release())
            else:
                begun.release()
            return made_RD

    if backward:
        exchange.combine = late_in_backward  # type: ignore[method-assign]
    else:
        exchange.dispatch = late  # type: ignore[method-assign]
    gate = NaiveGate(6, 8, top_k=3, scope="shared")
    moe = MoE(gate, Working(), num_experts=8, exchange=exchange, overlap=3)
    x_TD = torch.randn(8, 6, generator=torch.Generator().manual_seed(rank))
    moe(x_TD.requires_grad_()).hidden.sum().backward()
    return seen


@pytest.mark.ranks
@pytest.mark.parametrize("backward", [False, True])
def test_rows_of_the_next_piece_move_while_experts_work(backward: bool) -> None:
    assert run_ranks(4, at_the_same_time, backward) == [[True, True]] * 4


@pytest.mark.emulated
def test_the_experiment_times_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "overlap.json"
    sizes = {"tokens": 16, "hidden_size": 8, "intermediate_size": 8, "most_pieces": 2}
    main(path, cluster="2x1:200mbit", top_k=2, repetitions=2, **sizes)
    seconds = json.loads(path.read_text())["seconds"]
    assert list(seconds) == names(Config(most_pieces=2))
    assert all(len(times_s) == 2 and min(times_s) > 0 for times_s in seconds.values())
    assert "hierarchical" in capsys.readouterr().out
