"""How connections share an emulated link: in turns and in small packets.

A network card gives each of its connections a turn, and a switch each of its inputs. With one queue
for all, packets whose receiver is busy keep others waiting, and so do packets of 64 kB, which Linux
hands to virtual links whole: all-to-alls of four nodes that were started at once used their links
for .86 of the time, with what is done here .94 (emulated, 4x2 at 100 Mbit/s, 4 MB a link).
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Any, Literal

Side = Literal["source", "target"]
MOST_QUEUES = 16  # of a link: more hosts than that share them
BUCKET = 0x10000  # handle of the token bucket, which passes packets on in the order of the queues
_QUEUES = 0x20000
_FREE_BYTES_PER_S = 4_000_000_000  # only the bucket holds back
# With 16 kB links are shared no better, and exchanges that keep the cores busy took 5 % longer.
_PACKET_BYTES, _LEAST_PACKET_BYTES = 32_000, 1448
_IPV4, _PLACE_IN_HEADER = 0x0800, {"source": 12, "target": 16}


def share_fairly(ip: Any, index: int, side: Side, addresses: list[str], queue_bytes: int) -> None:
    """Give the hosts at one side of a link a queue each; the link serves the queues in turns.

    Parameters
    ----------
    ip
        Socket in the namespace of the interface.
    index
        Interface with a token bucket of the handle ``BUCKET``.
    side
        Whether hosts are told apart as sources or as targets of packets.
    addresses
        Of all hosts. The last bits of an address choose the queue, so that hosts beyond
        ``MOST_QUEUES`` share one.
    queue_bytes
        What a queue can hold at least.

    Raises
    ------
    NetlinkError
        The kernel has no ``htb`` or ``u32``.
    """
    # A queue of htb holds as many packets as the interface says when the queue is made.
    packets = queue_bytes // _LEAST_PACKET_BYTES
    ip.link("set", index=index, gso_max_size=_PACKET_BYTES, txqlen=packets)
    ip.tc("add", "htb", index=index, handle=_QUEUES, parent=BUCKET + 1)
    for number, key in _last_bits(addresses, _PLACE_IN_HEADER[side]):
        queue = _QUEUES + 1 + number
        rate = {"rate": _FREE_BYTES_PER_S, "quantum": _PACKET_BYTES}
        ip.tc("add-class", "htb", index=index, handle=queue, parent=_QUEUES, **rate)
        match = {"protocol": _IPV4, "target": queue, "keys": [key]}
        ip.tc("add-filter", "u32", index=index, parent=_QUEUES, **match)


def _last_bits(addresses: list[str], place: int) -> Iterator[tuple[int, str]]:
    """Numbers of the queues, and which packets belong to them: value, mask and place in the header.

    >>> list(_last_bits(["10.0.0.17", "10.0.0.2", "10.0.0.1"], 12))
    [(1, '0x00000001/0x0000000f+12'), (2, '0x00000002/0x0000000f+12')]
    """
    mask = MOST_QUEUES - 1
    for number in sorted({int(IPv4Address(address)) & mask for address in addresses}):
        yield number, f"0x{number:08x}/0x{mask:08x}+{place}"  # 8 digits are 4 bytes
