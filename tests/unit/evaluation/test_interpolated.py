"""Mixed logits: answers drawn from them, and the probability of each answer."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lightning.assets import BUNDLED_MODEL
from dpo_lightning.data.controlled import ControlledTask
from dpo_lightning.evaluation.interpolated import Pair, draw_mixed, mixed_logps, score_mixed
from dpo_lightning.evaluation.sampling import sampled_divergences
from dpo_lightning.models.probe import choose_path
from tests.support.models import VOCABULARY, make_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def pair() -> Pair:
    """The bundled model, and the same with some noise."""
    reference = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
    policy = copy.deepcopy(reference)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.06 * torch.randn_like(parameter))
    scorer = choose_path(reference, max_length=16)[0]
    scorer.prepare(policy)
    return Pair(policy, reference, scorer)


@pytest.fixture(scope="module")
def task() -> ControlledTask:
    return ControlledTask()


@pytest.fixture(scope="module")
def exact(pair, task):
    """Log-probabilities of all outcomes at a place."""

    def logps(lam: float) -> torch.Tensor:
        with pair.plain():
            return task.outcome_logps(pair.mixed(lam))

    return logps


def prompt(task: ControlledTask, number: int) -> np.ndarray:
    return task.prompt_ids[number].numpy().astype(np.int32)


# One token ----------------------------------------------------------------------------------------


def logs(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def test_mixed_logits_by_hand():
    """From (1/2, 1/2) towards (1/5, 4/5) the odds are 4^lam: at 2 they are 1 : 16."""
    reference, policy = logs(0.5, 0.5), logs(0.2, 0.8)
    assert mixed_logps(reference, policy, 2.0).exp().tolist() == pytest.approx([1 / 17, 16 / 17])
    assert torch.equal(mixed_logps(reference, policy, 0.0), reference)
    assert torch.allclose(mixed_logps(reference, policy, 1.0), policy)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 3.0])
def test_a_token_that_the_reference_never_says_is_not_said(lam: float):
    """Nor is one that the policy never says, but at the reference itself."""
    found = mixed_logps(logs(0.0, 0.5, 0.5, 0.0), logs(0.0, 0.5, 0.0, 0.5), lam).exp()
    assert found.tolist() == pytest.approx([0, 1, 0, 0] if lam else [0, 0.5, 0.5, 0])


# Whole answers ------------------------------------------------------------------------------------


def test_outcomes_at_both_ends_are_those_of_the_models(pair, task, exact):
    for model, lam in ((pair.reference, 0.0), (pair.policy, 1.0)):
        found = exact(lam)
        with pair.scorer.plain(model) as plain:
            assert torch.allclose(found, task.outcome_logps(plain), atol=1e-5)
    assert torch.allclose(exact(1.7).exp().sum(1), torch.ones(8).double(), atol=1e-5)


def test_answers_have_their_exact_probabilities(pair, task, exact):
    """All answers of up to three tokens to one prompt, under three mixtures.

    Those that end by themselves are outcomes of the task; what is cut off shares what is left.
    The KL that is summed token by token has the exact one as its mean: over all answers, each by
    its own probability.
    """
    lambdas = [0.0, 1.0, 1.7]
    ended = [place for place, outcome in enumerate(task.outcomes) if len(outcome) <= 3]
    cut = itertools.product(range(1, 9), repeat=3)
    answers = [np.array(y, dtype=np.int32) for y in (*(task.outcomes[i] for i in ended), *cut)]
    found = score_mixed(
        pair,
        [prompt(task, 5)] * len(answers),
        answers,
        own=[2] * len(answers),
        lambdas=lambdas,
        pad=0,
    )
    for place, lam in enumerate(lambdas):
        assert torch.allclose(found.logps[: len(ended), place], exact(lam)[5, ended], atol=2e-5)
        assert float(found.logps[:, place].exp().sum()) == pytest.approx(1, abs=1e-5)
    reference, _, own = found.logps.unbind(1)
    expected = float((own.exp() * (own - reference)).sum())
    assert expected > 0.3
    assert float((own.exp() * found.kl).sum()) == pytest.approx(expected, rel=1e-4)


def test_each_answer_has_the_kl_of_its_own_mixture(pair, task):
    """That of the policy is the one that a run reports, and the reference's is 0."""
    answers = [np.array([1, 2, 0], dtype=np.int32), np.array([3, 3, 4, 1], dtype=np.int32)] * 2
    prompts = [prompt(task, i) for i in (0, 3, 3, 0)]
    found = score_mixed(pair, prompts, answers, own=[1, 0, 0, 1], lambdas=[0.0, 1.0], pad=0)
    told = sampled_divergences(pair.policy, pair.reference, pair.scorer, prompts, answers, pad=0)
    assert found.kl.tolist() == pytest.approx([told[0], 0.0, 0.0, told[3]], abs=1e-6)


def test_answers_are_drawn_by_their_probabilities(pair, task, tokenizer, exact):
    """Shares of the likeliest outcomes among 1,200 answers, within four standard errors."""
    asked = [prompt(task, 2)] * 1200
    answers = draw_mixed(pair, tokenizer, asked, 1.7, max_new_tokens=4, batch_size=600, seed=1)
    drawn = [tuple(ids.tolist()) for ids in answers]
    assert {*drawn} <= {*task.outcomes}
    chances = exact(1.7)[2].exp()
    for place in chances.topk(8).indices.tolist():
        p = float(chances[place])
        share = drawn.count(task.outcomes[place]) / len(drawn)
        assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / len(drawn))


def test_seeds_repeat_and_differ_and_touch_no_generator(pair, task, tokenizer):
    asked = [prompt(task, i % 8) for i in range(40)]
    state = torch.get_rng_state()

    def draw(seed: int) -> list[list[int]]:
        answers = draw_mixed(
            pair, tokenizer, asked, 0.5, max_new_tokens=4, batch_size=16, seed=seed
        )
        return [ids.tolist() for ids in answers]

    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3-text", "mamba"])
def test_tokens_that_come_one_by_one_are_seen_with_all_before(family: str, tokenizer):
    """At 4,000 times the way one token is all but certain, and a plain loop finds the same ones.

    Prompts of 3, 5 and 4 tokens stand together; mamba's state is of another kind, so alone.
    """
    reference, policy = make_model(family), make_model(family, seed=1)
    scorer = choose_path(reference, max_length=16)[0]
    scorer.prepare(policy)
    draw = np.random.default_rng(0)
    lengths = [4] if family == "mamba" else [3, 5, 4]
    prompts = [draw.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths]
    pair = Pair(policy, reference, scorer)
    with pair.plain():
        model = pair.mixed(4000.0)
        expected = []
        for ids in prompts:
            row = torch.tensor(ids[None]).long()
            with torch.no_grad():
                for _ in range(5):
                    best = model(input_ids=row).logits[:, -1].argmax(-1, keepdim=True)
                    row = torch.cat([row, best], dim=1)
            expected.append(row[0, len(ids) :].tolist())
    found = draw_mixed(pair, tokenizer, prompts, 4000.0, max_new_tokens=5, batch_size=4, seed=0)
    for answer, whole in zip(found, expected, strict=True):
        assert answer.tolist() == whole[: len(answer)]
        assert len(answer) == 5 or answer[-1] in (0, 2)
