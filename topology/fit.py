"""What the samples of one pair say: latency, inverse bandwidth, burst, noise and how well it fits.

The median is used throughout. The minimum is not: behind a token bucket (emulated links, cloud
NICs) the fastest sample is one that found the bucket full. For the same reason the inverse
bandwidth is the slope between the two largest sizes and not a regression over all of them, which
reads such a link up to 78 % too fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

SMALL_BYTES = 8  # the message whose round trip gives the latency
AFFINE_RESIDUAL = 0.2  # above it alpha + beta * size does not describe the pair
MIN_BURST_BYTES = 16384  # less than one GSO packet of 64 KiB cannot be told from jitter
VISIBLE = 0.1  # share of a stream's time that a burst must save to be told from noise


@dataclass(frozen=True)
class PairSamples:
    """Everything that was timed for one flow from one rank to another, by the sender's clock.

    ``ping_s``: size to round trips. ``stream_s``: size to times from the first byte sent to the
    acknowledgement, each after a pause that fills a token bucket; equal positions follow each
    other. ``drained_s``: the same for one size right after another stream, bucket empty.
    """

    ping_s: Mapping[int, tuple[float, ...]]
    stream_s: Mapping[int, tuple[float, ...]]
    drained_s: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The samples as JSON values, rounded to 0.1 microseconds."""
        return {
            name: {str(s): [round(t, 7) for t in times] for s, times in getattr(self, name).items()}
            for name in ("ping_s", "stream_s", "drained_s")
        }

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> PairSamples:
        """The samples that :meth:`to_json` wrote."""
        return PairSamples(
            *(
                {int(size): tuple(times) for size, times in document[name].items()}
                for name in ("ping_s", "stream_s", "drained_s")
            )
        )


@dataclass(frozen=True)
class PairFit:
    """One flow from one rank to another: ``time = alpha_s + beta_s_per_byte * size``.

    ``table_s`` has the measured medians, one way, after a pause. ``burst_bytes`` is what passes at
    once then, 0 where none is visible; it comes off ``size``. ``noise`` is the median ``|log|`` of
    the ratio that two medians of as many samples would have, ``residual`` the median relative
    error of the model over all sizes.
    """

    alpha_s: float
    beta_s_per_byte: float
    burst_bytes: float
    residual: float
    noise: float
    table_s: Mapping[int, float]

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Inverse of ``beta_s_per_byte``."""
        return 1 / self.beta_s_per_byte

    @property
    def affine(self) -> bool:
        """Whether the model describes the measured table."""
        return self.residual <= AFFINE_RESIDUAL

    @cached_property
    def _sizes(self) -> list[int]:
        return sorted(self.table_s)

    def time_s(self, size_bytes: float) -> float:
        """Measured time of a message, between measured sizes by interpolation.

        Clustering uses this and not ``beta_s_per_byte``: fitted slopes of fast links are noise.
        """
        below = [size for size in self._sizes if size <= size_bytes]
        above = [size for size in self._sizes if size > size_bytes]
        if not above:
            last = below[-1]
            return self.table_s[last] + (size_bytes - last) * self.beta_s_per_byte
        if not below:
            return self.table_s[above[0]]
        low, high = below[-1], above[0]
        share = (size_bytes - low) / (high - low)
        return self.table_s[low] + share * (self.table_s[high] - self.table_s[low])


def median(values: Sequence[float]) -> float:
    """The middle value; the lower of the two middle ones if their number is even.

    >>> median([3.0, 1.0, 2.0])
    2.0
    """
    return sorted(values)[(len(values) - 1) // 2]


def median_interval(values: Sequence[float]) -> float:
    """Width of the 95 % interval of the median, relative to it, from order statistics.

    Needs no assumption on the distribution. Infinite below five samples, where the extremes
    enclose the median with less than 93 %.

    >>> median_interval([1.0, 1.01, 1.0, 0.99, 1.0])
    0.02
    """
    count = len(values)
    if count < 5:
        return math.inf
    ordered = sorted(values)
    outside, low = 0.0, 0
    for k in range(count // 2):
        outside += 2 * math.comb(count, k) / 2**count
        # 5 samples reach 93.75 %, which counts as enough.
        if k and outside > 0.05:
            break
        low = k
    return round((ordered[-1 - low] - ordered[low]) / median(ordered), 12)


def sample_noise(values: Sequence[float]) -> float:
    """Median ``|log|`` of the ratio of neighbouring samples; 0 for fewer than two.

    >>> round(sample_noise([1.0, 1.1, 1.0]), 3)
    0.095
    """
    ratios = [abs(math.log(b / a)) for a, b in pairwise(values)]
    return median(ratios) if ratios else 0.0


def fit_pair(samples: PairSamples) -> PairFit:
    """Latency, inverse bandwidth and burst of one flow.

    Latency is half of the small round trip, less the small message's own bytes. Inverse bandwidth
    is the median slope between the two largest streams. The burst is how far a stream stays below
    that line: ``time = alpha + beta * (size - burst)``; it is believed where a stream that finds
    the bucket empty is slower.

    Parameters
    ----------
    samples
        At least one round trip and two sizes of streams.

    Returns
    -------
    PairFit

    Examples
    --------
    >>> streams = {size: (1e-3 + size / 1e8,) for size in (2**17, 2**19, 2**21)}
    >>> fit = fit_pair(PairSamples({8: (1e-3,)}, streams))
    >>> round(fit.bandwidth_bytes_per_s / 1e6, 3), round(fit.alpha_s * 1e3, 3)
    (100.0, 0.5)
    """
    round_trips = {size: median(times) for size, times in samples.ping_s.items()}
    # The acknowledgement is one small message.
    acknowledged = min(round_trips.values()) / 2
    streams = {
        size: max(median(times) - acknowledged, 1e-9) for size, times in samples.stream_s.items()
    }
    beta, large = _slope(samples.stream_s), max(streams)
    burst = _burst_bytes(samples, streams, beta)
    latency = round_trips[min(round_trips)] / 2
    ratio = max(0.0, streams[large] - latency) / large
    if not burst and beta < ratio / 2:
        # Without a burst both read the same link. A slope that explains less than half of the
        # time is the noise of a link too fast for these sizes.
        beta = ratio
    alpha = max(0.0, latency - min(round_trips) * beta)
    # A median of n samples spreads by 1.253 / sqrt(n) of what they do.
    times = samples.stream_s[large]
    noise = sample_noise(times) * 1.253 / math.sqrt(len(times))
    table = {size: time / 2 for size, time in round_trips.items()} | streams
    errors = [
        abs(time - alpha - beta * max(0.0, size - burst)) / time for size, time in table.items()
    ]
    return PairFit(alpha, beta, burst, median(errors), noise, dict(sorted(table.items())))


def _slope(streams: Mapping[int, Sequence[float]]) -> float:
    small, large = sorted(streams)[-2:]
    # Neighbours in time: their difference is free of what changes slowly.
    seconds = [b - a for a, b in zip(streams[small], streams[large], strict=True)]
    if median(seconds) > 0:
        return median(seconds) / (large - small)
    # Noise can turn the slope over on links that are too fast for their largest size; the plain
    # ratio is then the honest bound.
    return median(streams[large]) / large


def _burst_bytes(samples: PairSamples, streams: Mapping[int, float], beta: float) -> float:
    # Ranks that wait for a processor make small messages look slower than they make streams; the
    # fastest round trip is the part that both have.
    latency = min(min(times) for times in samples.ping_s.values())
    for size, times in samples.drained_s.items():
        burst = min(size - (median(samples.stream_s[size]) - latency) / beta, float(size))
        gained = median(times) - median(samples.stream_s[size])
        visible = burst > MIN_BURST_BYTES and burst * beta > VISIBLE * streams[size]
        if visible and gained > burst * beta / 2:
            return burst
    return 0.0
