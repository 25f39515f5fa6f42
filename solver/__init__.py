"""Targets for the dispatch: which rank should send how many tokens to which expert.

The names below are loaded when they are first used, so that importing tamoe stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tamoe.solver.cost import exchange_time_s as exchange_time_s, link_times_s as link_times_s
    from tamoe.solver.entry import solve as solve
    from tamoe.solver.plan import Bottleneck as Bottleneck, Plan as Plan
    from tamoe.solver.workload import Workload as Workload

_HOME = {
    "Bottleneck": "plan",
    "Plan": "plan",
    "Workload": "workload",
    "exchange_time_s": "cost",
    "link_times_s": "cost",
    "solve": "entry",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
