"""Equal messages of words from every rank to every rank, one message for each pair of nodes.

Shape suffixes: P ranks, p ranks of this node, W words of a message, t ranks that messages are for.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
import torch.distributed as dist

from tamoe.groups import works_by_gloo
from tamoe.node_channel import MOST_BYTES, NodeChannel, node_channel
from tamoe.schedules import Nodes
from tamoe.waiting import Patience


class WordSwap:
    """Swaps messages between all ranks of a group.

    As one all-to-all; on gloo, once the ranks have agreed on nodes, by node: the ranks of a node
    collect what is for another node with the one of them that talks to it, and it deals out the
    answers. P² messages through sockets become one for each pair of nodes. It is one way for all
    exchanges of a group, so that ranks that are in different exchanges still hear of it.

    Parameters
    ----------
    group
        The ranks.
    rank
        This one.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        self._group_of, self._rank = ref(group), rank  # no cycle: the group keeps this alive
        self._others = tuple(peer for peer in range(group.size()) if peer != rank)
        self._tried: set[Nodes] = set()
        self._channel: NodeChannel | None = None
        self._nodes: list[list[int]] = []
        self._near: list[int] = []
        self._node = 0

    def agree(self, nodes: Nodes, patience: Patience) -> None:
        """Swap by these nodes from now on, if all ranks can; all call it with the same ones."""
        if self._channel is not None or nodes in self._tried:
            return
        self._tried.add(nodes)
        group = self._group_of()
        assert group is not None
        if not works_by_gloo(group) or all(len(ranks) == 1 for ranks in nodes):
            return
        self._nodes = [sorted(ranks) for ranks in nodes]
        self._node = next(number for number, ranks in enumerate(nodes) if self._rank in ranks)
        self._near = self._nodes[self._node]
        channel = node_channel(group, self._rank, self._near, patience)
        works = torch.tensor([channel is not None], dtype=torch.int32, device="cpu")
        where = "sockets of the nodes"
        with patience.trying(self._others, where):
            work = dist.all_reduce(works, dist.ReduceOp.MIN, group=group, async_op=True)
        patience.wait([(work, self._others)], where)
        self._channel = channel if works.item() else None

    def swap(self, message_PW: torch.Tensor, patience: Patience) -> torch.Tensor:
        """The message that every rank has for this one, ``[P, W]`` int32, by rank."""
        where, group = "counts, all ranks at once", self._group_of()
        assert group is not None
        device = message_PW.device
        if device.type != "cpu" and works_by_gloo(group, device):  # it reads the host's memory only
            message_PW = message_PW.cpu()
        small = message_PW.numel() * message_PW.element_size() <= MOST_BYTES
        if self._channel is not None and small and message_PW.device.type == "cpu":
            words_PW = self._by_node(message_PW.numpy(), self._channel, patience)
            return torch.from_numpy(words_PW).to(device)
        answer_PW = torch.empty_like(message_PW)
        with patience.trying(self._others, where):
            work = dist.all_to_all_single(answer_PW, message_PW, group=group, async_op=True)
        patience.wait([(work, self._others)], where, by_host=message_PW.device.type == "cpu")
        return answer_PW.to(device)

    def _talks_to(self, rank: int) -> list[int]:
        """Other nodes that a rank of this node exchanges messages with."""
        place, size = self._near.index(rank), len(self._near)
        others = (node for node in range(len(self._nodes)) if node != self._node)
        return [node for node in others if node % size == place]

    def _by_node(
        self, message_PW: np.ndarray, channel: NodeChannel, patience: Patience
    ) -> np.ndarray:
        try:
            return self._swapped(message_PW, channel, patience)
        except BaseException:
            channel.close()  # the ranks of the node that wait for this one hear of it
            raise

    def _swapped(
        self, message_PW: np.ndarray, channel: NodeChannel, patience: Patience
    ) -> np.ndarray:
        answer_PW = np.empty_like(message_PW)
        answer_PW[self._rank] = message_PW[self._rank]
        peers = [peer for peer in self._near if peer != self._rank]
        targets_p = {
            peer: [peer, *(rank for node in self._talks_to(peer) for rank in self._nodes[node])]
            for peer in self._near
        }
        # To the rank that talks to a node, what this one has for that node's ranks, and for itself.
        mine_t, width = targets_p[self._rank], message_PW.shape[1]
        tell = {peer: message_PW[targets_p[peer]].tobytes() for peer in peers}
        sizes = dict.fromkeys(peers, len(mine_t) * message_PW[0].nbytes)
        heard = channel.swap(tell, sizes, patience, "counts, inside the node")
        collected_ptW = np.stack(
            [
                message_PW[mine_t]
                if rank == self._rank
                else np.frombuffer(heard[rank], message_PW.dtype).reshape(-1, width)
                for rank in self._near
            ]
        )
        answer_PW[self._near] = collected_ptW[:, 0]
        came = self._between(collected_ptW[:, 1:], width, patience)
        # From the rank that talks to a node, what that node's ranks have for this one.
        place = {rank: number for number, rank in enumerate(self._near)}
        answer_PW[mine_t[1:]] = came[:, place[self._rank]]
        tell = {peer: came[:, place[peer]].tobytes() for peer in peers}
        sizes = {peer: (len(targets_p[peer]) - 1) * message_PW[0].nbytes for peer in peers}
        heard = channel.swap(tell, sizes, patience, "counts, inside the node")
        for peer, words in heard.items():
            answer_PW[targets_p[peer][1:]] = np.frombuffer(words, answer_PW.dtype).reshape(
                -1, width
            )
        return answer_PW

    def _between(self, collected_ptW: np.ndarray, width: int, patience: Patience) -> np.ndarray:
        """Swap with the nodes that this rank talks to: ``[t, p, W]`` from their ranks."""
        size, group = len(self._near), self._group_of()
        works: list[tuple[dist.Work, tuple[int, ...]]] = []
        came, begin, kept = [], 0, []
        for node in self._talks_to(self._rank):
            ranks = self._nodes[node]
            peer = ranks[self._node % len(ranks)]
            sent = torch.from_numpy(
                np.ascontiguousarray(collected_ptW[:, begin : begin + len(ranks)])
            )
            received = torch.empty(len(ranks), size, width, dtype=sent.dtype, device="cpu")
            with patience.trying([peer], "counts, between nodes"):
                for work in (
                    dist.irecv(received, group=group, group_src=peer),
                    dist.isend(sent, group=group, group_dst=peer),
                ):
                    assert work is not None  # only for ranks outside the group
                    works.append((work, (peer,)))
            came.append(received.numpy())
            kept.append(sent)
            begin += len(ranks)
        patience.wait(works, "counts, between nodes")
        return np.concatenate([np.empty((0, size, width), collected_ptW.dtype), *came])


_swaps: WeakKeyDictionary[dist.ProcessGroup, WordSwap] = WeakKeyDictionary()


def word_swap(group: dist.ProcessGroup, rank: int) -> WordSwap:
    """The one that all exchanges of a group use."""
    if group not in _swaps:
        _swaps[group] = WordSwap(group, rank)
    return _swaps[group]
