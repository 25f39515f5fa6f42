"""What each kernel does, in plain PyTorch: the CPU's path, the fallback, and the tests' reference.

No loop runs over tokens or rows. On a GPU some of these wait for the device; the kernels never do.
Shape suffixes: T tokens, K choices, N experts or rows, G groups, D hidden size, M rows of an
output, m rows copied, S sums, J terms of all sums.
"""

from __future__ import annotations

import torch

from tamoe.summation import accumulation_dtype


def build_index(
    expert_index_TK: torch.Tensor,
    num_experts: int,
    group_of_expert_N: torch.Tensor | None,
    num_groups: int,
) -> tuple[torch.Tensor, ...]:
    """Stable order of choices by expert, counts, and the tokens that touch each group."""
    num_tokens, top_k = expert_index_TK.shape
    index_TK = expert_index_TK.to(torch.int64)
    kept_TK = (index_TK >= 0) & (index_TK < num_experts)
    refused = (~kept_TK & (index_TK != -1)).sum()
    key = torch.where(kept_TK, index_TK, num_experts).flatten()
    count_N = _counts(key, num_experts)
    order = torch.argsort(key, stable=True)
    sorted_key = key[order]
    choice = torch.where(sorted_key < num_experts, order, -1)
    if group_of_expert_N is None:
        return choice, count_N, refused, *(key.new_empty(0) for _ in range(3))
    # One more group holds what was dropped, and is cut off at the end.
    group_N1 = torch.cat([group_of_expert_N.to(torch.int64), key.new_tensor([num_groups])])
    token = torch.arange(num_tokens, device=key.device).repeat_interleave(top_k)
    touched_GT = torch.zeros(num_groups + 1, num_tokens, dtype=torch.bool, device=key.device)
    touched_GT[group_N1[key], token] = True
    touched_GT = touched_GT[:num_groups]
    touch_count_G = touched_GT.sum(1)
    row_GT = touched_GT.cumsum(1) - 1
    found = touched_GT.nonzero()[:, 1]
    touch_token = key.new_full((num_tokens * min(top_k, num_groups),), -1)
    touch_token[: len(found)] = found
    row = row_GT[group_N1[sorted_key].clamp_max(num_groups - 1), token[order]]
    touch_row = torch.where(sorted_key < num_experts, row, -1)
    return choice, count_N, refused, touch_token, touch_count_G, touch_row


def _counts(key: torch.Tensor, num_experts: int) -> torch.Tensor:
    count = torch.zeros(num_experts + 1, dtype=torch.int64, device=key.device)
    return count.scatter_add_(0, key, torch.ones_like(key))[:num_experts]


def copy_rows_(
    out_MD: torch.Tensor,
    row_nD: torch.Tensor,
    source_m: torch.Tensor | None,
    target_m: torch.Tensor | None,
) -> None:
    """``out[target[m]] = row[source[m]]``; zeros for a negative source, nothing for a target."""
    if target_m is not None and bool((target_m < 0).any()):
        stored = (target_m >= 0).nonzero().flatten()
        source_m = stored if source_m is None else source_m[stored]
        target_m = target_m[stored]
    if source_m is not None and bool((source_m < 0).any()):
        copied = source_m >= 0
        place_m = (
            torch.arange(len(source_m), device=out_MD.device) if target_m is None else target_m
        )
        out_MD.index_fill_(0, place_m[~copied], 0)
        source_m, target_m = source_m[copied], place_m[copied]
    if target_m is None:
        if source_m is None:
            out_MD[: len(row_nD)].copy_(row_nD)
        else:
            torch.index_select(row_nD, 0, source_m, out=out_MD[: len(source_m)])
        return
    out_MD.index_copy_(0, target_m, row_nD if source_m is None else row_nD[source_m])


def combine(
    row_nD: torch.Tensor,
    offset_S1: torch.Tensor,
    index_J: torch.Tensor,
    weight_J: torch.Tensor | None,
) -> torch.Tensor:
    """Sums of rows times weights, term by term in the given order; weights in the wide dtype."""
    wide = accumulation_dtype(row_nD.dtype)
    num_sums = len(offset_S1) - 1
    first_S, length_S = offset_S1[:-1], offset_S1.diff()
    out_SD = torch.zeros(num_sums, row_nD.shape[1], dtype=row_nD.dtype, device=row_nD.device)
    sum_SD: torch.Tensor | None = None
    for position in range(int(length_S.max()) if num_sums else 0):
        sum_m = (length_S > position).nonzero().flatten()
        j_m = first_S[sum_m] + position
        term_mD = row_nD.index_select(0, index_J[j_m])
        if weight_J is not None:
            term_mD = (term_mD.to(wide) * weight_J[j_m].unsqueeze(1)).to(row_nD.dtype)
        if sum_SD is None:
            sum_SD = torch.zeros(num_sums, row_nD.shape[1], dtype=wide, device=row_nD.device)
            sum_SD.index_copy_(0, sum_m, term_mD.to(wide))
        else:
            sum_SD.index_add_(0, sum_m, term_mD.to(wide))  # sums are distinct: exact anywhere
    return out_SD if sum_SD is None else sum_SD.to(row_nD.dtype)


def combine_backward(
    grad_SD: torch.Tensor,
    row_nD: torch.Tensor,
    offset_S1: torch.Tensor,
    index_J: torch.Tensor,
    weight_J: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the rows, 0 for those in no sum, and of the weights (empty without)."""
    wide = accumulation_dtype(grad_SD.dtype)
    first, end = (int(offset) for offset in offset_S1[[0, -1]])
    sum_j = torch.arange(len(offset_S1) - 1, device=grad_SD.device).repeat_interleave(
        offset_S1.diff(), output_size=end - first
    )
    index_j = index_J[first:end]
    grad_row_nD = torch.zeros_like(row_nD)
    grad_jD = grad_SD.index_select(0, sum_j)
    if weight_J is None:
        return grad_row_nD.index_copy_(0, index_j, grad_jD), grad_SD.new_empty(0, dtype=wide)
    grad_jD = grad_jD.to(wide)
    grad_weight_J = torch.zeros_like(weight_J)
    grad_weight_J[first:end] = (grad_jD * row_nD.index_select(0, index_j).to(wide)).sum(1)
    grad_jD.mul_(weight_J[first:end].unsqueeze(1))
    return grad_row_nD.index_copy_(0, index_j, grad_jD.to(row_nD.dtype)), grad_weight_J
