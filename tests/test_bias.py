"""TopologyBias: convergence, long runs, small batches, bad numbers, state."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats
from torch import nn

import tamoe.bias
from tamoe import GShardGate, TopologyBias, TopologyLoss
from tamoe.bias import SignBias
from tamoe.functional import expert_counts
from tamoe.topology.errors import InputError
from tests.plan_rows import Rows, two_nodes


def drive(bias, logits_of_step, steps, top_k=1):
    """Route and update; in-node share of rank 0's choices at every step, in float64."""
    shares = []
    for step in range(steps):
        logits = logits_of_step(step)
        index = (logits + bias(logits)).topk(top_k, 1).indices
        counts = expert_counts(index, bias.num_experts)
        bias.update(counts)
        inside = counts[: bias.num_experts // 2].sum()
        shares.append(float(inside / counts.sum().clamp_min(1)))
    return np.array(shares)


def gaussian(spread, tokens=2048, experts=8, seed=0, offset_N=0.0):
    rng = torch.Generator().manual_seed(seed)
    return lambda step: spread * (torch.randn(tokens, experts, generator=rng) + offset_N)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("spread", [0.1, 0.3, 1, 2, 5, 10])
def test_controller_is_within_half_a_point_at_step_200_for_every_spread(spread, top_k):
    # A step of 2,048 tokens has a sampling error of 0.8 points; 40 steps of 0.13.
    shares = drive(TopologyBias(two_nodes(), rank=0), gaussian(spread), 200, top_k)
    assert shares[160:].mean() == pytest.approx(5 / 6, abs=0.005)
    assert abs(shares[30:] - 5 / 6).max() < 0.045  # settled long before, no oscillation


@pytest.mark.parametrize(
    ("spread", "share"), [(0.1, 1.0), (0.3, 1.0), (1, 0.947), (2, 0.794), (5, 0.627), (10, 0.566)]
)
def test_fixed_log_prior_gives_what_the_integral_says_and_misses_the_target(spread, share):
    # P(argmax in the node) = ∫ Σ_in φ((x - b_e)/σ)/σ Π_others Φ((x - b_j)/σ) dx, by quadrature.
    near, far = np.log(5 / 3), np.log(1 / 3)

    def density(x):
        a, b = (x - near) / spread, (x - far) / spread
        return 4 * stats.norm.pdf(a) / spread * stats.norm.cdf(a) ** 3 * stats.norm.cdf(b) ** 4

    exact = integrate.quad(density, near - 9 * spread, near + 9 * spread)[0]
    assert exact == pytest.approx(share, abs=2e-3)
    bias = TopologyBias(two_nodes(), rank=0, fixed=True)
    measured = drive(bias, gaussian(spread), 20).mean()
    assert measured == pytest.approx(exact, abs=0.006)
    assert abs(measured - 5 / 6) > 0.03
    np.testing.assert_allclose(bias.bias_N.numpy(), two_nodes().log_prior_N(0), rtol=1e-6)


def test_bias_found_minimises_the_convex_potential():
    # Φ(b) = E[max(z + b)] - <share, b> on one fixed batch, minimised by SciPy.
    rows = Rows(np.array([[40.0, 30.0, 20.0, 10.0]] * 4))
    logits = gaussian(1.5, tokens=4000, experts=4)(0).double()
    share = rows.target_N(0) / 100

    def potential(free):
        b = torch.from_numpy(np.append(free, 0.0))
        return float((logits + b).max(1).values.mean() - (b * torch.from_numpy(share)).sum())

    found = optimize.minimize(potential, np.zeros(3), method="Nelder-Mead", tol=1e-7).x
    bias = TopologyBias(rows, rank=0)
    drive(bias, lambda _: logits, 300)
    ours = (bias.bias_N - bias.bias_N[3]).numpy()[:3]
    np.testing.assert_allclose(ours, found, atol=0.02)


def test_holds_for_1500_steps_while_offsets_and_spread_drift():
    # What a training gate does: its spread grows 150-fold, its offsets move by several spreads.
    rng = torch.Generator().manual_seed(1)
    start, end = 2 * torch.randn(2, 8, generator=rng)

    def logits(step):
        moved = start + (end - start) * step / 1500
        spread = 0.02 * 150 ** (step / 1500)
        return spread * (torch.randn(1024, 8, generator=rng) + moved)

    shares = drive(TopologyBias(two_nodes(), rank=0), logits, 1500)
    windows = shares[100:].reshape(-1, 50).mean(1)
    assert abs(windows - 5 / 6).max() < 0.01


def test_recovers_from_a_gate_that_collapsed_on_remote_experts():
    offset = torch.tensor([0.0] * 4 + [10.0] * 4)
    shares = drive(TopologyBias(two_nodes(), rank=0), gaussian(1.0, offset_N=offset), 120)
    assert shares[0] < 0.01
    assert shares[80:].mean() == pytest.approx(5 / 6, abs=0.01)


@pytest.mark.parametrize("tokens", [2, 8, 32, 256])
def test_tiny_batches_are_steered_without_bias_on_average(tokens):
    # The mean of 3,000 steps of t tokens has a sampling error of 0.37/sqrt(3000 t).
    bias = TopologyBias(two_nodes(), rank=0)
    shares = drive(bias, gaussian(1.0, tokens=tokens), 4000)
    assert shares[1000:].mean() == pytest.approx(5 / 6, abs=0.012)
    assert abs(bias.unit_bias_N.mean()) < 1e-5  # log of a noisy count is low: it would drift up


def test_fresh_gate_with_a_tiny_spread_does_not_start_all_local():
    shares = drive(TopologyBias(two_nodes(), rank=0), gaussian(0.02), 1)
    assert 0.7 < shares[0] < 0.88


def test_spread_is_what_varies_over_tokens_between_experts():
    # Offsets of experts are what the bias undoes, constants of tokens select nothing.
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2048, 8, generator=rng)
    moved = logits + 50 * torch.randn(8, generator=rng) + 50 * torch.randn(2048, 1, generator=rng)
    for batch in (logits, moved):
        bias = TopologyBias(two_nodes(), rank=0)
        drive(bias, lambda _, batch=batch: batch, 3)
        assert bias.spread.item() == pytest.approx(3, rel=0.03)


def test_selection_does_not_depend_on_the_scale_of_the_logits():
    logits = gaussian(1.0)(0)
    results = []
    for scale in (0.125, 1.0, 8.0):  # powers of two: exact in floating point
        bias = TopologyBias(two_nodes(), rank=0)
        shares = drive(bias, lambda _, s=scale: s * logits, 30)
        results.append((shares.tolist(), bias.unit_bias_N.tolist()))
    assert results[0] == results[1] == results[2]


def test_many_experts_and_small_targets_are_reached():
    node = np.arange(64) // 8
    weight = np.where(node[:, None] == node, 20.0, 1.0)
    rows = Rows(4096 * weight / weight.sum(1, keepdims=True))
    bias = TopologyBias(rows, rank=0)
    total = torch.zeros(64)
    logits_of = gaussian(1.0, experts=64)
    for step in range(200):
        logits = logits_of(step)
        counts = expert_counts((logits + bias(logits)).topk(2, 1).indices, 64)
        bias.update(counts)
        total += counts if step >= 100 else 0
    share = total / total.sum()
    assert share[:8].sum().item() == pytest.approx(rows.target_N(0)[:8].sum() / 4096, abs=0.005)
    assert abs(share.numpy() / bias.share_N - 1).max() < 0.05


@pytest.mark.parametrize("kind", [TopologyBias, SignBias])
def test_a_compiled_gate_is_one_graph_and_its_bias_moves_as_without(kind):
    gates = []
    for _ in range(2):
        torch.manual_seed(0)
        gates.append(GShardGate(16, 8, steer=kind(two_nodes(), rank=0)))
    compiled = torch.compile(gates[1], fullgraph=True, backend="aot_eager")
    batches = torch.randn(6, 256, 16, generator=torch.Generator().manual_seed(0))
    for x_TD in (*batches[:5], batches[5, :0], batches[5]):
        eager, other = gates[0](x_TD), compiled(x_TD)
        assert torch.equal(eager.expert_index_TK, other.expert_index_TK)
        torch.testing.assert_close(other.aux_loss, eager.aux_loss)
    torch.testing.assert_close(state_of(gates[1].steer), state_of(gates[0].steer))
    assert gates[1].steer.steps == 6


# ---- numbers that are missing or bad ------------------------------------------------------------


def state_of(bias):
    return {name: value.clone() for name, value in bias.state_dict().items()}


def test_a_batch_without_tokens_changes_nothing():
    bias = TopologyBias(two_nodes(), rank=0)
    drive(bias, gaussian(1.0), 5)
    before = state_of(bias)
    empty = torch.zeros(0, 8)
    assert bias(empty).isfinite().all()
    bias.update(torch.zeros(8, dtype=torch.int64))
    after = state_of(bias)
    for name in ("unit_bias_N", "moving_share_N", "steps"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7)


def test_an_empty_batch_before_the_update_leaves_the_spread_of_the_one_before():
    bias = TopologyBias(two_nodes(), rank=0)
    logits_TN = gaussian(1.0)(0)
    bias(logits_TN)
    bias(logits_TN[:0])
    bias.update(torch.ones(8))
    assert float(bias.spread) == pytest.approx(1.0, rel=0.1)


def test_a_target_that_float32_has_not_leaves_the_bias_finite():
    tiny = Rows(np.array([[100.0, 100.0, 100.0, 1e-47]] * 4))
    bias = TopologyBias(tiny, rank=0)
    for plan in (tiny, Rows(np.full((4, 4), 25.0)), tiny):
        bias.set_plan(plan)
        counts_N = drive(bias, gaussian(1.0, experts=4), 3)
        assert np.isfinite(counts_N).all()
        assert all(value.isfinite().all() for value in state_of(bias).values())


def test_in_a_graph_every_batch_moves_the_spread_by_its_own_step(monkeypatch):
    bias = TopologyBias(two_nodes(), rank=0)
    drive(bias, gaussian(1.0), 40)
    monkeypatch.setattr(bias, "_is_graph", lambda: True)
    before = float(bias.spread)
    drive(bias, gaussian(4.0), 1)
    measured = float(gaussian(4.0)(0).std())
    expected = before + tamoe.bias.SPREAD_STEP * (measured - before)
    assert float(bias.spread) == pytest.approx(expected, rel=0.01)


def test_one_measurement_of_the_spread_counts_once():
    bias = TopologyBias(two_nodes(), rank=0)
    drive(bias, gaussian(1.0), 10)
    bias(gaussian(4.0)(0))
    bias.update(torch.full((8,), 256))
    once = float(bias.spread)
    bias.update(torch.full((8,), 256))  # nothing was measured for it
    assert once > 1.2 and float(bias.spread) == once


def test_the_spread_is_measured_less_often_later_and_still_followed(monkeypatch):
    measured = []
    own = tamoe.bias._spread
    monkeypatch.setattr("tamoe.bias._spread", lambda *a: measured.append(len(measured)) or own(*a))
    bias = TopologyBias(two_nodes(), rank=0)
    drive(bias, gaussian(1.0), 16 + 40)
    assert len(measured) == 16 + 10
    drive(bias, gaussian(4.0, seed=1), 80)
    assert float(bias.spread) == pytest.approx(4.0, rel=0.02)
    again = TopologyBias(two_nodes(), rank=0)
    again.load_state_dict(bias.state_dict())
    measured.clear()
    drive(again, gaussian(4.0), 40)
    assert len(measured) == 10


def test_counts_of_any_kind_are_left_as_they_were():
    for counts_N in (torch.ones(8), torch.ones(8, dtype=torch.int64), torch.arange(8.0)):
        bias = TopologyBias(two_nodes(), rank=0)
        bias(gaussian(1.0)(0))
        before_N = counts_N.clone()
        bias.update(counts_N)
        assert torch.equal(counts_N, before_N)


def test_first_batch_empty_or_of_one_token_is_no_trouble():
    for tokens in (0, 1):
        bias = TopologyBias(two_nodes(), rank=0)
        drive(bias, gaussian(1.0, tokens=tokens), 3)
        assert bias(torch.zeros(1, 8)).isfinite().all()
        assert drive(bias, gaussian(1.0), 100)[60:].mean() == pytest.approx(5 / 6, abs=0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_leave_the_spread_as_it_was(bad):
    bias = TopologyBias(two_nodes(), rank=0)
    drive(bias, gaussian(1.0), 10)
    logits = gaussian(1.0)(0)
    logits[3, 2] = bad
    bias(logits)
    bias.update(torch.full((8,), 256))
    assert all(value.isfinite().all() for value in state_of(bias).values())
    assert bias.spread.item() == pytest.approx(1.0, abs=0.1)
    assert TopologyBias(two_nodes(), rank=0)(logits).isfinite().all()


def test_expert_without_any_choice_moves_the_bias_by_a_bounded_step():
    bias = TopologyBias(two_nodes(), rank=0)
    drive(bias, gaussian(1.0), 10)
    for _ in range(100):
        before = bias.unit_bias_N.clone()
        bias(gaussian(1.0)(0))
        bias.update(torch.tensor([2048] + [0] * 7))
        assert (bias.unit_bias_N - before).abs().max() <= 2 * 0.3 * 3.0 + 1e-5
    assert bias.unit_bias_N.abs().max() <= 30


def test_a_gate_of_zeros_still_sends_tokens_everywhere_and_more_inside():
    # Every token alike: a batch goes to one expert, experts take turns.
    bias, counts = TopologyBias(two_nodes(), rank=0), torch.zeros(8)
    for _ in range(600):
        logits = torch.zeros(2048, 8)
        latest = expert_counts((logits + bias(logits)).topk(1, 1).indices, 8)
        bias.update(latest)
        counts += latest
    share = counts / counts.sum()
    assert share[:4].sum() > 0.6
    assert share.min() > 0.01


def test_padding_does_not_count_in_the_spread():
    logits = gaussian(1.0)(0)
    mask = torch.arange(2048) < 1500
    padded = logits.clone()
    padded[1500:] = float("nan")
    clean, masked = (TopologyBias(two_nodes(), rank=0) for _ in range(2))
    torch.testing.assert_close(masked(padded, mask), clean(logits[:1500]))


# ---- state --------------------------------------------------------------------------------------


def test_evaluation_reads_and_never_writes():
    bias = TopologyBias(two_nodes(), rank=0)
    drive(bias, gaussian(1.0), 10)
    bias.eval()
    before = state_of(bias)
    kept = bias.batch_spread.clone()
    bias(gaussian(5.0)(0))
    torch.testing.assert_close(state_of(bias), before, rtol=0, atol=0)
    assert bias.batch_spread == kept
    torch.testing.assert_close(bias(gaussian(5.0)(0)), bias.bias_N)


def test_training_goes_on_from_a_state_dict_as_if_never_stopped():
    first = TopologyBias(two_nodes(), rank=0)
    source = gaussian(1.0)
    drive(first, source, 20)
    second = TopologyBias(two_nodes(), rank=0)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert second.steps.item() == 20
    batches = [source(step) for step in range(10)]
    for bias in (first, copy.deepcopy(first), second):
        drive(bias, lambda step: batches[step], 10)
    torch.testing.assert_close(state_of(second), state_of(first), rtol=0, atol=0)
    assert set(first.state_dict()) == {"unit_bias_N", "moving_share_N", "spread", "steps"}


def test_state_stays_float32_when_a_model_is_cast():
    model = nn.Sequential(TopologyBias(two_nodes(), rank=0)).bfloat16()
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32, torch.int64}
    with torch.device("meta"):
        late = TopologyBias(two_nodes(), rank=0)
    late.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(state_of(late), state_of(TopologyBias(two_nodes(), rank=0)))


def test_new_plan_is_reached_without_starting_anew():
    bias = TopologyBias(two_nodes(), rank=0)
    source = gaussian(1.0)
    drive(bias, source, 60)
    steeper = two_nodes(ratio=20)
    bias.set_plan(steeper)
    shares = drive(bias, source, 60)
    assert shares[0] > 0.9  # the step of the log-prior at once
    assert shares[30:].mean() == pytest.approx(20 / 21, abs=0.005)
    with pytest.raises(InputError, match="plan has 4 ranks and 4 experts"):
        bias.set_plan(two_nodes(ranks_per_node=2))


def test_update_runs_without_reading_the_device():
    # On meta tensors any .item(), bool() or comparison in Python raises.
    bias = TopologyBias(two_nodes(), rank=0).to("meta")
    bias(torch.empty(16, 8, device="meta"), torch.empty(16, dtype=torch.bool, device="meta"))
    bias.update(torch.empty(8, dtype=torch.int64, device="meta"))


# ---- wrong input --------------------------------------------------------------------------------


def test_wrong_arguments_are_named():
    rows = two_nodes()
    for gain in (0, -1, 2.5, float("nan")):
        with pytest.raises(InputError, match=r"gain is .*; allowed: > 0 and < 2"):
            TopologyBias(rows, rank=0, gain=gain)
    with pytest.raises(InputError, match="rank is None"):
        TopologyBias(rows)
    bias = TopologyBias(rows, rank=0)
    with pytest.raises(InputError, match=r"logits_TN is \(4, 7\); allowed: \(tokens, 8\)"):
        bias(torch.zeros(4, 7))
    with pytest.raises(InputError, match=r"counts_N is \(7,\); allowed: 8"):
        bias.update(torch.zeros(7))
    zero = np.ones((2, 2))
    zero[0, 1] = 0
    with np.errstate(divide="ignore"), pytest.raises(InputError, match="plan: log_prior_N"):
        TopologyBias(Rows(zero), rank=0)


@pytest.mark.parametrize("kind", [TopologyBias, TopologyLoss])
def test_what_is_no_plan_is_refused(kind: type) -> None:
    with pytest.raises(
        InputError, match=r"plan is 'plan.json'; allowed: a tamoe.solver.Plan.*load"
    ):
        kind("plan.json", rank=0)
