"""Devices that tokens may be on: which backend moves them, and ranks that differ."""

from typing import Any
from unittest import mock

import pytest
import torch

import tamoe.exchange
from tamoe import Exchange
from tamoe.agreement import Header
from tamoe.groups import token_device, works_by_gloo
from tamoe.topology import InputError, Topology, run_ranks


class Group:
    """As a process group names its backends: one for each type of device, or none."""

    def __init__(self, **names: str) -> None:
        self._names = names

    def _get_backend(self, device: torch.device) -> Any:
        if device.type not in self._names:
            raise RuntimeError(f"No backend type associated with device type {device.type}")
        backend = mock.Mock()
        backend.name.return_value = self._names[device.type]
        return backend


@pytest.mark.parametrize(
    ("names", "with_gpu", "without"),
    [
        ({"cpu": "gloo"}, "cpu", "cpu"),
        ({"cpu": "gloo", "cuda": "gloo"}, "cpu", "cpu"),
        ({"cpu": "gloo", "cuda": "nccl"}, "cuda", "cpu"),
        ({"cuda": "nccl"}, "cuda", "cuda"),
        ({"cpu": "mpi"}, "cpu", "cpu"),
    ],
)
def test_tokens_are_expected_where_a_backend_is_made_for_them(
    names: dict[str, str], with_gpu: str, without: str
) -> None:
    group: Any = Group(**names)
    for available, expected in ((True, with_gpu), (False, without)):
        with mock.patch("torch.cuda.is_available", return_value=available):
            device = token_device(group)
        assert device.type == expected
        assert works_by_gloo(group, device) == (names[expected] == "gloo")


def test_what_goes_back_is_where_it_came_to() -> None:
    exchange, index_TK = Exchange(), torch.tensor([[1], [0]])
    row_RD, handle = exchange.dispatch(torch.ones(2, 3), index_TK, num_experts=2)
    with pytest.raises(InputError, match="row_RD is on meta; allowed: cpu, as dispatched"):
        exchange.combine(row_RD.to("meta"), handle)
    with pytest.raises(InputError, match="handle is NoneType; allowed: what dispatch returned"):
        exchange.dispatch_again(torch.ones(2, 3), None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"x_TD is list; allowed: torch\.Tensor"):
        exchange.dispatch_again([[1.0] * 3] * 2, handle)  # type: ignore[arg-type]


def elsewhere(**fields: Any) -> Header:
    return Header(**{**fields, "device": "cuda"})


def on_ranks_that_differ(rank: int) -> list[str]:
    exchange = Exchange(Topology.from_tree("2x2", bandwidth_bytes_per_s=(1e9, 1e9)))
    x_TD, index_TK, told = torch.ones(4, 2), torch.arange(4).view(4, 1), []

    def dispatch() -> None:
        exchange.dispatch(x_TD, index_TK, num_experts=4)

    for _ in range(2):  # before the ranks of a node are connected, and afterwards
        # Stands in for tokens on a GPU: only the header tells the others.
        with mock.patch.object(tamoe.exchange, "Header", elsewhere if rank == 1 else Header):
            try:
                dispatch()
            except InputError as error:
                told.append(str(error))
        dispatch()
    return told


@pytest.mark.ranks
def test_ranks_whose_tokens_are_on_another_device_are_named() -> None:
    for told in run_ranks(4, on_ranks_that_differ, timeout_s=60):
        assert len(told) == 2
        for text in told:
            assert "device differs between the ranks of the group: 'cpu' on rank 0, 2, 3; " in text
            assert "'cuda' on rank 1; allowed: the same on all ranks. Nothing was moved" in text
