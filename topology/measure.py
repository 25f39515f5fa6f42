"""The measurements themselves: ping-pong, streams, flows at the same time, copies, empty exchanges.

Every time is taken by one clock, the sender's: half of a round trip, or from the first byte sent
to the acknowledgement. A token bucket on the way (128 KiB on emulated links, unknown in clouds)
gives one burst away after every pause, and after a short one, such as a process that had to wait
for its processor, a part of it. So every stream comes after a pause that fills the bucket: all
sizes gain the same, and their slope is free of it. Loaded in ranks only: it needs torch.
"""

from __future__ import annotations

import time

import torch

from tamoe.topology.fit import SMALL_BYTES, PairSamples, median, median_interval
from tamoe.topology.orders import BUCKET_BYTES, FlowPlan, PairPlan, stream_bytes, sweep_count
from tamoe.topology.wire import Wire

PING_BYTES = (SMALL_BYTES, 1024, 16384)
PILOT_BYTES = 2 * BUCKET_BYTES
MIDDLE_BYTES = 131072
PAUSE_BYTES = 3 * BUCKET_BYTES // 2  # a pause lasts as long as the link takes for these
FEW = 3  # repetitions of what only checks the model
GOOD_INTERVAL = 0.03  # stop early when the median is known this well

_STOP, _PING, _STREAM = range(3)


# ---- one pair alone ---------------------------------------------------------------------------


def measure_pair(wire: Wire, peer: int, plan: PairPlan, *, first: bool) -> PairSamples | None:
    """Measure this rank to its peer and back again; both call it, one as the first.

    Returns
    -------
    PairSamples or None
        What the caller measured as the sender.
    """
    if first:
        samples = _send_pair(wire, peer, plan)
        _answer_pair(wire, peer)
        return samples
    _answer_pair(wire, peer)
    return _send_pair(wire, peer, plan)


def measure_one_way(wire: Wire, peer: int, plan: PairPlan, *, first: bool) -> PairSamples | None:
    """Measure from the first rank to the other only."""
    if first:
        return _send_pair(wire, peer, plan)
    _answer_pair(wire, peer)
    return None


def _send_pair(wire: Wire, peer: int, plan: PairPlan) -> PairSamples:
    _pings(wire, peer, SMALL_BYTES, 3)  # connections, pages
    ping_s = {
        size: _pings(wire, peer, size, plan.pings if size == SMALL_BYTES else plan.pings // 2 | 1)
        for size in PING_BYTES
    }
    _stream(wire, peer, PILOT_BYTES)  # drains the bucket
    pilot = _stream(wire, peer, PILOT_BYTES)
    pause_s = PAUSE_BYTES * pilot / PILOT_BYTES
    largest = stream_bytes(PILOT_BYTES / pilot, plan)
    sizes = (largest // 4, largest)
    sweeps: list[list[float]] = []
    most = sweep_count(2 * pause_s + sum(sizes) * pilot / PILOT_BYTES, plan)
    while len(sweeps) < most and not _settled(sweeps, min(most, plan.min_sweeps)):
        sweeps.append([_stream(wire, peer, size, pause_s) for size in sizes])
    stream_s = {size: tuple(sweep[k] for sweep in sweeps) for k, size in enumerate(sizes)}
    middle = min(MIDDLE_BYTES, largest // 8)
    stream_s[middle] = tuple(_stream(wire, peer, middle, pause_s) for _ in range(FEW))
    _stream(wire, peer, PILOT_BYTES)
    drained_s = {sizes[0]: tuple(_stream(wire, peer, sizes[0]) for _ in range(FEW))}
    wire.send_header([_STOP], peer)
    return PairSamples(ping_s, stream_s, drained_s)


def _settled(sweeps: list[list[float]], enough: int) -> bool:
    if len(sweeps) < enough or len(sweeps) % 2 == 0:
        return False
    return median_interval([large - small for small, large in sweeps]) < GOOD_INTERVAL


def _pings(wire: Wire, peer: int, size: int, count: int) -> tuple[float, ...]:
    wire.send_header([_PING, size, count], peer)
    out, into = wire.payload(size), torch.empty(size, dtype=torch.uint8, device=wire.device)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        wire.send_then_receive(out, into, peer)
        times.append(time.perf_counter() - start)
    return tuple(times)


def _stream(wire: Wire, peer: int, size: int, pause_s: float = 0.0) -> float:
    wire.send_header([_STREAM, size], peer)
    payload = wire.payload(size)
    if pause_s:
        time.sleep(pause_s)  # part of the measurement: a bucket in between fills up
    start = time.perf_counter()
    wire.send_then_receive(payload, wire.acknowledgement, peer)
    return time.perf_counter() - start


def _answer_pair(wire: Wire, peer: int) -> None:
    while True:
        what, size, count = wire.receive_header(peer)
        if what == _STOP:
            return
        if what == _PING:
            buffer = wire.payload(size)
            for _ in range(count):
                wire.receive(buffer, peer)
                wire.send(buffer, peer)
        else:
            wire.receive(wire.payload(size), peer)
            wire.send(wire.acknowledgement, peer)


# ---- flows at the same time -------------------------------------------------------------------


def measure_flow(wire: Wire, peer: int, plan: FlowPlan, *, first: bool) -> float | None:
    """Bytes per second from the first rank to the other while other flows run too.

    Messages follow each other, two on the way at a time, each acknowledged. Counted is what was
    acknowledged after the head and before the tail, so flows may begin and end a little apart.
    """
    message = wire.payload(plan.message_bytes)
    acknowledgement = wire.acknowledgement
    if not first:
        wire.receive(message, peer)
        while int(message[0].item()) == 1:
            wire.exchange(acknowledgement, message, peer)
        wire.send(acknowledgement, peer)
        return None
    message[0] = 1
    start = time.perf_counter()
    wire.send(message, peer)
    arrivals: list[float] = []
    end = plan.head_s + plan.window_s
    while not arrivals or arrivals[-1] < end + plan.head_s:
        wire.exchange(message, acknowledgement, peer)
        arrivals.append(time.perf_counter() - start)
    last = message.clone()
    last[0] = 0
    wire.exchange(last, acknowledgement, peer)
    wire.receive(acknowledgement, peer)
    return steady_rate(arrivals, plan)


def measure_load(wire: Wire, peer: int, plan: FlowPlan, *, first: bool) -> float | None:
    """Bytes per second each way while this pair and others load both directions of their links.

    Both ranks send and receive in step, two messages on the way at a time. With both directions
    loaded, flows of a round that cross the same switch are sure to meet.
    """
    message = torch.ones(plan.message_bytes, dtype=torch.uint8, device=wire.device)
    last = message.clone()
    last[0] = 0
    arriving = [torch.empty_like(message), torch.empty_like(message)]
    arrivals: list[float] = []
    end = 2 * plan.head_s + plan.window_s
    start = time.perf_counter()
    before = wire.start_exchange(message, arriving[0], peer)
    ending = False
    while True:
        turn = len(arrivals) + 1
        said = first and not ending and bool(arrivals) and arrivals[-1] > end
        now = wire.start_exchange(last if said else message, arriving[turn % 2], peer)
        wire.finish(before)
        arrivals.append(time.perf_counter() - start)
        if ending or (not first and int(arriving[(turn - 1) % 2][0].item()) == 0):
            wire.finish(now)
            break
        # The other side has begun one more message when it reads that this was the last but one.
        ending, before = said, now
    return steady_rate(arrivals, plan) if first else None


def steady_rate(arrivals_s: list[float], plan: FlowPlan) -> float:
    """Bytes per second between the first and the last acknowledgement of the window.

    >>> steady_rate([0.001 * k for k in range(1, 301)], FlowPlan(1000, 0.05, 0.2))
    1000000.0
    """
    inside = [t for t in arrivals_s if plan.head_s <= t <= plan.head_s + plan.window_s]
    if len(inside) < 2:  # slower than the window: all there is
        inside = [0.0, *arrivals_s][-max(2, len(arrivals_s)) :]
    return round(plan.message_bytes * (len(inside) - 1) / (inside[-1] - inside[0]), 3)


# ---- a rank alone, and all together -----------------------------------------------------------


def measure_copy(device: torch.device, size: int = 4 << 20, repetitions: int = 9) -> float:
    """Bytes per second at which this rank copies a tensor of its own."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(repetitions + 2):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return size / median(times[2:])


def measure_overhead(wire: Wire, repetitions: int = 11) -> float:
    """Seconds that an all-to-all of one element a rank takes."""
    times = []
    for _ in range(repetitions + 2):
        start = time.perf_counter()
        wire.empty_all_to_all()
        times.append(time.perf_counter() - start)
    return median(times[2:])
