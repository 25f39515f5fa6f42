"""tamoe's gates and losses against the code of others, on random inputs: the largest errors.

Run it (about a minute on two cores; each framework that is not installed is left out)::

    python -m tamoe.experiments.oracles -o oracles.json

Rows of other versions that the file has are kept, so that one table holds several: run it again
with another version in ``PYTHONPATH``, and ``--only transformers``.

An error is the largest difference of a number, or how many choices differ. Frameworks count drops,
choices and places as integers, so those have to agree exactly.

Shape suffixes: T tokens, K choices, N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from tamoe.experiments.command import run_command
from tamoe.experiments.deepspeed_oracles import top1_counts_and_loss, top1_without_drops, top2, topk
from tamoe.experiments.family_oracles import TITAN_SCORES, family_router, titan
from tamoe.experiments.oracle_inputs import (
    chosen_map,
    differ,
    draw_logits,
    draw_whole,
    routed,
)
from tamoe.experiments.tiny_models import FAMILIES
from tamoe.functional import (
    balance_loss,
    convention_factor,
    pooled_balance_loss,
    sequence_balance_loss,
    z_loss,
)
from tamoe.gates import Gate, NaiveGate, SigmoidGate
from tamoe.group_limit import GroupLimit
from tamoe.topology.documents import check_writable, read_document, write_document
from tamoe.topology.errors import InputError

DISTRIBUTIONS = {"megatron": "megatron-core"}  # where the name is not the package's
SCHEMA, SCHEMA_VERSION = "tamoe.experiment.oracles", "1.0"


@dataclass(frozen=True)
class Comparison:
    """A function of tamoe against one of another package."""

    function: str
    oracle: str
    package: str  # to import
    error: Callable[[torch.Generator], float]  # of one random input


# ---- Transformers -------------------------------------------------------------------------------


def pooled_loss(generator: torch.Generator) -> float:
    """``load_balancing_loss_func`` over several layers, with and without padding; relative."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    first_TN = draw_logits(generator)
    tokens, num_experts = first_TN.shape
    logits = [first_TN, *(torch.randn(tokens, num_experts, generator=generator) for _ in range(2))]
    top_k = draw_whole(generator, 1, num_experts)
    mask_T = None
    if draw_whole(generator, 0, 1):
        mask_T = torch.rand(tokens, generator=generator) < 0.7
        mask_T[0] = True
    theirs = load_balancing_loss_func(
        tuple(logits), num_experts, top_k, None if mask_T is None else mask_T[None].long()
    )
    probs = [one_TN.softmax(1) for one_TN in logits]
    ours = pooled_balance_loss(probs, [one_TN.topk(top_k).indices for one_TN in probs], mask_T)
    factor = convention_factor("transformers", top_k=top_k)
    return differ(ours * factor, theirs) / max(float(theirs), 1.0)


# ---- Megatron-Core ------------------------------------------------------------------------------


def _megatron() -> Any:
    from megatron.core.transformer.moe import moe_utils

    return moe_utils


def megatron_routing(generator: torch.Generator, score: str) -> float:
    """Weights and map of ``topk_routing_with_score_function``: softmax, sigmoid, groups, bias."""
    groups = draw_whole(generator, 2, 4)
    size = draw_whole(generator, 2, 4)
    logits_TN = (
        torch.randn(draw_whole(generator, 1, 30), groups * size, generator=generator)
        * (0.1, 1.0, 5.0)[draw_whole(generator, 0, 2)]
    )
    num_experts = groups * size
    top_groups = draw_whole(generator, 1, groups)
    limited = bool(draw_whole(generator, 0, 1))
    top_k = 2 * top_groups if limited else draw_whole(generator, 2, num_experts)
    limit = None
    if limited:
        limit = GroupLimit([e // size for e in range(num_experts)], top_groups, score="top2")
    options: dict[str, Any] = {"scaling_factor": 2.5, "score_function": score}
    if limited:
        options |= {"num_groups": groups, "group_topk": top_groups}
    bias_N = torch.randn(num_experts, generator=generator) * 0.1
    gate: Gate
    if score == "sigmoid":
        options["expert_bias"] = bias_N
        gate = SigmoidGate(num_experts, num_experts, top_k=top_k, route_scale=2.5, limit=limit)
        gate.expert_bias = _fixed_bias(bias_N)
    else:
        gate = NaiveGate(num_experts, num_experts, top_k=top_k, limit=limit)
    theirs_TN, map_TN = _megatron().topk_routing_with_score_function(logits_TN, top_k, **options)
    routing = routed(gate.eval(), logits_TN)
    scale = 1.0 if score == "sigmoid" else 2.5
    weight_TN = torch.zeros_like(logits_TN).scatter(
        1, routing.expert_index_TK, scale * routing.weight_TK.detach()
    )
    return max(
        differ(chosen_map(routing.expert_index_TK, num_experts), map_TN),
        differ(weight_TN, theirs_TN),
    )


def _fixed_bias(bias_N: torch.Tensor) -> Any:
    from tamoe.expert_bias import ExpertBias

    bias = ExpertBias(len(bias_N))
    bias.bias_N.copy_(bias_N)
    return bias


def megatron_balance(generator: torch.Generator) -> float:
    """``switch_load_balancing_loss_func`` of a batch, and by sequence as Megatron does it."""
    logits_TN = draw_logits(generator)
    logits_TN = logits_TN[: len(logits_TN) // 2 * 2]
    tokens, num_experts = logits_TN.shape
    top_k = draw_whole(generator, 1, num_experts)
    probs_TN = logits_TN.softmax(1)
    index_TK = probs_TN.topk(top_k).indices
    function = _megatron().switch_load_balancing_loss_func
    map_TN = chosen_map(index_TK, num_experts)
    whole = function(probs_TN, map_TN.sum(0), tokens, top_k, num_experts, 1.0)
    length = tokens // 2
    # Sequences stand side by side, as experts of their own.
    apart = [
        part.reshape(2, length, num_experts).transpose(0, 1).flatten(1)
        for part in (probs_TN, map_TN)
    ]
    each = function(apart[0], apart[1].sum(0), length, top_k, num_experts, 1.0) / 2
    return max(
        differ(balance_loss(probs_TN, index_TK), whole),
        differ(sequence_balance_loss(probs_TN, index_TK, 2), each),
    )


def megatron_z(generator: torch.Generator) -> float:
    """``z_loss_func``, with and without padding; relative."""
    logits_TN = draw_logits(generator)
    padding_T = torch.rand(len(logits_TN), generator=generator) < 0.3
    whole = _megatron().z_loss_func(logits_TN, 1.0)
    kept = _megatron().z_loss_func(logits_TN, 1.0, padding_T)
    return max(
        differ(z_loss(logits_TN), whole) / max(float(whole), 1.0),
        differ(z_loss(logits_TN, ~padding_T), kept) / max(float(kept), 1.0),
    )


COMPARISONS: tuple[Comparison, ...] = (
    Comparison(
        "SwitchGate, drop='random': counts, loss", "top1gating", "deepspeed", top1_counts_and_loss
    ),
    Comparison(
        "SwitchGate: dispatch, weights", "top1gating, no drops", "deepspeed", top1_without_drops
    ),
    Comparison("GShardGate, drop='position', first choices", "top2gating", "deepspeed", top2),
    Comparison(
        "within_capacity by probs", "topkgating, probs", "deepspeed", lambda g: topk(g, "probs")
    ),
    Comparison(
        "within_capacity by position",
        "topkgating, position",
        "deepspeed",
        lambda g: topk(g, "position"),
    ),
    Comparison(
        "balance_loss, expert_counts",
        "topkgating, no drops",
        "deepspeed",
        lambda g: topk(g, "none"),
    ),
    Comparison("pooled_balance_loss x k", "load_balancing_loss_func", "transformers", pooled_loss),
    Comparison(
        "NaiveGate, limit",
        "topk_routing…, softmax",
        "megatron",
        lambda g: megatron_routing(g, "softmax"),
    ),
    Comparison(
        "SigmoidGate, expert_bias, limit",
        "topk_routing…, sigmoid",
        "megatron",
        lambda g: megatron_routing(g, "sigmoid"),
    ),
    Comparison(
        "balance_loss, sequence_balance_loss",
        "switch_load_balancing…",
        "megatron",
        megatron_balance,
    ),
    Comparison("z_loss", "z_loss_func", "megatron", megatron_z),
    *(
        Comparison(
            "SigmoidGate" if family == "deepseek_v3" else "NaiveGate",
            f"router of {family}",
            "transformers",
            partial(family_router, family=family),
        )
        for family in FAMILIES
    ),
    *(
        Comparison(
            "SigmoidGate, expert_bias, limit" if score == "sigmoid" else "NaiveGate",
            f"TokenChoiceTopKRouter, {score}",
            "torchtitan",
            partial(titan, score=score),
        )
        for score in TITAN_SCORES
    ),
)


def available() -> Iterator[Comparison]:
    """Those whose package is installed."""
    for comparison in COMPARISONS:
        if find_spec(comparison.package) is not None:
            yield comparison


def largest_error(comparison: Comparison, inputs: int, seed: int = 0) -> float:
    """The largest error over so many random inputs."""
    generator = torch.Generator().manual_seed(seed)
    return max(comparison.error(generator) for _ in range(inputs))


def rows_of(inputs: int, only: str | None = None) -> list[dict[str, Any]]:
    """Every comparison whose package is installed."""
    rows = []
    for comparison in available():
        if only not in (None, comparison.package):
            continue
        distribution = DISTRIBUTIONS.get(comparison.package, comparison.package)
        rows.append(
            {
                "function": comparison.function,
                "oracle": comparison.oracle,
                "package": distribution,
                "version": metadata.version(distribution),
                "inputs": inputs,
                "largest_error": largest_error(comparison, inputs),
            }
        )
    return rows


def main(
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("oracles.json"),
    inputs: Annotated[int, typer.Option(help="Random inputs for each comparison.")] = 1000,
    only: Annotated[str | None, typer.Option(help="One package, such as transformers.")] = None,
) -> None:
    """Compare, print a table, write JSON (measured)."""
    check_writable(output)
    packages = sorted({comparison.package for comparison in COMPARISONS})
    if only not in (None, *packages):
        raise InputError(f"--only is {only!r}; allowed: {', '.join(packages)}")
    if inputs < 1:
        raise InputError(f"--inputs is {inputs}; allowed: a whole number >= 1")
    installed = {comparison.package for comparison in available()}
    if only is not None and only not in installed:
        here = ", ".join(sorted(installed))
        raise InputError(f"--only is {only!r}, which is not installed; allowed here: {here}")
    kept = read_document(output, SCHEMA, SCHEMA_VERSION)["rows"] if output.exists() else []
    rows = rows_of(inputs, only)
    new = {(row["oracle"], row["version"]) for row in rows}
    rows += [row for row in kept if (row["oracle"], row["version"]) not in new]
    rows.sort(key=lambda row: (row["package"], row["version"], row["oracle"]))
    names = ("function", "oracle", "package", "version", "inputs")
    table = Table("tamoe", *names[1:], "largest error", box=None)
    for row in rows:
        table.add_row(*(str(row[name]) for name in names), f"{row['largest_error']:.1e}")
    Console(width=None if Console().is_terminal else 130).print(table)
    document = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "label": "measured",
        "rows": rows,
    }
    write_document(output, document)


if __name__ == "__main__":
    run_command(main)
