"""The whole exchange on the project's kernels: the bits that plain PyTorch gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tamoe.exchange import Exchange
from tamoe.kernel_library import KernelLibrary
from tamoe.topology import run_ranks
from tests.op_cases import same_bits
from tests.shim_library import needs_gxx, on_shim, shim
from tests.test_hierarchical import DTYPES, routing, through, tree

pytestmark = [needs_gxx, pytest.mark.ranks]
EXPERTS = 8


def counted(library: KernelLibrary, calls: Counter[str]) -> KernelLibrary:
    """The library, every call of a kernel counted."""

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        return call

    functions = {name: counting(name, call) for name, call in library.functions.items()}
    return KernelLibrary(library.path, functions)


def on_both(rank: int, shape: str) -> tuple[list[str], dict[str, int]]:
    """Cases in which kernels and plain PyTorch differ; calls of kernels."""
    exchanges = {
        "flat, single": Exchange(tree(shape), kind="flat", schedule="single"),
        "flat, rounds": Exchange(tree(shape), kind="flat", schedule="rounds"),
        "flat, placed": Exchange(tree(shape), kind="flat", placement=[3, 0, 0, 1] * 2),
        "hierarchical": Exchange(tree(shape), kind="hierarchical", chunks=1),
        "hierarchical, parts": Exchange(tree(shape), kind="hierarchical", chunks=3),
    }
    differing, calls = [], Counter[str]()
    for seed in range(8):
        generator = torch.Generator().manual_seed(100 * seed + rank)
        dtype, tokens = DTYPES[seed % 4], 0 if seed == rank else 40
        x_TD, grad_TD = (torch.randn(tokens, 33, generator=generator).to(dtype) for _ in range(2))
        index_TK = routing(generator, tokens, EXPERTS, 3)
        weight_TK = torch.rand(tokens, 3, generator=generator).to((torch.float32, dtype)[seed // 4])
        given = (x_TD, index_TK, weight_TK if seed % 4 else None, EXPERTS, grad_TD)
        for name, exchange in exchanges.items():
            plain = through(exchange, *given)
            with on_shim(seed, counted(shim(), calls)):
                by_kernels = through(exchange, *given)
            if not all(map(same_bits, plain, by_kernels)):
                differing.append(f"{name}, {dtype}, seed {seed}")
    return differing, dict(calls)


@pytest.mark.parametrize("shape", ["2x2", "[[1,1],[1,[1]]]"])
def test_an_exchange_by_kernels_is_that_by_pytorch_to_the_bit(shape: str) -> None:
    shim()  # built once, not by every rank
    for differing, calls in run_ranks(4, on_both, shape, timeout_s=200):
        assert differing == []
        assert calls["build_index"] == 8 * 5  # one for all parts
        assert calls["combine"] and calls["copy_rows"]
