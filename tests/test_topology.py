"""Trees, routes, views, files: the Topology against routes written out by hand."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tamoe.topology import InputError, Link, Topology
from tamoe.topology.build import as_pairwise
from tamoe.topology.formats import topology_to_document
from tamoe.topology.tree import num_ranks, parse_tree, tree_depth, tree_vertices

INTRA, UPLINK, SWITCH = 2e9, 48e6, 12e6
PAIR = {"source_rank": 0, "target_rank": 1, "alpha_s": 1e-5, "beta_s_per_byte": 1e-9}
TREES = st.recursive(st.integers(1, 3), lambda inner: st.lists(inner, min_size=1, max_size=3))


def small_tree(**kwargs: Any) -> Topology:
    bandwidths = (INTRA, UPLINK, SWITCH)
    return Topology.from_tree("[[2,2],[2]]", bandwidth_bytes_per_s=bandwidths, **kwargs)


def names(topology: Topology, i: int, j: int) -> list[str]:
    return [topology.links[index].target for index in topology.route(i, j)]


def test_routes_of_a_tree_go_up_to_the_common_switch_and_down() -> None:
    topology = small_tree(latency_s=(1e-6, 1e-5, 1e-4))
    assert names(topology, 0, 1) == ["nic0", "rank1"]
    assert names(topology, 0, 3) == ["nic0", "switch1", "nic1", "rank3"]
    assert names(topology, 3, 4) == ["nic1", "switch1", "switch0", "switch2", "nic2", "rank4"]
    assert names(topology, 5, 5) == ["nic2", "rank5"]
    # Two device links, two node uplinks, two switch uplinks.
    assert topology.alpha_s[0, 4] == pytest.approx(2e-6 + 2e-5 + 2e-4)
    assert topology.beta_s_per_byte[0, 4] == 1 / SWITCH
    assert topology.beta_s_per_byte[0, 2] == 1 / UPLINK
    assert topology.beta_s_per_byte[0, 1] == 1 / INTRA


def test_level_counts_the_highest_link_crossed() -> None:
    expected = [[0, 0, 1, 1, 2, 2]] * 2 + [[1, 1, 0, 0, 2, 2]] * 2 + [[2, 2, 2, 2, 0, 0]] * 2
    assert small_tree().level_PP.tolist() == expected


@given(TREES)
@settings(max_examples=60, deadline=None)
def test_any_tree_has_every_rank_once_and_symmetric_routes(shape: Any) -> None:
    tree = parse_tree(shape)
    topology = Topology.from_tree(
        shape, bandwidth_bytes_per_s=[1e9 / 2**level for level in range(1 + tree_depth(tree))]
    )
    assert topology.num_ranks == num_ranks(tree)
    assert [r for ranks in topology.nodes for r in ranks] == list(range(topology.num_ranks))
    lengths = np.array(topology.incidence.sum(axis=0)).reshape(topology.level_PP.shape)
    assert (lengths == lengths.T).all()
    for i in range(topology.num_ranks):
        for j in range(topology.num_ranks):
            same = topology.node_of[i] == topology.node_of[j]
            assert (topology.level(i, j) == 0) == same
            if i != j:  # networkx is the second route to the same answer
                hops = nx.shortest_path_length(topology.graph, f"rank{i}", f"rank{j}")
                assert len(topology.route(i, j)) == hops


def test_pairwise_gives_each_pair_the_slowest_link_of_its_route() -> None:
    shared, pairwise = small_tree(), small_tree(contention="pairwise")
    assert pairwise.contention == "pairwise"
    assert np.array_equal(pairwise.beta_s_per_byte, shared.beta_s_per_byte)
    assert len(pairwise.links) == 36
    assert all(len(pairwise.route(i, j)) == 1 for i in range(6) for j in range(6))
    assert np.array_equal(as_pairwise(shared).level_PP, shared.level_PP)


def test_matrices_come_back_as_they_went_in() -> None:
    alpha_PP = np.array([[0, 1e-5, 3e-5], [1e-5, 0, 2e-5], [3e-5, 2e-5, 0]])
    beta_PP = np.array([[1e-11, 1e-9, 2e-9], [1e-9, 1e-11, 2e-9], [4e-9, 2e-9, 1e-11]])
    topology = Topology.from_matrices(alpha_PP, beta_PP, nodes=[[0, 1], [2]])
    np.testing.assert_allclose(topology.alpha_s, alpha_PP)
    np.testing.assert_allclose(topology.beta_s_per_byte, beta_PP)
    assert topology.level_PP.tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]


def test_uplink_is_the_capacity_over_the_border_of_a_node() -> None:
    assert small_tree().uplink_bytes_per_s(1) == (UPLINK, UPLINK)
    assert Topology.from_tree(3, bandwidth_bytes_per_s=[1e9]).uplink_bytes_per_s(0) == (
        math.inf,
        math.inf,
    )


def test_subset_keeps_routes_between_its_ranks() -> None:
    topology = small_tree()
    part = topology.subset([5, 0, 3])
    old = [5, 0, 3]
    assert part.nodes == ((1,), (2,), (0,))
    for i in range(3):
        for j in range(3):
            if i != j:
                assert part.pair(i, j) == topology.pair(old[i], old[j])
                assert part.level(i, j) == topology.level(old[i], old[j])


def test_files_round_trip_with_unknown_keys(tmp_path: Path) -> None:
    topology = small_tree(latency_s=1e-5)
    document = topology_to_document(topology) | {"rack": "B7"}
    document["links"][0]["cable"] = "blue"
    path = tmp_path / "t.json"
    path.write_text(json.dumps(document))
    Topology.load(path).save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == document


def test_pickles_between_ranks() -> None:
    again = pickle.loads(pickle.dumps(small_tree()))
    assert again.links == small_tree().links


def _broken(change: Any) -> dict[str, Any]:
    document = json.loads(json.dumps(topology_to_document(small_tree())))
    change(document)
    return document


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="tamoe.plan"), "schema is 'tamoe.plan', expected"),
        (lambda d: d.update(schema_version="2.0"), r"schema_version is 2.0.* reads 1\.x"),
        (lambda d: d.pop("links"), "missing field 'links'"),
        (lambda d: d["links"][3].update(bandwidth_bytes_per_s=-1), r"links\[3\].*is -1.*> 0"),
        (lambda d: d["links"][3].update(bandwidth_bytes_per_s=0), r"links\[3\].*is 0.*> 0"),
        (lambda d: d["links"][3].update(latency_s=math.nan), r"links\[3\].*latency_s is nan"),
        (lambda d: d["links"][3].update(latency_s="fast"), r"links\[3\].*latency_s is 'fast'"),
        (lambda d: d["links"][3].update(source="rank9"), r"links\[3\]: 'rank9' is not a vertex"),
        (lambda d: d["links"][3].update(origin="guess"), "origin is 'guess'.*measured"),
        (lambda d: d["vertices"][-1].update(rank=7), "t.json: .*6 devices for 6 ranks"),
        (lambda d: d.update(nodes=[[0, 1], [1, 2]]), "in exactly one node"),
        (lambda d: d.update(nodes=[[0, "1"]]), r"nodes\[0\]"),
        (lambda d: d.update(contention="none"), "contention is 'none'"),
        (lambda d: d.update(pairs=[{"source_rank": 0}]), r"pairs\[0\]: missing field"),
        (lambda d: d.update(pairs=5), "pairs is 5; allowed: a list"),
        (lambda d: d.update(pairs=[PAIR | {"target_rank": [1]}]), r"pairs\[0\]: ranks are"),
        (lambda d: d.update(pairs=[PAIR | {"target_rank": 99}]), r"pairs has \(0, 99\)"),
        (lambda d: d.update(provenance=3), "provenance is 3; allowed: an object"),
        (lambda d: d["vertices"][0].update(name=None), r"vertices\[0\]: name is None"),
    ],
)
def test_a_wrong_file_is_refused_by_field(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(_broken(change)))
    with pytest.raises(InputError, match=message):
        Topology.load(path)


def test_truncated_missing_and_binary_files(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(InputError, match="cannot read"):
        Topology.load(path)
    path.write_text(json.dumps(topology_to_document(small_tree()))[:200])
    with pytest.raises(InputError, match="truncated or not JSON"):
        Topology.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="not a file of schema"):
        Topology.load(path)
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="not a text file"):
        Topology.load(path)


@pytest.mark.parametrize(
    "text", ["", "4x", "0x2", "4x0", "[[2,2],[2]", "[]", "[2,[]]", "[2.5]", "two"]
)
def test_malformed_trees_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="tree"):
        parse_tree(text)


def test_wrong_numbers_of_levels_and_bad_values_are_refused() -> None:
    with pytest.raises(InputError, match="3 numbers, one a level"):
        Topology.from_tree("[[2,2],[2]]", bandwidth_bytes_per_s=(1e9, 1e9))
    with pytest.raises(InputError, match="bandwidth_bytes_per_s is 0"):
        Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e9, 0))
    with pytest.raises(InputError, match=r"beta_s_per_byte\[0, 1\] is -1"):
        Topology.from_matrices(np.zeros((2, 2)), [[1, -1], [1, 1]])
    with pytest.raises(InputError, match="allowed: numbers"):
        Topology.from_tree("2x1", bandwidth_bytes_per_s=("fast", 1e9))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not a table of numbers"):
        Topology.from_matrices([[0, 1], [1]], [[1, 1], [1, 1]])
    with pytest.raises(InputError, match="latency_s is -1"):
        Link("a", "b", 1.0, latency_s=-1)


def test_unconnected_ranks_are_named() -> None:
    document = topology_to_document(small_tree())
    document["links"] = [link for link in document["links"] if "switch2" not in link.values()]
    from tamoe.topology.formats import topology_from_document

    with pytest.raises(InputError, match="no route from rank 0 to rank 4"):
        topology_from_document(document, "t").route(0, 4)


def test_uplink_levels_of_mixed_depth() -> None:
    levels = {v.name: v.uplink_level for v in tree_vertices(parse_tree("[[[2]],1]"))}
    assert levels == {"switch0": 4, "switch1": 3, "switch2": 2, "nic0": 1, "nic1": 1}
