"""Random arguments of the operators, results worked out one by one, and bitwise comparison."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from tamoe import ops

WIDTHS = (0, 1, 3, 8, 31, 64, 130, 513, 1024)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal with the sign of zeros; any NaN equals any other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    if not torch.equal(torch.isnan(a), torch.isnan(b)):
        return False
    a, b = (torch.where(torch.isnan(x), 0.0, x) for x in (a, b))
    return torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, starting one element behind 16 bytes."""
    memory = torch.empty(tensor.numel() + 1 + 16, dtype=tensor.dtype)
    start = 1 + next(i for i in range(16) if memory[i:].data_ptr() % 16 == 0)
    moved = memory[start : start + tensor.numel()].view(tensor.shape)
    return moved.copy_(tensor)


@dataclass(frozen=True, eq=False)
class Sums:
    """Arguments of a combine."""

    row_nD: torch.Tensor
    offset_S1: torch.Tensor
    index_J: torch.Tensor
    weight_J: torch.Tensor | None
    grad_SD: torch.Tensor


def make_sums(
    seed: int, lengths: list[int], width: int, dtype: torch.dtype, weighted: bool, extra: int = 0
) -> Sums:
    generator = torch.Generator().manual_seed(seed)
    terms = sum(lengths)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        value = torch.randn(*size, generator=generator, dtype=torch.float64)
        value *= 10.0 ** torch.randint(-3, 4, size, generator=generator)
        keep = torch.rand(*size, generator=generator) < 0.95
        return torch.where(keep, value, -0.0).to(dtype)  # signed zeros tell how a sum starts

    return Sums(
        row_nD=normal(terms + extra, width),
        offset_S1=torch.tensor([0, *lengths]).cumsum(0),
        index_J=torch.randperm(terms + extra, generator=generator)[:terms],
        weight_J=normal(terms, dtype=wide) if weighted else None,
        grad_SD=normal(len(lengths), width),
    )


def sums() -> st.SearchStrategy[Sums]:
    return st.builds(
        make_sums,
        seed=st.integers(0, 2**32 - 1),
        lengths=st.lists(st.integers(0, 6), max_size=40),
        width=st.sampled_from(WIDTHS),
        dtype=st.sampled_from(ops.ROW_DTYPES),
        weighted=st.booleans(),
        extra=st.integers(0, 3),
    )


def sums_by_hand(case: Sums) -> torch.Tensor:
    """What combine gives, term by term."""
    wide = torch.float64 if case.row_nD.dtype == torch.float64 else torch.float32
    expected_SD = torch.zeros_like(case.grad_SD)
    for s, (begin, end) in enumerate(zip(case.offset_S1[:-1], case.offset_S1[1:], strict=True)):
        total = None
        for j in range(int(begin), int(end)):
            term = case.row_nD[case.index_J[j]].to(wide)
            if case.weight_J is not None:
                term = (term * case.weight_J[j]).to(case.row_nD.dtype).to(wide)
            total = term if total is None else total + term
        if total is not None:
            expected_SD[s] = total.to(case.row_nD.dtype)
    return expected_SD


def make_choices(
    seed: int, num_tokens: int, top_k: int, num_experts: int, how: str, dtype: torch.dtype
) -> torch.Tensor:
    """``[T, K]``: distinct experts of each token, any, all the same, all dropped; some dropped."""
    generator = torch.Generator().manual_seed(seed)
    if how == "distinct" and top_k <= num_experts:
        index = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    elif how == "one":
        index = torch.full((num_tokens, top_k), num_experts - 1)
    else:
        index = torch.randint(0, num_experts, (num_tokens, top_k), generator=generator)
    share = {"dropped": 1.0, "one": 0.0}.get(how, 0.1)
    drop = torch.rand(num_tokens, top_k, generator=generator) < share
    index = torch.where(drop, -1, index)
    if how == "refused" and index.numel():
        index[-1, -1], index[0, 0] = num_experts, -2
    return index.to(dtype)


def choices() -> st.SearchStrategy[tuple[torch.Tensor, int]]:
    """Experts of each choice, and their number."""
    kinds = ("distinct", "any", "one", "dropped", "refused")
    return st.integers(1, 70).flatmap(
        lambda experts: st.tuples(
            st.builds(
                make_choices,
                seed=st.integers(0, 2**32 - 1),
                num_tokens=st.one_of(st.integers(0, 40), st.sampled_from([700, 2048, 2100])),
                top_k=st.integers(1, 8),
                num_experts=st.just(experts),
                how=st.sampled_from(kinds),
                dtype=st.sampled_from([torch.int64, torch.int32, torch.int16]),
            ),
            st.just(experts),
        )
    )


def index_by_hand(
    index_TK: torch.Tensor, num_experts: int, group_of_expert: list[int] | None, num_groups: int
) -> list[list[int] | int]:
    """Every result of build_index, by sorting and counting Python integers."""
    flat = index_TK.flatten().tolist()
    top_k = index_TK.shape[1]
    kept = sorted((e, c) for c, e in enumerate(flat) if 0 <= e < num_experts)
    padding = [-1] * (len(flat) - len(kept))
    results: list[list[int] | int] = [
        [c for _, c in kept] + padding,
        [flat.count(e) for e in range(num_experts)],
        sum(e < -1 or e >= num_experts for e in flat),
    ]
    if group_of_expert is None:
        return [*results, [], [], []]
    touches = sorted({(group_of_expert[e], c // top_k) for e, c in kept})
    counts = [sum(g == group for g, _ in touches) for group in range(num_groups)]
    row = {touch: i - sum(counts[: touch[0]]) for i, touch in enumerate(touches)}
    size = len(index_TK) * min(top_k, num_groups)
    return [
        *results,
        [t for _, t in touches] + [-1] * (size - len(touches)),
        counts,
        [row[group_of_expert[e], c // top_k] for e, c in kept] + padding,
    ]
