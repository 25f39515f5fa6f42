"""What a rank knows about where it runs: host, processors, network interface, GPU.

These facts order the measurement and are compared with it; they never replace it. Nothing here
may fail: what cannot be read is None.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from tamoe.topology.hierarchy import Partition

# Settings that change what is measured. The rest of the environment is nobody's business.
_ENVIRONMENT = ("NCCL_", "GLOO_", "UCX_")
_ENVIRONMENT_NAMES = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "TAMOE_CLUSTER")


@dataclass(frozen=True)
class RankFacts:
    """Facts of one rank."""

    host: str  # hash of host name and boot: ranks of one node agree in it
    host_name: str | None
    machine: str  # hash of the boot: ranks that share processors agree in it
    cores: int  # that this process may use
    interface: str | None
    interface_bytes_per_s: float | None  # as its driver states it
    congestion_control: str | None
    gpu: dict[str, Any] | None
    environment: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return asdict(self)


def rank_facts(gpu_index: int | None = None, *, redact_hosts: bool = False) -> RankFacts:
    """Facts of this process.

    Parameters
    ----------
    gpu_index
        Index in torch of the rank's GPU, or None.
    redact_hosts
        Leave the host's name out; its hash stays.

    Examples
    --------
    >>> facts = rank_facts()
    >>> facts.cores >= 1, len(facts.host)
    (True, 12)
    """
    name = socket.gethostname()
    boot = _read("/proc/sys/kernel/random/boot_id") or name
    interface = _interface()
    return RankFacts(
        host=_hash(f"{name}\n{boot}"),
        host_name=None if redact_hosts else name,
        machine=_hash(boot),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        interface=interface,
        interface_bytes_per_s=_stated_speed(interface),
        congestion_control=_read("/proc/sys/net/ipv4/tcp_congestion_control"),
        gpu=None if gpu_index is None else _gpu(gpu_index),
        environment={k: v for k, v in sorted(os.environ.items()) if _is_of_interest(k)},
    )


def partition_by(keys: Sequence[str]) -> Partition:
    """Positions grouped by equal keys, in the order of their first appearance.

    >>> partition_by(["a", "a", "b", "a"])
    ((0, 1, 3), (2,))
    """
    groups: dict[str, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return tuple(tuple(group) for group in groups.values())


def software() -> dict[str, str]:
    """Versions of what takes part in a measurement."""
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for package in ("tamoe", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def common(values: Iterable[Any]) -> Any:
    """The value if all are equal, else the list of the different ones.

    >>> common(["reno", "reno"]), common(["reno", "bbr"])
    ('reno', ['bbr', 'reno'])
    """
    different = sorted(set(values), key=str)
    return different[0] if len(different) == 1 else different


def _is_of_interest(name: str) -> bool:
    return name.startswith(_ENVIRONMENT) or name in _ENVIRONMENT_NAMES


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _interface() -> str | None:
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if os.environ.get(name):
            return os.environ[name]
    for line in (_read("/proc/net/route") or "").splitlines()[1:]:
        fields = line.split()
        if len(fields) > 1 and fields[1] == "00000000":  # the default route
            return fields[0]
    return None


def _stated_speed(interface: str | None) -> float | None:
    text = None if interface is None else _read(f"/sys/class/net/{interface}/speed")
    try:
        megabit_per_s = float(text or "")
    except ValueError:
        return None
    return megabit_per_s * 1e6 / 8 if megabit_per_s > 0 else None


def _gpu(index: int) -> dict[str, Any] | None:
    """What the driver says of a GPU; torch and NVML number them differently, the bus id joins."""
    with contextlib.suppress(Exception):
        import pynvml
        import torch

        properties: Any = torch.cuda.get_device_properties(index)
        bus = f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}"
        bus += f":{properties.pci_device_id:02X}.0"
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus.encode())
        return {
            "name": properties.name,
            "pci_bus": bus,
            "uuid": _asked(lambda: pynvml.nvmlDeviceGetUUID(handle)),
            "driver": _asked(pynvml.nvmlSystemGetDriverVersion),
            "nvlinks": _nvlinks(pynvml, handle),
        }
    return None


def _nvlinks(pynvml: Any, handle: Any) -> int:
    up = 0
    # NVML_NVLINK_MAX_LINKS is no bound on what a device has: ask until it refuses.
    for link in range(64):
        state = _asked(partial(pynvml.nvmlDeviceGetNvLinkState, handle, link))
        if state is None:
            break
        up += int(state == 1)
    return up


def _asked(call: Callable[[], Any]) -> Any:
    try:
        value = call()
    except Exception:
        return None
    return value.decode() if isinstance(value, bytes) else value
