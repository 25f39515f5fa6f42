"""Checkpoints that do not depend on the number of ranks: experts are keyed by global number.

``torch.distributed.checkpoint`` holds the tensors: shared ones once, each expert under its number,
what differs by rank under its rank. Beside them ``tamoe.json`` says what the checkpoint is; it is
written last, so a directory without it is no checkpoint.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from tamoe.groups import group_rank, group_size, process_group
from tamoe.optimizer_keys import hyperparameters, optimizer_entries, prepare_optimizer
from tamoe.tensor_keys import NamedTensor, moe_layers, named_tensors
from tamoe.topology.documents import field, read_document, write_document
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.groups import Group

SCHEMA, VERSION = "tamoe.checkpoint", "1.0"
DOCUMENT = "tamoe.json"


def save_checkpoint(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    group: Group = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write model and optimizer to a directory that all ranks of the group can reach.

    Call it on all ranks. A checkpoint that is there already is replaced.

    Parameters
    ----------
    model
        May hold :class:`~tamoe.MoE` layers, parameters marked by scope, and modules with a
        ``tamoe_scope`` for their buffers, such as :class:`~tamoe.TopologyBias`.
    directory
        Made if missing.
    optimizer
        Over parameters of the model; its state is stored beside them.
    group
        The expert-parallel group: ProcessGroup, 1-D DeviceMesh or None for the default group.
    extra
        JSON values to get back from :func:`load_checkpoint`, for example the step. Rank 0's count.

    Raises
    ------
    InputError
        The directory cannot be written, ``extra`` is no JSON, or a tensor cannot be named.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save_checkpoint(nn.Linear(2, 2), directory, extra={"step": 7})
    ...     load_checkpoint(nn.Linear(2, 2), directory)
    {'step': 7}
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    rank, path = group_rank(group), Path(directory)
    tensors = named_tensors(model, rank)
    state = {f"model.{key}": part for t in tensors for key, part in t.parts(t.tensor.detach())}
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": VERSION,
        "num_ranks": group_size(group),
        "num_experts": {name: layer.num_experts for name, layer in moe_layers(model).items()},
        "optimizer": None,
        "extra": dict(extra or {}),
    }
    if optimizer is not None:
        entries, whole = optimizer_entries(optimizer, model, tensors)
        state.update(entries)
        groups = [hyperparameters(values) for values in optimizer.param_groups]
        document["optimizer"] = {"groups": groups, "whole_fields": whole}
    _together(lambda: _clear(path, document) if rank == 0 else None, group)
    _run_dcp(lambda pg: save(state, storage_writer=FileSystemWriter(path), process_group=pg), group)
    _together(lambda: write_document(path / DOCUMENT, document) if rank == 0 else None, group)


def load_checkpoint(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    group: Group = None,
) -> dict[str, Any]:
    """Read a checkpoint into model and optimizer, on the same or another number of ranks.

    Call it on all ranks. Experts may be placed on ranks otherwise than when they were saved: each
    is read by its number. On another number of ranks each takes the per-rank *parameters* of the
    first saved rank whose experts it now has, were they placed in rank order (a gate keeps its
    experts near), and per-rank *buffers* stay as they are, since they follow a plan for other
    ranks; a warning says so.

    Parameters
    ----------
    model
        Built as the saved one, with the same number of experts in all.
    directory
        From :func:`save_checkpoint`.
    optimizer
        With as many parameter groups as the saved one; its hyperparameters are read too. None
        leaves the stored state aside.
    group
        The expert-parallel group: ProcessGroup, 1-D DeviceMesh or None for the default group.

    Returns
    -------
    dict
        ``extra`` as given to :func:`save_checkpoint`.

    Raises
    ------
    InputError
        On all ranks, before anything is changed: the directory holds no complete checkpoint, the
        number of experts is another, or tensors are missing, left over or of another shape.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    path, state = Path(directory), dict[str, torch.Tensor]()
    adopt: list[Callable[[], None]] = []
    document: dict[str, Any] = {}

    def prepare() -> None:
        document.update(read_document(path / DOCUMENT, SCHEMA, VERSION))
        where = str(path / DOCUMENT)
        _check_experts(model, field(document, "num_experts", where), where)
        try:
            stored = FileSystemReader(path).read_metadata().state_dict_metadata
        except (OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"{path} holds no complete checkpoint: {error}") from None
        sizes = {key: meta for key, meta in stored.items() if hasattr(meta, "size")}
        saved_ranks = int(field(document, "num_ranks", where))
        tensors = _tensors_to_read(model, group_rank(group), group_size(group), saved_ranks)
        for tensor in tensors:
            parts = tensor.parts(tensor.tensor.detach())
            state.update((f"model.{key}", part) for key, part in parts)
        _check_tensors(state, sizes, path)
        if optimizer is not None:
            saved = document.get("optimizer")
            entries, then = prepare_optimizer(optimizer, model, tensors, saved, sizes, path)
            state.update(entries)
            adopt.append(then)

    _together(prepare, group)
    _run_dcp(lambda pg: load(state, storage_reader=FileSystemReader(path), process_group=pg), group)
    for step in adopt:
        step()
    extra: dict[str, Any] = document.get("extra", {})
    return extra


# ---- what to read ------------------------------------------------------------------------------


def _tensors_to_read(
    model: nn.Module, rank: int, num_ranks: int, saved_ranks: int
) -> list[NamedTensor]:
    source = rank if num_ranks == saved_ranks else rank * saved_ranks // num_ranks
    tensors = named_tensors(model, source)
    if num_ranks == saved_ranks or all(tensor.scope != "rank" for tensor in tensors):
        return tensors
    left = [t.name for t in tensors if t.scope == "rank" and not t.is_parameter]
    warnings.warn(
        f"the checkpoint is of {saved_ranks} ranks and this group has {num_ranks}: per-rank "
        f"parameters of rank {rank} come from rank {source}"
        + (f", and {', '.join(left)} stay as they are" if left else ""),
        stacklevel=5,
    )
    return [tensor for tensor in tensors if tensor.name not in left]


def _check_experts(model: nn.Module, saved: Mapping[str, int], where: str) -> None:
    layers = moe_layers(model)
    if set(layers) != set(saved):
        raise InputError(
            f"{where}: MoE layers {sorted(saved)} were saved and the model has {sorted(layers)}; "
            f"allowed: the same layers"
        )
    for name, layer in layers.items():
        if layer.num_experts != saved[name]:
            raise InputError(
                f"{where}: num_experts of layer {name!r} is {saved[name]} and the model has "
                f"{layer.num_experts}; allowed: the same number in all, on any number of ranks"
            )


def _check_tensors(state: Mapping[str, torch.Tensor], sizes: Mapping[str, Any], path: Path) -> None:
    missing = sorted(set(state) - set(sizes))
    shared = {key for key in sizes if key.startswith("model.") and "@rank" not in key}
    experts = {key for key in shared if ".experts." in key}
    unknown = sorted(shared - experts - set(state))
    if missing or unknown:
        raise InputError(
            f"{path} does not fit the model: "
            + "; ".join(
                f"{len(keys)} {what}, first {keys[0].removeprefix('model.')}"
                for what, keys in (("missing there", missing), ("unknown here", unknown))
                if keys
            )
        )
    for key, tensor in state.items():
        if tuple(sizes[key].size) != tuple(tensor.shape):
            raise InputError(
                f"{path}: {key.removeprefix('model.')} has shape {tuple(sizes[key].size)} and the "
                f"model has {tuple(tensor.shape)}; allowed: the same"
            )


# ---- together ----------------------------------------------------------------------------------


def _clear(path: Path, document: Mapping[str, Any]) -> None:
    """Make room: check what will be written, and take the mark of completeness away."""
    try:
        json.dumps(document, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"extra or the optimizer's settings: {error}; allowed: JSON") from None
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / DOCUMENT).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def _together(step: Callable[[], None], group: Group) -> None:
    """Run a step on each rank; if it fails on one, raise on all, so that none waits."""
    error: InputError | None = None
    try:
        step()
    except InputError as raised:
        error = raised
    resolved = process_group(group)
    if resolved is not None:
        messages: list[str | None] = [None] * dist.get_world_size(resolved)
        dist.all_gather_object(messages, None if error is None else str(error), group=resolved)
        failed = [(rank, text) for rank, text in enumerate(messages) if text is not None]
        if error is None and failed:
            error = InputError(f"rank {failed[0][0]}: {failed[0][1]}")
    if error is not None:
        raise error


def _run_dcp(call: Callable[[dist.ProcessGroup | None], object], group: Group) -> None:
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to.*")
        try:
            call(process_group(group))
        except (CheckpointException, OSError) as error:
            raise InputError(f"the checkpoint could not be read or written: {error}") from error
