"""An optimizer's state under the same keys as the parameters that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tamoe.tensor_keys import NamedTensor
from tamoe.topology.errors import InputError


def _by_parameter(model: nn.Module, tensors: list[NamedTensor]) -> dict[int, NamedTensor]:
    named = {tensor.name: tensor for tensor in tensors}
    return {id(parameter): named[name] for name, parameter in model.named_parameters()}


def optimizer_entries(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: list[NamedTensor]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state under the parameters' keys, and the fields that are one value for all experts."""
    by_parameter = _by_parameter(model, tensors)
    entries: dict[str, torch.Tensor] = {}
    whole: set[str] = set()
    for parameter, fields in optimizer.state.items():
        named = by_parameter.get(id(parameter))
        if named is None:
            raise InputError("optimizer has a parameter that is not one of the model's")
        for name, value in fields.items():
            if value is None:
                continue
            tensor = torch.as_tensor(value).detach()
            if tensor.shape == parameter.shape:
                parts = dict(named.parts(tensor))
            else:
                parts = dict.fromkeys(named.keys, tensor)
                whole.add(name)
            entries |= {f"optimizer.{key}.{name}": part for key, part in parts.items()}
    return entries, sorted(whole)


def prepare_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: list[NamedTensor],
    saved: Mapping[str, Any] | None,
    sizes: Mapping[str, Any],
    path: Path,
) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
    """Tensors to read into, and what to do with them afterwards; ``saved`` is the document's.

    Raises
    ------
    InputError
        Nothing was saved, or another number of parameter groups.
    """
    if saved is None:
        raise InputError(f"{path} was saved without an optimizer; allowed: optimizer=None")
    if len(saved["groups"]) != len(optimizer.param_groups):
        raise InputError(
            f"{path}: {len(saved['groups'])} parameter groups were saved and optimizer has "
            f"{len(optimizer.param_groups)}; allowed: the same number"
        )
    fields_of: dict[str, list[str]] = {}
    for key in sizes:
        if key.startswith("optimizer."):
            owner, _, name = key.removeprefix("optimizer.").rpartition(".")
            fields_of.setdefault(owner, []).append(name)
    by_parameter = _by_parameter(model, tensors)
    entries: dict[str, torch.Tensor] = {}
    fresh: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    for parameter in (p for values in optimizer.param_groups for p in values["params"]):
        named = by_parameter[id(parameter)]
        fresh[parameter] = {}
        for name in fields_of.get(named.keys[0], ()) if named.keys else ():  # none: no experts
            meta = sizes[f"optimizer.{named.keys[0]}.{name}"]
            if name in saved["whole_fields"]:
                tensor = torch.empty(meta.size, dtype=meta.properties.dtype)
                parts = {named.keys[0]: tensor}
            else:
                tensor = torch.empty_like(parameter, dtype=meta.properties.dtype)
                parts = dict(named.parts(tensor.detach()))
            fresh[parameter][name] = tensor.detach()
            entries |= {f"optimizer.{key}.{name}": part for key, part in parts.items()}

    def adopt() -> None:
        for parameter, values in fresh.items():
            optimizer.state[parameter] = values
        for settings, stored in zip(optimizer.param_groups, saved["groups"], strict=True):
            for name, value in stored.items():
                if isinstance(settings.get(name), torch.Tensor):
                    settings[name].fill_(value)
                else:
                    settings[name] = tuple(value) if isinstance(value, list) else value

    return entries, adopt


def hyperparameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group that JSON can hold.

    >>> hyperparameters({"params": [], "lr": 0.1, "betas": (0.9, 0.99), "hook": print})
    {'lr': 0.1, 'betas': (0.9, 0.99)}
    """
    plain = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    del plain["params"]
    return {k: v for k, v in plain.items() if isinstance(v, int | float | str | tuple | None)}
