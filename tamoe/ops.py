"""The steps of an exchange as PyTorch operators: index build, pack, copy-on-arrival, combine.

On a GPU they run tamoe's kernels, on the stream that is current, without waiting for the device; on
the CPU, and where there are no kernels, plain PyTorch (:mod:`tamoe.plain_ops`). Results are the
same bit for bit, but for a weight's gradient. Fake kernels tell ``torch.compile`` the shapes;
``gather_rows`` and ``combine`` have gradients.

Shape suffixes: T tokens, K choices, N experts or rows, G groups, D hidden size, M rows of an
output, m rows copied, S sums, J terms of all sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tamoe import kernel_calls
from tamoe.precision import accumulation_dtype
from tamoe.topology.errors import InputError, whole

ROW_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class BuiltIndex(NamedTuple):
    """Where choices go. Sizes do not depend on values; what is behind the kept choices is -1."""

    choice: torch.Tensor  # [T*K] flat choices t*K + k by expert, then by token
    count_N: torch.Tensor  # [N] kept choices of each expert
    refused: torch.Tensor  # scalar: choices that are neither -1 nor an expert; taken as dropped
    touch_token: torch.Tensor  # [T*min(K, G)] tokens by group, then by token, each once a group
    touch_count_G: torch.Tensor  # [G] tokens that touch each group
    touch_row: torch.Tensor  # [T*K] for each entry of choice, its token's row in its group's block


def build_index(
    expert_index_TK: torch.Tensor,
    num_experts: int,
    group_of_expert_N: torch.Tensor | None = None,
    num_groups: int = 0,
) -> BuiltIndex:
    """Stable order of the kept choices by expert; with groups, the tokens that each one needs.

    Parameters
    ----------
    expert_index_TK
        ``[T, K]`` integers, 0 to N - 1, or -1 for a dropped choice.
    num_experts
        N, >= 1.
    group_of_expert_N
        ``[N]`` integers, 0 to G - 1: the node, say, of each expert. None leaves the last three
        results empty.
    num_groups
        G; 0 without groups.

    Raises
    ------
    InputError
        A shape, dtype or number is not allowed. Values are counted in ``refused`` instead, which
        is not read here: that would wait for the device.

    Examples
    --------
    Token 0 goes to both experts of group 0 and is sent there once.

    >>> index = torch.tensor([[0, 1], [2, -1]])
    >>> built = build_index(index, 3, torch.tensor([0, 0, 1]), 2)
    >>> built.choice.tolist(), built.count_N.tolist()
    ([0, 1, 2, -1], [1, 1, 1])
    >>> built.touch_token.tolist(), built.touch_count_G.tolist(), built.touch_row.tolist()
    ([0, 1, -1, -1], [1, 1], [0, 0, 0, -1])
    """
    if expert_index_TK.ndim != 2 or expert_index_TK.shape[1] < 1:
        shape = tuple(expert_index_TK.shape)
        raise InputError(f"expert_index_TK has shape {shape}; allowed: [T, K], K >= 1")
    _check_integers("expert_index_TK", expert_index_TK)
    num_experts = whole("num_experts", num_experts, 1, 2**31 - 1)
    if group_of_expert_N is None:
        num_groups = whole("num_groups, without group_of_expert_N,", num_groups, 0, 0)
    else:
        num_groups = whole("num_groups", num_groups, 1, 2**31 - 1)
        _check_integers("group_of_expert_N", group_of_expert_N)
        if group_of_expert_N.shape != (num_experts,):
            shape = tuple(group_of_expert_N.shape)
            raise InputError(f"group_of_expert_N has shape {shape}; allowed: [{num_experts}]")
        _check_device(expert_index_TK, group_of_expert_N=group_of_expert_N)
    return BuiltIndex(
        *torch.ops.tamoe.build_index(expert_index_TK, num_experts, group_of_expert_N, num_groups)
    )


def copy_rows_(
    out_MD: torch.Tensor,
    row_nD: torch.Tensor,
    source_m: torch.Tensor | None = None,
    target_m: torch.Tensor | None = None,
) -> None:
    """Pack and copy-on-arrival: ``out[target[m]] = row[source[m]]``, without gradients.

    Parameters
    ----------
    out_MD
        ``[M, D]``, contiguous, any dtype, not overlapping the rows. Other rows keep their values.
    row_nD
        ``[N, D]`` in the same dtype.
    source_m, target_m
        ``[m]`` integers; None is 0, 1, 2 … A negative source stores zeros, a negative target
        nothing. Targets are distinct, or which copy stays is not defined.

    Raises
    ------
    InputError
        A shape, dtype or device is not allowed.

    Examples
    --------
    >>> out_MD = torch.zeros(2, 1)
    >>> copy_rows_(out_MD, torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0]))
    >>> out_MD.tolist()
    [[3.0], [1.0]]
    """
    if out_MD.ndim != 2 or row_nD.ndim != 2 or out_MD.shape[1] != row_nD.shape[1]:
        shapes = f"{tuple(out_MD.shape)} and {tuple(row_nD.shape)}"
        raise InputError(f"out_MD and row_nD have shapes {shapes}; allowed: [M, D] and [N, D]")
    if out_MD.dtype != row_nD.dtype:
        raise InputError(f"row_nD is {row_nD.dtype}; allowed: that of out_MD, {out_MD.dtype}")
    if not out_MD.is_contiguous():
        raise InputError(f"out_MD has strides {out_MD.stride()}; allowed: a contiguous tensor")
    num_copies = len(row_nD)
    for name, index_m in (("source_m", source_m), ("target_m", target_m)):
        if index_m is not None:
            _check_vector(name, index_m, out_MD)
            num_copies = len(index_m)
    if source_m is not None and target_m is not None and len(source_m) != len(target_m):
        raise InputError(f"target_m has {len(target_m)} entries; allowed: {len(source_m)}")
    if target_m is None and num_copies > len(out_MD):
        raise InputError(f"out_MD has {len(out_MD)} rows; allowed: >= {num_copies}, one a copy")
    if source_m is None and num_copies > len(row_nD):
        raise InputError(f"row_nD has {len(row_nD)} rows; allowed: >= {num_copies}, one a copy")
    _check_device(out_MD, row_nD=row_nD)
    torch.ops.tamoe.copy_rows_(out_MD, row_nD.detach(), source_m, target_m)


def gather_rows(row_nD: torch.Tensor, index_m: torch.Tensor) -> torch.Tensor:
    """``row[index[m]]``, ``[m, D]``; zeros for a negative index.

    The gradient of a row that is named more than once is the sum in the order of the index, made
    in float32 (float64 for float64): the same on every run, unlike that of ``index_select``.

    Examples
    --------
    >>> gather_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([1, -1, 1])).flatten().tolist()
    [2.0, 0.0, 2.0]
    """
    _check_rows("row_nD", row_nD)
    _check_vector("index_m", index_m, row_nD)
    gathered_mD: torch.Tensor = torch.ops.tamoe.gather_rows(row_nD, index_m)
    return gathered_mD


def combine(
    row_nD: torch.Tensor,
    offset_S1: torch.Tensor,
    index_J: torch.Tensor,
    weight_J: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted sums of rows in a given order: the canonical order of the exchange, say.

    ``out[s] = Σ round(weight[j] · row[index[j]])`` for j from ``offset[s]`` to
    ``offset[s+1] - 1``, in that order. Products are rounded to the rows' dtype; the sum is made in
    float32 (float64 for float64), starts with its first term and is rounded once at its end. An
    empty sum is 0.

    Parameters
    ----------
    row_nD
        ``[N, D]`` of float32, float64, bfloat16 or float16.
    offset_S1
        ``[S + 1]`` integers that never fall, 0 to J.
    index_J
        ``[J]`` integers, 0 to N - 1. For gradients of the rows, not of the weights, a row is a term
        at most once.
    weight_J
        ``[J]`` of a floating dtype, or None for plain sums.

    Raises
    ------
    InputError
        A shape, dtype or device is not allowed.

    Examples
    --------
    >>> row_nD, offset_S1 = torch.tensor([[1.0], [10.0], [100.0]]), torch.tensor([0, 2, 2])
    >>> combine(row_nD, offset_S1, torch.tensor([2, 0]), torch.tensor([0.5, 2.0])).tolist()
    [[52.0], [0.0]]
    """
    weight_J = _checked_terms(row_nD, offset_S1, index_J, weight_J)
    combined_SD: torch.Tensor = torch.ops.tamoe.combine(row_nD, offset_S1, index_J, weight_J)
    return combined_SD


def combine_backward(
    grad_SD: torch.Tensor,
    row_nD: torch.Tensor,
    offset_S1: torch.Tensor,
    index_J: torch.Tensor,
    weight_J: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What :func:`combine` sends back: gradients of its rows and weights, from those of its sums.

    ``grad_row[index[j]] = round(grad[s] · weight[j])``, 0 for rows in no sum; ``grad_weight[j] =
    grad[s] · row[index[j]]`` (None without weights), in float32 (float64 for float64).

    Parameters
    ----------
    grad_SD
        ``[S, D]``, in the dtype of the rows.
    row_nD, offset_S1, index_J, weight_J
        As for :func:`combine`.

    Raises
    ------
    InputError
        A shape, dtype or device is not allowed.

    Examples
    --------
    >>> row_nD, offset_S1 = torch.tensor([[1.0], [10.0]]), torch.tensor([0, 1])
    >>> combine_backward(
    ...     torch.tensor([[3.0]]), row_nD, offset_S1, torch.tensor([1]), torch.tensor([2.0]))
    (tensor([[0.],
            [6.]]), tensor([30.]))
    """
    weight_J = _checked_terms(row_nD, offset_S1, index_J, weight_J)
    expected = (len(offset_S1) - 1, row_nD.shape[1])
    if tuple(grad_SD.shape) != expected or grad_SD.dtype != row_nD.dtype:
        given = f"{grad_SD.dtype} of shape {tuple(grad_SD.shape)}"
        raise InputError(f"grad_SD is {given}; allowed: {row_nD.dtype} of shape {expected}")
    _check_device(row_nD, grad_SD=grad_SD)
    grad_row_nD, grad_weight_J = torch.ops.tamoe.combine_backward(
        grad_SD, row_nD, offset_S1, index_J, weight_J
    )
    return grad_row_nD, None if weight_J is None else grad_weight_J


# ---- checks -------------------------------------------------------------------------------------


def _checked_terms(
    row_nD: torch.Tensor,
    offset_S1: torch.Tensor,
    index_J: torch.Tensor,
    weight_J: torch.Tensor | None,
) -> torch.Tensor | None:
    """The weights in the dtype of sums, once everything about the sums is allowed."""
    _check_rows("row_nD", row_nD)
    _check_vector("offset_S1", offset_S1, row_nD)
    _check_vector("index_J", index_J, row_nD)
    if len(offset_S1) < 1:
        raise InputError("offset_S1 has no entry; allowed: [S + 1], 0 to J")
    if weight_J is None:
        return None
    if weight_J.shape != index_J.shape or not weight_J.is_floating_point():
        given = f"{weight_J.dtype} of shape {tuple(weight_J.shape)}"
        raise InputError(f"weight_J is {given}; allowed: a floating dtype, [{len(index_J)}]")
    _check_device(row_nD, weight_J=weight_J)
    return weight_J.to(accumulation_dtype(row_nD.dtype))


def _check_rows(name: str, row_nD: torch.Tensor) -> None:
    if row_nD.ndim != 2 or row_nD.dtype not in ROW_DTYPES:
        given = f"{row_nD.dtype} of shape {tuple(row_nD.shape)}"
        allowed = "two dims of float32, float64, bfloat16 or float16"
        raise InputError(f"{name} is {given}; allowed: {allowed}")


def _check_integers(name: str, index: torch.Tensor) -> None:
    if index.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        raise InputError(f"{name} is {index.dtype}; allowed: int64, int32, int16, int8")


def _check_vector(name: str, index: torch.Tensor, beside: torch.Tensor) -> None:
    _check_integers(name, index)
    if index.ndim != 1:
        raise InputError(f"{name} has shape {tuple(index.shape)}; allowed: one dim")
    _check_device(beside, **{name: index})


def _check_device(beside: torch.Tensor, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != beside.device:
            raise InputError(
                f"{name} is on {tensor.device}; allowed: that of the rest, {beside.device}"
            )


kernel_calls.register()
