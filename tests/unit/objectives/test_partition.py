"""The partition function, against hand-worked numbers and brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from dpo_lightning.assets import BUNDLED_MODEL
from dpo_lightning.data.controlled import ControlledTask
from dpo_lightning.objectives.partition import (
    StreamedPartition,
    estimate_log_partition,
    exact_log_partition,
    group_shares,
    log_partition,
    optimal_logps,
)
from tests.support.properties import examples


def test_log_partition_of_two_groups():
    """log(1 + 2) = 1.098612 and log(3 + 4 + 5) = 2.484907."""
    scores = torch.tensor([1.0, 2, 3, 4, 5]).log()
    values = log_partition(scores, torch.tensor([0, 0, 1, 1, 1]))
    assert values.tolist() == pytest.approx([1.098612, 2.484907], abs=1e-5)


def test_long_responses_do_not_underflow():
    """Beta 0.14 on -783 and -784: exp(-109.62) is 0 in float32, the log is not.

    log Z = -109.62 + log(1 + e^-0.14) = -109.62 + 0.625588 = -108.994412.
    """
    scores = 0.14 * torch.tensor([-783.0, -784.0])
    assert scores.exp().sum() == 0
    value = log_partition(scores, torch.tensor([0, 0]))
    assert value.item() == pytest.approx(-108.994412, abs=1e-4)


def test_scores_far_apart_between_groups_do_not_meet():
    """A shift shared by all groups would lose the low one."""
    scores = torch.tensor([1e4, 1e4, -1e4, -1e4])
    values = log_partition(scores, torch.tensor([0, 0, 1, 1]))
    assert values.tolist() == pytest.approx([1e4 + math.log(2), -1e4 + math.log(2)])


def test_probabilities_sum_to_one_in_every_group():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([2, 5, 1, 3])
    group = torch.arange(4).repeat_interleave(sizes)
    scores = 50 * torch.randn(len(group), generator=generator, dtype=torch.float64)
    log_z = log_partition(scores, group)
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, group, (scores - log_z[group]).exp())
    torch.testing.assert_close(sums, torch.ones(4, dtype=torch.float64))


def test_log_partition_gradient_is_the_softmax():
    scores = torch.tensor([0.3, -1.0, 2.0, 2.0, -4.0], dtype=torch.float64, requires_grad=True)
    group = torch.tensor([0, 0, 1, 1, 1])
    assert torch.autograd.gradcheck(lambda s: log_partition(s, group), scores)
    log_partition(scores, group).sum().backward()
    expected = torch.cat([scores[:2].detach().softmax(0), scores[2:].detach().softmax(0)])
    torch.testing.assert_close(scores.grad, expected)


def test_impossible_responses_and_no_responses():
    scores = torch.tensor([-math.inf, 1.0, -math.inf, -math.inf])
    values = log_partition(scores, torch.tensor([0, 0, 1, 1]))
    assert values.tolist() == [1.0, -math.inf]
    empty = log_partition(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert empty.shape == (0,)


def test_half_precision_scores_are_summed_in_float32():
    value = log_partition(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(math.log(3), abs=1e-6)


def test_exact_partition_and_optimum_by_hand():
    """pi_ref = (1/2, 1/4, 1/4), r = beta * (0, log 2, log 4), beta = 0.5.

    Z = 1/2 * 1 + 1/4 * 2 + 1/4 * 4 = 2; pi* = (1/2, 1/2, 1) / 2 = (1/4, 1/4, 1/2).
    """
    reference = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    rewards = 0.5 * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).log()
    assert exact_log_partition(reference, rewards, 0.5).item() == pytest.approx(math.log(2))
    optimum = optimal_logps(reference, rewards, 0.5)
    assert optimum.exp().tolist() == pytest.approx([0.25, 0.25, 0.5])


def small_space():
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    return reference, torch.randn(2, 6, generator=generator, dtype=torch.float64), generator


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_no_other_policy_is_better_than_the_optimum(beta):
    """E[r] - beta * KL(pi || pi_ref) at pi* is beta * log Z, and less anywhere else."""
    reference, rewards, generator = small_space()

    def value(logps):
        return (logps.exp() * (rewards - beta * (logps - reference))).sum(-1)

    optimum = optimal_logps(reference, rewards, beta)
    torch.testing.assert_close(optimum.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    best = value(optimum)
    torch.testing.assert_close(best, beta * exact_log_partition(reference, rewards, beta))
    for size in (0.01, 0.1, 1.0, 5.0):
        noise = size * torch.randn(200, 2, 6, generator=generator, dtype=torch.float64)
        assert (value((optimum + noise).log_softmax(-1)) < best).all()


def test_a_constant_on_the_rewards_of_a_prompt_only_shifts_log_z():
    """r + c gives the same pi* and log Z + c / beta: it cancels between two responses."""
    reference, rewards, _ = small_space()
    shift = torch.tensor([[3.0], [-40.0]], dtype=torch.float64)
    beta = 0.25
    torch.testing.assert_close(
        optimal_logps(reference, rewards + shift, beta), optimal_logps(reference, rewards, beta)
    )
    torch.testing.assert_close(
        exact_log_partition(reference, rewards + shift, beta),
        exact_log_partition(reference, rewards, beta) + shift[:, 0] / beta,
    )


def test_what_the_reference_never_says_the_optimum_never_says():
    reference = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    optimum = optimal_logps(reference, torch.tensor([0.0, 0.0, 9.0], dtype=torch.float64), 0.1)
    assert optimum.exp().tolist() == pytest.approx([0.5, 0.5, 0.0])


@settings(max_examples=examples(60))
@given(
    logratios=st.lists(st.floats(-800, 800), min_size=1, max_size=16),
    beta=st.floats(0.01, 1.0),
)
def test_float32_probabilities_sum_to_one_at_any_length(logratios, beta):
    """-783, the log-probability of an ordinary response, and others near it and far from it.

    As exact as the scores are, and within 1e-6 of 1 where |log Z| is small enough for float32.
    """
    scores = beta * torch.tensor([-783.0, *logratios])
    group = torch.zeros(len(scores), dtype=torch.int64)
    for values, precision in ((scores, 2**-23), (scores.double(), 2**-52)):
        log_z = log_partition(values, group)
        exact = torch.logsumexp(scores.double(), 0)
        # At -100 a float32 is good to 4e-6, and a probability to no more.
        allowed = 10 * precision + precision * exact.abs().item()
        assert log_z.item() == pytest.approx(exact.item(), abs=allowed)
        assert (values - log_z).double().exp().sum().item() == pytest.approx(1, abs=allowed)


# The estimate ------------------------------------------------------------------------------------


def test_the_estimate_of_two_samples_by_hand():
    """Rewards beta * log(1, 3): weights 1 and 3, mean 2, so log 2 = 0.693147.

    The sample sd is sqrt((1 + 1) / 1) = sqrt 2, the standard error sqrt 2 / (2 sqrt 2) = 1/2, and
    the effective sample size (1 + 3)^2 / (1 + 9) = 1.6.
    """
    rewards = 0.3 * torch.tensor([1.0, 3.0], dtype=torch.float64).log()
    value, stderr, ess = estimate_log_partition(rewards, 0.3)
    assert value.item() == pytest.approx(math.log(2))
    assert stderr.item() == pytest.approx(0.5)
    assert ess.item() == pytest.approx(1.6)


def test_the_estimate_of_equal_and_of_hopeless_samples():
    """Equal weights: no error, ess m. One of m that is all of Z: error 1, ess 1.

    With weights (1, 0, ..., 0) the mean is 1/m and the sample variance
    (1 - 1/m) / (m - 1) = 1/m, so the error is sqrt(1/m) / (1/m * sqrt m) = 1.
    """
    rewards = torch.tensor([[2.0] * 50, [1e4] + [0.0] * 49])
    value, stderr, ess = estimate_log_partition(rewards, 0.5)
    assert value.tolist() == pytest.approx([4.0, 2e4 - math.log(50)])
    assert stderr.tolist() == pytest.approx([0, 1])
    assert ess.tolist() == pytest.approx([50, 1])


def test_a_single_sample_has_no_error_estimate():
    value, stderr, ess = estimate_log_partition(torch.tensor([[3.0], [-1.0]]), 2.0)
    assert value.tolist() == [1.5, -0.5]
    assert stderr.tolist() == [math.inf] * 2
    assert ess.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e6, -1e6])
def test_the_estimate_at_huge_rewards(dtype, size):
    """A common 1e6 shifts the value and nothing else: the rewards' differences are exact."""
    small = torch.tensor([0.0, 0.5, -1.25, 2.0], dtype=dtype)
    value, stderr, ess = estimate_log_partition(size + small, 0.7)
    expected = estimate_log_partition(small, 0.7)
    assert value.item() == pytest.approx(size / 0.7 + expected[0].item(), rel=1e-7)
    torch.testing.assert_close((stderr, ess), expected[1:])
    far = estimate_log_partition(torch.tensor([1e6, -1e6], dtype=dtype), 1.0)
    assert [x.item() for x in far] == pytest.approx([1e6 - math.log(2), 1, 1])


def test_the_mean_weight_is_exactly_z_in_expectation():
    """All 3^4 samples of size 4 from a space of 3, each with its probability: E[exp(value)] = Z."""
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    rewards = torch.tensor([0.4, -1.0, 2.0], dtype=torch.float64)
    draws = torch.cartesian_prod(*[torch.arange(3)] * 4)
    value, stderr, _ = estimate_log_partition(rewards[draws], 0.5)
    probability = reference[draws].sum(1).exp()
    z = exact_log_partition(reference, rewards, 0.5).exp().item()
    assert (probability * value.exp()).sum().item() == pytest.approx(z, rel=1e-12)
    # On the scale of Z the standard error is unbiased too, squared: Var(mean w) = Var(w) / 4.
    variance = (reference.exp() * ((rewards / 0.5).exp() - z).square()).sum().item() / 4
    squared = (stderr * value.exp()).square()
    assert (probability * squared).sum().item() == pytest.approx(variance, rel=1e-12)


def test_the_estimate_gradient_is_the_softmax():
    rewards = torch.tensor([[0.3, -1.0, 2.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    rewards.requires_grad_()
    assert torch.autograd.gradcheck(lambda r: estimate_log_partition(r, 0.7)[0], rewards)
    value, stderr, ess = estimate_log_partition(rewards, 0.7)
    (gradient,) = torch.autograd.grad(value.sum(), rewards)
    torch.testing.assert_close(gradient, (rewards.detach() / 0.7).softmax(-1) / 0.7)
    assert not stderr.requires_grad
    assert not ess.requires_grad


def test_the_estimate_takes_half_precision_up_and_refuses_nonsense():
    assert (
        estimate_log_partition(torch.zeros(3, dtype=torch.bfloat16), 1.0)[0].dtype == torch.float32
    )
    for rewards, beta, message in (
        (torch.zeros(2, 0), 1.0, r"shape \(2, 0\)"),
        (torch.tensor(1.0), 1.0, r"shape \(\)"),
        (torch.zeros(2), 0.0, "beta is 0.0"),
        (torch.zeros(2), math.inf, "beta is inf"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate_log_partition(rewards, beta)


@pytest.fixture(scope="module")
def real():
    """The controlled task's 4681 outcomes: normalised reference logps and rewards, (8, 4681)."""
    task = ControlledTask()
    logps = task.outcome_logps(AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL))
    return logps.log_softmax(1), task.rewards


def test_the_estimate_covers_the_exact_value_of_the_real_task(real):
    """Beta 2, 256 samples, 200 seeds, 8 prompts: the standard error is what it says it is."""
    reference, rewards = real
    exact = exact_log_partition(reference, rewards, 2.0)
    scaled, sizes = [], []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        draws = torch.multinomial(reference.exp(), 256, replacement=True, generator=generator)
        value, stderr, ess = estimate_log_partition(rewards.gather(1, draws), 2.0)
        scaled.append((value - exact) / stderr)
        sizes.append(ess)
    errors, size = torch.stack(scaled), torch.stack(sizes)
    assert size.min() >= 0.1 * 256
    assert (errors.abs() < 3).double().mean(0).min() >= 0.95
    # Neither too small nor too large: 68 percent within one, 95 within two.
    assert errors.std().item() == pytest.approx(1, abs=0.1)


# The exact values in pieces ----------------------------------------------------------------------


RESULTS = (
    "log_z",
    "expected_reward",
    "reference_reward",
    "kl_optimum_reference",
    "kl_reference_optimum",
)


def all_at_once(reference, rewards, beta):
    """The quantities by definition, from the policies themselves."""
    optimum = optimal_logps(reference, rewards, beta)

    def expectation(logps, values):
        return torch.where(logps > -math.inf, logps.exp() * values, 0.0).sum(-1)

    return {
        "log_z": exact_log_partition(reference, rewards, beta),
        "expected_reward": expectation(optimum, rewards),
        "reference_reward": expectation(reference, rewards),
        "kl_optimum_reference": expectation(optimum, optimum - reference),
        "kl_reference_optimum": expectation(reference, reference - optimum),
    }


def stream(reference, rewards, beta, sizes):
    streamed = StreamedPartition(beta)
    parts = zip(reference.split(sizes, -1), rewards.split(sizes, -1), strict=True)
    for part in parts:
        streamed.add(*part)
    return streamed


@settings(max_examples=examples(60))
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=8).filter(sum),
    beta=st.floats(0.05, 5.0),
    offset=st.sampled_from([0.0, 40.0, -40.0]),
    impossible=st.sampled_from([None, "first", "last"]),
    seed=st.integers(0, 10_000),
)
def test_any_chunks_equal_all_at_once(sizes, beta, offset, impossible, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(2, 3, sum(sizes), generator=generator, dtype=torch.float64)
    # Whole chunks may well hold nothing that the reference can say.
    half = sum(sizes) // 2
    if impossible and half:
        logits[..., slice(half) if impossible == "first" else slice(-half, None)] = -math.inf
    reference = logits.log_softmax(-1)
    rewards = offset + torch.randn(2, 3, sum(sizes), generator=generator, dtype=torch.float64)
    streamed = stream(reference, rewards, beta, sizes)
    for name, expected in all_at_once(reference, rewards, beta).items():
        value = getattr(streamed, name)
        assert value.shape == (2, 3)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9, msg=name)
    assert streamed.log_mass.abs().max() < 1e-12


@pytest.mark.parametrize("beta", [0.05, 0.5, 2.0])
def test_the_real_task_in_chunks(real, beta):
    """97 outcomes at a time, in float32 as a model gives them, the rarest ones first."""
    order = real[0].argsort(dim=1)
    reference, rewards = (x.gather(1, order) for x in real)
    streamed = stream(reference.float(), rewards.float(), beta, 97)
    for name, expected in all_at_once(reference, rewards, beta).items():
        value = getattr(streamed, name)
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, expected, rtol=3e-6, atol=3e-6, msg=name)


def test_the_streamed_optimum_by_hand():
    """pi_ref = (1/2, 1/4, 1/4), pi* = (1/4, 1/4, 1/2), Z = 2, r = (0, log 2, log 4) / 2.

    E*[r] = (1/4 * log 2 + 1/2 * log 4) / 2 = 5/8 log 2, E_ref[r] = 3/8 log 2;
    KL(pi* || pi_ref) = 5/4 log 2 - log 2 = 1/4 log 2, the other way log 2 - 3/4 log 2, the same.
    """
    reference = torch.tensor([0.5, 0.25, 0.25]).log()
    rewards = 0.5 * torch.tensor([1.0, 2.0, 4.0]).log()
    streamed = stream(reference, rewards, 0.5, [1, 2])
    values = [getattr(streamed, name).item() / math.log(2) for name in RESULTS]
    assert values == pytest.approx([1, 5 / 8, 3 / 8, 1 / 4, 1 / 4], abs=1e-6)


@pytest.mark.parametrize("size", [1e6, -1e6])
def test_streaming_at_huge_rewards(size):
    """A constant of 1e6 on all rewards moves log Z and the mean rewards, and neither KL."""
    reference, rewards, _ = small_space()
    before = stream(reference, rewards, 1.0, [2, 4])
    after = stream(reference, rewards + size, 1.0, [2, 4])
    for name in RESULTS:
        shift = 0 if name.startswith("kl") else size
        expected = getattr(before, name) + shift
        torch.testing.assert_close(getattr(after, name), expected, rtol=0, atol=1e-8, msg=name)


def test_an_incomplete_space_is_the_reference_restricted_to_it():
    reference, rewards, _ = small_space()
    streamed = StreamedPartition(0.5)
    streamed.add(reference[:, :4], rewards[:, :4])
    expected = all_at_once(reference[:, :4].log_softmax(-1), rewards[:, :4], 0.5)
    for name in RESULTS:
        torch.testing.assert_close(getattr(streamed, name), expected[name], msg=name)
    torch.testing.assert_close(streamed.log_mass, reference[:, :4].logsumexp(-1))
    plain = exact_log_partition(reference[:, :4], rewards[:, :4], 0.5)
    torch.testing.assert_close(streamed.log_z + streamed.log_mass, plain)


def test_streaming_refuses_what_does_not_fit():
    streamed = StreamedPartition(0.5)
    with pytest.raises(ValueError, match="nothing was added"):
        _ = streamed.log_z
    streamed.add(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\(1,\).*\(2,\)"):
        streamed.add(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"rewards \(3,\)"):
        streamed.add(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="beta is -1"):
        StreamedPartition(-1)


@given(st.data())
def test_shares_of_a_group_sum_to_one_in_float32(data):
    """Also where log Z is -783 and a float32 of that size is good to 6e-5 only."""
    beta = data.draw(st.floats(0.01, 1))
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    group = torch.tensor([g for g, size in enumerate(sizes) for _ in range(size)])
    noise = torch.randn(len(group), generator=torch.Generator().manual_seed(len(group)))
    scores = (-783 * beta + noise).float()
    shares = group_shares(scores, group)
    assert shares.dtype == torch.float32
    sums = torch.zeros(len(sizes)).index_add(0, group, shares)
    torch.testing.assert_close(sums, torch.ones(len(sizes)), rtol=0, atol=1e-6)
    plain = (scores.double() - log_partition(scores.double(), group)[group]).exp()
    torch.testing.assert_close(shares.double(), plain, rtol=1e-5, atol=1e-7)
