"""Answers whose draws depend on a seed and their own prompt: distributions, batches, limits."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from dpo_lightning.evaluation.interpolated import Pair
from dpo_lightning.evaluation.keyed import (
    DrawnFrom,
    Sampling,
    choose_tokens,
    draw_keyed,
    drawn_from,
    noise_seed,
)
from dpo_lightning.models.rope import RopeLengths
from dpo_lightning.models.scoring import Scorer
from tests.support.models import tiny_llama_config

VOCABULARY = 23
END = 1


def model_of(config, seed: int):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # far from uniform, so that a slip changes tokens
        parameter.data *= 8
    return model


@pytest.fixture(scope="module")
def pair() -> Pair:
    config: LlamaConfig = tiny_llama_config(vocab_size=VOCABULARY)
    policy, reference = model_of(config, 1), model_of(config, 2)
    return Pair(policy, reference, Scorer("padded", RopeLengths({}), {}))


def prompts() -> list[np.ndarray]:
    dice = np.random.default_rng(5)
    return [dice.integers(3, VOCABULARY, size=n).astype(np.int32) for n in (2, 9, 5, 2, 7)]


def draw(pair: Pair, asked, sampling: Sampling, *, lam=1.0, batch_size=2, positions=None):
    return draw_keyed(
        DrawnFrom(pair, lam),
        asked,
        sampling,
        ends=[END],
        pad=0,
        positions=positions,
        batch_size=batch_size,
    )


def test_tokens_come_with_their_probability():
    """Of 4000 draws each share lies within four standard errors, sqrt(p(1-p)/4000), of p."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    count = 4000
    generators = [torch.Generator().manual_seed(noise_seed(n, np.array([7]))) for n in range(count)]
    drawn = choose_tokens(p.log().expand(count, 5), Sampling(), generators)
    shares = torch.bincount(drawn, minlength=5) / count
    assert ((shares - p).abs() <= 4 * (p * (1 - p) / count).sqrt()).all()


def test_temperature_and_top_p_by_hand():
    """p = .5 .3 .15 .05. Before the second stands .5 < .6, before the third .8: two are left.

    They become .5/.8 = .625 and .375. At temperature 1/2 all are squared: .25 .09 .0225 .0025 over
    .365; with top-p .6 before the second stands .685: one is left.
    """
    logps = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    plain = drawn_from(logps, Sampling(top_p=0.6)).exp()[0]
    assert plain.tolist() == pytest.approx([0, 0.625, 0, 0.375])
    sharp = drawn_from(logps, Sampling(temperature=0.5)).exp()[0]
    assert sharp.tolist() == pytest.approx([x / 0.365 for x in (0.0225, 0.25, 0.0025, 0.09)])
    both = drawn_from(logps, Sampling(temperature=0.5, top_p=0.6)).exp()[0]
    assert both.tolist() == pytest.approx([0, 1, 0, 0])
    least = drawn_from(logps, Sampling(top_p=1e-9)).exp()[0]
    assert least.tolist() == pytest.approx([0, 1, 0, 0])


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_neither_batch_nor_order_changes_an_answer(pair, lam):
    sampling = Sampling(max_new_tokens=12, seed=3)
    asked = prompts()
    one = draw(pair, asked, sampling, lam=lam, batch_size=1)
    all_at_once = draw(pair, asked, sampling, lam=lam, batch_size=5)
    turned = draw(pair, asked[::-1], sampling, lam=lam, batch_size=3)[::-1]
    assert [x.tolist() for x in one] == [x.tolist() for x in all_at_once]
    assert [x.tolist() for x in one] == [x.tolist() for x in turned]
    assert len({tuple(x.tolist()) for x in one}) == len(one)
    other = draw(pair, asked, Sampling(max_new_tokens=12, seed=4), lam=lam)
    assert [x.tolist() for x in other] != [x.tolist() for x in one]


@torch.no_grad()
def by_hand(pair: Pair, prompt, lam: float, longest: int) -> list[int]:
    """The likeliest token of mixed logits, each time from a whole forward pass of both."""
    ids = list(map(int, prompt))
    for _ in range(longest):
        p, q = (
            model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            for model in (pair.policy, pair.reference)
        )
        ids.append(int((q + lam * (p - q)).argmax()))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0, 1.7])
def test_greedy_answers_are_those_of_whole_passes(pair, lam):
    asked = prompts()
    found = draw(pair, asked, Sampling(temperature=0, max_new_tokens=10), lam=lam, batch_size=3)
    assert [x.tolist() for x in found] == [by_hand(pair, ids, lam, 10) for ids in asked]


def test_positions_end_an_answer_and_the_others_go_on():
    """Of 12 positions prompts of 2 and 9 leave 10 and 3; what has ended looks up no position."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=12)
    model = model_of(config, 1)
    pair = Pair(model, model, Scorer("padded", RopeLengths({}), {}))
    asked = prompts()[:2]
    found = draw_keyed(
        DrawnFrom(pair),
        asked,
        Sampling(max_new_tokens=20),
        ends=[],
        pad=0,
        positions=12,
        batch_size=2,
    )
    assert [len(ids) for ids in found] == [10, 3]


def test_an_answer_ends_with_its_end(pair):
    found = draw(pair, prompts(), Sampling(max_new_tokens=60), batch_size=5)
    ended = [ids for ids in found if END in ids.tolist()]
    assert ended
    assert all(ids.tolist().index(END) == len(ids) - 1 for ids in ended)
    assert all(len(ids) == 60 for ids in found if END not in ids.tolist())


def test_the_seed_of_a_prompt_is_of_both():
    ids = np.array([3, 4], dtype=np.int32)
    seeds = {noise_seed(seed, row) for seed in (1, 2) for row in (ids, ids[:1], ids[::-1])}
    assert len(seeds) == 6
    assert noise_seed(1, ids) == noise_seed(1, ids.astype(np.int64))
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert math.log2(max(seeds)) > 50
