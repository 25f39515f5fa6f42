"""Plan files: JSON of schema ``tamoe.plan``, units in the keys, the topology inside."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from tamoe.solver.choice import ASKED_EXCHANGES
from tamoe.solver.cost import SELF_SENDS
from tamoe.solver.plan import Plan
from tamoe.solver.workload import Workload
from tamoe.topology.documents import field, number, read_document, write_document
from tamoe.topology.errors import InputError
from tamoe.topology.formats import topology_from_document, topology_to_document

SCHEMA = "tamoe.plan"
SCHEMA_VERSION = "1.0"
_KNOWN = {
    "schema", "schema_version", "method", "floor", "kl", "self_send", "asked_exchange", "time_s",
    "even_time_s", "lower_bound_s", "objective_gap", "notes", "workload", "target_tokens",
    "link_prices", "pair_prices", "rank_prices_s_per_token", "expert_prices_s_per_token",
    "topology", "exchange", "exchange_reason",  # the last two in files of older versions
}  # fmt: skip
_SUM_ERROR = 1e-6  # relative; targets of a file must send every token


def plan_to_document(plan: Plan) -> dict[str, Any]:
    """The JSON object that a plan is stored as."""
    return {
        **plan.extra,
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "method": plan.method,
        "floor": plan.floor,
        "kl": plan.kl,
        "self_send": plan.self_send,
        "asked_exchange": plan.asked_exchange,
        "time_s": plan.time_s,
        "even_time_s": plan.even_time_s,
        "lower_bound_s": plan.lower_bound_s,
        "objective_gap": plan.objective_gap,
        "notes": list(plan.notes),
        "workload": dataclasses.asdict(plan.workload),
        "target_tokens": plan.target_PN.tolist(),
        "link_prices": plan.link_prices.tolist(),
        "pair_prices": [
            {"source_rank": i, "target_rank": j, "price": price} for i, j, price in plan.pair_prices
        ],
        "rank_prices_s_per_token": plan.rank_price_P.tolist(),
        "expert_prices_s_per_token": plan.expert_price_GN.tolist(),
        "topology": topology_to_document(plan.topology),
    }


def plan_from_document(document: Mapping[str, Any], where: str) -> Plan:
    """A plan from its JSON object; ``where`` begins the messages about what is wrong.

    Raises
    ------
    InputError
        A field is missing, of the wrong type, shape or range.
    """
    topology = topology_from_document(field(document, "topology", where), f"{where}: topology")
    num = topology.num_ranks
    workload = _workload(field(document, "workload", where), num, f"{where}: workload")
    num_experts = workload.num_experts(num)
    num_groups = len(workload.groups(num))
    target_PN = _array(document, "target_tokens", (num, num_experts), where, minimum=0.0)
    _check_rows(target_PN, workload, where)
    self_send = field(document, "self_send", where)
    if self_send not in SELF_SENDS:
        raise InputError(f"{where}: self_send is {self_send!r}; allowed: {', '.join(SELF_SENDS)}")
    asked_exchange = document.get("asked_exchange", "auto")  # older versions had nothing to ask
    if asked_exchange not in ASKED_EXCHANGES:
        allowed = ", ".join(ASKED_EXCHANGES)
        raise InputError(f"{where}: asked_exchange is {asked_exchange!r}; allowed: {allowed}")
    return Plan(
        topology=topology,
        workload=workload,
        method=_text(document, "method", where),
        floor=_floor(document, where),
        kl=number(document, "kl", where),
        self_send=self_send,
        target_PN=target_PN,
        time_s=number(document, "time_s", where),
        even_time_s=number(document, "even_time_s", where),
        lower_bound_s=number(document, "lower_bound_s", where),
        link_prices=_array(document, "link_prices", (len(topology.links),), where, minimum=0.0),
        pair_prices=_pair_prices(document, num, where),
        rank_price_P=_array(document, "rank_prices_s_per_token", (num,), where),
        expert_price_GN=_array(
            document, "expert_prices_s_per_token", (num_groups, num_experts), where
        ),
        objective_gap=number(document, "objective_gap", where, default=0.0, minimum=-1.0),
        asked_exchange=asked_exchange,
        notes=_notes(document, where),
        extra={key: value for key, value in document.items() if key not in _KNOWN},
    )


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a plan file; it appears whole or not at all."""
    write_document(path, plan_to_document(plan))


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file.

    Raises
    ------
    InputError
        The file is missing, truncated, of another schema or version, or a field is wrong.
    """
    return plan_from_document(read_document(path, SCHEMA, SCHEMA_VERSION), str(path))


def _workload(document: Any, num_ranks: int, where: str) -> Workload:
    values = {spec.name: field(document, spec.name, where) for spec in dataclasses.fields(Workload)}
    try:
        workload = Workload(**values)
        workload.expert_position_N(num_ranks)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return workload


def _floor(document: Mapping[str, Any], where: str) -> float:
    floor = number(document, "floor", where)
    if floor > 1:
        raise InputError(f"{where}: floor is {floor}; allowed: 0 to 1")
    return floor


def _check_rows(target_PN: np.ndarray, workload: Workload, where: str) -> None:
    tokens = workload.top_k * workload.tokens_per_rank
    wrong = np.flatnonzero(abs(target_PN.sum(axis=1) / tokens - 1) > _SUM_ERROR)
    if len(wrong):
        rank = int(wrong[0])
        raise InputError(
            f"{where}: target_tokens[{rank}] sums to {target_PN[rank].sum():g}; allowed: "
            f"top_k x tokens_per_rank = {tokens}"
        )


def _array(
    document: Mapping[str, Any],
    key: str,
    shape: tuple[int, ...],
    where: str,
    minimum: float | None = None,
) -> np.ndarray:
    values = field(document, key, where)
    try:
        array = np.array(values)
    except ValueError:  # rows of different length
        array = np.array(None)
    if array.dtype.kind not in "iuf":
        raise InputError(f"{where}: {key} is not an array of numbers of shape {shape}")
    if array.shape != shape:
        raise InputError(f"{where}: {key} has shape {array.shape}; allowed: {shape}")
    good = np.isfinite(array) & (array >= (-np.inf if minimum is None else minimum))
    if not good.all():
        at = tuple(int(index) for index in np.argwhere(~good)[0])
        allowed = "finite" if minimum is None else f"finite and >= {minimum:g}"
        place = "".join(f"[{index}]" for index in at)
        raise InputError(f"{where}: {key}{place} is {array[at]}; allowed: {allowed}")
    return array.astype(np.float64)


def _pair_prices(
    document: Mapping[str, Any], num_ranks: int, where: str
) -> tuple[tuple[int, int, float], ...]:
    entries = field(document, "pair_prices", where)
    if not isinstance(entries, list):
        raise InputError(f"{where}: pair_prices is {entries!r}; allowed: a list")
    prices = []
    for position, entry in enumerate(entries):
        here = f"{where}: pair_prices[{position}]"
        ends = [field(entry, name, here) for name in ("source_rank", "target_rank")]
        for rank in ends:
            if type(rank) is not int or not 0 <= rank < num_ranks:
                raise InputError(f"{here}: rank {rank!r}; allowed: 0 to {num_ranks - 1}")
        prices.append((ends[0], ends[1], number(entry, "price", here)))
    return tuple(prices)


def _text(document: Mapping[str, Any], key: str, where: str) -> str:
    value = field(document, key, where)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} is {value!r}; allowed: a string")
    return value


def _notes(document: Mapping[str, Any], where: str) -> tuple[str, ...]:
    notes = field(document, "notes", where)
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise InputError(f"{where}: notes is {notes!r}; allowed: a list of strings")
    return tuple(notes)
