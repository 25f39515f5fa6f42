"""What every rank of a probe needs: who takes part, the store, the device, how to follow."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tamoe.topology.formats import topology_from_document
from tamoe.topology.graph import Topology
from tamoe.topology.inventory import RankFacts, rank_facts

if TYPE_CHECKING:
    import torch

_calls: dict[tuple[int, ...], int] = {}  # probes made so far by these ranks; names their keys


@dataclass
class Job:
    """One rank's view of the job that is probed."""

    members: list[int]  # global ranks, by rank in the topology
    rank: int  # own position among them
    device: torch.device
    timeout_s: float
    redact_hosts: bool
    store: Any = None  # set while the heartbeat runs

    @property
    def on_gpu(self) -> bool:
        """Whether messages live on a GPU."""
        return self.device.type == "cuda"

    @property
    def backend(self) -> str:
        """Of the group that carries the data."""
        import torch.distributed as dist

        if len(self.members) == 1:
            return "none"
        if self.on_gpu:
            return "nccl"
        return "mpi" if dist.get_backend() == "mpi" else "gloo"

    def facts(self) -> RankFacts:
        """What this rank knows about where it runs."""
        index = (self.device.index or 0) if self.on_gpu else None
        return rank_facts(index, redact_hosts=self.redact_hosts)

    def with_heartbeat(self, work: Callable[[], Topology]) -> Topology:
        """Do this rank's part while its heart beats in the store and its facts are posted."""
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        from tamoe.topology.heartbeat import Heartbeat

        key = tuple(self.members)
        number = _calls[key] = _calls.get(key, -1) + 1
        name = f"tamoe/probe/{'-'.join(map(str, _ends(key)))}/{number}"
        self.store = PrefixStore(name, _get_default_store())
        with Heartbeat(self.store, f"heart/{self.rank}"):
            self.store.set(f"facts/{self.rank}", json.dumps(self.facts().to_json()))
            return work()

    def wire(self) -> Any:
        """A process group of its own for the messages; every rank calls it at the same time."""
        from tamoe.topology.wire import Wire

        return Wire(self.members, self.backend, self.device, self.timeout_s)

    def follow(self) -> Topology:
        """What ranks other than 0 do."""
        from tamoe.topology.rounds import Follower

        follower = Follower(self.store, self.rank, self.timeout_s)
        follower.next_order()  # "go": all have joined
        wire = self.wire()
        stop = follower.follow(wire)
        text = wire.broadcast(None, stop.settings["size_bytes"])
        wire.close()
        return topology_from_document(json.loads(zlib.decompress(text)), "probe")


def _ends(ranks: tuple[int, ...]) -> tuple[int, ...]:
    """A short name for a set of ranks that two groups at work at the same time cannot share."""
    return (ranks[0], ranks[-1], len(ranks), hash(ranks) & 0xFFFF)
