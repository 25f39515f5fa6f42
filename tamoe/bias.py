"""TopologyBias: a controller that drives what a gate selects to the rank's row of the Plan.

:class:`SignBias` takes steps of equal size instead, as DeepSeek-V3 does for load balance.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from tamoe.plan_module import PlanModule, PlanRows, checked_row
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.groups import Group

# The moving average of the shares reaches back far enough to hold this many choices of the expert
# with the smallest target: log of a count below that is biased (-1/(2n)) and noisy.
MIN_WINDOW_CHOICES = 16.0
MAX_SHARE_STEP = 0.5  # a longer memory than two batches makes the loop overshoot
SPREAD_STEP = 0.1
# The spread moves slowly and its measurement is half the work, so later batches are left out.
MEASURED_FIRST, MEASURE_EVERY = 16, 4
MAX_LOG_RATIO = 3.0  # an expert without any choice is worth no more than one at 5 % of its target
LEAST_SHARE = 1e-30
LEAST_SPREAD = 1e-6  # equal logits still need a bias that breaks their ties
MAX_UNIT_BIAS = 30.0  # in spreads; beyond that selection is all or nothing
Start = Literal["target", "prices", "even"]
STARTS: tuple[Start, ...] = ("target", "prices", "even")


class TopologyBias(PlanModule):
    """A bias on the logits, for selection only, that keeps the rank's dispatch at its target.

    Works with one gate shared by all ranks: each rank has its own bias. Combine weights come from
    the unbiased logits, so that the bias moves tokens and does not scale experts.

    After each batch ``b += gain · σ̂ · log(ĉ/c̄)``, with ĉ the target, c̄ a moving average of the
    measured counts and σ̂ the running spread of the logits. Since the bias is kept in units of σ̂,
    it follows a gate whose logits grow, and the number of steps does not depend on their scale.
    It starts at the log-prior log(ĉ/even) in the same units, or where ``start`` says.

    Parameters
    ----------
    plan
        :class:`tamoe.solver.Plan`.
    group
        Expert-parallel group that the plan was solved for, None for the default group. Only asked
        for this process's rank; nothing is communicated.
    rank
        Row of the plan; None asks the group.
    gain
        η, in (0, 2). 0.3 settles within 30 steps at 2,048 tokens a rank.
    fixed
        True: where it starts and nothing else. Exact only for sampled top-1 routing with flat
        logits; with argmax it misses the target by the spread of the logits. Kept for comparison.
    start
        ``"target"``: log(ĉ/even). ``"prices"``: what the prices of the links alone ask for,
        -π · PkS / (kl · T_even), of a plan with ``kl`` > 0; it differs by what the plan adds to
        keep experts even, so they are even only where ranks are alike. ``"even"``: 0.
    device
        Of the state.

    Raises
    ------
    InputError
        The rank is unknown or out of range, the gain is out of range, the plan has targets of 0
        (solve with ``floor`` or ``kl``), or it has no prices of the kind that ``start`` asks for.

    Notes
    -----
    The bias that reaches ĉ minimises the convex ``Φ(b) = E[Σ top-k(z + b)] - <ĉ/S, b>``, whose
    gradient is inclusion minus ĉ/S; the controller is stochastic descent on it. The spread is the
    standard deviation of the logits about their mean over experts and over tokens: a constant of a
    token selects nothing, a constant of an expert is what the bias has to undo.

    Batches too small to judge (fewer than 16 expected choices of the rarest expert) lengthen the
    moving average and lower the gain in proportion. A batch without tokens changes nothing, one
    whose logits are not finite leaves the spread as it was; neither waits for the device.

    ``state_dict`` holds unit bias, shares, spread and steps of *this rank* (``tamoe_scope`` is
    ``"rank"``): a checkpoint must keep them apart by rank.

    Examples
    --------
    >>> import torch
    >>> from tamoe import TopologyBias
    >>> from tamoe.functional import expert_counts
    >>> from tamoe.solver import Workload, solve
    >>> from tamoe.topology import Topology
    >>> topology = Topology.from_tree("2x4", bandwidth_bytes_per_s=(5e10, 1e10))
    >>> bias = TopologyBias(solve(topology, Workload(tokens_per_rank=512, top_k=1)), rank=0)
    >>> logits_TN = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    >>> for _ in range(50):
    ...     index_TK = (logits_TN + bias(logits_TN)).topk(1).indices
    ...     bias.update(expert_counts(index_TK, 8))
    >>> error_N = expert_counts(index_TK, 8) / 512 - torch.from_numpy(bias.share_N)
    >>> error_N.abs().max().item() < 0.01
    True
    """

    unit_bias_N: torch.Tensor
    moving_share_N: torch.Tensor
    spread: torch.Tensor
    steps: torch.Tensor
    target_share_N: torch.Tensor
    batch_spread: torch.Tensor
    _updates: int  # outside of graphs; steps leaves out those without tokens

    def __init__(
        self,
        plan: PlanRows,
        *,
        group: Group = None,
        rank: int | None = None,
        gain: float = 0.3,
        fixed: bool = False,
        start: Start = "target",
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 < gain < 2:
            raise InputError(f"gain is {gain}; allowed: > 0 and < 2, 0.3 is a good start")
        if start not in STARTS:
            raise InputError(f"start is {start!r}; allowed: {', '.join(map(repr, STARTS))}")
        super().__init__(plan, group, rank)
        self.gain, self.fixed, self.start = float(gain), fixed, start
        self._prior_N = self._prior(plan)

        def buffer(name: str, *shape: int, persistent: bool = True) -> None:
            value = torch.empty(shape, dtype=torch.float32, device=device)
            self.register_buffer(name, value, persistent=persistent)

        buffer("unit_bias_N", self.num_experts)  # bias over spread
        buffer("moving_share_N", self.num_experts)  # c̄ over its sum
        buffer("spread")  # σ̂, 0 before the first update
        self.register_buffer("steps", torch.empty((), dtype=torch.int64, device=device))
        buffer("target_share_N", self.num_experts, persistent=False)
        buffer("batch_spread", persistent=False)  # measured last; 0 once followed
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget what was measured: back to the log-prior."""
        prior_N = torch.from_numpy(self._prior_N)
        self.unit_bias_N.copy_(prior_N if self.fixed else prior_N * self._units_per_log())
        self.target_share_N.copy_(self._target())
        self.moving_share_N.copy_(self.target_share_N)
        self.spread.fill_(1.0 if self.fixed else 0.0)
        self.steps.zero_()
        self.batch_spread.zero_()
        self._set_updates(0)

    def set_plan(self, plan: PlanRows) -> None:
        """Follow another Plan of the same ranks and experts from now on.

        What was measured is kept; the bias moves by the change of the log-prior at once and by the
        controller from there.

        Raises
        ------
        InputError
            The plan has another number of ranks or experts, or not what ``start`` asks for.
        """
        self._check_size(plan)
        prior_N = self._prior(plan)  # refuses some plans, so before anything is adopted
        self._adopt(plan)
        units = 1.0 if self.fixed else self._units_per_log()
        change_N = torch.from_numpy((prior_N - self._prior_N) * units).to(self.unit_bias_N)
        self._prior_N = prior_N
        old_N = self.target_share_N.clone()
        self.target_share_N.copy_(self._target())
        self.unit_bias_N.add_(change_N)
        # The measured shares follow, or the controller would take the same step a second time.
        self.moving_share_N.mul_(self.target_share_N / old_N)
        self.moving_share_N.div_(self.moving_share_N.sum())

    @property
    def bias_N(self) -> torch.Tensor:
        """The bias as it stands, ``[N]``; 0 before the first batch of training."""
        return self.unit_bias_N * self.spread

    def forward(self, logits_TN: torch.Tensor, mask_T: torch.Tensor | None = None) -> torch.Tensor:
        """The bias to add to the logits for selection.

        In training mode the spread of these logits is noted for the next :meth:`update`, of which
        every fourth is preceded by that after the first 16; in evaluation mode nothing changes.

        Parameters
        ----------
        logits_TN
            ``[T, N]``, unbiased.
        mask_T
            ``[T]``; tokens where it is 0 (padding) are left out of the spread.

        Returns
        -------
        torch.Tensor
            ``[N]`` float32, without gradient.
        """
        if logits_TN.ndim != 2 or logits_TN.shape[1] != self.num_experts:
            raise InputError(
                f"logits_TN is {tuple(logits_TN.shape)}; allowed: (tokens, {self.num_experts})"
            )
        if self.fixed:
            return self.bias_N
        spread = self.spread
        if self.training and not self._measures():
            return self.unit_bias_N * spread
        batch = _spread(logits_TN.detach(), mask_T)
        if self.training:
            self.batch_spread.copy_(torch.where(batch > 0, batch, self.batch_spread))
        return self.unit_bias_N * torch.where(spread > 0, spread, batch)

    def update(self, counts_N: torch.Tensor) -> None:
        """One step of the controller.

        The gates of tamoe call it in training mode, once a batch. Call it yourself for a gate of
        your own, after the forward pass whose choices were counted.

        Parameters
        ----------
        counts_N
            ``[N]``, choices of each expert on this rank in the latest batch, before drops:
            :func:`tamoe.functional.expert_counts`. Any sum; only shares matter.
        """
        if counts_N.shape != (self.num_experts,):
            raise InputError(f"counts_N is {tuple(counts_N.shape)}; allowed: {self.num_experts}")
        if self.fixed:
            return
        if self._measures():
            self._follow_spread()
        moving_share_N, unit_bias_N = self.moving_share_N, self.unit_bias_N
        share_N, step = self._share_and_step(counts_N.detach().to(moving_share_N))
        moving_share_N.lerp_(share_N, step)
        unit_bias_N.add_(self._change_N(moving_share_N, step * (1 / MAX_SHARE_STEP)))
        unit_bias_N.sub_(unit_bias_N.mean()).clamp_(-MAX_UNIT_BIAS, MAX_UNIT_BIAS)
        self.steps.add_(step > 0)
        if not torch.compiler.is_compiling():
            self._set_updates(self._updates + 1)

    def _share_and_step(self, counts_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Shares of the batch, and what a moving average of them takes of it.

        That is 0 without tokens, and less than its most where the rarest expert expects few.
        """
        total = counts_N.sum()
        if counts_N.is_cpu and not torch.compiler.is_compiling():
            known = total.item()  # no device to wait for, and a number costs less than a tensor
            return counts_N / max(known, 1.0), min(known * self._step_per_choice, MAX_SHARE_STEP)
        step = (total * self._step_per_choice).clamp_(max=MAX_SHARE_STEP)
        return counts_N / total.clamp_min(1), step

    def _set_updates(self, updates: int) -> None:
        # By nn.Module's own __setattr__ this costs as much as an operation on a tensor.
        object.__setattr__(self, "_updates", updates)

    def _is_graph(self) -> bool:
        """Whether what runs now is compiled or captured, the same for all batches to come."""
        if torch.compiler.is_compiling():
            return True
        return self.spread.is_cuda and torch.cuda.is_current_stream_capturing()

    def _measures(self) -> bool:
        if self._is_graph():
            return True
        return self._updates < MEASURED_FIRST or self._updates % MEASURE_EVERY == 0

    def _follow_spread(self) -> None:
        batch, spread = self.batch_spread, self.spread
        latest = torch.where(batch > 0, batch, spread)  # 0: no batch to go by
        seen = torch.where(spread > 0, spread, latest)
        batches = 1 if self._is_graph() or self._updates < MEASURED_FIRST else MEASURE_EVERY
        spread.copy_(torch.lerp(seen, latest, 1 - (1 - SPREAD_STEP) ** batches))
        batch.zero_()

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        # Training goes on as if it had never stopped.
        self._set_updates(0 if self.steps.is_meta else int(self.steps))
        self.batch_spread.zero_()

    def extra_repr(self) -> str:
        """Rank, size and gain, for ``print(model)``."""
        how = "fixed=True" if self.fixed else f"gain={self.gain:g}"
        return f"{super().extra_repr()}, {how}"

    def _change_N(self, moving_share_N: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
        """What a batch adds, in spreads; its weight is 1 where it is large enough to judge."""
        ratio_N = self.target_share_N / moving_share_N
        return ratio_N.log_().clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO).mul_(self.gain * weight)

    def _target(self) -> torch.Tensor:
        # A share that float32 has not would make the ratio to it 0/0.
        return torch.from_numpy(np.maximum(self.share_N, LEAST_SHARE))

    def _adopt(self, plan: PlanRows) -> None:
        super()._adopt(plan)
        self._step_per_choice = float(self.share_N.min()) / MIN_WINDOW_CHOICES

    def _prior(self, plan: PlanRows) -> np.ndarray:
        if self.start == "prices":
            found = getattr(plan, "price_prior_N", None)
            if found is None:
                raise InputError("start is 'prices' and the plan has none; allowed: of solve(…)")
            return checked_row("price_prior_N", found(self.rank), self.num_experts)
        prior_N = checked_row("log_prior_N", plan.log_prior_N(self.rank), self.num_experts)
        return prior_N * (self.start != "even")

    def _units_per_log(self) -> float:
        # By this many spreads a bias must rise to multiply a share by e: the tail of a Gaussian
        # falls by e over σ/√(2 ln N) at the largest of N values.
        return 1.0 / max(1.0, math.sqrt(2.0 * math.log(self.num_experts)))


class SignBias(TopologyBias):
    """A bias that moves by steps of one size, whose sign the error has, smaller with time.

    After each batch ``b += speed / (1 + decay · steps) · σ̂ · sign(ĉ - c̄)``. DeepSeek-V3's update
    has neither σ̂ nor decay; with its 0.001 it is too slow for logits of a spread above 1.

    Parameters
    ----------
    plan, group, rank, start, device
        As for :class:`TopologyBias`.
    speed
        First step in spreads of the logits, > 0.
    decay
        >= 0; 0 keeps all steps equal, and the share swings about the target by them.

    Examples
    --------
    >>> import torch
    >>> from tamoe.solver import Workload, solve
    >>> from tamoe.topology import Topology
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(5e10, 1e10))
    >>> bias = SignBias(solve(topology, Workload(top_k=1)), rank=0, speed=0.25, start="even")
    >>> _ = bias(torch.randn(64, 2))
    >>> bias.update(torch.tensor([32, 32]))  # fewer stay than should
    >>> (bias.unit_bias_N[0] > bias.unit_bias_N[1]).item()
    True
    """

    def __init__(
        self,
        plan: PlanRows,
        *,
        group: Group = None,
        rank: int | None = None,
        speed: float = 0.25,
        decay: float = 0.02,
        start: Start = "target",
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 < speed < math.inf:
            raise InputError(f"speed is {speed}; allowed: finite and > 0")
        if not 0 <= decay < math.inf:
            raise InputError(f"decay is {decay}; allowed: finite and >= 0")
        self.speed, self.decay = float(speed), float(decay)
        super().__init__(plan, group=group, rank=rank, start=start, device=device)

    def extra_repr(self) -> str:
        """Rank, size and speed, for ``print(model)``."""
        return f"{PlanModule.extra_repr(self)}, speed={self.speed:g}, decay={self.decay:g}"

    def _change_N(self, moving_share_N: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
        speed = self.speed * weight / (1.0 + self.decay * self.steps)
        return speed * torch.sign(self.target_share_N - moving_share_N)


def _spread(logits_TN: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
    """Standard deviation about the means over tokens and over experts; 0 where it has no value."""
    tokens, num_experts = logits_TN.shape
    if tokens < 2 or num_experts < 2:
        return logits_TN.new_zeros((), dtype=torch.float32)
    if mask_T is None:
        centred_TN = logits_TN.float()
        centred_TN = centred_TN - centred_TN.mean(1, keepdim=True)
        centred_TN -= centred_TN.mean(0)
        spread = torch.linalg.vector_norm(centred_TN) / math.sqrt((tokens - 1) * (num_experts - 1))
        return spread.clamp_min_(LEAST_SPREAD).nan_to_num_(0.0, 0.0)
    keep_T1 = mask_T.unsqueeze(1).bool()
    centred_TN = torch.where(keep_T1, logits_TN.float(), 0.0)
    centred_TN = centred_TN - centred_TN.mean(1, keepdim=True)
    kept = keep_T1.sum()
    centred_TN = (centred_TN - centred_TN.sum(0) / kept) * keep_T1
    degrees = (kept - 1) * (num_experts - 1)
    spread = (centred_TN.square().sum() / degrees).sqrt()
    spread = spread.clamp_min_(LEAST_SPREAD).nan_to_num_(0.0, 0.0)
    return torch.where(degrees > 0, spread, 0.0)
