"""Plan: the target dispatch, what it costs, and what proves that little more can be had."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from tamoe.solver.choice import AskedExchange, Kind, choose_for
from tamoe.solver.cost import CostModel, SelfSend, cost_model, tokens_between_ranks
from tamoe.solver.workload import Workload
from tamoe.topology.errors import InputError, whole
from tamoe.topology.graph import Topology

Norm = Literal["sum", "softmax"]
TIGHT = 1e-5  # a link is a bottleneck when it ends within this share of the exchange's end


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """A link, or another limit, that ends with the exchange."""

    name: str  # "nic0 -> switch0", "rank0 copies to itself", "flow rank0 -> rank3", "latency"
    link: int | None  # position in Topology.links, None for other limits
    time_s: float  # when it ends (simulated)
    price: float  # share of the exchange's time that hangs on it, 0 to 1


@dataclass(frozen=True, eq=False)
class Plan:
    """How many tokens each rank should send to each expert, with times (simulated) and prices.

    Made by :func:`tamoe.solver.solve` or :meth:`load`. Experts are numbered as in
    :class:`Workload`; with several EP groups a row holds the experts of the rank's own group.

    Attributes
    ----------
    target_PN
        ``[P, N]`` tokens from each rank to each expert; rows sum to ``top_k · tokens_per_rank``.
    time_s, even_time_s
        Predicted time of one dispatch exchange at the target, and under even dispatch.
    lower_bound_s
        No admissible dispatch ends sooner, whatever the solver did (see
        :mod:`tamoe.solver.certificate`). Admissible: every expert gets as many tokens as any
        other, every token takes an expert at most once, and the floor holds.
    link_prices
        ``[links]``, aligned with ``topology.links``: an optimal dual, of which there may be
        several. 1 % more bandwidth on link l saves ``price_l · (T - A_l) · 1 %`` of the least time
        T, A being the link's constant cost. For ``closed_form`` they are the exact problem's.
    pair_prices
        ``(source, target, price)`` of ranks that copy to themselves and of single flows slower
        than their links.
    rank_price_P, expert_price_GN
        Seconds per token: multipliers u of what a rank sends and v of what an expert gets, by
        group. An entropic target is ``clip(even · exp((u + v - π) · PkS / (kl · even_time_s)))``,
        π being :meth:`price_N`.
    objective_gap
        Own bound on how far an entropic target's objective is from its optimum; 0 for others.
    asked_exchange
        What :func:`~tamoe.solver.solve` was told to take: "auto", "flat" or "hierarchical".
    notes
        Sentences for the reader: where steering cannot help, where a method gave something up.

    Examples
    --------
    >>> from tamoe.solver import Workload, solve
    >>> topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(1e9, 1e8))
    >>> plan = solve(topology, Workload(tokens_per_rank=1000, top_k=1))
    >>> plan.target_N(0).round().tolist()
    [475.0, 475.0, 25.0, 25.0]
    >>> round(plan.even_time_s / plan.time_s, 2)
    10.0
    """

    topology: Topology
    workload: Workload
    method: str
    floor: float
    kl: float
    self_send: SelfSend
    target_PN: np.ndarray
    time_s: float
    even_time_s: float
    lower_bound_s: float
    link_prices: np.ndarray
    pair_prices: tuple[tuple[int, int, float], ...]
    rank_price_P: np.ndarray
    expert_price_GN: np.ndarray
    objective_gap: float = 0.0
    asked_exchange: AskedExchange = "auto"
    notes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)  # unknown keys of a file

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", MappingProxyType(dict(self.extra)))
        for name in ("target_PN", "link_prices", "rank_price_P", "expert_price_GN"):
            values = np.array(getattr(self, name), dtype=np.float64)
            values.flags.writeable = False
            object.__setattr__(self, name, values)

    def __repr__(self) -> str:
        return (
            f"Plan({self.method}, {self.num_ranks} ranks, {self.num_experts} experts, floor "
            f"{self.floor:g}, kl {self.kl:g}, time_s {self.time_s:.3g}, even_time_s "
            f"{self.even_time_s:.3g} (simulated))"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Mapping proxies do not pickle, and a Plan travels between ranks.
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "extra": dict(self.extra)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    # ---- size ---------------------------------------------------------------------------------

    @property
    def num_ranks(self) -> int:
        """Number of ranks P."""
        return self.topology.num_ranks

    @property
    def num_experts(self) -> int:
        """Number of experts N of a group."""
        return int(self.target_PN.shape[1])

    @property
    def even_tokens(self) -> float:
        """Tokens that even dispatch sends to each expert, kS/N."""
        return self.workload.even_tokens(self.num_ranks)

    def group_of(self, rank: int) -> int:
        """Number of the EP group of a rank."""
        self._check_rank(rank)
        groups = self.workload.groups(self.num_ranks)
        return next(number for number, ranks in enumerate(groups) if rank in ranks)

    def expert_rank_N(self, rank: int) -> np.ndarray:
        """Rank that holds each expert of a rank's group, ``[N]`` int64."""
        ranks = np.array(self.workload.groups(self.num_ranks)[self.group_of(rank)])
        return ranks[self.workload.expert_position_N(self.num_ranks)]

    def level_N(self, rank: int) -> np.ndarray:
        """Highest level of a link to each expert's rank, ``[N]``; -1 where that is the rank."""
        if rank not in self._level_of_rank:
            level = [
                -1 if other == rank else self.topology.level(rank, int(other))
                for other in self.expert_rank_N(rank)
            ]
            self._level_of_rank[rank] = np.array(level)
        return self._level_of_rank[rank].copy()

    @cached_property
    def _level_of_rank(self) -> dict[int, np.ndarray]:
        return {}

    # ---- rows ---------------------------------------------------------------------------------

    def target_N(self, rank: int) -> np.ndarray:
        """Tokens that a rank should send to each expert, ``[N]``."""
        self._check_rank(rank)
        return self.target_PN[rank].copy()

    def penalty_N(self, rank: int, norm: Norm = "sum") -> np.ndarray:
        """Weights of the topology loss for a rank, ``[N]``, of mean 1.

        Parameters
        ----------
        rank
            0 to P - 1.
        norm
            "sum": w = N·ĉ⁻¹ / Σ ĉ⁻¹, whose loss has the target as its fixed point. "softmax":
            N·softmax(w) of these w, as the paper's code does with values whose unit it leaves
            open; its fixed point is not the target. For comparison only.

        Returns
        -------
        numpy.ndarray

        Raises
        ------
        InputError
            The rank or norm is unknown, or a target is 0.

        Examples
        --------
        >>> from tamoe.solver import Workload, solve
        >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(3.0, 1.0))
        >>> plan = solve(topology, Workload(tokens_per_rank=100, top_k=1))
        >>> plan.penalty_N(0).round(3).tolist(), plan.penalty_N(0, norm="softmax").round(3).tolist()
        ([0.667, 1.333], [0.678, 1.322])
        """
        if norm not in ("sum", "softmax"):
            raise InputError(f"norm is {norm!r}; allowed: sum, softmax")
        inverse_N = 1 / self._positive_row(rank, "penalty_N")
        weight_N = inverse_N / inverse_N.mean()
        if norm == "softmax":
            power_N = np.exp(weight_N - weight_N.max())
            weight_N = power_N / power_N.mean()
        return weight_N

    def log_prior_N(self, rank: int) -> np.ndarray:
        """log(ĉ/even) of a rank's row, ``[N]``: where a bias on the logits starts.

        Raises
        ------
        InputError
            The rank is unknown or a target is 0.
        """
        return np.log(self._positive_row(rank, "log_prior_N") / self.even_tokens)

    def price_prior_N(self, rank: int) -> np.ndarray:
        """What the links' prices alone add to the logits of a rank, ``[N]`` of mean 0.

        Where no floor binds, an entropic target is even · exp((u + v - π) · PkS / (kl · T_even)):
        prices π of the links, u and v for the sums of ranks and experts. Where flows share links π
        is not unique.

        Raises
        ------
        InputError
            The rank is unknown, or the plan has no ``kl`` > 0.

        Examples
        --------
        >>> from tamoe.solver import Workload, solve
        >>> topology = Topology.from_tree(
        ...     "2x1", bandwidth_bytes_per_s=(5.0, 1.0), contention="pairwise"
        ... )
        >>> plan = solve(topology, Workload(top_k=1), method="entropic", kl=1.0)
        >>> bool((plan.price_prior_N(0) - plan.log_prior_N(0)).std() < 1e-3)
        True
        """
        self._check_rank(rank)
        if not self.kl > 0:
            raise InputError(
                f"kl of the plan is {self.kl:g}; allowed: > 0, method='entropic': others have no "
                f"prices of this kind"
            )
        choices = self.num_ranks * self.workload.tokens_per_rank * self.workload.top_k
        per_second = choices / (self.kl * self.even_time_s) if self.even_time_s else 0.0
        prior_N: np.ndarray = -self.price_N(rank) * per_second
        return prior_N - prior_N.mean()

    def price_N(self, rank: int) -> np.ndarray:
        """Seconds that one more token from a rank to each expert costs, ``[N]``.

        The sum over the route of link price times bytes of a token over bandwidth.
        """
        self._check_rank(rank)
        price_of = {int(target): self._price(rank, int(target)) for target in self._peers(rank)}
        return np.array([price_of[int(target)] for target in self.expert_rank_N(rank)])

    def _peers(self, rank: int) -> np.ndarray:
        return np.unique(self.expert_rank_N(rank))

    def _price(self, source: int, target: int) -> float:
        seconds_per_byte = 0.0
        if source != target or self.self_send == "intra":
            for index in self.topology.route(source, target):
                bandwidth = self.topology.links[index].bandwidth_bytes_per_s
                seconds_per_byte += self.link_prices[index] / bandwidth
        for i, j, price in self.pair_prices:
            if (i, j) == (source, target):
                copies = i == j and self.self_send == "copy"
                beta = 1 / (self.topology.copy_bytes_per_s or np.inf)
                beta = beta if copies else self.topology.pair(i, j).beta_s_per_byte
                seconds_per_byte += price * beta
        return float(seconds_per_byte * self.workload.token_bytes)

    def _positive_row(self, rank: int, what: str) -> np.ndarray:
        row_N = self.target_N(rank)
        if not (row_N > 0).all():
            raise InputError(
                f"{what} of rank {rank}: {int((row_N <= 0).sum())} of its {len(row_N)} targets are "
                f"0; allowed: targets > 0. Solve with floor > 0, or method='entropic' with kl > 0"
            )
        return row_N

    def _check_rank(self, rank: int) -> None:
        whole("rank", rank, 0, self.num_ranks - 1)

    # ---- what the target does -----------------------------------------------------------------

    @property
    def gap(self) -> float:
        """(time_s - lower_bound_s) / lower_bound_s: what the target gives away at most.

        At most 1e-6 for ``exact``. Below 0 only where ``closed_form`` leaves experts unevenly
        loaded, which the bound does not admit.
        """
        scale_s = max(self.lower_bound_s, 1e-9 * self.even_time_s)
        return (self.time_s - self.lower_bound_s) / scale_s if scale_s > 0 else 0.0

    @property
    def column_error(self) -> float:
        """Largest relative deviation of an expert's tokens from even load."""
        groups = [list(ranks) for ranks in self.workload.groups(self.num_ranks)]
        loads_GN = np.array([self.target_PN[ranks].sum(axis=0) for ranks in groups])
        return float(abs(loads_GN / (self.even_tokens * len(groups[0])) - 1).max())

    @property
    def divergence(self) -> float:
        """(1/PkS) Σ ĉ log(ĉ/even), in nats a token: 0 for the even target."""
        ratio = self.target_PN / self.even_tokens
        logs = np.log(ratio, where=ratio > 0, out=np.zeros_like(ratio))
        return float((self.target_PN * logs).sum() / self.target_PN.sum())

    @property
    def exchange(self) -> Kind:
        """What was asked for; for "auto" the faster one on gloo, by the cost model of exchanges.

        Found when first asked for, which takes seconds from 32 ranks on.
        """
        return choose_for(self).kind

    @property
    def exchange_reason(self) -> str:
        """Why that one: times of both, simulated, and the busiest link."""
        return choose_for(self).reason

    @cached_property
    def link_loads(self) -> np.ndarray:
        """Bytes over each link in one dispatch at the target, ``[links]``."""
        cost, bytes_PP = self._cost, self._bytes_PP
        seconds_L = (cost.seconds_per_byte @ bytes_PP.ravel())[: cost.num_links]
        return seconds_L * np.array([link.bandwidth_bytes_per_s for link in self.topology.links])

    @cached_property
    def bottlenecks(self) -> tuple[Bottleneck, ...]:
        """Everything that ends with the exchange, highest price first."""
        cost = self._cost
        times_R = cost.row_times_s(self._bytes_PP)
        price_R = [*self.link_prices, *(price for _, _, price in self.pair_prices)]
        names = [f"{link.source} -> {link.target}" for link in self.topology.links]
        for i, j in cost.pairs:
            copies = i == j and self.self_send == "copy"
            names.append(f"rank{i} copies to itself" if copies else f"flow rank{i} -> rank{j}")
        found = [
            Bottleneck(name, row if row < cost.num_links else None, float(time_s), float(price))
            for row, (name, time_s, price) in enumerate(zip(names, times_R, price_R, strict=True))
            if time_s > 0 and time_s >= self.time_s * (1 - TIGHT)
        ]
        if 0 < self.time_s * (1 - TIGHT) <= cost.latency_s:
            rest = max(0.0, 1 - float(sum(price_R)))
            found.append(Bottleneck("latency", None, cost.latency_s, rest))
        return tuple(sorted(found, key=lambda limit: -limit.price))

    def level_shares(self, *, even: bool = False) -> np.ndarray:
        """Shares of all tokens that stay on their rank, then that go to each level.

        Parameters
        ----------
        even
            The shares of even dispatch instead of the target's.

        Returns
        -------
        numpy.ndarray
            ``[1 + levels]``: own rank, other ranks of the node, then over node uplinks, and so on.
        """
        target_PN = np.full_like(self.target_PN, self.even_tokens) if even else self.target_PN
        tokens_PP = tokens_between_ranks(self.workload, target_PN)
        place_PP = 1 + self.topology.level_PP
        np.fill_diagonal(place_PP, 0)
        shares = np.bincount(
            place_PP.ravel(), tokens_PP.ravel(), minlength=1 + self.topology.num_levels
        )
        return shares / shares.sum()

    @cached_property
    def _cost(self) -> CostModel:
        return cost_model(self.topology, self.workload, self.self_send)

    @property
    def _bytes_PP(self) -> np.ndarray:
        return tokens_between_ranks(self.workload, self.target_PN) * self.workload.token_bytes

    # ---- files --------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan, with its topology, as JSON of schema ``tamoe.plan``."""
        from tamoe.solver.plan_file import save_plan

        save_plan(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan; raises :class:`InputError` naming the field that is wrong."""
        from tamoe.solver.plan_file import load_plan

        return load_plan(path)
