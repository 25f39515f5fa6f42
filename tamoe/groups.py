"""Process groups: one way to name the ranks of an expert-parallel group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from tamoe.topology.graph import Topology

    Group = ProcessGroup | DeviceMesh | None


def is_distributed() -> bool:
    """Whether torch.distributed has a default process group.

    >>> is_distributed()
    False
    """
    return dist.is_available() and dist.is_initialized()


def process_group(group: Group = None) -> ProcessGroup | None:
    """The process group behind ``group``.

    Parameters
    ----------
    group
        A ProcessGroup, a 1-D DeviceMesh, or None for the default group.

    Returns
    -------
    ProcessGroup or None
        None where torch.distributed is not initialised: one rank, number 0.

    Raises
    ------
    InputError
        A mesh has more than one axis, the argument is something else, or this process is not in
        the group.

    Examples
    --------
    >>> process_group() is None
    True
    """
    if group is None:
        return dist.group.WORLD if is_distributed() else None
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise InputError(
                f"group is a DeviceMesh of {group.ndim} axes {group.mesh_dim_names}; allowed: one "
                f"axis, for example mesh['ep']"
            )
        group = group.get_group()
    given: object = group
    if not isinstance(given, dist.ProcessGroup):
        # torch hands a non-member this placeholder instead of a group.
        if given == dist.GroupMember.NON_GROUP_MEMBER:
            raise InputError("group: this process is not a member; pass a group that contains it")
        raise InputError(
            f"group is {type(given).__name__}; allowed: ProcessGroup, 1-D DeviceMesh or None"
        )
    return given


def group_rank(group: Group = None) -> int:
    """This process's rank in the group; 0 where torch.distributed is not initialised.

    >>> group_rank()
    0
    """
    resolved = process_group(group)
    return 0 if resolved is None else dist.get_rank(resolved)


def group_size(group: Group = None) -> int:
    """Number of ranks of the group; 1 where torch.distributed is not initialised.

    >>> group_size()
    1
    """
    resolved = process_group(group)
    return 1 if resolved is None else dist.get_world_size(resolved)


def group_timeout_s(group: ProcessGroup) -> float:
    """Seconds that a group's transfers on the CPU may take; torch's default where it does not say.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> group_timeout_s(dist.group.WORLD)
    1800.0
    >>> dist.destroy_process_group()
    """
    backend = group._get_backend(torch.device("cpu"))
    timeout = getattr(getattr(backend, "options", None), "_timeout", None)
    return float((timeout or dist.constants.default_pg_timeout).total_seconds())


def backend_of(group: ProcessGroup, device: torch.device) -> str | None:
    """Name of the backend that moves a group's tensors of a device; None: none does.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> backend_of(dist.group.WORLD, torch.device("cpu"))
    'gloo'
    >>> dist.destroy_process_group()
    """
    try:
        name: str = group._get_backend(device).name()
    except RuntimeError:
        return None
    return name


def works_by_gloo(group: ProcessGroup, device: torch.device | None = None) -> bool:
    """Whether the group moves tensors of a device, None: the CPU's, with gloo."""
    return "gloo" in (backend_of(group, device or torch.device("cpu")) or "")


def tokens_by_gloo(group: ProcessGroup | None) -> bool:
    """Whether gloo moves a group's tokens, on the device where they most likely are.

    >>> tokens_by_gloo(None)
    False
    """
    return group is not None and works_by_gloo(group, token_device(group))


def token_device(group: ProcessGroup | None) -> torch.device:
    """Type of the device that a group's tokens are most likely on.

    The GPU where the group moves its tensors with a backend made for it, such as NCCL, or those of
    no other device; else the CPU.

    >>> token_device(None)
    device(type='cpu')
    """
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    if group is None:
        return cpu
    by_cpu = backend_of(group, cpu)
    if torch.cuda.is_available() and backend_of(group, gpu) not in (None, by_cpu):
        return gpu
    return gpu if by_cpu is None else cpu


def group_topology(topology_or_plan: Any, group: ProcessGroup | None) -> Topology | None:
    """Topology of the ranks of a group, numbered as there; None for None.

    Parameters
    ----------
    topology_or_plan
        Of the group's ranks, or a Plan for several groups, one of which, by its ranks in the job
        and their order, is this one.
    group
        As :func:`process_group` returns it.

    Raises
    ------
    InputError
        It has another number of ranks than the group, or the group is none of a Plan's several.

    Examples
    --------
    >>> group_topology(None, None) is None
    True
    """
    topology: Topology | None = getattr(topology_or_plan, "topology", topology_or_plan)
    if topology is not None and not hasattr(topology, "num_ranks"):
        raise InputError(
            f"topology_or_plan is {type(topology_or_plan).__name__}; allowed: Topology, Plan or "
            f"None. Files are read by Topology.load and Plan.load"
        )
    num_ranks = group_size(group)
    workload = getattr(topology_or_plan, "workload", None)
    groups = () if workload is None else workload.groups(topology_or_plan.topology.num_ranks)
    if topology is None or (topology.num_ranks == num_ranks and len(groups) <= 1):
        return topology
    members = (0,) if group is None else tuple(dist.get_process_group_ranks(group))
    if members in groups:
        return topology.subset(members)
    told = f"topology_or_plan has {topology.num_ranks} ranks and the group {num_ranks}"
    if len(groups) > 1:
        raise InputError(
            f"{told}, {members} of the job; allowed: one of the plan's ep_groups, in that order of "
            f"ranks: {', '.join(map(str, groups[:4]))}{', …' if len(groups) > 4 else ''}"
        )
    raise InputError(f"{told}; allowed: the group's ranks. Take topology.subset(ranks)")
