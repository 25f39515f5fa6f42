"""The cluster's links as a graph, and how they are measured or emulated.

The names below are loaded when they are first used, so that importing tamoe stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tamoe.topology.errors import (
        EmulationError as EmulationError,
        InfeasibleError as InfeasibleError,
        InputError as InputError,
        ProbeError as ProbeError,
        RankError as RankError,
        RankTimeoutError as RankTimeoutError,
        TamoeError as TamoeError,
    )
    from tamoe.topology.graph import Topology as Topology
    from tamoe.topology.link import Link as Link, Pair as Pair
    from tamoe.topology.probing import probe as probe
    from tamoe.topology.ranks import run_ranks as run_ranks
    from tamoe.topology.spec import ClusterSpec as ClusterSpec

_HOME = {
    "ClusterSpec": "spec",
    "EmulationError": "errors",
    "InfeasibleError": "errors",
    "InputError": "errors",
    "Link": "link",
    "Pair": "link",
    "ProbeError": "errors",
    "RankError": "errors",
    "RankTimeoutError": "errors",
    "TamoeError": "errors",
    "Topology": "graph",
    "probe": "probing",
    "run_ranks": "ranks",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
