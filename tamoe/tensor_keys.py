"""Names of a model's tensors that do not depend on how many ranks hold them.

A tensor of an expert is named by the expert's global number, one that differs by rank by its rank,
any other by its name in ``state_dict``. A tensor that holds several experts has a name for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from tamoe.moe import MoE
from tamoe.scope import Scope, scope_of, state_scopes
from tamoe.topology.errors import InputError


@dataclass(frozen=True, eq=False)
class NamedTensor:
    """A tensor of the model and its keys: one, or one for each expert along its first dimension."""

    name: str  # in state_dict
    tensor: torch.Tensor
    keys: tuple[str, ...]
    scope: Scope
    is_parameter: bool
    is_stacked: bool  # the keys name the rows of the first dimension

    def parts(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The keys with their parts of a tensor of the same shape; views."""
        for index, key in enumerate(self.keys):
            yield key, tensor[index] if self.is_stacked else tensor


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The model's MoE layers by name.

    >>> moe_layers(nn.Linear(1, 1))
    {}
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def named_tensors(model: nn.Module, rank: int) -> list[NamedTensor]:
    """Every tensor of the model's ``state_dict`` with its keys on a rank.

    Examples
    --------
    >>> from tamoe.scope import mark_scope
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    >>> _ = mark_scope(model[1], "rank")
    >>> [tensor.keys for tensor in named_tensors(model, 3)]
    [('0.weight',), ('1.weight@rank3',)]
    """
    layers = moe_layers(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    scopes = state_scopes(model)
    found = []
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"model: {name} of its state_dict is {type(tensor).__name__}; allowed: tensors"
            )
        is_parameter = name in parameters
        scope = scope_of(parameters[name]) if is_parameter else scopes.get(name, "shared")
        layer = _layer_of(name, layers)
        if layer is not None:
            keys = _expert_keys(name, layer, layers[layer], tensor)
            is_stacked = layers[layer].is_grouped
            found.append(NamedTensor(name, tensor, keys, "expert", is_parameter, is_stacked))
            continue
        if scope == "expert":
            raise InputError(
                f"model: {name} has scope 'expert' and is not in the experts of a MoE layer, so "
                f"its global number is not known; allowed: experts inside tamoe.MoE"
            )
        key = f"{name}@rank{rank}" if scope == "rank" else name
        found.append(NamedTensor(name, tensor, (key,), scope, is_parameter, False))
    return found


def _layer_of(name: str, layers: dict[str, MoE]) -> str | None:
    """The innermost layer whose experts hold the tensor."""
    holding = [layer for layer in layers if name.startswith(_prefix(layer))]
    return max(holding, key=len, default=None)


def _prefix(layer: str) -> str:
    return f"{layer}.experts." if layer else "experts."


def _expert_keys(name: str, layer: str, moe: MoE, tensor: torch.Tensor) -> tuple[str, ...]:
    prefix = _prefix(layer)
    rest = name.removeprefix(prefix)
    if not moe.is_grouped:
        local, _, rest = rest.partition(".")
        return (f"{prefix}{moe.expert_numbers[int(local)]}.{rest}",)
    if tensor.ndim == 0 or len(tensor) != len(moe.expert_numbers):
        raise InputError(
            f"model: {name} has shape {tuple(tensor.shape)}; allowed: the "
            f"{len(moe.expert_numbers)} experts of the rank as first dimension, so that a "
            f"checkpoint can hold each under its global number"
        )
    return tuple(f"{prefix}{number}.{rest}" for number in moe.expert_numbers)
