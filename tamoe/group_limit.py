"""GroupLimit: a token's experts lie in few groups, such as the nodes of a cluster.

Shape suffixes: T tokens, N experts of the whole group, G groups, M experts of the largest group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from tamoe.topology.errors import InputError, whole

if TYPE_CHECKING:
    from typing import Self

    from tamoe.solver.plan import Plan

GroupScore = Literal["max", "top2"]


class GroupLimit(nn.Module):
    """Restricts each token to the groups of experts whose scores are highest.

    With nodes as groups a token crosses the links of at most so many nodes, whatever ``top_k`` is
    (DeepSeek-V2, device-limited routing; DeepSeek-V3, node-limited routing).

    Parameters
    ----------
    group_of_N
        Group of each expert, 0 to G - 1; groups may differ in size, none is empty.
    top_groups
        Groups a token may use, 1 to G.
    score
        What a group is worth: its best expert (``"max"``, DeepSeek-V2) or the sum of its two best
        (``"top2"``, DeepSeek-V3). Of equal groups the lower goes first.
    device
        Of the tables; that of the gate.

    Raises
    ------
    InputError
        A group has no expert, or a number is out of range.

    Examples
    --------
    >>> limit = GroupLimit([0, 0, 1, 1], top_groups=1, score="top2")
    >>> limit(torch.tensor([[9.0, 0.0, 5.0, 6.0]])).tolist()
    [[False, False, True, True]]
    """

    group_of_N: torch.Tensor
    expert_GM: torch.Tensor

    def __init__(
        self,
        group_of_N: Sequence[int],
        top_groups: int,
        *,
        score: GroupScore = "max",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if score not in ("max", "top2"):
            raise InputError(f"score is {score!r}; allowed: 'max', 'top2'")
        members = [
            [expert for expert, other in enumerate(group_of_N) if other == group]
            for group in range(1 + max(group_of_N, default=-1))
        ]
        if not members or not all(members) or min(group_of_N) < 0:
            raise InputError(
                f"group_of_N is {list(group_of_N)}; allowed: 0 to G - 1, each for some expert"
            )
        self.top_groups = whole("top_groups", top_groups, 1, len(members))
        self.score: GroupScore = score
        largest = max(map(len, members))
        padded = [[*group, *[-1] * (largest - len(group))] for group in members]
        self._groups, self._experts = list(group_of_N), padded
        self._sizes = sorted(map(len, members))
        for name, numbers in (("group_of_N", self._groups), ("expert_GM", padded)):
            shape = torch.Size([len(numbers)] if name == "group_of_N" else [len(padded), largest])
            empty = torch.empty(shape, dtype=torch.int64, device=device)
            self.register_buffer(name, empty, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Write the buffers anew, for example after ``to_empty`` of a model made on ``meta``."""
        self.group_of_N.copy_(torch.tensor(self._groups, device="cpu"))
        self.expert_GM.copy_(torch.tensor(self._experts, device="cpu"))

    @classmethod
    def of_nodes(
        cls,
        plan: Plan,
        top_groups: int,
        *,
        score: GroupScore = "max",
        rank: int = 0,
        device: torch.device | str | None = None,
    ) -> Self:
        """Groups are the nodes that hold the experts of a rank's expert-parallel group.

        Parameters
        ----------
        plan
            :class:`tamoe.solver.Plan`, which knows the nodes and where experts are.
        top_groups, score, device
            As for the class.
        rank
            Any rank of the group; only a plan with several ``ep_groups`` needs it.

        Examples
        --------
        >>> from tamoe.solver import Workload, solve
        >>> from tamoe.topology import Topology
        >>> topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(3e10, 1e10))
        >>> GroupLimit.of_nodes(solve(topology, Workload(), floor=0.25), 1).group_of_N.tolist()
        [0, 0, 1, 1]
        """
        nodes = [plan.topology.node_of[place] for place in plan.expert_rank_N(rank)]
        used = sorted(set(nodes))  # a node may have no expert
        groups = [used.index(node) for node in nodes]
        return cls(groups, top_groups, score=score, device=device)

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.group_of_N)

    @property
    def least_experts(self) -> int:
        """How many experts every token may take at least: those of the smallest groups."""
        return sum(self._sizes[: self.top_groups])

    def forward(self, score_TN: torch.Tensor) -> torch.Tensor:
        """Experts that each token may take, ``[T, N]`` bool."""
        if score_TN.ndim != 2 or score_TN.shape[1] != self.num_experts:
            raise InputError(
                f"score_TN is {tuple(score_TN.shape)}; allowed: (tokens, {self.num_experts})"
            )
        score_TGM = score_TN.detach()[:, self.expert_GM.clamp_min(0)]
        score_TGM = score_TGM.masked_fill(self.expert_GM < 0, -torch.inf)
        if self.score == "max" or score_TGM.shape[2] == 1:
            worth_TG = score_TGM.amax(2)
        else:
            two_TG2 = score_TGM.topk(2, dim=2).values
            # A group of one expert is worth that one.
            worth_TG = two_TG2.masked_fill(two_TG2 == -torch.inf, 0.0).sum(2)
        taken_TG = worth_TG.sort(dim=1, descending=True, stable=True).indices[:, : self.top_groups]
        allowed_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter_(1, taken_TG, True)
        return allowed_TG[:, self.group_of_N]

    def extra_repr(self) -> str:
        """Sizes and score, for ``print(model)``."""
        return f"{len(self.expert_GM)} groups, top_groups={self.top_groups}, score={self.score!r}"
