"""Workload: sizes follow from the fields, and what cannot be is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tamoe.solver import Workload
from tamoe.solver.workload import divide_experts
from tamoe.topology.errors import InputError


def test_experts_are_numbered_rank_by_rank() -> None:
    workload = Workload(experts_per_rank=3)
    assert workload.num_experts(4) == 12
    assert workload.expert_position_N(4).tolist() == [e // 3 for e in range(12)]
    assert workload.even_tokens(4) == 2 * 2048 / 12


def test_placement_replaces_experts_per_rank() -> None:
    workload = Workload(placement=[2, 0, 0, 0])  # type: ignore[arg-type]
    assert workload.placement == (2, 0, 0, 0)
    assert workload.num_experts(4) == 4
    assert workload.expert_position_N(3).tolist() == [2, 0, 0, 0]
    assert Workload(placement=(0, 0, 1, 1), experts_per_rank=2).num_experts(2) == 4


def test_groups_number_their_own_experts() -> None:
    workload = Workload(ep_groups=[[0, 2], [3, 1]], experts_per_rank=2)  # type: ignore[arg-type]
    assert workload.groups(4) == ((0, 2), (3, 1))
    assert workload.num_experts(4) == 4


def test_whole_numbers_of_other_types_are_taken() -> None:
    workload = Workload(tokens_per_rank=np.int64(5))  # type: ignore[arg-type]
    assert type(workload.tokens_per_rank) is int
    assert hash(workload) == hash(Workload(tokens_per_rank=5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens_per_rank": 0}, "tokens_per_rank is 0; allowed: a whole number >= 1"),
        ({"top_k": 0}, "top_k is 0; allowed"),
        ({"top_k": -1}, "top_k is -1; allowed"),
        ({"top_k": 1.5}, "top_k is 1.5; allowed"),
        ({"top_k": True}, "top_k is True; allowed"),
        ({"hidden_size": float("nan")}, "hidden_size is nan; allowed"),
        ({"element_bytes": "2"}, "element_bytes is '2'; allowed"),
        ({"experts_per_rank": 0.5}, "experts_per_rank is 0.5; allowed"),
        ({"placement": ()}, "placement is "),
        ({"placement": "01"}, "placement is '01'; allowed"),
        ({"placement": (0, -1)}, r"placement\[1\] is -1; allowed"),
        ({"placement": (0, 0.5)}, r"placement\[1\] is 0.5; allowed"),
        ({"ep_groups": ()}, "ep_groups is "),
        ({"ep_groups": ((0, 1), (2,))}, r"groups of \[2, 1\] ranks; allowed: groups of one size"),
        ({"ep_groups": ((0, 1), (1, 2))}, "every rank in exactly one group"),
        ({"ep_groups": (0, 1)}, r"ep_groups\[0\] is 0; allowed"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Workload(**fields)


@pytest.mark.parametrize(
    ("fields", "num_ranks", "message"),
    [
        ({"top_k": 5}, 4, "top_k is 5; allowed: 1 to the number of experts, 4"),
        ({"top_k": 3, "placement": (0, 1)}, 2, "number of experts, 2"),
        ({"placement": (0, 4)}, 4, r"placement\[1\] is 4; allowed: a position .* 0 to 3"),
        ({"placement": (0, 1), "experts_per_rank": 3}, 2, "leave experts_per_rank out"),
        ({"ep_groups": ((0, 1), (2, 3))}, 8, "every rank from 0 to 7 in exactly one group"),
        ({"ep_groups": ((0, 1), (2, 9))}, 4, "every rank from 0 to 3 in exactly one group"),
    ],
)
def test_what_does_not_fit_the_cluster_is_refused(
    fields: dict[str, Any], num_ranks: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Workload(**fields).expert_position_N(num_ranks)


def test_experts_that_cannot_be_divided_are_refused() -> None:
    assert divide_experts(16, 4) == 4
    with pytest.raises(InputError, match="num_experts is 10; allowed: a multiple of the 4 ranks"):
        divide_experts(10, 4)
    with pytest.raises(InputError, match="num_experts is 0; allowed"):
        divide_experts(0, 4)
