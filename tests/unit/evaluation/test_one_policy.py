"""Points of the frontier of one policy, from answers that were drawn."""

import numpy as np
import pytest
import torch

from dpo_lightning.evaluation import one_policy, reweighting
from dpo_lightning.evaluation.interpolated import AnswerScores
from dpo_lightning.evaluation.one_policy import (
    ANSWERS,
    Axis,
    Drawn,
    Mixture,
    decoded_point,
    gather,
    plan_mixtures,
    weighted_point,
)

BETA = Axis(0.5, all_prompts=False)


@pytest.mark.parametrize(("prompts", "few"), [(1, 16), (8, 16), (20, 13), (64, 4), (1000, 4)])
def test_mixtures_have_answers_for_a_mean_between_them(prompts: int, few: int):
    """256 answers of each mixture, but 4 to 16 to a prompt; policy and reference always have 16."""
    found = plan_mixtures([2.0, 1.0, 0.5, 0.5, 0.0], prompts=prompts, seed=3)
    assert [(m.lam, m.count) for m in found] == [(0, 16), (1, 16), (0.5, few), (2, few)]


def test_seeds_are_independent_and_repeat():
    found, again, other = (
        [m.seed for m in plan_mixtures([0.5, 2.0], prompts=8, seed=seed)] for seed in (3, 3, 4)
    )
    assert found == again
    assert len({*found, *other}) == 8


def drawn(rewards: bool = True) -> Drawn:
    """Two prompts, two answers of each of three mixtures; answers are told apart by their id."""
    mixtures = [Mixture(0.0, 2, 1), Mixture(1.0, 2, 2), Mixture(0.5, 2, 3)]
    answers = [[np.array([10 * m + i]) for i in range(4)] for m in range(3)]

    def score(every, own):
        ids = [int(answer[0]) for answer in every]
        assert own == [i // 10 for i in ids]
        logps = torch.tensor([[-float(i), -1.0, -2.0] for i in ids]).double()
        return AnswerScores(logps, torch.tensor(ids).double() / 10)

    def judge(every):
        return [float(answer[0]) for answer in every]

    return gather(mixtures, answers, score=score, judge=judge if rewards else None, prompts=2)


def test_answers_are_put_together_by_prompt():
    """Of four answers of a mixture the first two are to the first prompt."""
    found = drawn()
    assert found.rewards.tolist() == [[0, 1, 10, 11, 20, 21], [2, 3, 12, 13, 22, 23]]
    assert found.logps[..., 0].tolist() == (-found.rewards).tolist()
    assert [[int(ids[0]) for ids in row] for row in found.answers] == found.rewards.tolist()
    assert found.of(2) == slice(4, 6)


def test_a_decoded_point_is_of_its_own_answers():
    """Marks 20, 21 and 22, 23: means 20.5 and 22.5, so 21.5; t of one degree is 12.7062.

    Within: each mean has variance 1/2 / 2 = 1/4, both 1/2, over two prompts sqrt(1/2) / 2, with
    two degrees of freedom t = 4.3027.
    """
    point = decoded_point(drawn(), 2, BETA)
    assert (point["lambda"], point["beta"], point["method"]) == (0.5, 1.0, "decoded")
    assert point["reward"] == 21.5
    assert point["reward_interval"] == pytest.approx([21.5 - 12.7062, 21.5 + 12.7062], abs=1e-4)
    half = 4.302653 * 0.5**0.5 / 2
    assert point["reward_interval_within"] == pytest.approx([21.5 - half, 21.5 + half], abs=1e-5)
    assert point["kl"] == pytest.approx(2.15)
    assert point["ess"] == 2


def test_the_interval_is_of_these_prompts_where_there_are_no_others():
    point = decoded_point(drawn(), 2, Axis(0.5, all_prompts=True))
    assert point["reward_interval"] == point["reward_interval_within"]


def test_places_have_a_beta_where_there_is_one():
    """The reference is where beta is infinite."""
    assert BETA.place(2.0) == {"lambda": 2.0, "beta": 0.25}
    assert BETA.place(0.0) == {"lambda": 0.0, "beta": None}
    assert Axis(None, all_prompts=True).place(2.0) == {"lambda": 2.0, "beta": None}


def answers_of(logps: torch.Tensor, rewards: torch.Tensor | None) -> Drawn:
    mixtures = [Mixture(0.0, ANSWERS, 1), Mixture(1.0, ANSWERS, 2)]
    return Drawn(mixtures, logps, torch.zeros(len(logps), 2 * ANSWERS), rewards, [])


def test_a_weighted_point_that_rests_on_enough_is_shown():
    """Of equal models all weights are 1: 32 answers to each prompt, and their mean."""
    rewards = torch.arange(64.0).double().view(2, 32)
    point, why = weighted_point(answers_of(torch.zeros(2, 32, 2).double(), rewards), 0.5, BETA)
    assert why is None
    assert (point["method"], point["ess"]) == ("weights", 32)
    assert (point["reward"], point["kl"]) == pytest.approx((31.5, 0.0))
    bare, _ = weighted_point(answers_of(torch.zeros(2, 32, 2).double(), None), 0.5, BETA)
    assert (bare["reward"], bare["reward_interval"]) == (None, None)


def test_one_that_rests_on_few_has_no_value_and_says_why():
    """One answer of 32 is worth all others together, and more."""
    logps = torch.zeros(2, 32, 2).double()
    logps[:, 16, 1] = 9.0
    point, why = weighted_point(answers_of(logps, torch.ones(2, 32).double()), 2.0, BETA)
    assert "reward" not in point
    assert "kl" not in point
    assert why == f"its effective sample is {point['ess']:.1f} answers a prompt, below 14"


def test_one_whose_weights_have_a_heavy_tail_says_so(monkeypatch):
    """Enough answers at most prompts, and a few weights that are far above all others.

    With a lower bound, as samples with such a tail seldom have enough answers.
    """
    for module in (reweighting, one_policy):
        monkeypatch.setattr(module, "MOST_PARETO_K", 0.4)
    torch.manual_seed(0)
    logps = torch.zeros(40, 32, 2).double()
    logps[..., 1] = 0.05 * torch.randn(40, 32)
    logps[:2, 0, 1] = 2.3
    point, why = weighted_point(answers_of(logps, None), 1.5, BETA)
    assert point["ess"] > 14
    assert why == (
        f"the tail of its weights has Pareto k {point['pareto_k']:.2f}, and only below 0.4 a mean "
        "settles"
    )
