"""Scope of a parameter: on which ranks it is the same.

``"shared"``: the same on every rank, gradients are averaged over all of them. ``"rank"``: each
rank has its own values, as a per-rank gate does; never averaged. ``"expert"``: one expert's
values, on the rank that hosts it; never averaged over the ranks of its expert-parallel group.
A checkpoint keys ``"rank"`` parameters by rank and ``"expert"`` parameters by expert number.
Buffers have the scope of the module that owns them: its attribute ``tamoe_scope``.
"""

from __future__ import annotations

from typing import Literal, TypeVar

from torch import nn

from tamoe.topology.errors import InputError

Scope = Literal["shared", "rank", "expert"]
SCOPES: tuple[Scope, ...] = ("shared", "rank", "expert")
_ATTRIBUTE = "tamoe_scope"
_Module = TypeVar("_Module", bound=nn.Module)


def mark_scope(module: _Module, scope: Scope) -> _Module:
    """Mark every parameter of a module, so that gradient averaging and checkpoints treat it right.

    The mark is an attribute ``tamoe_scope`` of the parameter and of the module that owns it. torch
    drops the parameter's in ``copy.deepcopy`` and when a model leaves the ``meta`` device;
    :func:`restore_scopes` brings it back from the module's.

    Parameters
    ----------
    module
        Its parameters are marked, those of its children too. Children whose class has a
        ``tamoe_scope`` of its own keep that for their buffers.
    scope
        ``"shared"``, ``"rank"`` or ``"expert"``.

    Returns
    -------
    torch.nn.Module
        The same module.

    Raises
    ------
    InputError
        The scope is none of the three.

    Examples
    --------
    >>> from torch import nn
    >>> scope_of(mark_scope(nn.Linear(2, 2), "rank").weight)
    'rank'
    """
    if scope not in SCOPES:
        raise InputError(f"scope is {scope!r}; allowed: {', '.join(map(repr, SCOPES))}")
    for owner in module.modules():
        if not hasattr(type(owner), _ATTRIBUTE):
            setattr(owner, _ATTRIBUTE, scope)
    for parameter in module.parameters():
        setattr(parameter, _ATTRIBUTE, scope)
    return module


def restore_scopes(module: _Module) -> _Module:
    """Mark parameters that lost their mark as the module that owns them is marked.

    Examples
    --------
    >>> import copy
    >>> from torch import nn
    >>> twin = copy.deepcopy(mark_scope(nn.Linear(2, 2), "rank"))
    >>> scope_of(twin.weight), scope_of(restore_scopes(twin).weight)
    ('shared', 'rank')
    """
    for owner in module.modules():
        scope = getattr(owner, _ATTRIBUTE, None)
        if scope is None:
            continue
        for parameter in owner.parameters(recurse=False):
            if not hasattr(parameter, _ATTRIBUTE):
                setattr(parameter, _ATTRIBUTE, scope)
    return module


def scope_of(parameter: nn.Parameter) -> Scope:
    """The scope of a parameter; ``"shared"`` where nothing was marked.

    >>> from torch import nn
    >>> scope_of(nn.Linear(2, 2).weight)
    'shared'
    """
    scope: Scope = getattr(parameter, _ATTRIBUTE, "shared")
    return scope


def state_scopes(module: nn.Module) -> dict[str, Scope]:
    """The scope of every parameter and persistent buffer, by its name in ``state_dict``.

    Lost marks of parameters are restored.

    Examples
    --------
    >>> from torch import nn
    >>> state_scopes(nn.Sequential(nn.Linear(2, 2, bias=False)))
    {'0.weight': 'shared'}
    """
    restore_scopes(module)
    scopes: dict[str, Scope] = {}
    for prefix, owner in module.named_modules():
        start = f"{prefix}." if prefix else ""
        for name, parameter in owner.named_parameters(recurse=False):
            scopes[start + name] = scope_of(parameter)
        for name, _ in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                scopes[start + name] = getattr(owner, _ATTRIBUTE, "shared")
    return scopes
