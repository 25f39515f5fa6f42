"""The network of an emulated cluster: namespaces, bridges, veth pairs and token buckets.

Each node is a network namespace. All switches are bridges in one more, the fabric. A veth pair is
a link; ``tbf`` on both of its ends gives each direction its rate, and hosts take turns on it. With
``intra=RATE`` every rank has a namespace too, and its node's namespace is a bridge between the
ranks and the uplink::

    node 0                       fabric                        node 1
    eth0 tbf ─────────── tbf nic0 ─ switch0 ─ nic1 tbf ─────────── tbf eth0

Namespaces are only descriptors, without names, so they vanish with the processes that hold them.
"""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tamoe.topology import linux
from tamoe.topology.sharing import BUCKET, Side, share_fairly
from tamoe.topology.spec import BURST_BYTES, ClusterSpec

# A bucket's queue: a shorter one drops packets, which cost up to half the throughput. Where many
# connections meet in one link it is longer, so that it holds all their windows and drops nothing.
QUEUE_BYTES = 4 << 20
_LONGEST_QUEUE_BYTES = 1 << 30
# A connection's window covers this time at the cluster's highest rate: as long as a busy machine
# keeps a receiver waiting for a core. A smaller one lets the link run dry meanwhile.
_WINDOW_S = 0.05
_WINDOW_BYTES = (128 << 10, 4 << 20)  # least and most
_CONNECTIONS_PER_PAIR = 2  # two process groups at once
_RESEND_S = (0.2, 60.0)  # least, which is Linux's own, and most
INTERFACE = "eth0"  # of every node, and of every rank that has its own namespace
_FIRST_ADDRESS = ipaddress.IPv4Address("10.0.0.1")
_PREFIX_LENGTH = 16
_SETTINGS = Path("/proc/sys/net")  # of the reader's own namespace
# The kernel reports a new link up to a second late when both ends have the same index, each in its
# own namespace, since it then does not see that the two are one link.
_FIRST_INDEX = 1000


@dataclass(frozen=True)
class LinkReport:
    """What passed one direction of a shaped link."""

    source: str  # vertex of the cluster's topology
    target: str
    bytes: int  # on the wire: payload, headers, retransmissions
    dropped_packets: int


@dataclass(frozen=True)
class NetworkReport:
    """What an emulated network saw while a job ran on it."""

    links: tuple[LinkReport, ...]
    congestion_control: str
    setup_s: float

    @property
    def dropped_packets(self) -> int:
        """Packets that found a full queue; any at all spoils a measurement."""
        return sum(link.dropped_packets for link in self.links)


@dataclass(frozen=True)
class _End:
    """One end of a link: an interface and, between switches, the bridge that it is a port of."""

    namespace: int
    interface: str
    bridge: str | None
    address: str | None
    source: str  # this end sends from this vertex of the topology
    target: str
    bit_per_s: int | None


def window_bytes(spec: ClusterSpec) -> int:
    """Largest receive window of a connection on a cluster.

    >>> window_bytes(ClusterSpec.parse("4x2:200mbit"))
    1250000
    """
    least, most = _WINDOW_BYTES
    return min(max(int(max(_rates(spec), default=0) / 8 * _WINDOW_S), least), most)


def queue_bytes(spec: ClusterSpec) -> int:
    """Queue limit of each bucket on a cluster: room for every window that can meet in a link.

    >>> queue_bytes(ClusterSpec.parse("2x1:200mbit")) == QUEUE_BYTES
    True
    """
    wanted = _most_flows(spec) * window_bytes(spec)
    return min(max(wanted, QUEUE_BYTES), _LONGEST_QUEUE_BYTES)


def resend_s(spec: ClusterSpec) -> float:
    """Seconds without an answer after which TCP sends again, beside what answers usually take.

    As long as a full queue takes to empty: links drop nothing, so whatever is sent again before is
    sent in vain. With Linux's own 200 ms, senders took packets for lost that a slow link held back,
    and reduced what they have under way: an all-to-all took 519 ms in one run and 572 in the next
    (one node at 25 Mbit/s, the others at 100).

    >>> resend_s(ClusterSpec.parse("2x1:200mbit")), resend_s(ClusterSpec.parse("4x2:100mbit"))
    (0.2, 1.2)
    """
    least, most = _RESEND_S
    slowest_bit_per_s = min(_rates(spec), default=None)
    if slowest_bit_per_s is None:
        return least
    return min(max(queue_bytes(spec) * 8 / slowest_bit_per_s, least), most)


def _rates(spec: ClusterSpec) -> list[int]:
    intra = [] if spec.intra_bit_per_s is None else [spec.intra_bit_per_s]
    return [*spec.uplink_bit_per_s, *dict(spec.node_bit_per_s).values(), *intra]


def _most_flows(spec: ClusterSpec) -> int:
    """Connections that can meet in one direction of one link."""
    below = [len(vertex.ranks) for vertex in spec.vertices if vertex.parent is not None]
    most = max((ranks * (spec.num_ranks - ranks) for ranks in below), default=0)
    return _CONNECTIONS_PER_PAIR * max(most, spec.num_ranks - 1, 1)


def address(index: int) -> str:
    """Address of a node, or of a rank where ranks have their own, by its number."""
    return str(_FIRST_ADDRESS + index)


def hosts_text(spec: ClusterSpec | None) -> str:
    """Lines of /etc/hosts that give every address of a cluster a name.

    Without a cluster: this machine's own lines, and a name for its loopback.
    """
    if spec is None:
        own = Path("/etc/hosts")
        lines = own.read_text(errors="replace").splitlines() if own.exists() else []
        return "\n".join([*lines, "::ffff:127.0.0.1 localhost"]) + "\n"
    if spec.intra_bit_per_s is None:
        names = [f"node{node}" for node in range(spec.num_nodes)]
    else:
        first = {ranks[0]: f"node{node} " for node, ranks in enumerate(spec.nodes)}
        names = [f"{first.get(rank, '')}rank{rank}" for rank in range(spec.num_ranks)]
    named = [("127.0.0.1", "localhost"), *((address(i), name) for i, name in enumerate(names))]
    # torch's store listens on IPv6 and looks its IPv4 peers up in that form.
    lines = [f"{prefix}{own} {name}" for own, name in named for prefix in ("", "::ffff:")]
    return "\n".join(["::1 localhost", *lines]) + "\n"


class Network:
    """Builds a cluster's network in the namespace of the process, which becomes its fabric."""

    def __init__(self, spec: ClusterSpec) -> None:
        started = time.perf_counter()
        self.spec = spec
        self.fabric = linux.network_namespace()
        _set_up_namespace(spec)
        self.nodes = [_new_namespace(spec) for _ in spec.nodes]
        own = spec.intra_bit_per_s is not None
        self.ranks = [_new_namespace(spec) for _ in range(spec.num_ranks if own else 0)]
        self.links = [*self._uplinks(), *(self._rank_links() if own else ())]
        for namespace, bridge in self._bridges():
            with _inside(namespace) as ip:
                _add_bridge(ip, bridge)
        for number, (below, above) in enumerate(self.links):
            with _inside(above.namespace) as ip:
                peer = {"ifname": below.interface, "net_ns_fd": below.namespace}
                index = _FIRST_INDEX + number
                ip.link("add", kind="veth", ifname=above.interface, peer=peer, index=index)
        ends = [end for link in self.links for end in link]
        limit = queue_bytes(spec)
        hosts = [address(index) for index in range(len(self.ranks) or len(self.nodes))]
        for namespace in (*self.ranks, *self.nodes, self.fabric):
            with _inside(namespace) as ip:
                for end in ends:
                    if end.namespace == namespace:
                        _set_up_end(ip, end, limit, hosts)
        congestion_control = _SETTINGS / "ipv4" / "tcp_congestion_control"
        self.congestion_control = congestion_control.read_text().strip()
        self.setup_s = time.perf_counter() - started

    def descriptors(self) -> list[int]:
        """Namespaces of the nodes, then those of the ranks that have their own."""
        return [*self.nodes, *self.ranks]

    def report(self) -> NetworkReport:
        """Read the counters of every shaped end."""
        found = []
        for end in (end for link in self.links for end in link):
            if end.bit_per_s is None:
                continue
            with _inside(end.namespace) as ip:
                qdiscs = ip.get_qdiscs(index=_index(ip, end.interface))
                qdisc = next(one for one in qdiscs if one["handle"] == BUCKET)
                stats = qdisc.get_attr("TCA_STATS")
            found.append(LinkReport(end.source, end.target, stats["bytes"], stats["drop"]))
        return NetworkReport(tuple(found), self.congestion_control, self.setup_s)

    def _bridges(self) -> list[tuple[int, str]]:
        switches = [v.name for v in self.spec.vertices if v.node is None]
        inside = [(self.nodes[node], f"nic{node}") for node in range(len(self.nodes)) if self.ranks]
        return [*((self.fabric, name) for name in switches), *inside]

    def _uplinks(self) -> list[tuple[_End, _End]]:
        links = []
        for vertex in self.spec.vertices:
            name, parent, node = vertex.name, vertex.parent, vertex.node
            if parent is None:
                continue
            rate = self.spec.uplink_of(vertex)
            above = _End(self.fabric, f"{name}.down", parent, None, parent, name, rate)
            if node is None:
                below = _End(self.fabric, f"{name}.up", name, None, name, parent, rate)
            elif self.ranks:
                below = _End(self.nodes[node], INTERFACE, name, None, name, parent, rate)
            else:
                own = address(node)
                below = _End(self.nodes[node], INTERFACE, None, own, name, parent, rate)
            links.append((below, above))
        return links

    def _rank_links(self) -> list[tuple[_End, _End]]:
        links = []
        rate = self.spec.intra_bit_per_s
        for node, ranks in enumerate(self.spec.nodes):
            for rank in ranks:
                name, nic, own = f"rank{rank}", f"nic{node}", address(rank)
                below = _End(self.ranks[rank], INTERFACE, None, own, name, nic, rate)
                above = _End(self.nodes[node], name, nic, None, nic, name, rate)
                links.append((below, above))
        return links


# ---- inside a namespace ---------------------------------------------------------------------


@contextmanager
def _inside(namespace: int) -> Iterator[Any]:
    """A pyroute2 socket in a namespace, to which this thread moves for the time."""
    from pyroute2 import IPRoute

    before = linux.network_namespace()
    try:
        linux.setns(namespace, linux.CLONE_NEWNET)
        with IPRoute() as ip:
            yield ip
    finally:
        linux.setns(before, linux.CLONE_NEWNET)
        os.close(before)


def _new_namespace(spec: ClusterSpec) -> int:
    before = linux.network_namespace()
    try:
        namespace = linux.new_network_namespace()
        _set_up_namespace(spec)
        return namespace
    finally:
        linux.setns(before, linux.CLONE_NEWNET)
        os.close(before)


def _set_up_namespace(spec: ClusterSpec) -> None:
    """Bring loopback up, and TCP that suits the links; no IPv6, which would only disturb them."""
    from pyroute2 import IPRoute

    _try_setting("ipv6/conf/all/disable_ipv6", "1")
    _try_setting("ipv6/conf/default/disable_ipv6", "1")
    # Hosts differ in their default, and bbr sends again behind a bucket.
    _try_setting("ipv4/tcp_congestion_control", "reno")
    _try_setting("ipv4/tcp_rmem", f"4096 {_WINDOW_BYTES[0]} {window_bytes(spec)}")
    # Else what a connection carries in its first round trips hangs on how long it had rested.
    _try_setting("ipv4/tcp_slow_start_after_idle", "0")
    # Kernels before 6.11 keep their 200 ms. A timeout there is worse than the probe before it.
    if _try_setting("ipv4/tcp_rto_min_us", str(round(resend_s(spec) * 1e6))):
        _try_setting("ipv4/tcp_early_retrans", "0")  # no probes
    with IPRoute() as ip:
        ip.link("set", index=1, state="up")


def _try_setting(name: str, value: str) -> bool:
    """Whether the kernel has it and takes the value; it is read-only in some containers."""
    try:
        (_SETTINGS / name).write_text(value)
    except OSError:
        return False
    return True


def _add_bridge(ip: Any, name: str) -> None:
    ip.link("add", kind="bridge", ifname=name, br_stp_state=0, br_mcast_snooping=0)
    ip.link("set", index=_index(ip, name), state="up")


def _set_up_end(ip: Any, end: _End, limit: int, hosts: list[str]) -> None:
    index = _index(ip, end.interface)
    if end.bridge is not None:
        ip.link("set", index=index, master=_index(ip, end.bridge))
    if end.bit_per_s is not None:
        rate = end.bit_per_s // 8
        bucket = {"rate": rate, "burst": BURST_BYTES, "limit": limit}
        ip.tc("add", "tbf", index=index, handle=BUCKET, **bucket)
        side: Side = "source" if end.address is None else "target"
        share_fairly(ip, index, side, hosts, limit)
    if end.address is not None:
        ip.addr("add", index=index, address=end.address, prefixlen=_PREFIX_LENGTH)
    ip.link("set", index=index, state="up")


def _index(ip: Any, interface: str) -> int:
    return ip.link_lookup(ifname=interface)[0]
