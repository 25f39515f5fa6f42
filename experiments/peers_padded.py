"""DeepSpeed's and Tutel's exchanges: buffers of one fixed size for each expert, padded.

Their real layers' code runs; only the experts are replaced. Gating is done beforehand and not in
the times; tamoe's dispatch, in contrast, holds all of its planning.

Shape suffixes: T tokens, K choices, N experts, E experts of a rank, P ranks, C capacity, D hidden
size.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tamoe.experiments.peers_entry import Clock, Entry, Load

CAPACITY_FACTORS = (None, 1.25, 1.0)  # None: as large as it has to be to drop nothing
_LEAST_CAPACITY = 4  # DeepSpeed's default


def deepspeed_entries(load: Load) -> list[Entry]:
    """DeepSpeed's MOELayer without drops and with fixed capacities."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with _pid_as_in_proc():
        import deepspeed

    # Its all-reduce through shared memory takes no part, and would be compiled first.
    deepspeed.ops.__compatible_ops__.clear()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False)
    return [_deepspeed_entry(load, factor) for factor in CAPACITY_FACTORS]


@contextlib.contextmanager
def _pid_as_in_proc() -> Iterator[None]:
    """DeepSpeed looks for its own process in /proc, which counts from outside the ranks."""
    own = os.getpid
    os.getpid = lambda: int(os.readlink("/proc/self"))
    try:
        yield
    finally:
        os.getpid = own


def _deepspeed_entry(load: Load, capacity_factor: float | None) -> Entry:
    import torch.distributed as dist
    from deepspeed.moe.sharded_moe import MOELayer, topkgating

    gated = topkgating(
        load.logits_TN,
        load.index_TK.shape[1],
        capacity_factor or 1.0,
        _LEAST_CAPACITY,
        drop_tokens=capacity_factor is not None,
        ep_group=dist.group.WORLD,
        sparse_routes=True,
    )
    experts = _Experts(load)
    layer = MOELayer(
        _FixedGate(gated), experts, "ranks", load.topology.num_ranks, load.experts_per_rank
    )
    layer._set_ep_group(dist.group.WORLD)
    layer.wall_clock_breakdown = True  # it times its all-to-alls itself

    def run(clock: Clock) -> torch.Tensor:
        experts.clock = clock
        layer.timers.timers.clear()
        out_TD: torch.Tensor = layer(load.x_TD, None)
        clock.stop()
        clock.moving_s = (layer.time_falltoall + layer.time_salltoall) / 1e3  # milliseconds
        return out_TD

    return Entry(
        f"DeepSpeed, {_in_words(capacity_factor)}",
        run,
        capacity=int(gated[1]),
        dropped_share=float((gated[3] < 0).float().mean()),
    )


def _in_words(capacity_factor: float | None) -> str:
    return "no drops" if capacity_factor is None else f"capacity {capacity_factor:g}"


class _FixedGate(nn.Module):
    """Answers what DeepSpeed's gate has said of the load."""

    def __init__(self, gated: tuple[Any, ...]) -> None:
        super().__init__()
        self.gated = gated

    def forward(self, *ignored: Any) -> tuple[Any, ...]:
        return self.gated

    def _set_ep_group(self, group: Any) -> None:
        pass


class _Experts(nn.Module):
    """The local experts on DeepSpeed's ``[P, E, C, D]``."""

    clock: Clock

    def __init__(self, load: Load) -> None:
        super().__init__()
        self.factor_EC1 = load.factor_E[:, None, None]

    def forward(self, x_PECD: torch.Tensor) -> torch.Tensor:
        with self.clock.experts():
            return x_PECD * self.factor_EC1


def tutel_entries(load: Load) -> list[Entry]:
    """Tutel's linear and two-dimensional hierarchical (2DH) all-to-all, without drops.

    2DH takes nodes of one size; it is left out where they differ.
    """
    from tutel import moe

    critical, _ = moe.extract_critical(
        load.logits_TN.softmax(1), load.index_TK.shape[1], loss_fn=None, capacity_factor=0.0
    )
    sizes = {len(ranks) for ranks in load.topology.nodes}
    kinds = {"linear": False, "2DH": True} if len(sizes) == 1 else {"linear": False}
    os.environ["LOCAL_SIZE"] = str(max(sizes))  # where Tutel looks for it
    return [
        Entry(f"Tutel {name}, no drops", _run_tutel(load, critical, use_2dh), int(critical[4]))
        for name, use_2dh in kinds.items()
    ]


def _run_tutel(
    load: Load, critical: tuple[Any, ...], use_2dh: bool
) -> Callable[[Clock], torch.Tensor]:
    import torch.distributed as dist
    from tutel import moe
    from tutel.impls.communicate import all_to_all

    group = dist.group.WORLD

    def run(clock: Clock) -> torch.Tensor:
        buffer_NCD = moe.fast_encode(load.x_TD, critical, is_postscore=True)
        with clock.moving():
            buffer_ECD = all_to_all(buffer_NCD, 1, 0, use_2dh=use_2dh, group=group)
        with clock.experts():
            buffer_ECD = buffer_ECD * load.factor_E[:, None, None]
        with clock.moving():
            buffer_NCD = all_to_all(buffer_ECD, 0, 1, use_2dh=use_2dh, group=group)
        out_TD: torch.Tensor = moe.fast_decode(buffer_NCD, critical, is_postscore=True)
        clock.stop()
        return out_TD

    return run
