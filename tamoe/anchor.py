"""What keeps the ranks of a group together in their backward passes.

An exchange's backward pass moves rows, so a rank that leaves it out, or takes it at another point
among its exchanges than the others do, keeps them waiting. Two things could make it: experts that
lose the graph of their rows, and a checkpoint that runs dispatch and combine anew where a rank
first needs what it has not kept, which may be a part of its own experts.

Shape suffixes: R rows, D hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Dispatched(NamedTuple):
    """What a dispatch gives a combine."""

    row_RD: torch.Tensor
    weight: torch.Tensor | None  # factors of rows, where the route applies them, with their graph
    anchor_0D: torch.Tensor  # no rows, with the graph of those that were dispatched


def anchor_for(ctx: Any, row_RD: torch.Tensor) -> torch.Tensor:
    """An output of a dispatch that combine takes beside the rows, whatever became of their graph.

    Saved, so that a checkpoint has something to run anew for in the backward pass of every rank.
    """
    anchor_0D = row_RD.new_empty(0, row_RD.shape[1])
    ctx.save_for_backward(anchor_0D)
    return anchor_0D


def recompute(ctx: Any) -> None:
    """Let a checkpoint run anew what it has not kept, here, before this pass moves rows."""
    _ = ctx.saved_tensors
