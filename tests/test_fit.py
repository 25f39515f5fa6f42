"""Fits of a pair against closed forms: an affine link, a link behind a token bucket."""

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tamoe.topology.fit import PairSamples, fit_pair, median, median_interval, sample_noise

SIZES = (131072, 524288, 2097152)
PINGS = (8, 1024, 16384)


def bucket_time(size, alpha, bandwidth, burst=0.0, credit=0.0):
    """Time of a message behind a bucket that has ``credit`` bytes of its ``burst`` left."""
    return alpha + max(0.0, size - min(credit, burst)) / bandwidth


def samples(alpha, bandwidth, burst=0.0, spread=0.0, reps=9, seed=0, slowed=0.0):
    """What the protocol times: streams after a pause, a few without, round trips."""
    rng = np.random.default_rng(seed)

    def noisy(value):
        factors = np.exp(spread * rng.standard_normal(reps))
        factors *= np.where(rng.random(reps) < slowed, rng.uniform(1.5, 5.0, reps), 1.0)
        return tuple(value * factors)

    ping = {s: noisy(2 * bucket_time(s, alpha, bandwidth, burst, burst)) for s in PINGS}
    stream = {s: noisy(bucket_time(s, alpha, bandwidth, burst, burst) + alpha) for s in SIZES}
    drained = {SIZES[1]: noisy(bucket_time(SIZES[1], alpha, bandwidth) + alpha)[:3]}
    return PairSamples(ping, stream, drained)


@settings(deadline=None)
@given(
    st.floats(1e-6, 2e-3),
    st.floats(1e6, 1e8),
    st.sampled_from([0.0, 32768.0, 65536.0, 131072.0, 262144.0]),
)
def test_noiseless_link_is_recovered_whatever_its_burst(alpha, bandwidth, burst):
    fit = fit_pair(samples(alpha, bandwidth, burst))
    assert fit.bandwidth_bytes_per_s == pytest.approx(bandwidth, rel=1e-9)
    assert fit.alpha_s == pytest.approx(alpha, abs=20 / bandwidth)  # the small message's own bytes
    # A burst is believed where it saves a tenth of the stream's time.
    saved = burst / bandwidth / bucket_time(SIZES[1], alpha, bandwidth, burst, burst)
    if abs(saved - 0.1) > 0.001:
        expected = burst if saved > 0.1 else 0.0
        assert fit.burst_bytes == pytest.approx(expected, abs=40)
        if expected == burst:
            assert fit.residual < 1e-3 + 20 / (bandwidth * alpha)


def test_noisy_bandwidth_and_latency_within_ten_percent():
    # Protocol figures: 9 repetitions, 5 % noise, a tenth of the samples slowed 1.5 to 5 times.
    errors = []
    for seed in range(100):
        fit = fit_pair(samples(1e-4, 5e7, spread=0.05, slowed=0.1, seed=seed))
        errors.append(abs(math.log(fit.bandwidth_bytes_per_s / 5e7)))
    assert np.quantile(errors, 0.95) < 0.1


def test_regression_over_all_sizes_fails_behind_a_bucket_where_the_slope_does_not():
    """The trap: streams that begin with a full bucket, fitted with relative weights."""
    alpha, bandwidth, burst = 2e-4, 23.91e6, 524288.0
    sizes = np.array([8, 1024, 16384, 131072, 524288, 1048576, 4194304], dtype=float)
    times = np.array([bucket_time(s, alpha, bandwidth, burst, burst) for s in sizes])
    design = np.stack([np.ones_like(sizes), sizes], axis=1) / times[:, None]
    _, beta = np.linalg.lstsq(design, np.ones_like(sizes), rcond=None)[0]
    assert 1 / beta > 1.13 * bandwidth  # relative least squares reads it far too fast
    streams = {int(s): (t + alpha,) for s, t in zip(sizes[-2:], times[-2:], strict=True)}
    fit = fit_pair(PairSamples({8: (2 * alpha,)}, streams))
    assert fit.bandwidth_bytes_per_s == pytest.approx(bandwidth, rel=1e-6)
    assert sizes[-1] / times[-1] > 1.1 * bandwidth  # so does the plain ratio of the largest size


def test_minimum_would_follow_the_one_sample_that_found_more_credit():
    base = samples(2e-4, 23.91e6, 131072)
    lucky = {size: (times[0] / 2, *times[1:]) for size, times in base.stream_s.items()}
    fit = fit_pair(PairSamples(base.ping_s, lucky, base.drained_s))
    assert fit.bandwidth_bytes_per_s == pytest.approx(23.91e6, rel=1e-6)
    small, large = SIZES[1:]
    minimum = (large - small) / (min(lucky[large]) - min(lucky[small]))
    assert minimum > 1.5 * 23.91e6


@pytest.mark.parametrize("seed", range(20))
def test_no_burst_is_seen_on_a_link_that_has_none(seed):
    fit = fit_pair(samples(2e-3, 5e9, burst=0.0, spread=0.05, slowed=0.1, seed=seed))
    assert fit.burst_bytes == 0


def test_protocol_that_is_slower_for_large_messages_is_no_burst():
    """The line through the largest sizes misses the smaller ones, but a pause changes nothing."""
    streams = {131072: (0.002,), 524288: (0.008,), 2097152: (0.064,)}
    fit = fit_pair(PairSamples({8: (1e-4,)}, streams, {524288: (0.008,)}))
    assert fit.burst_bytes == 0


def test_streams_held_back_by_others_give_no_negative_burst():
    streams = {SIZES[0]: (0.1,), SIZES[1]: (1.0,), SIZES[2]: (1.05,)}
    fit = fit_pair(PairSamples({8: (1e-4,)}, streams, {SIZES[1]: (3.0,)}))
    assert fit.burst_bytes == 0


def test_latency_is_never_negative_and_slope_never_turns_over():
    # Larger message faster than the smaller: noise on a link too fast for these sizes.
    fit = fit_pair(PairSamples({8: (1e-6,)}, {524288: (2e-3,), 2097152: (1e-3,)}))
    assert fit.alpha_s >= 0
    assert fit.beta_s_per_byte > 0


def test_slope_that_explains_little_of_the_time_gives_way_to_the_ratio():
    # 4 MiB in 3 ms; the quarter was unlucky and took nearly as long, which would mean 31 GB/s.
    streams = {1 << 17: (0.2e-3,), 1 << 20: (2.9e-3,), 1 << 22: (3e-3,)}
    fit = fit_pair(PairSamples({8: (2e-4,)}, streams, {1 << 20: (2.9e-3,)}))
    assert fit.bandwidth_bytes_per_s == pytest.approx((1 << 22) / 2.8e-3, rel=1e-3)


def test_time_between_measured_sizes_is_interpolated_and_beyond_follows_the_slope():
    fit = fit_pair(samples(1e-4, 1e8))
    assert fit.time_s(1 << 20) == pytest.approx(1e-4 + (1 << 20) / 1e8, rel=1e-4)
    assert fit.time_s(1 << 23) == pytest.approx(1e-4 + (1 << 23) / 1e8, rel=1e-4)
    assert fit.time_s(1) == fit.table_s[8]
    assert fit.time_s(SIZES[1]) == fit.table_s[SIZES[1]]


def test_bent_pairs_are_not_called_affine():
    streams = {131072: (0.1,), 524288: (0.11,), 2097152: (0.2,)}
    assert not fit_pair(PairSamples({8: (1e-4,), 1024: (2e-2,)}, streams)).affine


@given(st.lists(st.floats(0.5, 2), min_size=1, max_size=31))
def test_median_of_an_odd_number_is_the_middle_sample(values):
    values = values if len(values) % 2 else values[1:] or [1.0]
    if len(values) % 2:
        assert median(values) == np.median(values)
        assert median(values) in values


@pytest.mark.parametrize(("count", "low"), [(5, 0), (7, 0), (9, 1), (15, 3), (21, 5)])
def test_median_interval_has_the_textbook_order_statistics(count, low):
    # Sign test at 5 %; for 5 values the extremes (93.75 %) are accepted.
    values = [1.0 + 0.01 * k for k in range(count)]
    expected = (values[-1 - low] - values[low]) / values[count // 2]
    assert median_interval(values) == pytest.approx(expected)
    assert median_interval(values[:4]) == math.inf


def test_noise_is_zero_for_equal_samples_and_ignores_slow_drift():
    assert sample_noise([1.0] * 5) == 0
    assert sample_noise([1.0]) == 0
    assert sample_noise([1.0 + 0.001 * k for k in range(9)]) < 0.0011


def test_samples_survive_their_json():
    before = samples(1e-4, 1e8, 131072)
    after = PairSamples.from_json(before.to_json())
    assert fit_pair(after).beta_s_per_byte == pytest.approx(
        fit_pair(before).beta_s_per_byte, rel=1e-4
    )
