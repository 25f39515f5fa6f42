"""Topology-aware Mixture-of-Experts training.

Measure the cluster's links, solve for how many tokens each rank should send to each expert, steer
any router there, and move the tokens. The names below are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tamoe.bias import (
        SignBias as SignBias,
        TopologyBias as TopologyBias,
    )
    from tamoe.capacity import TopologyCapacity as TopologyCapacity
    from tamoe.checkpoint import (
        load_checkpoint as load_checkpoint,
        save_checkpoint as save_checkpoint,
    )
    from tamoe.divergence import (
        LocalityLoss as LocalityLoss,
        TargetDivergence as TargetDivergence,
    )
    from tamoe.exchange import Exchange as Exchange
    from tamoe.expert_bias import ExpertBias as ExpertBias
    from tamoe.gate import Gate as Gate
    from tamoe.gates import (
        FasterGate as FasterGate,
        GShardGate as GShardGate,
        NaiveGate as NaiveGate,
        NoisyGate as NoisyGate,
        SigmoidGate as SigmoidGate,
        SwitchGate as SwitchGate,
        steering as steering,
    )
    from tamoe.group_limit import GroupLimit as GroupLimit
    from tamoe.loss import TopologyLoss as TopologyLoss
    from tamoe.moe import MoE as MoE, MoEOutput as MoEOutput
    from tamoe.parallel import (
        DenseGradients as DenseGradients,
        broadcast_dense as broadcast_dense,
        clip_grad_norm as clip_grad_norm,
    )
    from tamoe.record import record_exchanges as record_exchanges
    from tamoe.routing import Routing as Routing
    from tamoe.topology.errors import (
        EmulationError as EmulationError,
        ExchangeError as ExchangeError,
        InfeasibleError as InfeasibleError,
        InputError as InputError,
        KernelError as KernelError,
        ProbeError as ProbeError,
        RankError as RankError,
        RankTimeoutError as RankTimeoutError,
        TamoeError as TamoeError,
    )

__version__ = "0.1.0"

_HOME = {
    "DenseGradients": "parallel",
    "EmulationError": "topology.errors",
    "Exchange": "exchange",
    "ExchangeError": "topology.errors",
    "ExpertBias": "expert_bias",
    "FasterGate": "gates",
    "GShardGate": "gates",
    "Gate": "gate",
    "GroupLimit": "group_limit",
    "InfeasibleError": "topology.errors",
    "InputError": "topology.errors",
    "KernelError": "topology.errors",
    "LocalityLoss": "divergence",
    "MoE": "moe",
    "MoEOutput": "moe",
    "NaiveGate": "gates",
    "NoisyGate": "gates",
    "ProbeError": "topology.errors",
    "RankError": "topology.errors",
    "RankTimeoutError": "topology.errors",
    "Routing": "routing",
    "SigmoidGate": "gates",
    "SignBias": "bias",
    "SwitchGate": "gates",
    "TamoeError": "topology.errors",
    "TargetDivergence": "divergence",
    "TopologyBias": "bias",
    "TopologyCapacity": "capacity",
    "TopologyLoss": "loss",
    "broadcast_dense": "parallel",
    "clip_grad_norm": "parallel",
    "load_checkpoint": "checkpoint",
    "record_exchanges": "record",
    "save_checkpoint": "checkpoint",
    "steering": "gates",
}
_MODULES = ("functional", "solver", "topology")
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__", "functional"]
