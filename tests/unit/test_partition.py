"""The partition function, against hand-worked numbers and brute force."""

import math

import pytest
import torch

from dpo_lightning.objectives import exact_log_partition, log_partition, optimal_logps


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
