"""Which flows run at the same time on purpose, and for how long."""

from __future__ import annotations

import itertools
import math
import random

from tamoe.topology.hierarchy import Group, Partition, members_of
from tamoe.topology.orders import BUCKET_BYTES, FlowPlan
from tamoe.topology.schedule import Round, circle_rounds, flows_between, in_turn
from tamoe.topology.survey import Survey, capacity

LOAD_ORDERS = 2  # orders in which the nodes of a small cluster are loaded
SMALL_CLUSTER = 16  # nodes
PARTNERS = 3  # nodes with which a node's uplink is filled, one after the other
HEAD_S = 0.1  # flows begin within this time of each other
WINDOW_BURSTS = 24  # token buckets that pass in the time that is counted

Windows = list[Round]  # flows of one round, those of a window together


def load_rounds(nodes: Partition, seed: int) -> list[Windows]:
    """Rounds in which all nodes are busy in pairs, every two nodes once in each order.

    In another order other flows meet above the nodes; large clusters have enough with one.
    """
    rounds = []
    for turn in range(LOAD_ORDERS if len(nodes) <= SMALL_CLUSTER else 1):
        order = random.Random(seed + turn).sample(range(len(nodes)), len(nodes))
        for pairs in circle_rounds(len(nodes)):
            ends = [(nodes[order[a]], nodes[order[b]]) for a, b in pairs]
            rounds.append([flows_between([a], [b]) for a, b in ends])
    return rounds


def contention_rounds(nodes: Partition, tree: Group) -> list[Windows]:
    """Rounds that fill the uplinks of nodes and switches, each way."""
    rounds = _node_rounds(nodes, tree) if max(map(len, nodes)) > 1 else []
    for group in tree.groups():
        rounds += [[flows] for flows in _switch_windows(nodes, group)]
    return rounds


def _node_rounds(nodes: Partition, tree: Group) -> list[Windows]:
    """Nodes of the same switch in pairs, all ranks of each; all switches at once."""
    per_switch: list[list[Windows]] = []
    for group in tree.groups():
        alike = [child for child in group.children if isinstance(child, int)]
        rounds: list[Windows] = []
        for pairs in circle_rounds(len(alike))[:PARTNERS]:
            ends = [(nodes[alike[a]], nodes[alike[b]]) for a, b in pairs]
            rounds.append([flows_between([a], [b]) for a, b in ends])
            rounds.append([flows_between([b], [a]) for a, b in ends])
        per_switch.append(rounds)
    return [
        list(itertools.chain.from_iterable(some))
        for some in itertools.zip_longest(*per_switch, fillvalue=[])
    ]


def _switch_windows(nodes: Partition, group: Group) -> Windows:
    """From each child of a switch to its siblings and back, where a child is a switch too."""
    if all(isinstance(child, int) for child in group.children):
        return []
    windows: Windows = []
    for child in group.children:
        inside = [nodes[node] for node in members_of(child)]
        siblings = [members_of(other) for other in group.children if other != child]
        outside = [nodes[node] for node in in_turn(siblings)]
        windows += [flows_between(inside, outside), flows_between(outside, inside)]
        if len(group.children) == 2:
            break  # the other child's windows would be the same
    return windows


def flow_plan(survey: Survey, flows: Round) -> FlowPlan:
    """Messages and times that suit the slowest and the fastest of some flows."""
    rates = [_usual_rate(survey, flow) for flow in flows]
    return FlowPlan(
        message_bytes=min(4 << 20, max(65536, 1 << int(math.log2(max(rates) * 1e-3)))),
        head_s=min(0.3, max(HEAD_S, 2 * BUCKET_BYTES / min(rates))),
        window_s=min(1.5, max(0.15, WINDOW_BURSTS * BUCKET_BYTES / min(rates))),
    )


def _usual_rate(survey: Survey, flow: tuple[int, int]) -> float:
    a, b = (survey.node_of[rank] for rank in flow)
    ends = capacity(survey, [a], out=True), capacity(survey, [b], out=False)
    return min((rate for rate in ends if rate is not None), default=1e9)
