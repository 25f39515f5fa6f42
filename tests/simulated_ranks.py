"""A runner of the probe whose ranks are computed: flows share links by max-min fairness.

TCP comes near to that. Readings have noise, and glitches where asked for.
"""

import numpy as np

from tamoe.topology.fit import PairSamples

SIZES = (131072, 524288, 2097152)


def fair_rates(topology, flows):
    """Max-min fair rate of each flow: the most crowded link fills first."""
    routes = [set(topology.route(i, j)) for i, j in flows]
    left = {k: link.bandwidth_bytes_per_s for k, link in enumerate(topology.links)}
    rates, open_flows = [0.0] * len(flows), set(range(len(flows)))
    while open_flows:
        users = {
            link: [f for f in open_flows if link in routes[f]]
            for f in open_flows
            for link in routes[f]
        }
        tightest = min(users, key=lambda link: left[link] / len(users[link]))
        share = left[tightest] / len(users[tightest])
        for flow in users[tightest]:
            rates[flow] = share
            open_flows.discard(flow)
            for link in routes[flow]:
                left[link] -= share
    return rates


class SimulatedRanks:
    """A runner that computes what ranks on a known topology would time."""

    def __init__(self, truth, noise=0.01, seed=0, slow_pairs=(), glitches=0):
        self.truth = truth
        self.rng = np.random.default_rng(seed)
        self.noise = noise
        self.slow_pairs = dict(slow_pairs)
        self.glitches = glitches  # readings that are far off once
        self.orders = []

    def run(self, order):
        self.orders.append(order)
        if order.do == "copy":
            return {order.pairs[0][0]: 1e10}
        if order.do == "overhead":
            return {0: 1e-3}
        flows = list(order.pairs)
        if order.do == "load":
            rates = fair_rates(self.truth, flows + [(j, i) for i, j in flows])
            rates = [min(pair) for pair in zip(rates, rates[len(flows) :], strict=False)]
        else:
            rates = fair_rates(self.truth, flows)
        return {i: rate * self._noise() for (i, _), rate in zip(flows, rates, strict=True)}

    def samples(self, order):
        self.orders.append(order)
        ways = [list(order.pairs)]
        if order.do == "pairs":
            ways.append([(j, i) for i, j in order.pairs])
        found = {}
        for flows in ways:
            for flow, rate in zip(flows, fair_rates(self.truth, flows), strict=True):
                found[flow] = self._timed(flow, rate * self.slow_pairs.get(flow, 1.0))
        return found

    def _timed(self, flow, rate):
        if self.glitches:
            self.glitches -= 1
            rate /= 3
        alpha = 5e-5
        links = [self.truth.links[k] for k in self.truth.route(*flow)]
        burst = min(links, key=lambda link: link.bandwidth_bytes_per_s).burst_bytes
        ping = {size: self._many(2 * alpha, 21) for size in (8, 1024, 16384)}
        stream = {size: self._many(2 * alpha + max(0, size - burst) / rate, 5) for size in SIZES}
        drained = self._many(2 * alpha + SIZES[1] / rate, 3)
        return PairSamples(ping, stream, {SIZES[1]: drained})

    def _noise(self):
        return float(np.exp(self.noise * self.rng.standard_normal()))

    def _many(self, value, count):
        return tuple(value * self._noise() for _ in range(count))
