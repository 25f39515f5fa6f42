"""The text of emulated clusters: grammar, messages with places, and the ground truth."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from tamoe.topology.errors import InputError
from tamoe.topology.spec import ClusterSpec, rate_text
from tamoe.topology.tree import Tree, num_ranks, tree_depth

RATES = st.integers(8_000, 32_000_000_000)


@st.composite
def specs(draw: st.DrawFn) -> ClusterSpec:
    leaves = st.integers(1, 4)
    tree: Tree = draw(
        st.recursive(leaves, lambda below: st.lists(below, min_size=1, max_size=3).map(tuple))
    )
    levels = tree_depth(tree)
    shaped = draw(st.booleans())
    rates = draw(st.tuples(*[RATES] * levels)) if shaped else ()
    nodes = ClusterSpec(tree).num_nodes
    own = draw(st.dictionaries(st.integers(0, nodes - 1), RATES, max_size=2)) if levels else {}
    return ClusterSpec(tree, rates, tuple(own.items()), draw(st.none() | RATES))


@settings(deadline=None, derandomize=True)
@given(specs())
def test_text_of_any_spec_reads_back_as_the_same_spec(spec: ClusterSpec) -> None:
    assert ClusterSpec.parse(str(spec)) == spec


@settings(deadline=None, derandomize=True)
@given(specs())
def test_ground_truth_has_every_link_of_the_tree_with_its_own_rate(spec: ClusterSpec) -> None:
    topology = spec.topology()
    assert topology.nodes == spec.nodes
    assert topology.num_ranks == num_ranks(spec.tree)
    # One link each way for every rank, node and switch below the root.
    below_root = sum(vertex.parent is not None for vertex in spec.vertices)
    assert len(topology.links) == 2 * (spec.num_ranks + below_root)
    own = dict(spec.node_bit_per_s)
    for link in topology.links:
        names = (link.source, link.target)
        if link.level == 0:
            rate = spec.intra_bit_per_s
        else:
            default = spec.uplink_bit_per_s[link.level - 1] if spec.uplink_bit_per_s else None
            nics = [int(name[3:]) for name in names if name.startswith("nic")]
            rate = own.get(nics[0], default) if link.level == 1 else default
        if rate is None:
            assert (link.origin, link.burst_bytes) == ("static", 0)
        else:
            # 1448 bytes of payload in each frame of 1514 bytes.
            assert link.bandwidth_bytes_per_s == pytest.approx(rate / 8 * 1448 / 1514, rel=1e-12)
            assert (link.origin, link.burst_bytes) == ("given", 131072)


@pytest.mark.parametrize(
    ("text", "tree", "uplinks", "own", "intra"),
    [
        ("4x2:200mbit", (2, 2, 2, 2), (200_000_000,), (), None),
        ("4x2", (2, 2, 2, 2), (), (), None),
        ("8", 8, (), (), None),
        ("8;intra=1gbit", 8, (), (), 10**9),
        (" 4 x 2 : 2.5Gbit ", (2, 2, 2, 2), (2_500_000_000,), (), None),
        (
            "[[2,2],[2]]:400mbit,100mbit;node1=20mbit",
            ((2, 2), (2,)),
            (400_000_000, 100_000_000),
            ((1, 20_000_000),),
            None,
        ),
        ("2x1;node1=64kbit;intra=9000bit", (1, 1), (), ((1, 64_000),), 9000),
    ],
)
def test_grammar(text: str, tree: Tree, uplinks: tuple, own: tuple, intra: int | None) -> None:
    assert ClusterSpec.parse(text) == ClusterSpec(tree, uplinks, own, intra)


@pytest.mark.parametrize(
    ("text", "character", "problem"),
    [
        ("", 1, "malformed"),
        ("4x", 1, "expected 'NODESxRANKS'"),
        ("4x0:1mbit", 1, "expected 'NODESxRANKS'"),
        ("[[2,2],[2]:1mbit,1mbit", 1, "malformed"),
        ("[]:1mbit", 1, "nothing below it"),
        ("999999999999x2", 1, "too many ranks"),
        ("5000x1", 1, "at most 4096"),
        ("[4000,4000]", 1, "at most 4096"),
        ("4x2:", 5, "something is missing"),
        ("4x2:200", 5, "'200' is no rate"),
        ("4x2:fast", 5, "'fast' is no rate"),
        ("4x2:200mbps", 5, "bps would be bytes"),
        ("4x2: 0mbit", 6, "'0mbit' is out of range"),
        ("4x2:-1mbit", 5, "'-1mbit' is no rate"),
        ("4x2:1e9gbit", 5, "no rate"),
        ("4x2:33gbit", 5, "from 8kbit to 32gbit"),
        ("4x2:200mbit,0bit", 13, "'0bit' is out of range"),
        ("4x2:200mbit,100mbit", 5, "2 uplink rates for a tree with 1 level"),
        ("[[2],[2]]:1mbit", 11, "1 uplink rate for a tree with 2 levels"),
        ("8:1mbit", 3, "a single node has no uplink"),
        ("4x2:1mbit:2mbit", 11, "second ':'"),
        ("4x2:1mbit;", 11, "something is missing"),
        ("4x2:1mbit;node9=1mbit", 11, "node9 does not exist.*node0 to node3"),
        ("8;node0=1mbit", 3, "node0 does not exist or has no uplink"),
        ("4x2:1mbit;nod1=1mbit", 11, "'nod1=1mbit' is no option; allowed: nodeN=RATE, intra=RATE"),
        ("4x2:1mbit;node1", 11, "no option"),
        ("4x2:1mbit; node1=0mbit", 18, "'0mbit' is out of range"),
        ("4x2:1mbit;node1=1mbit;node1=2mbit", 23, "the same rate again"),
        ("4x2;intra=1mbit;intra=1mbit", 17, "the same rate again"),
    ],
)
def test_malformed_text_says_where_and_what_is_allowed(
    text: str, character: int, problem: str
) -> None:
    with pytest.raises(InputError, match=rf"character {character}: .*{problem}") as caught:
        ClusterSpec.parse(text)
    assert repr(text) in str(caught.value)
    assert caught.value.exit_code == 2


@settings(deadline=None, derandomize=True)
@given(st.text(alphabet="0123456789x[],:;=. nodeitramkg", max_size=24))
def test_any_text_is_read_or_refused_with_an_input_error(text: str) -> None:
    try:
        spec = ClusterSpec.parse(text)
    except InputError:
        return
    assert ClusterSpec.parse(str(spec)) == spec


@pytest.mark.parametrize("value", [None, 5, "4x2;" * 2000])
def test_what_is_no_short_text_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="cluster is"):
        ClusterSpec.parse(value)  # type: ignore[arg-type]


def test_fields_are_checked_without_text_too() -> None:
    with pytest.raises(InputError, match="rate 0 bit/s"):
        ClusterSpec((2, 2), (0,))
    with pytest.raises(InputError, match="each node once"):
        ClusterSpec((2, 2), (), ((0, 10**6), (0, 10**6)))
    with pytest.raises(InputError, match="node2 does not exist"):
        ClusterSpec((2, 2), (), ((2, 10**6),))
    with pytest.raises(InputError, match="rate 1 bit/s"):
        ClusterSpec((2, 2), intra_bit_per_s=1)


@settings(deadline=None, derandomize=True)
@given(RATES)
def test_rate_text_keeps_the_rate(rate: int) -> None:
    spec = ClusterSpec.parse(f"2x1:{rate_text(rate)}")
    assert spec.uplink_bit_per_s == (rate,)


def test_node_rate_replaces_only_that_node_s_uplink() -> None:
    topology = ClusterSpec.parse("[[2,2],[2]]:400mbit,100mbit;node1=20mbit").topology()
    payload = 1448 / 1514 / 8
    assert topology.uplink_bytes_per_s(0) == (400e6 * payload,) * 2
    assert topology.uplink_bytes_per_s(1) == (20e6 * payload,) * 2
    slowest = min(topology.links[i].bandwidth_bytes_per_s for i in topology.route(0, 4))
    assert slowest == pytest.approx(100e6 * payload)
