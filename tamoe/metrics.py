"""What routing did: tokens, bytes, locality, balance and distance to the Plan, as numbers and maps.

Shape suffixes: P ranks, N experts of a group.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from tamoe.groups import process_group
from tamoe.loss_totals import expert_counts
from tamoe.plan_module import PlanRows, check_plan
from tamoe.routing import Routing
from tamoe.topology.errors import InputError, whole

if TYPE_CHECKING:
    from tamoe.groups import Group


class ScalarWriter(Protocol):
    """What :func:`write_scalars` needs: ``torch.utils.tensorboard.SummaryWriter`` has it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Write one number."""
        ...


def dispatch_metrics(
    counts_N: torch.Tensor | np.ndarray | Sequence[float],
    plan: PlanRows,
    rank: int,
    *,
    dropped: float = 0,
) -> dict[str, float]:
    """Numbers of one rank's dispatch, against its row of a Plan.

    Parameters
    ----------
    counts_N
        ``[N]`` choices of each expert on this rank: :func:`tamoe.functional.expert_counts`, or a
        row of ``sent_counts_N`` of :func:`tamoe.record_exchanges`.
    plan
        Gives targets; a :class:`tamoe.solver.Plan` also nodes, levels and bytes.
    rank
        Of the plan.
    dropped
        Choices that capacity dropped, of those counted.

    Returns
    -------
    dict
        - ``choices``, ``drop_rate`` (share of the choices);
        - ``load_cv``, ``load_max_over_mean``: how unevenly *this rank* loads the experts, which is
          what steering wants; the experts' balance is that of all ranks' counts
          (:func:`group_metrics`);
        - ``target_divergence``: KL of the dispatch from the target, nats, 0 at the target;
        - of a Plan with a topology also ``remote_share`` (choices that leave the node),
          ``level_self``, ``level_0`` … (choices that stay on the rank, in the node, cross as many
          levels of uplinks) and ``sent_bytes`` (of rows that leave the rank, by the flat exchange).

    Raises
    ------
    InputError
        Shapes do not fit.

    Examples
    --------
    >>> from tamoe.solver import Workload, solve
    >>> from tamoe.topology import Topology
    >>> topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(3e10, 1e10))
    >>> plan = solve(topology, Workload(tokens_per_rank=100, top_k=1), floor=0.25)
    >>> numbers = dispatch_metrics(torch.tensor([40, 40, 10, 10]), plan, 0)
    >>> numbers["remote_share"], round(numbers["load_cv"], 3)
    (0.2, 0.6)
    """
    check_plan(plan)
    # Plain numbers: for a row of some hundred experts they take less time than arrays.
    counts = _counts(counts_N, plan.num_experts)
    choices, dropped = sum(counts), float(dropped)
    if not 0 <= dropped <= choices:
        raise InputError(f"dropped is {dropped:g}; allowed: 0 to {choices:g}, those counted")
    total = choices or 1.0
    found = {"choices": choices, "drop_rate": dropped / total, **_balance(counts)}
    found["target_divergence"] = _divergence(counts, plan.target_N(rank).tolist())
    topology, find_level_N = getattr(plan, "topology", None), getattr(plan, "level_N", None)
    if topology is None or find_level_N is None:
        return found
    crossing = [0.0] * (topology.num_levels + 1)
    for level, count in zip(find_level_N(rank).tolist(), counts, strict=True):
        crossing[level + 1] += count
    stay, *levels = crossing
    found["remote_share"] = sum(levels[1:]) / total
    found["level_self"] = stay / total
    found |= {f"level_{level}": number / total for level, number in enumerate(levels)}
    found["sent_bytes"] = sum(levels) * plan.workload.token_bytes  # type: ignore[attr-defined]
    return found


def routing_metrics(
    routing: Routing, plan: PlanRows, rank: int, mask_T: torch.Tensor | None = None
) -> dict[str, float]:
    """Numbers of what one rank dispatches, from what a gate or an :class:`~tamoe.MoE` returns.

    Parameters
    ----------
    routing
        The gate's; of an MoE layer ``MoEOutput.routing``.
    plan, rank
        As for :func:`dispatch_metrics`.
    mask_T
        ``[T]``; tokens where it is 0 are padding and not counted as dropped.

    Returns
    -------
    dict
        As of :func:`dispatch_metrics`, for the choices that were kept; ``choices`` are all, and
        ``drop_rate`` is the share of them that was dropped.

    Examples
    --------
    >>> from tamoe import SwitchGate
    >>> from tamoe.solver import Workload, solve
    >>> from tamoe.topology import Topology
    >>> topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(3e10, 1e10))
    >>> plan = solve(topology, Workload(tokens_per_rank=64, top_k=1), floor=0.25)
    >>> routing = SwitchGate(16, 4, capacity=0.5, drop="probs")(torch.randn(64, 16))
    >>> routing_metrics(routing, plan, 0)["drop_rate"] >= 0.5
    True
    """
    if not isinstance(routing, Routing):
        raise InputError(
            f"routing is a {type(routing).__name__}; allowed: a tamoe.Routing, as a gate returns "
            f"it, and MoEOutput.routing"
        )
    check_plan(plan)
    index_TK, num_experts = routing.expert_index_TK, routing.probs_TN.shape[1]
    if num_experts != plan.num_experts:
        raise InputError(
            f"routing is over {num_experts} experts; allowed: those of the plan, {plan.num_experts}"
        )
    if mask_T is not None and mask_T.shape != index_TK.shape[:1]:
        raise InputError(f"mask_T is {tuple(mask_T.shape)}; allowed: ({len(index_TK)},)")
    if mask_T is not None:
        index_TK = index_TK[mask_T.bool()]
    found = dispatch_metrics(expert_counts(index_TK, plan.num_experts), plan, rank)
    found["choices"] = float(index_TK.numel())
    found["drop_rate"] = float((index_TK < 0).sum()) / max(index_TK.numel(), 1)
    return found


def gather_counts(counts_N: torch.Tensor, group: Group = None) -> np.ndarray:
    """Counts of all ranks, ``[P, N]``, on every rank; collective.

    >>> gather_counts(torch.tensor([1, 2])).tolist()
    [[1, 2]]
    """
    resolved = process_group(group)
    if resolved is None:
        return counts_N.detach().cpu().numpy()[None]
    parts = [torch.empty_like(counts_N) for _ in range(resolved.size())]
    torch.distributed.all_gather(parts, counts_N.contiguous(), group=resolved)
    return torch.stack(parts).cpu().numpy()


def group_metrics(counts_PN: np.ndarray, plan: PlanRows) -> dict[str, float]:
    """Numbers of the dispatch of all ranks of a group.

    Parameters
    ----------
    counts_PN
        ``[P, N]``: :func:`gather_counts`.
    plan
        Of these ranks.

    Returns
    -------
    dict
        ``load_cv`` and ``load_max_over_mean`` of the experts' total load, and the mean over ranks
        of what :func:`dispatch_metrics` finds, as ``mean_…``.

    Examples
    --------
    >>> from tamoe.solver import Workload, solve
    >>> from tamoe.topology import Topology
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(3e10, 1e10))
    >>> plan = solve(topology, Workload(tokens_per_rank=100, top_k=1), floor=0.25)
    >>> numbers = group_metrics(np.array([[90, 10], [10, 90]]), plan)
    >>> round(numbers["mean_remote_share"], 6), numbers["load_cv"]
    (0.1, 0.0)
    """
    check_plan(plan)
    counts_PN = np.asarray(counts_PN)
    if counts_PN.shape != (plan.num_ranks, plan.num_experts):
        raise InputError(
            f"counts_PN is {counts_PN.shape}; allowed: {(plan.num_ranks, plan.num_experts)}"
        )
    ranks = [dispatch_metrics(row_N, plan, rank) for rank, row_N in enumerate(counts_PN)]
    means = {f"mean_{key}": float(np.mean([one[key] for one in ranks])) for key in ranks[0]}
    return _balance(counts_PN.sum(0).tolist()) | means


def write_scalars(
    writer: ScalarWriter, metrics: Mapping[str, float], step: int, *, prefix: str = "tamoe/"
) -> None:
    """Write metrics to TensorBoard, or to whatever else has ``add_scalar``.

    Parameters
    ----------
    writer
        ``torch.utils.tensorboard.SummaryWriter`` (``pip install tensorboard``).
    metrics
        Of :func:`dispatch_metrics`, :func:`group_metrics` or ``Handle.metrics()``.
    step
        Training step, >= 0.
    prefix
        Before every name.
    """
    whole("step", step, 0)
    for key, value in metrics.items():
        writer.add_scalar(f"{prefix}{key}", value, step)


def save_heatmap(
    counts_PN: np.ndarray, plan: PlanRows, path: str | os.PathLike[str], *, title: str = ""
) -> None:
    """Draw what ranks sent to experts beside what the Plan asks for, as shares of even.

    Parameters
    ----------
    counts_PN
        ``[P, N]``: :func:`gather_counts`.
    plan
        Of these ranks.
    path
        Of a PNG or SVG.
    title
        Above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_plan(plan)
    counts_PN = np.asarray(counts_PN, dtype=float)
    target_PN = np.array([plan.target_N(rank) for rank in range(plan.num_ranks)])
    if counts_PN.shape != target_PN.shape:
        raise InputError(f"counts_PN is {counts_PN.shape}; allowed: {target_PN.shape}")
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    both = figure.subplots(1, 2, sharey=True)
    shares = [
        values_PN / np.maximum(values_PN.mean(1, keepdims=True), 1e-12)
        for values_PN in (counts_PN, target_PN)
    ]
    top = max(float(share_PN.max()) for share_PN in shares)
    for axes, share_PN, name in zip(both, shares, ("dispatched", "target"), strict=True):
        image = axes.imshow(share_PN, vmin=0, vmax=top, cmap="viridis", aspect="auto")
        axes.set(xlabel="expert", title=name)
    both[0].set_ylabel("rank")
    figure.colorbar(image, ax=both, label="choices over even share")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _counts(counts_N: torch.Tensor | np.ndarray | Sequence[float], num_experts: int) -> list[float]:
    values = counts_N.tolist() if hasattr(counts_N, "tolist") else counts_N
    try:
        counts = [float(value) for value in values]
    except (TypeError, ValueError):  # a single number, rows of numbers, no numbers
        counts = []
    whole_row = len(counts) == num_experts and min(counts) >= 0 and math.isfinite(sum(counts))
    if not whole_row:
        shape = tuple(getattr(counts_N, "shape", ()))
        raise InputError(
            f"counts_N is {reprlib.repr(values)}{f' of shape {shape}' if shape else ''}; allowed: "
            f"{num_experts} finite numbers >= 0"
        )
    return counts


def _balance(counts: list[float]) -> dict[str, float]:
    size, mean = len(counts), sum(counts) / len(counts)
    if mean == 0:
        return {"load_cv": 0.0, "load_max_over_mean": 0.0}
    deviation = math.dist(counts, [mean] * size) / math.sqrt(size)
    return {"load_cv": deviation / mean, "load_max_over_mean": max(counts) / mean}


def _divergence(counts: list[float], target: list[float]) -> float:
    """KL of one distribution from another: 0 without counts, infinite where none should be."""
    total = sum(counts)
    if total == 0:
        return 0.0
    pairs = zip(counts, target, strict=True)
    try:
        terms = [count * math.log(count / aim) for count, aim in pairs if count]
    except ZeroDivisionError:
        return math.inf
    return max(0.0, sum(terms) / total + math.log(sum(target) / total))  # not -1e-16
