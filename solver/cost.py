"""Cost model of the flat exchange: how long each link is busy with given traffic.

A link ends at ``A + (bytes - burst) / B``, never before A: its constant cost A is the largest
latency of a pair routed over it, plus the sender's overhead for each of its P - 1 messages. The
exchange ends with the last link. All times here are simulated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tamoe.solver.workload import Workload
from tamoe.topology.errors import InputError
from tamoe.topology.graph import Topology

SelfSend = Literal["intra", "copy", "free"]
Direction = Literal["dispatch", "combine"]
SELF_SENDS: tuple[SelfSend, ...] = ("intra", "copy", "free")
DIRECTIONS: tuple[Direction, ...] = ("dispatch", "combine")
# A single flow is a limit of its own only where it was measured this much slower than its links.
SLOW_PAIR = 1.05


@dataclass(frozen=True, eq=False)
class CostModel:
    """Rows ``T >= const_R + seconds_per_byte @ bytes``, and ``T >= latency_s``.

    The first rows are the links of the topology, in its order; then ranks that copy to themselves
    and pairs whose single flow is slower than their links.
    """

    seconds_per_byte: Any  # csr [R, P·P]: of each ordered pair, source-major
    const_R: np.ndarray  # A - burst/B
    constant_cost_R: np.ndarray  # A
    pairs: tuple[tuple[int, int], ...]  # (source, target) of the rows after the links
    latency_s: float  # the largest A

    @property
    def num_links(self) -> int:
        """Number of rows that are links."""
        return len(self.const_R) - len(self.pairs)

    def row_times_s(self, bytes_PP: np.ndarray) -> np.ndarray:
        """When each row ends, ``[R]``."""
        loaded_R = self.const_R + self.seconds_per_byte @ bytes_PP.ravel()
        return np.maximum(loaded_R, self.constant_cost_R)


def cost_model(topology: Topology, workload: Workload, self_send: SelfSend) -> CostModel:
    """The rows of a topology for the pairs of ranks that a workload lets exchange.

    Raises
    ------
    InputError
        ``self_send`` is unknown, or "copy" without a known copy rate.
    """
    from scipy import sparse

    check_self_send(topology, self_send)
    num = topology.num_ranks
    groups = workload.groups(num)
    exchanges_PP = np.zeros((num, num), dtype=bool)
    for group in groups:
        exchanges_PP[np.ix_(group, group)] = True
    np.fill_diagonal(exchanges_PP, self_send == "intra")
    bandwidth_L = np.array([link.bandwidth_bytes_per_s for link in topology.links])
    burst_L = np.array([link.burst_bytes for link in topology.links])
    used = topology.incidence.tocoo()
    kept = exchanges_PP.ravel()[used.col]
    link, column = used.row[kept], used.col[kept]
    overhead_s = (len(groups[0]) - 1) * topology.overhead_s
    constant_L = np.zeros(len(bandwidth_L))
    np.maximum.at(constant_L, link, topology.alpha_s.ravel()[column] + overhead_s)
    extra = _copy_rows(topology) if self_send == "copy" else []
    extra += _slow_pairs(topology, exchanges_PP, overhead_s)
    rows = np.concatenate([link, len(bandwidth_L) + np.arange(len(extra))])
    columns = np.concatenate([column, [i * num + j for i, j, _, _ in extra]]).astype(np.int64)
    values = np.concatenate([1 / bandwidth_L[link], [beta for _, _, _, beta in extra]])
    shape = (len(bandwidth_L) + len(extra), num * num)
    constant_R = np.concatenate([constant_L, [alpha for _, _, alpha, _ in extra]])
    return CostModel(
        sparse.csr_array((values, (rows, columns)), shape=shape),
        constant_R - np.concatenate([burst_L / bandwidth_L, np.zeros(len(extra))]),
        constant_R,
        tuple((i, j) for i, j, _, _ in extra),
        float(constant_R.max(initial=0.0)),
    )


def check_self_send(topology: Topology, self_send: str) -> None:
    """Raise where tokens that a rank keeps cannot be priced as asked."""
    if self_send not in SELF_SENDS:
        raise InputError(f"self_send is {self_send!r}; allowed: {', '.join(SELF_SENDS)}")
    if self_send == "copy" and topology.copy_bytes_per_s is None:
        raise InputError(
            "self_send is 'copy' and the topology has no copy_bytes_per_s; allowed: 'intra', "
            "'free', or a topology with the rate (a probe measures it)"
        )


def _copy_rows(topology: Topology) -> list[tuple[int, int, float, float]]:
    assert topology.copy_bytes_per_s is not None
    beta = 1 / topology.copy_bytes_per_s
    return [(rank, rank, 0.0, beta) for rank in range(topology.num_ranks)]


def _slow_pairs(
    topology: Topology, exchanges_PP: np.ndarray, overhead_s: float
) -> list[tuple[int, int, float, float]]:
    slow = []
    for (i, j), pair in sorted(topology.pairs.items()):
        if not exchanges_PP[i, j]:
            continue
        route = [topology.links[index].bandwidth_bytes_per_s for index in topology.route(i, j)]
        beta_of_route = 1 / min(route) if route else 0.0
        if pair.beta_s_per_byte > SLOW_PAIR * beta_of_route:
            slow.append((i, j, pair.alpha_s + overhead_s, pair.beta_s_per_byte))
    return slow


def exchange_time_s(
    topology: Topology,
    workload: Workload,
    counts_PN: np.ndarray,
    *,
    direction: Direction = "dispatch",
    self_send: SelfSend = "intra",
) -> float:
    """Simulated time of one flat exchange of given counts.

    Parameters
    ----------
    topology
        Links and latencies.
    workload
        Bytes of a token, experts and groups; its ``tokens_per_rank`` and ``top_k`` are not used.
    counts_PN
        ``[P, N]`` tokens that each rank sends to each expert of its group, >= 0.
    direction
        "dispatch": from the tokens' ranks to the experts. "combine": the way back.
    self_send
        Price of tokens that stay on their rank; see :func:`tamoe.solver.solve`.

    Returns
    -------
    float
        Seconds.

    Raises
    ------
    InputError
        The counts have another shape, or are negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e9, 1e6))
    >>> workload = Workload(tokens_per_rank=1000, top_k=1, hidden_size=50)
    >>> round(exchange_time_s(topology, workload, np.full((2, 2), 500)), 6)
    0.05
    """
    bytes_PP = _traffic(topology, workload, counts_PN, direction)
    model = cost_model(topology, workload, self_send)
    return max(model.latency_s, float(model.row_times_s(bytes_PP).max(initial=0.0)))


def link_times_s(
    topology: Topology,
    workload: Workload,
    counts_PN: np.ndarray,
    *,
    direction: Direction = "dispatch",
    self_send: SelfSend = "intra",
) -> np.ndarray:
    """When each link ends in one flat exchange of given counts, ``[links]`` seconds (simulated).

    The arguments are those of :func:`exchange_time_s`; links that no pair uses end at 0.

    Examples
    --------
    >>> import numpy as np
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e9, 1e6))
    >>> workload = Workload(tokens_per_rank=1000, top_k=1, hidden_size=50)
    >>> times = link_times_s(topology, workload, np.full((2, 2), 500))
    >>> [link.source for link, time in zip(topology.links, times) if time == times.max()]
    ['switch0', 'switch0', 'nic0', 'nic1']
    """
    bytes_PP = _traffic(topology, workload, counts_PN, direction)
    model = cost_model(topology, workload, self_send)
    return model.row_times_s(bytes_PP)[: model.num_links]


def _traffic(
    topology: Topology, workload: Workload, counts_PN: np.ndarray, direction: str
) -> np.ndarray:
    if direction not in DIRECTIONS:
        raise InputError(f"direction is {direction!r}; allowed: {', '.join(DIRECTIONS)}")
    num = topology.num_ranks
    position_N = workload.expert_position_N(num)
    counts = np.asarray(counts_PN, dtype=np.float64)
    if counts.shape != (num, len(position_N)):
        raise InputError(
            f"counts_PN has shape {counts.shape}; allowed: (ranks, experts) = "
            f"({num}, {len(position_N)})"
        )
    if not (np.isfinite(counts).all() and (counts >= 0).all()):
        rank, expert = np.argwhere(~(np.isfinite(counts) & (counts >= 0)))[0]
        value = counts[rank, expert]
        raise InputError(f"counts_PN[{rank}, {expert}] is {value}; allowed: finite and >= 0")
    bytes_PP = tokens_between_ranks(workload, counts) * workload.token_bytes
    return bytes_PP if direction == "dispatch" else bytes_PP.T


def tokens_between_ranks(workload: Workload, counts_PN: np.ndarray) -> np.ndarray:
    """Tokens that each rank sends to each rank, ``[P, P]``."""
    num = len(counts_PN)
    position_N = workload.expert_position_N(num)
    tokens_PP = np.zeros((num, num))
    for group in workload.groups(num):
        ranks = np.array(group)
        on_rank = np.zeros((len(position_N), num))
        on_rank[np.arange(len(position_N)), ranks[position_N]] = 1
        tokens_PP[ranks] = counts_PN[ranks] @ on_rank
    return tokens_PP
