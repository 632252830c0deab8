"""Answers that a model draws, and the KL divergence that is estimated from them."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lightning.assets import BUNDLED_MODEL
from dpo_lightning.data.controlled import PROMPTS, ControlledTask
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.answers import (
    Answering,
    choose_prompts,
    cut_off_note,
)
from dpo_lightning.evaluation.drawn import evaluate_samples
from dpo_lightning.evaluation.judges import MarkingJudge
from dpo_lightning.evaluation.sampling import answer_prompts, end_ids, sampled_divergences
from dpo_lightning.models.probe import choose_path
from dpo_lightning.reference.kinds import NoReference
from dpo_lightning.reference.pair import Models


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def scorer(reference):
    return choose_path(reference, max_length=16)[0]


@pytest.fixture(scope="module")
def policy(reference, scorer):
    """The reference with some noise: a few nats away."""
    policy = copy.deepcopy(reference)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
    return policy


def prompt_ids() -> list[np.ndarray]:
    return [ids.numpy().astype(np.int32) for ids in ControlledTask().prompt_ids]


def sequence_logp(model, prompt, answer) -> float:
    with torch.no_grad():
        row = torch.tensor([[*prompt, *answer]])
        logps = model(input_ids=row).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return logps.gather(1, torch.tensor(answer)[:, None]).sum().item()


# Answers -----------------------------------------------------------------------------------------


def draw(model, scorer, tokenizer, prompts, *, seed, batch_size=16, max_new_tokens=4):
    return answer_prompts(
        model, scorer, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size,
        seed=seed,
    )  # fmt: skip


def test_answers_are_drawn_from_the_models_own_distribution(policy, scorer, tokenizer):
    """Shares of the first token among 4,000 answers, within four standard errors."""
    prompt = prompt_ids()[2]
    answers = draw(policy, scorer, tokenizer, [prompt] * 4000, seed=1, batch_size=2000)
    with scorer.plain(policy), torch.no_grad():
        expected = policy(input_ids=torch.tensor(prompt[None]).long()).logits[0, -1].softmax(-1)
    for token in range(9):
        share = np.mean([answer[0] == token for answer in answers])
        p = expected[token].item()
        assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / 4000) + 1e-3


def test_a_models_own_generation_settings_sharpen_nothing(policy, scorer, tokenizer):
    sharp = copy.deepcopy(policy)
    sharp.generation_config.update(do_sample=True, top_k=1, temperature=0.01, top_p=0.1)
    prompts = prompt_ids() * 8
    plain = draw(policy, scorer, tokenizer, prompts, seed=5)
    assert [a.tolist() for a in draw(sharp, scorer, tokenizer, prompts, seed=5)] == [
        a.tolist() for a in plain
    ]
    assert len({tuple(a.tolist()) for a in plain}) > 20


def test_answers_end_with_what_ended_them(policy, scorer, tokenizer):
    outcomes = set(ControlledTask().outcomes)
    for answer in draw(policy, scorer, tokenizer, prompt_ids() * 30, seed=2, batch_size=48):
        assert answer.dtype == np.int32
        assert tuple(answer.tolist()) in outcomes


def test_batches_do_not_change_greedy_answers_and_seeds_repeat(policy, scorer, tokenizer):
    prompts = prompt_ids()
    prompts[1] = np.concatenate([prompts[1], prompts[2][1:], prompts[3][1:]])  # another length
    alone = [draw(policy, scorer, tokenizer, [p], seed=None)[0].tolist() for p in prompts]
    together = [a.tolist() for a in draw(policy, scorer, tokenizer, prompts, seed=None)]
    assert together == alone
    state = torch.get_rng_state()
    first = draw(policy, scorer, tokenizer, prompts, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    again = draw(policy, scorer, tokenizer, prompts, seed=7)
    other = draw(policy, scorer, tokenizer, prompts, seed=8)
    assert [a.tolist() for a in first] == [a.tolist() for a in again]
    assert [a.tolist() for a in first] != [a.tolist() for a in other]


def test_the_model_stays_as_it_was(policy, scorer, tokenizer):
    policy.train()
    attention = policy.config._attn_implementation
    draw(policy, scorer, tokenizer, prompt_ids(), seed=1)
    assert policy.training
    assert policy.config._attn_implementation == attention


def test_all_of_a_models_end_tokens_end_an_answer(policy, tokenizer):
    chatty = copy.deepcopy(policy)
    chatty.generation_config.eos_token_id = [3, 5]
    assert end_ids(chatty, tokenizer) == [0, 3, 5]


# KL ----------------------------------------------------------------------------------------------


def divergences(policy, reference, scorer, prompts, answers) -> list[float]:
    return sampled_divergences(policy, reference, scorer, prompts, answers, pad=0)


def test_the_estimate_is_unbiased(policy, reference, scorer):
    """Its mean over all 4,681 outcomes, weighted by the policy, is KL(policy || reference)."""
    task = ControlledTask()
    prompt = prompt_ids()[4]
    with scorer.plain(policy), scorer.plain(reference):
        logps = task.outcome_logps(policy)[4]
        exact = (logps.exp() * (logps - task.outcome_logps(reference)[4])).sum().item()
    answers = [np.array(outcome, dtype=np.int32) for outcome in task.outcomes]
    values = divergences(policy, reference, scorer, [prompt] * len(answers), answers)
    assert min(values) > -1e-5
    assert (logps.exp().numpy() @ np.array(values)) == pytest.approx(exact, rel=1e-4)
    assert exact > 0.1


def test_it_varies_less_than_the_plain_logratio(policy, reference, scorer, tokenizer):
    prompts = prompt_ids() * 40
    answers = draw(policy, scorer, tokenizer, prompts, seed=11, batch_size=320)
    values = divergences(policy, reference, scorer, prompts, answers)
    with scorer.plain(policy), scorer.plain(reference):
        plain = [
            sequence_logp(policy, p, a) - sequence_logp(reference, p, a)
            for p, a in zip(prompts, answers, strict=True)
        ]
    assert np.std(values) < np.std(plain)
    error = math.hypot(np.std(values), np.std(plain)) / math.sqrt(len(plain))
    assert abs(np.mean(values) - np.mean(plain)) < 4 * error


def test_the_same_model_is_nowhere_away_from_itself(reference, scorer, tokenizer):
    prompts = prompt_ids()
    answers = draw(reference, scorer, tokenizer, prompts, seed=1)
    assert divergences(reference, reference, scorer, prompts, answers) == [0.0] * 8


def test_a_token_that_cannot_come_adds_nothing(policy, reference, scorer):
    """By hand: the policy never says token 7, the reference either says it or never does, too.

    The next-token distributions are softmaxes over the other tokens, or over all of the reference;
    the answer has one token, so the estimate is the sum of p log(p / q) where p is not 0.
    """
    with scorer.plain(policy), scorer.plain(reference), torch.no_grad():
        prompt = prompt_ids()[2]
        row = torch.tensor(prompt[None]).long()
        p, q = (model(input_ids=row).logits[0, -1].double() for model in (policy, reference))
    others = [token for token in range(len(p)) if token != 7]
    answer = [np.array([1], dtype=np.int32)]
    for mute, logits in ((without_token_7(reference), q[others]), (reference, q)):
        logps, theirs = p[others].log_softmax(-1), logits.log_softmax(-1)
        theirs = theirs if len(theirs) == len(others) else theirs[others]
        expected = (logps.exp() * (logps - theirs)).sum().item()
        [value] = divergences(without_token_7(policy), mute, scorer, [prompt], answer)
        assert value == pytest.approx(expected, rel=1e-4)
        assert value > 0.01


def without_token_7(model):
    """The model with a bias that token 7 does not survive."""
    mute = copy.deepcopy(model)
    head = mute.get_output_embeddings()
    biased = torch.nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        biased.weight.copy_(head.weight)
        biased.bias.zero_()
        biased.bias[7] = -torch.inf
    mute.set_output_embeddings(biased)
    return mute


def test_padding_and_batches_do_not_change_it(policy, reference, scorer, monkeypatch):
    from dpo_lightning.evaluation import sampling

    prompts = prompt_ids()[:3]
    prompts[0] = np.concatenate([prompts[0], prompts[1][1:]])
    answers = [np.array(a, dtype=np.int32) for a in ([1, 0], [2, 3, 4, 5], [6, 7, 0])]
    alone = [
        divergences(policy, reference, scorer, [p], [a])[0]
        for p, a in zip(prompts, answers, strict=True)
    ]
    assert divergences(policy, reference, scorer, prompts, answers) == pytest.approx(
        alone, rel=1e-4
    )
    monkeypatch.setattr(sampling, "_PASS_SCORES", 1)
    assert divergences(policy, reference, scorer, prompts, answers) == pytest.approx(
        alone, rel=1e-4
    )


# All together ------------------------------------------------------------------------------------


def groups() -> list[TokenGroup]:
    answers = (np.array([1, 0], dtype=np.int32), np.array([2, 0], dtype=np.int32))
    return [
        TokenGroup(ids, answers, (1, 2), 1.0, "f:1", f"s:{text}")
        for ids, text in zip(prompt_ids(), PROMPTS, strict=True)
    ]


def evaluate(policy, reference, scorer, tokenizer, *, count, score=None):
    """Rows and metrics of answers that a function marks."""
    sampled = sample(policy, reference, scorer, tokenizer, count=count, score=score)
    return sampled.rows, sampled.metrics


def sample(policy, reference, scorer, tokenizer, *, count, score=None):
    models = Models(
        policy=policy, reference=NoReference(), scorer=scorer, starts_from_reference=True,
        weights="", reference_weights="", reference_config="", make_reference=lambda: reference,
    )  # fmt: skip
    answering = Answering(
        tokenizer=tokenizer, max_new_tokens=4, batch_size=16, precision=torch.no_grad
    )
    return evaluate_samples(
        models, groups(), count=count, seed=1, answering=answering,
        judge=None if score is None else MarkingJudge(score),
        device=torch.device("cpu"),
    )  # fmt: skip


def test_scores_win_rates_and_errors(policy, reference, scorer, tokenizer):
    """Scores by hand: the policy's answers score 1, 2, 1, 2, ..., the reference's 1 always.

    Wins are 0.5 and 1 in turn: mean 0.75 and, of 10, deviation 0.25 * sqrt(10/9), error that /
    sqrt(10) = 0.08333. The scores' mean is 1.5 and their error twice that.
    """
    calls = []

    def score(prompts, answers):
        calls.append((prompts, answers))
        return [1.0] * 10 if len(calls) == 2 else [1.0 + i % 2 for i in range(10)]

    rows, metrics = evaluate(policy, reference, scorer, tokenizer, count=10, score=score)
    assert metrics["samples/win_rate"] == pytest.approx(0.75)
    assert metrics["samples/win_rate_stderr"] == pytest.approx(0.08333, abs=1e-5)
    assert metrics["samples/judge"] == pytest.approx(1.5)
    assert metrics["samples/judge_stderr"] == pytest.approx(0.16667, abs=1e-5)
    assert metrics["samples/reference_judge"] == 1
    # Ten answers to eight prompts, so that the interval is that of eight: p = 0.75, z² = 3.841459.
    # Middle (0.75 + 3.841459/16) / (1 + 3.841459/8) = 0.668898, half 1.959964 *
    # sqrt(0.1875/8 + 3.841459/256) / 1.480182 = 0.259623.
    interval = [metrics[f"samples/win_rate_{end}"] for end in ("low", "high")]
    assert interval == pytest.approx([0.409275, 0.928521], abs=2e-6)
    # Lengths and shares cut off of both stand beside the marks; this task's answers end themselves.
    both = {f"samples/{who}{name}" for who in ("", "reference_") for name in ("length", "cut_off")}
    assert both <= metrics.keys()
    kls = [row["kl"] for row in rows]
    assert metrics["samples/kl"] == pytest.approx(np.mean(kls))
    assert metrics["samples/kl_stderr"] == pytest.approx(np.std(kls, ddof=1) / math.sqrt(10))
    # Each prompt in turn, as its row has it, and the same for both.
    assert calls[0][0] == calls[1][0] == [*PROMPTS, *PROMPTS[:2]]
    assert [row["policy"] for row in rows] == [a.strip() for a in calls[0][1]]
    assert [row["reference"] for row in rows] == [a.strip() for a in calls[1][1]]


def test_the_answers_of_both_models_are_their_own(policy, reference, scorer, tokenizer):
    """Drawn with the seed of the run, the same for both, as each model by itself draws them."""
    rows, _ = evaluate(
        policy, reference, scorer, tokenizer, count=8, score=lambda _, answers: [1.0] * len(answers)
    )
    said = {}
    for name, model in (("policy", policy), ("reference", reference)):
        drawn = draw(model, scorer, tokenizer, prompt_ids(), seed=1)
        said[name] = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in drawn]
        assert [row[name] for row in rows] == said[name]
    assert said["policy"] != said["reference"]


def test_a_judge_that_fails_costs_its_marks_alone(policy, reference, scorer, tokenizer):
    def broken(prompts, answers):
        raise UserError("the judge is out")

    plain = sample(policy, reference, scorer, tokenizer, count=4)
    sampled = sample(policy, reference, scorer, tokenizer, count=4, score=broken)
    assert sampled.failure == "the judge is out"
    assert [row["policy"] for row in sampled.rows] == [row["policy"] for row in plain.rows]
    assert plain.metrics.items() <= sampled.metrics.items()
    assert "samples/judge" not in sampled.metrics


def test_without_samples_nothing_is_said(policy, reference, scorer, tokenizer):
    assert evaluate(policy, reference, scorer, tokenizer, count=0) == ([], {})
    rows, metrics = evaluate(policy, reference, scorer, tokenizer, count=1)
    assert len(rows) == 1
    assert math.isnan(metrics["samples/kl_stderr"])
    assert "samples/judge" not in metrics


@pytest.mark.parametrize(
    ("cut", "positions", "said"),
    [
        (2, None, None),
        (3, None, "evaluation.max_new_tokens=4: 3 of 4 answers were cut off there, so KL"),
        (
            3,
            16,
            "the model's 16 positions leave 4 tokens behind the longest prompt: 3 of 4",
        ),
    ],
)
def test_answers_that_are_mostly_cut_off_are_said(cut, positions, said):
    answering = Answering(None, 4, 16, torch.no_grad, positions)
    whole = [np.array([1, 0], dtype=np.int32), np.array([1, 1, 1, 0], dtype=np.int32)]
    answers = [np.array([1, 1, 1, 1], dtype=np.int32)] * cut + whole[: 4 - cut]
    note = cut_off_note(answers, [0], answering)
    assert note is None if said is None else note.startswith(said)


def test_answers_that_a_task_keeps_short_are_not_cut_off():
    answers = [np.array([1, 1, 1, 1], dtype=np.int32)] * 3
    assert cut_off_note(answers, [0], Answering(None, 4, 16, torch.no_grad)) is not None
    assert cut_off_note(answers, [0], Answering(None, 4, 16, torch.no_grad, cuts=False)) is None


def test_prompts_are_different_and_leave_room():
    long = TokenGroup(np.arange(50, dtype=np.int32), groups()[0].responses, (1, 2), 1.0, "", "long")
    chosen = choose_prompts([long, *groups(), *groups()], count=5, max_tokens=20)
    assert [group.prompt_key for group in chosen] == [f"s:{text}" for text in PROMPTS[:5]]
