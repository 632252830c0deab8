"""Several answers to each prompt: each token by hand, exact distributions, batches, ranks, ends."""

import contextlib
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from dpo_lightning.assets import BUNDLED_MODEL
from dpo_lightning.data.controlled import MAX_TOKENS, ControlledTask
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation import rows_written
from dpo_lightning.evaluation.backends import BackendDrawer
from dpo_lightning.evaluation.many_answers import (
    RoundDraws,
    draw_answers,
    draw_batch,
    plan_batches,
)
from dpo_lightning.evaluation.noise import answer_keys
from dpo_lightning.evaluation.writers import way_of
from dpo_lightning.models.adapters import Adapters, LoraSettings
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.models.sharding import shard_model
from dpo_lightning.plugins import SAMPLERS, register_sampler
from dpo_lightning.settings.generation import Backend
from tests.support.models import _LLAMA_LIKE, FAMILIES, PADDED_ONLY, VOCABULARY, make_model
from tests.support.noise import race
from tests.support.ranks import on_ranks
from tests.support.vllm_module import install

END = 2
TOKENIZER = SimpleNamespace(eos_token_id=END)
DRAWS = RoundDraws(num_generations=3, temperature=1.5, max_new_tokens=9, seed=4, round=1)


def some_prompts(*lengths: int, seed: int = 5) -> list[np.ndarray]:
    dice = np.random.default_rng(seed)
    return [dice.integers(3, VOCABULARY, size=n).astype(np.int32) for n in lengths]


def prepared(family: str, path: str):
    model, scorer = make_model(family), Scorer(path)
    scorer.prepare(model)
    return model, scorer


def lists(answers) -> list[list[list[int]]]:
    return [[ids.tolist() for ids in own] for own in answers]


def drawn(model, scorer, prompts, draws=DRAWS, *, batch_tokens=10**6, **options):
    """The answers to all prompts, in their order."""
    found: list = [None] * len(prompts)
    several = draw_answers(
        model, scorer, TOKENIZER, prompts, draws, batch_tokens=batch_tokens, **options
    )
    for numbers, answers in several:
        for number, own in zip(numbers, lists(answers), strict=True):
            found[number] = own
    return found


@torch.no_grad()
def check_by_hand(plain, prompts, answers, draws, *, ends=(END,), most=None) -> None:
    """Each token wins the race of its noise by the scores of one plain pass over its own row."""
    plain.eval()
    for prompt, own in zip(prompts, answers, strict=True):
        noise = {"seed": draws.seed, "round": draws.round, "occurrence": 0}
        keys = answer_keys(prompt, **noise, count=draws.num_generations)
        for key, answer in zip(keys, own, strict=True):
            row = torch.tensor([[*prompt.tolist(), *answer]])
            scores = plain(input_ids=row).logits[0, len(prompt) - 1 : -1].float().tolist()
            assert answer == [
                race(each, key, step, draws.temperature) for step, each in enumerate(scores)
            ]
            stops = [step for step, token in enumerate(answer, 1) if token in ends]
            assert stops == [len(answer)] or (not stops and len(answer) == (most or 10**9))


PATHS = [(family, "flat") for family in FAMILIES] + [
    (family, "padded") for family in ("mistral-window", "gpt2", *PADDED_ONLY)
]


@pytest.mark.parametrize(("family", "path"), PATHS)
def test_each_token_is_that_of_the_plain_model_and_its_noise(family, path):
    """Prompts of three lengths, one of them alone in its token; windows shorter than the texts."""
    prompts = some_prompts(1, 8, 5)
    model, scorer = prepared(family, path)
    assert model.training
    found = drawn(model, scorer, prompts, batch_tokens=10**6)
    assert model.training
    if path == "flat":
        assert way_of(model, scorer, 17) == ("shared", None)
    ends = {END, model.generation_config.eos_token_id}
    check_by_hand(make_model(family), prompts, found, DRAWS, ends=ends, most=9)
    assert len({tuple(ids) for own in found for ids in own}) > 6


def test_the_way_is_that_of_the_model(caplog):
    ways = {family: way_of(*prepared(family, "padded"), 20)[0] for family in PADDED_ONLY}
    assert ways == dict.fromkeys(PADDED_ONLY, "cached") | {"mamba": "whole"}
    model, scorer = prepared("mamba", "padded")
    prompts, draws = some_prompts(3, 2), RoundDraws(1, 1.0, 2, 1, 1)
    with caplog.at_level(logging.INFO):
        drawn(model, scorer, prompts, draws, batch_tokens=1)
    [said] = caplog.messages
    assert said.endswith("for each token: a mamba model has no cache of keys and values alone")


@torch.no_grad()
def test_factors_that_change_with_the_length_are_those_of_each_length():
    """LongRoPE has other factors behind 12 tokens: of a prompt of 8 from the fifth token on."""
    factors = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 4.0, 7.0, 11.0],
        "original_max_position_embeddings": 12,
        "factor": 4.0,
    }

    def made():
        config = type(make_model("llama").config)(
            **{**_LLAMA_LIKE, "max_position_embeddings": 48, "rope_parameters": dict(factors)}
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data *= 4 if parameter.ndim > 1 else 1
        return model

    model, scorer = made(), Scorer("flat")
    scorer.prepare(model)
    assert way_of(model, scorer, 12)[0] == "shared"
    assert way_of(model, scorer, 13)[0] == "whole"
    [prompt], draws = some_prompts(8), RoundDraws(2, 1.5, 8, 4, 1)
    [found] = drawn(model, scorer, [prompt], draws)
    keys = answer_keys(prompt, seed=4, round=1, occurrence=0, count=2)
    plain = made().eval()
    for key, answer in zip(keys, found, strict=True):
        row = prompt.tolist()
        for step, token in enumerate(answer):
            scores = plain(input_ids=torch.tensor([row])).logits[0, -1]
            assert token == race(scores.tolist(), key, step, 1.5)
            row.append(token)
    assert max(map(len, found)) == 8


def test_a_prompt_is_computed_once_and_ended_answers_leave():
    """Tokens that meet the embedding: two prompts of 6 once each, then a row of each answer.

    24 answers; whenever an eighth of those in the batch have ended they leave it.
    """
    model, scorer = prepared("llama", "flat")
    model.generation_config.eos_token_id = list(range(2, 20))  # a fifth of all tokens
    sizes = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, ids, __: sizes.append(ids[0].shape)
    )
    draws, prompts = RoundDraws(12, 1.5, 40, 1, 1), some_prompts(6, 6)
    answers = drawn(model, scorer, prompts, draws)
    check_by_hand(make_model("llama"), prompts, answers, draws, ends=range(2, 20), most=40)
    assert tuple(sizes[0]) == (2, 6)
    assert all(size[1] == 1 for size in sizes[1:])
    lengths = np.array([len(ids) for own in answers for ids in own])
    rows = 24
    for step, (count, _) in enumerate(sizes[1:], 1):
        alive = int((lengths > step).sum())
        rows = alive if rows - alive >= 0.125 * rows else rows
        assert count == rows
    assert len(sizes) == lengths.max()


def test_the_same_prompt_twice_is_computed_once_and_answered_anew():
    model, scorer = prepared("llama", "flat")
    sizes = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, ids, __: sizes.append(ids[0].shape)
    )
    one, other = some_prompts(6, 4)
    found = drawn(model, scorer, [one, other, one])
    assert tuple(sizes[0]) == (2, 6)
    assert len({tuple(ids) for k in (0, 2) for ids in found[k]}) == 6
    keys = answer_keys(one, seed=4, round=1, occurrence=1, count=3)
    logits = make_model("llama").eval()(input_ids=torch.tensor([one.tolist()])).logits[0, -1]
    assert [ids[0] for ids in found[2]] == [race(logits.tolist(), key, 0, 1.5) for key in keys]


# Distributions -----------------------------------------------------------------------------------


class Tempered:
    """A model at another temperature."""

    def __init__(self, model, temperature: float) -> None:
        self._model, self._temperature = model, temperature

    def parameters(self):
        return self._model.parameters()

    def __call__(self, *, input_ids):
        return SimpleNamespace(logits=self._model(input_ids=input_ids).logits / self._temperature)


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_answers_of_the_embedded_task_have_their_exact_distribution(temperature):
    """2,500 answers to each of two prompts, in cells of outcomes with their exact probabilities.

    Outcomes that are expected at least 5 times are cells, all others together one; the statistic
    sum (n - e)^2 / e has the mean m - 1 and the variance 2 (m - 1) of m cells, and a little more.
    """
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    scorer, task = Scorer("flat"), ControlledTask()
    exact = task.outcome_logps(Tempered(model, temperature)).exp()
    scorer.prepare(model)
    places = {outcome: place for place, outcome in enumerate(task.outcomes)}
    draws = RoundDraws(2500, temperature, MAX_TOKENS, 3, 1)
    asked = [task.prompt_ids[n].numpy().astype(np.int32) for n in (1, 6)]
    found = draw_batch(model, scorer, tokenizer, asked, [0, 1], draws)
    for answers, p in zip(found, exact[[1, 6]], strict=True):
        counts = torch.zeros(len(places), dtype=torch.float64)
        for ids in answers:
            counts[places[tuple(ids.tolist())]] += 1
        expected = p * len(answers)
        often = expected >= 5
        n = torch.cat([counts[often], counts[~often].sum()[None]])
        e = torch.cat([expected[often], expected[~often].sum()[None]])
        statistic, freedom = float(((n - e) ** 2 / e).sum()), len(n) - 1
        assert freedom > 15
        assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


# What an answer depends on -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    return prepared("llama", "flat")


def test_neither_batches_nor_order_nor_ranks_change_an_answer(llama):
    prompts = some_prompts(4, 9, 2, 4, 7, 3, 9)
    whole = drawn(*llama, prompts)
    planned = plan_batches(prompts, DRAWS, batch_tokens=80)
    assert len(planned) > 3
    assert drawn(*llama, prompts, batch_tokens=80) == whole
    shares = [drawn(*llama, prompts, batches=planned[rank::2]) for rank in (0, 1)]
    assert [a or b for a, b in zip(*shares, strict=True)] == whole
    assert all((a is None) != (b is None) for a, b in zip(*shares, strict=True))
    turned = drawn(*llama, prompts[::-1], batch_tokens=80)[::-1]
    assert turned == whole
    [alone] = draw_batch(*llama, TOKENIZER, prompts, [4], DRAWS)
    assert [ids.tolist() for ids in alone] == whole[4]
    assert alone[0].dtype == np.int32


def test_seeds_rounds_and_numbers_of_answers(llama):
    """Another seed or round draws others; more answers leave the first ones as they are."""
    prompts = some_prompts(5, 3)
    plain = drawn(*llama, prompts)
    answers = [tuple(ids) for own in plain for ids in own]
    for changed in (RoundDraws(3, 1.5, 9, 5, 1), RoundDraws(3, 1.5, 9, 4, 2)):
        others = [tuple(ids) for own in drawn(*llama, prompts, changed) for ids in own]
        assert not {*answers} & {*others}
    more = drawn(*llama, prompts, RoundDraws(5, 1.5, 9, 4, 1))
    assert [own[:3] for own in more] == plain
    shorter = drawn(*llama, prompts, RoundDraws(3, 1.5, 4, 4, 1))
    assert shorter == [[ids[:4] for ids in own] for own in plain]


def test_no_generator_is_touched_and_no_gradient_kept(llama):
    state = torch.get_rng_state()
    drawn(*llama, some_prompts(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in llama[0].parameters())


def test_under_autocast_tokens_are_nearly_those_of_float32(llama):
    """bfloat16 rounds scores to three digits: at a low temperature few tokens change."""
    prompts, draws = some_prompts(6, 6, 4), RoundDraws(4, 1.5, 6, 1, 1)
    precision = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # noqa: E731
    rounded = drawn(*llama, prompts, draws, precision=precision)
    plain = drawn(*llama, prompts, draws)
    same = [
        a[0] == b[0] for x, y in zip(rounded, plain, strict=True) for a, b in zip(x, y, strict=True)
    ]
    assert sum(same) >= 10


def test_a_policy_with_an_adapter_draws_with_it(llama):
    """The adapter's own matrices, filled with any values, change the answers: by hand as well."""
    model = make_model("llama")
    adapters = Adapters(
        model,
        LoraSettings(4, 8, None, rslora=False, dora=False, gaussian=False),
        reference=None,
        dropout=0.0,
        seed=3,
        load_base=None,
    )
    draw = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    scorer, prompts = Scorer("flat"), some_prompts(7, 3)
    scorer.prepare(adapters.policy)
    found = drawn(adapters.policy, scorer, prompts)
    assert found != drawn(*llama, prompts)
    with scorer.plain(adapters.policy) as plain:
        check_by_hand(plain, prompts, found, DRAWS, most=9)


# Ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["flat", "padded"])
def test_positions_end_an_answer_and_the_others_go_on(path):
    """Of 12 positions prompts of 2 and 9 leave 10 and 3; what has ended looks up no position."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=12)
    torch.manual_seed(0)
    model, scorer = AutoModelForCausalLM.from_config(config), Scorer(path)
    scorer.prepare(model)
    prompts = some_prompts(2, 9)
    # Batches of like lengths: these two are put into one by name.
    silent = SimpleNamespace(eos_token_id=None)
    found = draw_batch(model, scorer, silent, prompts, [0, 1], RoundDraws(2, 1.0, 20, 1, 1))
    assert [[len(ids) for ids in own] for own in found] == [[10, 10], [3, 3]]


@pytest.mark.parametrize("place", ["cpu", "elsewhere"])
def test_a_device_that_is_waited_for_is_asked_seldom_and_gives_the_same(llama, monkeypatch, place):
    looks = []
    plain = rows_written._require_finite

    def looked(sound):
        looks.append(1)
        plain(sound)

    monkeypatch.setattr(rows_written, "_require_finite", looked)
    if place == "elsewhere":
        monkeypatch.setattr(rows_written, "_looks_at_each", lambda device: False)
    found = drawn(*llama, some_prompts(5, 5), RoundDraws(3, 1.5, 20, 4, 1))
    check_by_hand(
        make_model("llama"), some_prompts(5, 5), found, RoundDraws(3, 1.5, 20, 4, 1), most=20
    )
    longest = max(len(ids) for own in found for ids in own)
    assert longest == 20
    assert len(looks) == (20 if place == "cpu" else 2) + 1


def test_scores_that_are_not_finite_are_said():
    model, scorer = prepared("llama", "flat")
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(UserError, match=r"scores of the next token are not finite.*optimizer\.lr"):
        drawn(model, scorer, some_prompts(4))
    assert model.training


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_generations": 0}, "an answer"),
        ({"max_new_tokens": 0}, "a token"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.inf}, "temperature=inf"),
    ],
)
def test_draws_of_nothing_are_refused(changes, said):
    plain = {"num_generations": 2, "temperature": 1.0, "max_new_tokens": 4, "seed": 1, "round": 1}
    with pytest.raises(ValueError, match=said):
        RoundDraws(**(plain | changes))


# Batches -----------------------------------------------------------------------------------------


def test_batches_are_full_and_of_like_lengths():
    """Two answers of 10 tokens are 20 to a prompt; 64 tokens at most.

    9 and 8 are padded to 9: 2 * 29 = 58. 5 and 5: 50. 4 and 4: 48, and a third would be 72. With
    room for all padding decides, at most 1.25: 40 and 9 are 80 / 49 = 1.63; 9, 8, 5 are
    27 / 22 = 1.23, and 36 / 27 with one more; 5, 4, 4 are 15 / 13, and 20 / 15 with 2.
    """
    prompts = some_prompts(5, 9, 4, 8, 5, 4, 2, 40)
    draws = RoundDraws(2, 1.0, 10, 1, 1)
    planned = plan_batches(prompts, draws, batch_tokens=64)
    lengths = [[len(prompts[n]) for n in batch] for batch in planned]
    assert lengths == [[40], [9, 8], [5, 5], [4, 4], [2]]
    assert plan_batches(prompts, draws, batch_tokens=1) == [[n] for batch in planned for n in batch]
    large = plan_batches(prompts, draws, batch_tokens=10**6)
    lengths = [[len(prompts[n]) for n in batch] for batch in large]
    assert lengths == [[40], [9, 8, 5], [5, 4, 4], [2]]
    assert plan_batches([], draws, batch_tokens=64) == []


def test_batches_are_of_contents_and_not_of_places():
    """Prompts of a length have one order, whatever that of the rows; equal ones are neighbours."""
    prompts = some_prompts(4, 4, 4, 4, 4, 4)
    prompts.append(prompts[2].copy())
    draws = RoundDraws(2, 1.0, 10, 1, 1)

    def contents(asked):
        planned = plan_batches(asked, draws, batch_tokens=72)
        return [[asked[n].tolist() for n in batch] for batch in planned]

    assert contents(prompts[::-1]) == contents(prompts)
    assert [len(batch) for batch in contents(prompts)] == [3, 3, 1]
    order = [n for batch in plan_batches(prompts, draws, batch_tokens=72) for n in batch]
    assert order.index(6) == order.index(2) + 1


# Progress, and another backend -------------------------------------------------------------------


def test_each_batch_is_checked_shown_and_given(llama):
    """Three prompts of three answers, one a batch; the third check ends it."""
    shown, checks = [], []

    @contextlib.contextmanager
    def show(name, *, total, unit, done=0):
        shown.append((name, total, unit))
        yield lambda now, note="": shown.append((now, note))

    def check():
        checks.append(len(shown))
        if len(checks) == 3:
            raise KeyboardInterrupt

    found = draw_answers(
        *llama, TOKENIZER, some_prompts(4, 3, 2), DRAWS, batch_tokens=1, show=show, check=check
    )
    assert [next(found)[0], next(found)[0]] == [[0], [1]]
    with pytest.raises(KeyboardInterrupt):
        next(found)
    assert shown[0] == ("sampling", 9, "answers")
    assert [now for now, _ in shown[1:]] == [3, 6]
    assert all(note.endswith(" tokens/s") and note[0].isdigit() for _, note in shown[1:])
    assert checks == [1, 2, 3]


def drawer_of(name: str, **more) -> BackendDrawer:
    files = lambda who, model: contextlib.nullcontext(("folder", None))  # noqa: E731
    return BackendDrawer(Backend(name, **more), LONG_WORDS, files, contextlib.nullcontext)


class _Words:
    eos_token_id = END

    def __len__(self) -> int:
        return VOCABULARY


LONG_WORDS = _Words()


def test_a_sampler_is_asked_batch_by_batch_with_a_seed_for_each_answer(llama):
    """So that its answers depend neither on the rank nor on what else is asked."""
    asked = []

    @register_sampler("counted")
    def sampler(request):
        asked.append(request)
        return [[3 + seed % 50, END] for seed in request.seeds]

    try:
        prompts = some_prompts(4, 9, 4)
        prompts[2] = prompts[0].copy()
        drawer = drawer_of("counted")
        whole = drawn(*llama, prompts, batch_tokens=60, drawer=drawer)
        planned = plan_batches(prompts, DRAWS, batch_tokens=60)
        shares = [
            drawn(*llama, prompts, batches=planned[rank::2], drawer=drawer) for rank in (0, 1)
        ]
    finally:
        SAMPLERS.pop("counted")
    assert [a or b for a, b in zip(*shares, strict=True)] == whole
    assert planned == [[1], [0], [2]]
    assert asked[0].prompts == [prompts[1].tolist()] * 3
    assert asked[0].limits == [9, 9, 9]
    assert (asked[0].temperature, asked[0].top_p, asked[0].who) == (1.5, 1.0, "policy")
    seeds = [seed for request in asked[:3] for seed in request.seeds]
    assert len({*seeds}) == 9
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({request.seed for request in asked[:3]}) == 3
    assert all(0 <= request.seed < 2**31 for request in asked)
    assert whole[0] == [[3 + seed % 50, END] for seed in asked[1].seeds]


def test_an_engine_is_started_once_for_all_batches(llama, monkeypatch):
    """vLLM gives each prompt backwards and then the end, as its stand-in does."""
    started = install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("gc.collect", lambda: 0)
    prompts = some_prompts(4, 3)
    found = drawn(*llama, prompts, batch_tokens=1, drawer=drawer_of("vllm"))
    assert len(started.engines) == 1
    [(_, params, _)] = started.requests
    keys = [answer_keys(p, seed=4, round=1, occurrence=0, count=3) for p in prompts]
    assert [p.seed for p in params] == [key & (2**63 - 1) for own in keys for key in own]
    assert found[0] == [[*prompts[0].tolist()[::-1], END]] * 3


def test_a_server_does_not_draw_for_the_reference(llama):
    """Then the model itself does."""
    prompts = some_prompts(4)
    server = drawer_of("http://localhost:1/v1")
    assert drawn(*llama, prompts, drawer=server, who="reference") == drawn(*llama, prompts)


# Shares of a model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("family", "path"), [("llama", "flat"), ("bloom", "padded")])
def test_a_sharded_model_draws_the_same(mesh, family, path):
    model, scorer = prepared(family, path)
    prompts = some_prompts(6, 4)
    whole = drawn(model, scorer, prompts)
    sharded = shard_model(model, mesh, torch.device("cpu"), compute_dtype=None)
    assert drawn(sharded, scorer, prompts) == whole


def rank_draws(rank: int) -> list:
    """Draws of a rank of two, from a model that they share."""
    model, scorer = prepared("llama", "flat")
    mesh = init_device_mesh("cpu", (2,))
    sharded = shard_model(model, mesh, torch.device("cpu"), compute_dtype=None)
    return drawn(sharded, scorer, some_prompts(6, 4, 9), batch_tokens=60)


@pytest.mark.long
def test_two_ranks_that_share_a_model_draw_the_same(llama, tmp_path):
    one, other = on_ranks(rank_draws, tmp_path)
    assert one == other == drawn(*llama, some_prompts(6, 4, 9), batch_tokens=60)
