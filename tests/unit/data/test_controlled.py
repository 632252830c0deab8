"""The controlled task and the bundled model: exact quantities against independent slow ones."""

import json
import math
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dpo_lightning.assets import BUNDLED_MODEL
from dpo_lightning.assets.make_tiny_llama import author_chain, author_logps, make
from dpo_lightning.data.controlled import (
    END,
    MAX_TOKENS,
    PROMPTS,
    WORDS,
    ControlledTask,
    word_values,
)


@pytest.fixture(scope="module")
def task() -> ControlledTask:
    return ControlledTask()


@pytest.fixture(scope="module")
def bundled() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)


@pytest.fixture(scope="module")
def reference_logps(task, bundled) -> torch.Tensor:
    return task.outcome_logps(bundled)


def random_model(vocabulary: int = 9) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.5,
        )
        return LlamaForCausalLM(config).eval()


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p || q) averaged over the prompts, for logps where p may be -inf."""
    return torch.where(p.isfinite(), p.exp() * (p - q), 0.0).sum(1).mean().item()


# The space and the reward ------------------------------------------------------------------------


def test_the_outcomes_are_all_that_four_tokens_can_say(task):
    """1 + 8 + 64 + 512 that end and 8**4 = 4096 that are cut: 4681, all different.

    No outcome begins another, so no sampled text could be two of them.
    """
    outcomes = task.outcomes
    assert len(outcomes) == len(set(outcomes)) == 4681
    assert Counter(map(len, outcomes)) == {1: 1, 2: 8, 3: 64, 4: 512 + 4096}
    assert all((y[-1] == END) != (END not in y) for y in outcomes)
    beginnings = {y[:n] for y in outcomes for n in range(1, len(y))}
    assert not beginnings & set(outcomes)


def test_the_reward_is_the_sum_of_the_words_values(task):
    values = word_values()
    draw = random.Random(0)
    for _ in range(50):
        p, y = draw.randrange(8), draw.randrange(4681)
        by_hand = sum(values[p][token - 1] for token in task.outcomes[y] if token != END)
        assert task.rewards[p, y].item() == pytest.approx(by_hand, abs=1e-12)
    assert task.rewards[:, task.outcomes.index((END,))].tolist() == [0.0] * 8
    assert len({tuple(row) for row in values}) == 8, "every prompt has values of its own"


# Probabilities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["bundled", "random"])
def test_probabilities_sum_to_one(task, bundled, which):
    logps = task.outcome_logps(bundled if which == "bundled" else random_model())
    assert logps.shape == (8, 4681)
    assert logps.dtype == torch.float64
    assert (logps.exp().sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("which", ["bundled", "random"])
def test_outcome_logps_equal_a_plain_loop(task, bundled, which):
    """Token by token, one forward per token, for 20 outcomes of every length."""
    model = bundled if which == "bundled" else random_model()
    logps = task.outcome_logps(model)
    draw = random.Random(1)
    chosen = [0, 3, 40, 500, *(draw.randrange(4681) for _ in range(16))]
    for y in chosen:
        p = draw.randrange(8)
        ids = [END, *(WORDS.index(word) + 1 for word in PROMPTS[p].split())]
        total = 0.0
        for token in task.outcomes[y]:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            total += logits.log_softmax(-1)[token].item()
            ids.append(token)
        assert logps[p, y].item() == pytest.approx(total, abs=1e-4)


def test_generation_says_only_outcomes_and_as_often_as_they_are_likely(
    task, bundled, reference_logps
):
    """400 samples of one prompt: shares of the first word within 4 standard errors."""
    shipped = json.loads((BUNDLED_MODEL / "generation_config.json").read_text())
    assert shipped["max_new_tokens"] == MAX_TOKENS
    prompt = task.prompt_ids[3].expand(400, -1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = bundled.generate(prompt, attention_mask=torch.ones_like(prompt))[:, 3:].tolist()
    said = [tuple(y[: y.index(END) + 1]) if END in y else tuple(y) for y in ids]
    assert set(said) <= set(task.outcomes)
    probabilities = reference_logps[3].exp()
    for token in range(1, 9):
        share = sum(y[0] == token for y in said) / 400
        here = torch.tensor([y[0] == token for y in task.outcomes])
        expected = probabilities[here].sum().item()
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 400) + 1e-3


# The report --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_report_equals_a_loop_over_outcomes(task, reference_logps, beta):
    """The report written out again in numpy, prompt by prompt, from the definitions."""
    policy_logps = task.outcome_logps(random_model())
    found: dict[str, list[float]] = {}
    for p in range(8):
        r = task.rewards[p].numpy()
        pi, ref = np.exp(policy_logps[p].numpy()), np.exp(reference_logps[p].numpy())
        log_weight = np.log(ref) + r / beta
        log_z = log_weight.max() + np.log(np.exp(log_weight - log_weight.max()).sum())
        best = np.exp(log_weight - log_z)
        log_best = log_weight - log_z
        logs = {"policy": np.log(pi), "reference": np.log(ref), "optimum": log_best}
        weights = {"policy": pi, "reference": ref, "optimum": best}
        here = {
            "expected_reward": pi @ r,
            "reference_reward": ref @ r,
            "optimal_reward": best @ r,
            "log_z": log_z,
            "probability_sum": pi.sum(),
        }
        for a, b in (
            ("policy", "reference"),
            ("reference", "policy"),
            ("optimum", "policy"),
            ("policy", "optimum"),
            ("optimum", "reference"),
        ):
            here[f"kl_{a}_{b}"] = weights[a] @ (logs[a] - logs[b])
        for name, value in here.items():
            found.setdefault(name, []).append(value)
    report = task.report(policy_logps, reference_logps, beta=beta)
    assert set(report) == {*found, "optimal_reward_at_kl", "gain_ratio"}
    for name, values in found.items():
        assert report[name] == pytest.approx(np.mean(values), rel=1e-9), name


def test_the_gain_is_compared_with_the_best_at_the_same_kl(task, reference_logps):
    """The optimum at any beta is itself on the frontier; halfway in probability is below it."""
    from dpo_lightning.objectives.partition import optimal_logps

    optimum = optimal_logps(reference_logps, task.rewards, 0.7)
    report = task.report(optimum, reference_logps, beta=0.1)
    assert report["optimal_reward_at_kl"] == pytest.approx(report["expected_reward"], rel=1e-6)
    assert report["gain_ratio"] == pytest.approx(1, abs=1e-6)
    mixture = ((optimum.exp() + reference_logps.exp()) / 2).log()
    mixed = task.report(mixture, reference_logps, beta=0.1)
    # The gain in reward is halved by mixing; the curve says what its KL could have bought.
    gain = (report["expected_reward"] - report["reference_reward"]) / 2
    assert mixed["expected_reward"] - mixed["reference_reward"] == pytest.approx(gain, rel=1e-6)
    best = mixed["optimal_reward_at_kl"] - mixed["reference_reward"]
    assert mixed["gain_ratio"] == pytest.approx(gain / best, rel=1e-9)
    assert 0.5 < mixed["gain_ratio"] < 0.95
    # Sorted points of the frontier: no KL buys less reward than a smaller one.
    points = task.frontier(reference_logps, points=12)
    assert [p["kl"] for p in points] == sorted(p["kl"] for p in points)
    assert [p["reward"] for p in points] == sorted(p["reward"] for p in points)
    assert math.isnan(task.report(reference_logps, reference_logps, beta=1.0)["gain_ratio"])


def test_the_report_of_the_reference_and_of_the_optimum(task, reference_logps):
    """A policy is 0 away from itself; at pi*, E[r] - beta KL(pi* || pi_ref) = beta log Z."""
    beta = 0.5
    same = task.report(reference_logps, reference_logps, beta=beta)
    assert same["kl_policy_reference"] == same["kl_reference_policy"] == 0
    assert same["expected_reward"] == same["reference_reward"] < same["optimal_reward"]
    gain = same["optimal_reward"] - beta * same["kl_optimum_reference"]
    assert gain == pytest.approx(beta * same["log_z"], rel=1e-9)


def test_what_a_policy_never_says_counts_nothing(task, reference_logps):
    """-inf in both: 0 * (-inf - -inf) must not make the report nan."""
    certain = torch.full_like(reference_logps, -math.inf)
    certain[:, 5] = 0.0
    report = task.report(certain, reference_logps, beta=0.1)
    assert report["expected_reward"] == pytest.approx(task.rewards[:, 5].mean().item())
    assert report["kl_policy_reference"] == pytest.approx(-reference_logps[:, 5].mean().item())
    assert report["kl_reference_policy"] == math.inf
    assert report["probability_sum"] == 1


# The pairs ---------------------------------------------------------------------------------------


def indices(task: ControlledTask, groups) -> np.ndarray:
    """Pairs as an array (n, 3): prompt, chosen, rejected."""
    index = {y: i for i, y in enumerate(task.outcomes)}
    return np.array(
        [
            [PROMPTS.index(g.prompt_key), *(index[tuple(y.tolist())] for y in g.responses)]
            for g in groups
        ]
    )


def test_pairs_follow_the_reference_and_the_bradley_terry_labels(task, reference_logps):
    """20,000 pairs: prompts, first words and label shares within 4.5 standard errors."""
    n = 20_000
    groups = task.groups(n, seed=5, reference_logps=reference_logps)
    pairs = indices(task, groups)
    prompt, chosen, rejected = pairs.T
    assert len(groups) == n
    assert (chosen != rejected).all()
    assert (pairs[:, 1:] != 0).all()
    assert all(g.ranks == (1, 2) and g.weight == 1.0 for g in groups[:50])
    np.testing.assert_array_equal(groups[7].prompt, task.prompt_ids[prompt[7]].numpy())

    assert np.abs(np.bincount(prompt, minlength=8) / n - 1 / 8).max() < 4.5 * math.sqrt(
        1 / 8 * 7 / 8 / n
    )
    first = np.array([y[0] for y in task.outcomes])
    for p in range(8):
        probabilities = reference_logps[p].exp().numpy()
        here = pairs[prompt == p][:, 1:].ravel()
        for token in range(1, 9):
            expected = probabilities[first == token].sum()
            share = (first[here] == token).mean()
            # Equal pairs are drawn again, which moves the shares a little.
            assert abs(share - expected) < 4.5 * math.sqrt(expected / len(here)) + 0.005

    gap = (task.rewards[prompt, chosen] - task.rewards[prompt, rejected]).numpy()
    for low, high in ((0.2, 1.0), (1.0, 2.0), (2.0, 4.0)):
        near = np.abs(gap)[(np.abs(gap) > low) & (np.abs(gap) < high)]
        right = (gap[(np.abs(gap) > low) & (np.abs(gap) < high)] > 0).mean()
        expected = (1 / (1 + np.exp(-near))).mean()
        assert abs(right - expected) < 4.5 * math.sqrt(0.25 / len(near))


def test_empty_and_equal_responses_are_drawn_again(task):
    """A reference that says nothing half of the time, and else one of two words."""
    logps = torch.full((8, 4681), -math.inf, dtype=torch.float64)
    logps[:, 0], logps[:, 1], logps[:, 2] = math.log(0.5), math.log(0.25), math.log(0.25)
    pairs = indices(task, task.groups(300, seed=1, reference_logps=logps))
    assert {tuple(sorted(pair)) for pair in pairs[:, 1:].tolist()} == {(1, 2)}


def test_a_seed_is_a_data_set(task, reference_logps):
    def draw(seed):
        return indices(task, task.groups(200, seed=seed, reference_logps=reference_logps)).tolist()

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_bayes_accuracy(task, reference_logps):
    """At least 0.8 on the task's pairs, and the mean of sigmoid(|r1 - r2|) of any."""
    groups = task.groups(4000, seed=0, reference_logps=reference_logps)
    prompt, chosen, rejected = indices(task, groups).T
    gap = (task.rewards[prompt, chosen] - task.rewards[prompt, rejected]).abs()
    bayes = task.bayes_accuracy(groups)
    assert bayes == pytest.approx(gap.sigmoid().mean().item(), abs=1e-9)
    assert bayes >= 0.8
    one = task.bayes_accuracy(groups[:1])
    assert one == pytest.approx(1 / (1 + math.exp(-gap[0].item())))


def test_single_responses_follow_the_reference_and_a_logistic_of_their_reward(
    task, reference_logps
):
    """20,000 of them: shares of first words, and of desirable ones by reward, to 4.5 errors."""
    n = 20_000
    groups = task.labelled(n, seed=5, reference_logps=reference_logps)
    prompt, outcome = indices(task, groups).T
    assert len(groups) == n
    assert (outcome != 0).all()
    assert all(g.ranks == (1,) and g.weight == 1.0 and g.mismatched is None for g in groups[:50])
    first = np.array([y[0] for y in task.outcomes])
    for p in range(8):
        probabilities = reference_logps[p].exp().numpy()
        probabilities[0] = 0  # what is empty is drawn again
        probabilities /= probabilities.sum()
        here = first[outcome[prompt == p]]
        for token in range(1, 9):
            expected = probabilities[first == token].sum()
            assert abs((here == token).mean() - expected) < 4.5 * math.sqrt(expected / len(here))
    reward = task.rewards[prompt, outcome].numpy()
    label = np.array([g.label for g in groups])
    for low, high in ((-9, -1), (-1, 0), (0, 1), (1, 9)):
        near = (reward >= low) & (reward < high)
        expected = (1 / (1 + np.exp(-reward[near]))).mean()
        assert abs(label[near].mean() - expected) < 4.5 * math.sqrt(0.25 / near.sum())
    guessed = (1 / (1 + np.exp(-np.abs(reward)))).mean()
    assert task.bayes_accuracy(groups) == pytest.approx(guessed, abs=1e-9)
    again = task.labelled(50, seed=5, reference_logps=reference_logps)
    assert len({g.prompt_key for g in again}) > 1


# The bundled files -------------------------------------------------------------------------------


def test_the_tokenizer_loses_no_text(task):
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    assert tokenizer(list(PROMPTS)).input_ids == task.prompt_ids.tolist()
    assert len(tokenizer) == 9
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == END
    assert tokenizer(" ".join(WORDS), add_special_tokens=False).input_ids == list(range(1, 9))
    assert tokenizer.decode([1, 2, END], skip_special_tokens=True) == "sun rain"
    for text in ("sunny", "sun, rain", "Sun"):
        with pytest.raises(Exception, match=r"\[UNK\]"):
            tokenizer(text)


def test_the_bundled_model_is_small_and_speaks_the_authors_language(bundled, reference_logps):
    files = {path.name: path.stat().st_size for path in BUNDLED_MODEL.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 2e6
    assert {p.dtype for p in bundled.parameters()} == {torch.float32}
    assert bundled.config.tie_word_embeddings
    assert divergence(author_logps(), reference_logps) < 0.002
    assert reference_logps[:, 0].exp().max() < 1e-3, "the author is never silent"


def test_the_authors_chain_is_a_distribution():
    torch.testing.assert_close(author_chain().sum(-1), torch.ones(8, 9, dtype=torch.float64))
    assert author_logps().exp().sum(1).tolist() == pytest.approx([1.0] * 8)
    assert author_chain()[:, 0, END].tolist() == [0.0] * 8


@pytest.mark.slow
def test_the_maker_makes_the_shipped_model_again(task, reference_logps, tmp_path):
    """Same settings and tokenizer; the same language within what rounding does to training."""
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    learned = make(tmp_path / "model")
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's draws stay its own"
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        again, shipped = (
            json.loads((f / name).read_text()) for f in (tmp_path / "model", BUNDLED_MODEL)
        )
        again.pop("transformers_version", None)
        shipped.pop("transformers_version", None)
        assert again == shipped
    logps = task.outcome_logps(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert divergence(reference_logps, logps) < 1e-3
    assert learned < 0.002


@pytest.mark.long
def test_the_maker_is_a_command(tmp_path):
    command = [sys.executable, "-m", "dpo_lightning.assets.make_tiny_llama"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "m"), "--steps", "12"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "KL(author || model)" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"m"}, "no scratch folder is left"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").config.vocab_size == 9
