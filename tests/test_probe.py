"""The probe in real processes: plain ranks, emulated clusters of known truth, ranks that die."""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tamoe.topology import (
    ClusterSpec,
    InputError,
    ProbeError,
    RankError,
    Topology,
    probe,
    run_ranks,
)
from tamoe.topology.formats import topology_to_document
from tamoe.topology.heartbeat import Watch

SMALL_TIMEOUT_S = 6.0


def probed(rank, partial_path=None, settings=None):
    told = []
    progress = (lambda *args: told.append(args)) if rank == 0 else None
    topology = probe(partial_path=partial_path, progress=progress, **(settings or {}))
    return topology, told


def without_samples(topology):
    document = topology_to_document(topology)
    document["provenance"].pop("samples", None)
    return json.loads(json.dumps(document))


# ---- one rank, plain ranks --------------------------------------------------------------------


def test_one_rank_without_a_job_has_its_own_copying_rate():
    topology = probe()
    assert topology.nodes == ((0,),)
    assert topology.copy_bytes_per_s > 1e8
    assert topology.provenance["status"] == "complete"
    assert topology.provenance["label"] == "measured"


@pytest.mark.parametrize("setting", ["budget_s", "timeout_s"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_times_must_be_positive(setting, value):
    with pytest.raises(InputError, match=setting):
        probe(**{setting: value})


@pytest.mark.ranks
def test_plain_ranks_agree_on_one_node_and_keep_their_samples(tmp_path):
    path = tmp_path / "partial.json"
    (first, told), *others = run_ranks(3, probed, path)
    assert first.nodes == ((0, 1, 2),)
    assert set(first.pairs) == set(itertools.permutations(range(3), 2))
    assert first.provenance["status"] == "complete"
    assert {phase for phase, *_ in told} == {"inside nodes"}
    assert len(first.provenance["samples"]) == 6
    for other, _ in others:
        assert without_samples(other) == without_samples(first)
        assert "samples" not in other.provenance
    assert without_samples(Topology.load(path)) == without_samples(first)


@pytest.mark.ranks
def test_provenance_is_complete_and_holds_no_secrets(monkeypatch):
    monkeypatch.setenv("NCCL_PROTO", "LL")
    monkeypatch.setenv("SOME_TOKEN", "secret")
    topology, _ = run_ranks(2, probed)[0]
    found = topology.provenance
    assert found["environment"]["NCCL_PROTO"] == "LL"
    assert "secret" not in json.dumps(dict(found))
    for key in (
        "versions", "backend", "interface", "congestion_control", "started", "ended", "hosts",
    ):  # fmt: skip
        assert found[key], key
    assert found["schedule"]["seed"] == 0
    assert found["schedule"]["repetitions"][0] % 2 == 1


def probe_a_part(rank):
    import torch.distributed as dist

    groups = [dist.new_group([1, 3]), dist.new_group([0, 2])]
    topology = probe(group=groups[0] if rank in (1, 3) else groups[1], redact_hosts=True)
    dist.barrier()  # the caller's groups still work
    return topology


@pytest.mark.ranks
def test_two_groups_are_probed_at_the_same_time_and_again():
    for topology in run_ranks(4, probe_a_part):
        assert topology.num_ranks == 2
        assert [host["name"] for host in topology.provenance["hosts"]] == [None]


def probe_twice(rank):
    return [probe(seed=seed).provenance["schedule"]["seed"] for seed in (1, 2)]


@pytest.mark.ranks
def test_a_job_can_be_probed_again():
    assert run_ranks(2, probe_twice) == [[1, 2], [1, 2]]


# ---- emulated clusters of known truth ---------------------------------------------------------


def assert_uplinks(topology, truth, tolerance=0.05):
    for node in range(truth.num_nodes):
        expected = truth.uplink_bytes_per_s(node)
        assert topology.uplink_bytes_per_s(node) == pytest.approx(expected, rel=tolerance), node


@pytest.mark.emulated
def test_two_nodes_of_one_rank():
    topology, _ = run_ranks("2x1:200mbit", probed)[0]
    truth = ClusterSpec.parse("2x1:200mbit").topology()
    assert topology.nodes == truth.nodes
    assert_uplinks(topology, truth)
    assert topology.provenance["label"] == "emulated"


@pytest.mark.emulated
@pytest.mark.slow
def test_one_slow_node_is_named_and_every_uplink_is_within_five_percent():
    begun = time.monotonic()
    topology, told = run_ranks("4x2:200mbit;node2=50mbit", probed)[0]
    assert time.monotonic() - begun <= 60
    truth = ClusterSpec.parse("4x2:200mbit;node2=50mbit").topology()
    assert topology.nodes == truth.nodes
    assert topology.provenance["partition"]["measured"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.provenance["partition"]["adjusted_rand_index"] == 1.0
    assert (topology.level_PP == truth.level_PP).all()
    assert_uplinks(topology, truth)
    bursts = [link.burst_bytes for link in topology.links if link.level == 1]
    assert statistics.median(bursts) == pytest.approx(131072, rel=0.25)
    assert {slow["node"] for slow in topology.provenance["slow_nodes"]} == {2}
    assert not topology.provenance["slow_links"]
    assert not topology.provenance["asymmetric_pairs"]
    assert topology.provenance["cpu_bound"]
    # Two flows of one node through its one uplink: each takes about twice as long as alone.
    shared = [w["slowdown"] for w in topology.provenance["contention"] if len(w["flows"]) == 2]
    assert statistics.median(shared) == pytest.approx(2.0, rel=0.1)
    assert {phase for phase, *_ in told} >= {"inside nodes", "between nodes", "contention"}


@pytest.mark.emulated
@pytest.mark.slow
def test_two_levels_of_switches_and_their_uplinks_are_found():
    begun = time.monotonic()
    topology, _ = run_ranks("[[2,2],[2]]:200mbit,50mbit", probed)[0]
    assert time.monotonic() - begun <= 60
    truth = ClusterSpec.parse("[[2,2],[2]]:200mbit,50mbit").topology()
    fast, slow = (rate / 8 * 1448 / 1514 for rate in (200e6, 50e6))
    assert topology.nodes == truth.nodes
    assert (topology.level_PP == truth.level_PP).all()
    assert topology.uplink_bytes_per_s(0) == pytest.approx((fast, fast), rel=0.05)
    assert topology.uplink_bytes_per_s(1) == pytest.approx((fast, fast), rel=0.05)
    assert topology.uplink_bytes_per_s(2) == pytest.approx((slow, slow), rel=0.05)
    switches = [link.bandwidth_bytes_per_s for link in topology.links if link.level == 2]
    assert switches == pytest.approx([slow, slow], rel=0.05)
    assert not topology.provenance["slow_nodes"]


@pytest.mark.emulated
@pytest.mark.slow
def test_switches_that_only_many_flows_notice_are_found():
    topology, _ = run_ranks("[[2,2],[2,2]]:100mbit,100mbit", probed)[0]
    truth = ClusterSpec.parse("[[2,2],[2,2]]:100mbit,100mbit").topology()
    assert (topology.level_PP == truth.level_PP).all()
    assert_uplinks(topology, truth)
    switches = [link.bandwidth_bytes_per_s for link in topology.links if link.level == 2]
    assert switches == pytest.approx([100e6 / 8 * 1448 / 1514] * 4, rel=0.05)


@pytest.mark.emulated
@pytest.mark.slow
def test_nodes_are_found_from_times_alone():
    topology, _ = run_ranks("3x2:100mbit", probed, None, {"use_hosts": False})[0]
    assert topology.nodes == ((0, 1), (2, 3), (4, 5))
    assert topology.provenance["partition"]["nodes_from"] == "times"
    assert_uplinks(topology, ClusterSpec.parse("3x2:100mbit").topology())


@pytest.mark.emulated
@pytest.mark.slow
def test_budget_cuts_the_measurement_short_and_says_so():
    topology, _ = run_ranks("4x2:20mbit", probed, None, {"budget_s": 6.0})[0]
    assert topology.nodes == ((0, 1), (2, 3), (4, 5), (6, 7))
    found = topology.provenance
    assert found["schedule"]["economy"] != "none"
    assert found["duration_s"] < 20
    assert (found["status"] == "partial") == bool(found["schedule"]["rounds_left_out"])


# ---- ranks that die ---------------------------------------------------------------------------


@pytest.mark.parametrize("alive", [(0,), (0, 1)])
def test_a_rank_that_fell_silent_while_nobody_looked_is_found(alive):
    from torch.distributed import HashStore

    store, end = HashStore(), threading.Event()
    keys = ["heart/0", "heart/1"]
    for key in keys:
        store.set(key, "0")
    watch = Watch(store, keys)
    watch.look()
    for key in keys:
        store.set(key, "1")  # counted on since, and one of them no further

    def count_on():
        number = 2
        while not end.wait(0.05):
            for rank in alive:
                store.set(keys[rank], str(number))
            number += 1

    thread = threading.Thread(target=count_on)
    thread.start()
    try:
        assert watch.wait_for_silence(1.0) == [rank for rank in (0, 1) if rank not in alive]
    finally:
        end.set()
        thread.join()


def probed_with_a_victim(rank, path, victim, sent):
    if rank == victim:
        threading.Thread(target=_end_when_measuring, args=(path, sent), daemon=True).start()
    return probe(partial_path=path, timeout_s=SMALL_TIMEOUT_S)


def _end_when_measuring(path, sent):
    """Send this process a signal as soon as the partial file has a measured pair."""
    while True:
        text = Path(path).read_text() if Path(path).exists() else ""
        if '"target_rank"' in text:
            os.kill(os.getpid(), sent)
            return
        threading.Event().wait(0.002)


@pytest.mark.ranks
@pytest.mark.slow
def test_stopped_rank_is_named_and_a_valid_partial_file_is_left(tmp_path):
    path = tmp_path / "partial.json"
    begun = time.monotonic()
    with pytest.raises(RankError, match="rank 2 died or stopped") as caught:
        run_ranks(4, probed_with_a_victim, path, 2, signal.SIGSTOP, timeout_s=120)
    assert isinstance(caught.value.__cause__, ProbeError)
    assert caught.value.__cause__.rank == 2
    assert time.monotonic() - begun < SMALL_TIMEOUT_S + 5 + 20  # 20 to start four ranks
    partial = Topology.load(path)
    assert partial.provenance["status"] == "timeout"
    assert "rank 2" in partial.provenance["reason"]
    assert partial.pairs


@pytest.mark.ranks
def test_killed_rank_under_the_launcher_leaves_a_valid_partial_file(tmp_path):
    path = tmp_path / "partial.json"
    with pytest.raises(RankError, match=r"rank 1 .*SIGKILL|rank 1 died"):
        run_ranks(3, probed_with_a_victim, path, 1, signal.SIGKILL, timeout_s=120)
    assert Topology.load(path).provenance["status"] in ("partial", "timeout")


PEER = """
import sys, time
import torch.distributed as dist
from tamoe.topology import ProbeError
sys.path.insert(0, {root!r})
from tests.test_probe import probed_with_a_victim
rank, port, path, victim, sent = (*map(int, sys.argv[1:3]), sys.argv[3], *map(int, sys.argv[4:]))
store = dist.TCPStore("127.0.0.1", port, is_master=False)
dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
try:
    probed_with_a_victim(rank, path, victim, sent)
except ProbeError as error:
    print("NAMED", error.rank, error, flush=True)
import os
os._exit(0)
"""


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "sent"), [(1, signal.SIGKILL), (2, signal.SIGSTOP), (0, signal.SIGKILL)]
)
def test_every_survivor_names_the_dead_rank(tmp_path, victim, sent):
    """Without a launcher that ends all ranks: each must find out by itself."""
    from torch.distributed import TCPStore

    # The store lives here, as it does in torchrun's agent, so rank 0 may die too.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    code, path = PEER.format(root=str(Path(__file__).parents[1])), tmp_path / "partial.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    peers = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, (r, store.port, path, victim, int(sent)))],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        for r in range(3)
    ]
    try:
        survivors = [peer for rank, peer in enumerate(peers) if rank != victim]
        outputs = [peer.communicate(timeout=90)[0] for peer in survivors]
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()
    assert all(f"NAMED {victim} " in text for text in outputs), outputs
    assert Topology.load(path).provenance["status"] == ("partial" if victim == 0 else "timeout")
