"""Emulated clusters: namespaces as the text says, real traffic at its rates, true counters."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tamoe.topology.errors import InputError, RankError
from tamoe.topology.netns import interface_bytes
from tamoe.topology.network import address, hosts_text
from tamoe.topology.ranks import run_ranks, run_ranks_with_report
from tamoe.topology.spec import ClusterSpec
from tests.emulated import TRANSFER, path, payload, run, transfers_at
from tests.processes import kill_started, start

pytestmark = pytest.mark.emulated


@pytest.fixture(autouse=True)
def _no_program_outlives_its_test() -> Iterator[None]:
    yield
    kill_started()


# ---- functions for ranks -------------------------------------------------------------------


def seen_by(rank: int) -> dict[str, Any]:
    import torch.distributed as dist

    dist.barrier()
    settings = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return {
        "host": socket.gethostname(),
        "node": os.environ["GROUP_RANK"],
        "local": (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]),
        "interface": os.environ["GLOO_SOCKET_IFNAME"],
        "congestion": settings.read_text().strip(),
        "namespace": os.readlink("/proc/self/ns/net"),
        "name": socket.getnameinfo((f"::ffff:{address(0)}", 1), 0)[0],
        "address": socket.gethostbyname("node1"),
    }


def queues(rank: int) -> dict[str, tuple[str, bool]]:
    from pyroute2 import IPRoute

    found = {}
    with IPRoute() as ip:
        for link in ip.get_links():
            parts = ip.get_qdiscs(index=link["index"])
            kinds = [
                one.get_attr("TCA_KIND") for one in sorted(parts, key=lambda one: one["handle"])
            ]
            found[link.get_attr("IFLA_IFNAME")] = (
                " ".join(kinds),
                bool(link["flags"] & 1),
            )
    return found


def sends_more_to_higher_ranks(rank: int) -> tuple[int, dict[int, int]]:
    """Largest packet of the interface, and bytes that left by each of its queues, by number."""
    import torch
    import torch.distributed as dist
    from pyroute2 import IPRoute

    dist.barrier()
    if rank == 0:
        for peer in range(1, dist.get_world_size()):
            dist.send(torch.zeros(peer * 125_000), peer)
    else:
        dist.recv(torch.zeros(rank * 125_000), 0)
    dist.barrier()
    with IPRoute() as ip:
        (index,) = ip.link_lookup(ifname="eth0")
        (link,) = ip.get_links(index)
        queues = {one["handle"] & 0xFFFF: one for one in ip.get_classes(index=index)}
    sent = {number: one.get_attr("TCA_STATS")["bytes"] for number, one in queues.items()}
    return link.get_attr("IFLA_GSO_MAX_SIZE"), sent


def everybody_sends_to_rank_0(rank: int, num_floats: int) -> tuple[int, int]:
    import torch
    import torch.distributed as dist

    dist.barrier()
    before = interface_bytes()
    dist.barrier()
    value = torch.zeros(num_floats)
    if rank == 0:
        values = [torch.empty_like(value) for _ in range(1, dist.get_world_size())]
        for work in [dist.irecv(v, src) for src, v in enumerate(values, 1)]:
            work.wait()
    else:
        dist.send(value, 0)
    dist.barrier()
    received, sent = interface_bytes()
    return received - before[0], sent - before[1]


def hangs(rank: int) -> None:
    time.sleep(1000)


def fails(rank: int) -> None:
    if rank == 2:
        raise ValueError(socket.gethostname())


# ---- the network -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "pair", "bit_per_s"),
    [
        ("4x2:200mbit", (7, 0), 200e6),
        ("2x2:200mbit;node1=120mbit", (0, 3), 120e6),  # into the slow node
        ("[[2,2],[2]]:400mbit,100mbit", (0, 4), 100e6),  # the switch's uplink is the narrow one
        ("2x2:400mbit;intra=160mbit", (0, 1), 160e6),  # inside a node
        ("1x2;intra=160mbit", (1, 0), 160e6),
    ],
)
def test_transfer_runs_at_the_rate_of_the_text(
    spec: str, pair: tuple[int, int], bit_per_s: float, tmp_path: Path
) -> None:
    script = tmp_path / "transfer.py"
    script.write_text(TRANSFER)
    cluster = ClusterSpec.parse(spec)
    node = next(n for n, ranks in enumerate(cluster.nodes) if pair[1] in ranks)
    target = address(node if cluster.intra_bit_per_s is None else pair[1])
    command = ("env", f"TARGET={target}", sys.executable, str(script), *map(str, pair))
    assert transfers_at(payload(bit_per_s), lambda: run(spec, *command))


def test_ranks_see_their_node() -> None:
    seen = run_ranks("2x2:200mbit", seen_by)
    assert [s["host"] for s in seen] == ["node0", "node0", "node1", "node1"]
    assert [s["node"] for s in seen] == ["0", "0", "1", "1"]
    assert [s["local"] for s in seen] == [("0", "2"), ("1", "2")] * 2
    assert {s["interface"] for s in seen} == {"eth0"}
    assert {s["congestion"] for s in seen} == {"reno"}
    assert len({s["namespace"] for s in seen}) == 2  # one a node
    assert {(s["name"], s["address"]) for s in seen} == {("node0", address(1))}


def test_ranks_have_namespaces_of_their_own_with_an_intra_rate() -> None:
    seen = run_ranks("2x2:200mbit;intra=1gbit", seen_by)
    assert [s["host"] for s in seen] == ["node0", "node0", "node1", "node1"]
    assert len({s["namespace"] for s in seen}) == 4


def test_loopback_is_up_and_never_shaped() -> None:
    for found in run_ranks("2x1:100mbit", queues):
        assert found == {"lo": ("noqueue", True), "eth0": ("tbf htb", True)}
    for found in run_ranks("2x1", queues):
        assert found == {"lo": ("noqueue", True), "eth0": ("noqueue", True)}


@pytest.mark.parametrize("spec", ["3x1:100mbit", "1x3:100mbit;intra=200mbit"])
def test_each_host_has_a_queue_of_its_own(spec: str) -> None:
    (most_bytes, sent), *_ = run_ranks(spec, sends_more_to_higher_ranks)
    assert most_bytes == 32_000
    # Queues have the number of their host's address and one more; a host sends itself nothing.
    assert sent[2] < 1e5
    assert 0.5e6 < sent[3] < 0.7e6
    assert 1.0e6 < sent[4] < 1.2e6


NUMBERS = """
import sys
from tamoe.topology import network
from tamoe.topology.namespaces import enter_cluster_namespaces
from tamoe.topology.spec import ClusterSpec
enter_cluster_namespaces()
for link in network.Network(ClusterSpec.parse(sys.argv[1])).links:
    numbers = []
    for end in link:
        with network._inside(end.namespace) as ip:
            numbers.append(network._index(ip, end.interface))
    print(*numbers)
"""


@pytest.mark.parametrize("spec", ["3x1:1gbit", "2x2:1gbit;intra=1gbit", "[[2],[2]]:1gbit,1gbit"])
def test_both_ends_of_a_link_have_different_numbers(spec: str) -> None:
    # With equal ones the kernel reports a new link late, and the first packets take a second.
    process, _ = start("-c", NUMBERS, spec, env={"PYTHONPATH": path()})
    out, err = process.communicate(timeout=60)
    assert err == ""
    assert out
    for line in out.splitlines():
        below, above = line.split()
        assert below != above


@pytest.mark.parametrize("spec", ["4x2:200mbit", "3x2:100mbit;intra=400mbit", "6x1"])
def test_received_bytes_are_the_payload_and_no_packet_is_dropped(spec: str) -> None:
    cluster, size = ClusterSpec.parse(spec), 500_000
    done = run_ranks_with_report(spec, everybody_sends_to_rank_0, size)
    remote = cluster.num_ranks - len(cluster.nodes[0])
    received, _ = done.results[0]
    assert 1.0 < received / (4 * size * remote) < 1.02
    _, sent = done.results[-1]
    assert 1.0 < sent / (4 * size * len(cluster.nodes[-1])) < 1.02
    assert done.network is not None
    assert done.network.dropped_packets == 0
    assert done.network.congestion_control == "reno"
    reported = {(link.source, link.target) for link in done.network.links}
    if cluster.uplink_bit_per_s:
        assert {("nic0", "switch0"), ("switch0", "nic0")} <= reported
    assert (("rank0", "nic0") in reported) == (cluster.intra_bit_per_s is not None)


def timeouts_and_probes(rank: int, size: int) -> tuple[int, int]:
    """Those of this node while everybody sends to rank 0; -1 where they cannot be prevented."""
    import torch.distributed as dist

    if not os.access("/proc/sys/net/ipv4/tcp_rto_min_us", os.W_OK):
        return -1, -1
    dist.barrier()  # what it took to connect does not count
    before = tcp_counters()
    everybody_sends_to_rank_0(rank, size)
    after = tcp_counters()
    return tuple(after[name] - before[name] for name in ("TCPTimeouts", "TCPLossProbes"))


def tcp_counters() -> dict[str, int]:
    names, values, *_ = Path("/proc/self/net/netstat").read_text().splitlines()
    return dict(zip(names.split()[1:], map(int, values.split()[1:]), strict=True))


def test_no_timeout_and_no_probe_behind_a_queue_of_seconds() -> None:
    counted = run_ranks("4x2:5mbit", timeouts_and_probes, 40_000)
    if (-1, -1) in counted:
        pytest.skip("Linux before 6.11, or settings that are read-only")
    assert counted == [(0, 0)] * 8


# Two hosts send to a third over queues of a packet each; prints what was dropped on the way there.
SHORT_QUEUES = """
import socket, threading
from tamoe.topology import linux, network
from tamoe.topology.namespaces import enter_cluster_namespaces
from tamoe.topology.spec import ClusterSpec
enter_cluster_namespaces()
network.queue_bytes = lambda spec: 1448
built = network.Network(ClusterSpec.parse("3x1:5mbit"))
def send(node):
    linux.setns(built.nodes[node], linux.CLONE_NEWNET)
    with socket.create_connection((network.address(0), port)) as peer:
        peer.sendall(bytes(1_000_000))
before = linux.network_namespace()
linux.setns(built.nodes[0], linux.CLONE_NEWNET)
server = socket.create_server((network.address(0), 0))
port = server.getsockname()[1]
linux.setns(before, linux.CLONE_NEWNET)
threads = [threading.Thread(target=send, args=(node,)) for node in (1, 2)]
for thread in threads:
    thread.start()
for peer, _ in [server.accept(), server.accept()]:
    while peer.recv(1 << 20):
        pass
report = built.report()
(last,) = [link for link in report.links if link.target == "nic0"]
print(last.dropped_packets, report.dropped_packets)
"""


def test_packets_that_find_a_full_queue_are_counted() -> None:
    process, _ = start("-c", SHORT_QUEUES, env={"PYTHONPATH": path()})
    out, err = process.communicate(timeout=60)
    assert err == ""
    dropped, on_all_links = map(int, out.split())
    assert 0 < dropped <= on_all_links


def test_incast_of_many_long_flows_drops_nothing() -> None:
    # Seven flows into one link: with the kernel's own windows they fill 4 MB and drop.
    done = run_ranks_with_report("8x1:200mbit", everybody_sends_to_rank_0, 1_000_000)
    assert done.network is not None
    assert done.network.dropped_packets == 0


def test_ranks_of_one_node_talk_over_loopback() -> None:
    (received, sent), _ = run_ranks("1x2", everybody_sends_to_rank_0, 10)
    assert received == sent  # what lo sends, it receives


def test_interface_bytes_needs_an_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothere0")
    with pytest.raises(InputError, match="GLOO_SOCKET_IFNAME is 'nothere0'"):
        interface_bytes()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert len(interface_bytes()) == 2


def test_failures_in_ranks_name_them_on_clusters_too() -> None:
    with pytest.raises(RankError, match="rank 2 raised ValueError: node1"):
        run_ranks("2x2:1gbit", fails)
    with pytest.raises(RankError, match="ranks 0, 1 had not finished"):
        run_ranks("2x1:1gbit", hangs, timeout_s=0.5)


def test_eight_ranks_reach_their_first_barrier_soon(record_property: Any) -> None:
    script = """
import time; start = time.monotonic()
import torch.distributed as dist
from tamoe.topology.ranks import run_ranks
def barrier(rank): dist.barrier()
if __name__ == "__main__":
    run_ranks("4x2:200mbit", barrier); print(time.monotonic() - start)
"""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "first.py").write_text(script)
        process, _ = start(f"{folder}/first.py", env={"PYTHONPATH": path()})
        out, err = process.communicate(timeout=120)
    assert err == ""
    record_property("first_barrier_s", float(out))
    assert float(out) < 30  # 2.1 to 2.7 s on two idle cores; the bound is for busy machines


def test_hosts_file_names_every_address() -> None:
    for text in ("3x2:1mbit", "3x2:1mbit;intra=1mbit"):
        spec = ClusterSpec.parse(text)
        names = dict(line.split()[:2] for line in hosts_text(spec).splitlines())
        count = spec.num_nodes if spec.intra_bit_per_s is None else spec.num_ranks
        for index in range(count):
            assert names[address(index)] == names[f"::ffff:{address(index)}"]
    assert "::ffff:127.0.0.1 localhost" in hosts_text(None)
