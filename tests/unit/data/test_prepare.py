"""Every row of the files is trained on, held out, or dropped for a reason."""

import copy
import json
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_lightning.data.records import BadRow, Message, PreferenceGroup, Rows, read_rows
from dpo_lightning.data.splits import data_hash, prepare_rows, split_by_prompt
from dpo_lightning.data.templates import PLAIN_CHAT_TEMPLATE
from dpo_lightning.data.tokens import DROP_REASONS
from dpo_lightning.errors import UserError
from tests.support.groups import ids, token_group
from tests.support.properties import examples


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of letters; "." is EOS, "^" is BOS and nobody writes it."""
    pieces = [".", "^", "?", *"abcdefghijklmnopqrstuvwxyz0123456789 "]
    backend = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=".", bos_token="^", unk_token="?"
    )


def make_rows(*texts, bad=0, notes=(), name="rows.jsonl"):
    groups = [
        PreferenceGroup(prompt, responses, (1, 2), 1.0, None, f"{name}:{line}")
        for line, (prompt, *responses) in enumerate(texts, start=1)
    ]
    broken = [BadRow(f"{name}:{len(texts) + i}", "row", "no object", "") for i in range(bad)]
    return Rows(groups, broken, len(groups) + bad, list(notes))


def prepare(train, tokenizer, evaluation=None, **changes):
    settings = {
        "max_length": 100,
        "truncation": "drop",
        "eval_fraction": 0.1,
        "split_seed": 0,
        "max_dropped": 1.0,
    } | changes
    return prepare_rows(train, evaluation, tokenizer, **settings)


# The account of the rows --------------------------------------------------------------------------


def test_train_eval_and_dropped_are_the_rows(tokenizer):
    good = [(f"q{i}", "yes", "no") for i in range(30)]
    rows = make_rows(
        *good, ("q", "a", "a"), ("q", "a", ""), ("q" * 99, "a", "b"), ("r" * 99, "a", "b"), bad=3
    )
    data = prepare(rows, tokenizer)
    assert (len(data.train), len(data.eval)) == (27, 3)
    assert data.dropped == {
        "bad_row": 3,
        "too_long": 2,
        "identical_responses": 1,
        "empty_response": 1,
    }
    assert data.counts() == {
        "train_groups": 27,
        "eval_groups": 3,
        "evaluated_groups": 3,
        "train_pairs": 27,
        "dropped": dict(data.dropped),
        "changed": {},
    }


def test_what_was_changed_is_counted(tokenizer):
    rows = make_rows(("q", "yes", "nobody"), ("q", "yes", "no"))
    data = prepare(rows, tokenizer, max_length=6, truncation="response")
    assert data.counts()["changed"] == {"truncated_response": 1}
    assert data.counts()["dropped"] == {}
    assert {group.source for group in data.train} == {"rows.jsonl:1", "rows.jsonl:2"}


_WORDS = st.text("ab ", max_size=4)


@settings(max_examples=examples(150))
@given(
    train=st.lists(st.tuples(_WORDS, _WORDS, _WORDS), min_size=1, max_size=12),
    evaluation=st.none() | st.lists(st.tuples(_WORDS, _WORDS, _WORDS), min_size=1, max_size=6),
    bad=st.integers(0, 2),
    max_length=st.integers(2, 8),
    truncation=st.sampled_from(["drop", "prompt", "response"]),
    eval_fraction=st.sampled_from([0.0, 0.2, 0.5, 0.9]),
)
def test_any_rows_add_up(tokenizer, train, evaluation, bad, max_length, truncation, eval_fraction):
    rows = make_rows(*train, bad=bad)
    other = None if evaluation is None else make_rows(*evaluation, bad=1, name="other.jsonl")
    data = None
    try:
        data = prepare(
            rows,
            tokenizer,
            other,
            max_length=max_length,
            truncation=truncation,
            eval_fraction=eval_fraction,
        )
    except UserError as error:
        refusal = str(error)
    if data is None:
        assert refusal.startswith(("data.train: no group is left", "data.eval: no group is left"))
        return
    total = rows.total + (0 if other is None else other.total)
    assert len(data.train) + len(data.eval) + data.dropped.total() == total
    assert data.dropped["bad_row"] == bad + (other is not None)
    assert set(data.dropped) <= set(DROP_REASONS)
    assert all(data.dropped.values())
    assert data.train
    places = [group.source for group in data.train + data.eval]
    assert len(set(places)) == len(places)
    if other is None:
        keys = [{group.prompt_key for group in part} for part in (data.train, data.eval)]
        assert not keys[0] & keys[1]
        assert bool(data.eval) == (bool(eval_fraction) and len(keys[0] | keys[1]) > 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "form", "rows_in_file", "prompts_too_long"),
    [
        ("hh_harmless_raw.jsonl", "auto", 400, 53),
        ("sharegpt_dpo.json", "sharegpt", 300, 148),
        ("openassistant_ranked.jsonl", "auto", 212, 63),
    ],
)
def test_real_rows_add_up(shared, file, form, rows_in_file, prompts_too_long):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    rows = read_rows(
        str(shared / "data" / file),
        format=form,
        columns={},
        split=None,
        subset=None,
        revision=None,
    )
    settings = {"max_length": 512, "truncation": "response", "max_dropped": 0.6}
    data = prepare(rows, tokenizer, **settings)
    assert rows.total == rows_in_file
    assert len(data.train) + len(data.eval) + data.dropped.total() == rows_in_file
    assert not rows.bad
    groups = data.train + data.eval
    assert all(len(g.prompt) + max(map(len, g.responses)) <= 512 for g in groups)
    assert all(g.ranks[0] == 1 and g.pairs > 0 for g in groups)
    if file.startswith("openassistant"):
        assert max(len(g.responses) for g in groups) == 9
    # A prompt that fills the context alone leaves nothing to compare, and few others do.
    nothing = data.dropped["nothing_to_compare"]
    assert prompts_too_long <= nothing + 2
    assert nothing <= prompts_too_long + 8
    assert data.changed["truncated_response"] > 0
    # The same prompts stay on one side, and about a tenth is held out.
    assert not {g.prompt_key for g in data.train} & {g.prompt_key for g in data.eval}
    assert abs(len(data.eval) - 0.1 * len(groups)) < 3
    # Dropping instead loses more, which is more than a run accepts by itself.
    with pytest.raises(UserError, match=r"data\.max_dropped=0\.05: \d+ of \d+ rows.*too_long"):
        prepare(rows, tokenizer, max_length=512, max_dropped=0.05)


# What stops a run ---------------------------------------------------------------------------------


def rows_with_drops(dropped, total):
    kept = [(f"q{i}", "yes", "no") for i in range(total - dropped)]
    return make_rows(*kept, *[("q", "same", "same")] * dropped)


@pytest.mark.parametrize(
    ("dropped", "total", "limit"), [(1, 20, 0.05), (29, 100, 0.29), (0, 3, 0.0), (57, 100, 0.57)]
)
def test_as_much_may_be_dropped_as_is_allowed(tokenizer, dropped, total, limit):
    data = prepare(rows_with_drops(dropped, total), tokenizer, max_dropped=limit)
    assert data.dropped.total() == dropped


@pytest.mark.parametrize(("dropped", "total", "limit"), [(2, 20, 0.05), (30, 100, 0.29), (1, 9, 0)])
def test_more_dropped_than_allowed_stops_with_the_reasons(tokenizer, dropped, total, limit):
    with pytest.raises(UserError) as caught:
        prepare(rows_with_drops(dropped, total), tokenizer, max_dropped=limit)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"data.max_dropped={limit}: {dropped} of {total} rows were dropped")
    assert f"{dropped} identical_responses" in message
    assert DROP_REASONS["identical_responses"] in message
    remedy = float(message.rpartition("allow as many with data.max_dropped=")[2])
    assert prepare(rows_with_drops(dropped, total), tokenizer, max_dropped=remedy).train


LONG_PROMPT = ("q" * 40, "yes", "no")
LONG_ANSWERS = ("q", "y" * 40, "n" * 40)


@pytest.mark.parametrize(
    ("long", "truncation", "remedies"),
    [
        (LONG_PROMPT, "drop", ["data.truncation=prompt", "data.max_length=44"]),
        (LONG_PROMPT, "response", ["data.truncation=prompt", "data.max_length=44"]),
        (LONG_ANSWERS, "drop", ["data.truncation=response", "data.max_length=42"]),
        (LONG_ANSWERS, "prompt", ["data.truncation=response", "data.max_length=42"]),
    ],
)
def test_what_keeps_long_rows_is_said_and_does(tokenizer, long, truncation, remedies):
    rows = make_rows(("q", "yes", "no"), long, bad=1)
    given = {"max_length": 20, "max_dropped": 0.5, "truncation": truncation}
    with pytest.raises(UserError) as caught:
        prepare(rows, tokenizer, **given)
    message = str(caught.value)
    assert "2 of 3 rows" in message
    assert "1 bad_row" in message
    assert "data.max_length=20" in message
    said = [part.rpartition("with ")[2] for part in message.rpartition("; ")[2].split(", or ")]
    assert said == [*remedies, "data.max_dropped=0.667"]
    for remedy in said:
        key, _, value = remedy.removeprefix("data.").partition("=")
        kind = type(given[key])
        assert prepare(rows, tokenizer, **given | {key: kind(value)}).train


def test_a_length_that_the_model_does_not_take_is_no_remedy(tokenizer):
    rows = make_rows(("q", "yes", "no"), LONG_PROMPT)
    with pytest.raises(UserError) as caught:
        prepare(rows, tokenizer, max_length=20, max_dropped=0.1, positions=43)
    assert "data.max_length=44" not in str(caught.value)


def test_nothing_left_names_what_would_keep_rows(tokenizer):
    with pytest.raises(UserError) as caught:
        prepare(make_rows(LONG_PROMPT), tokenizer, max_length=20)
    assert str(caught.value).endswith(
        "name other rows with data.train=, or keep long rows with data.truncation=prompt, or take "
        "them whole with data.max_length=44"
    )


# Rows that a chat template does not take ----------------------------------------------------------

PICKY = (
    "{% for m in messages %}{{ m.content if m.role in ('user', 'assistant') }}.{% endfor %}"
    "{% if messages[0].content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
)


def messages_rows(*roles_and_texts):
    groups = [
        PreferenceGroup(
            (Message(role, text),),
            ((Message("assistant", "yes"),), (Message("assistant", "never"),)),
            (1, 2),
            1.0,
            None,
            f"rows.jsonl:{line}",
        )
        for line, (role, text) in enumerate(roles_and_texts, start=1)
    ]
    return Rows(groups, [], len(groups), [])


@pytest.fixture
def picky(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = PICKY
    return other


GOOD = [("user", f"q{number}") for number in range(9)]


@pytest.mark.parametrize(
    ("bad", "field", "problem"),
    [
        (("user", "no"), "prompt", "the chat template refuses a conversation with the roles user"),
        (("tool", "x"), "prompt[0].content", "leaves out 'x' ('content' of the role 'tool')"),
    ],
)
def test_a_row_that_the_template_does_not_take_goes_by_on_bad_row(picky, bad, field, problem):
    rows = messages_rows(*GOOD[:4], bad, *GOOD[4:])
    with pytest.raises(UserError) as caught:
        prepare(rows, picky)
    message = str(caught.value)
    assert message.startswith(f"rows.jsonl:5: {field}: ")
    assert problem in message
    assert "1 bad row of 10, data.on_bad_row=skip skips them (kept in quarantine.jsonl)" in message
    data = prepare(rows, picky, on_bad_row="skip")
    assert data.dropped == {"not_rendered": 1}
    assert len(data.train) + len(data.eval) == 9
    [row] = data.set_aside
    assert (row.source, row.field, problem in row.problem) == ("rows.jsonl:5", field, True)
    assert json.loads(row.row)["prompt"] == [{"role": bad[0], "content": bad[1]}]


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_one_cause_of_many_rows_stops_with_one_line(picky, on_bad_row):
    rows = messages_rows(*GOOD[:7], *[("tool", text) for text in ("x", "y", "z")])
    with pytest.raises(UserError) as caught:
        prepare(rows, picky, on_bad_row=on_bad_row)
    assert str(caught.value) == (
        "data.train: the chat template leaves out 'content' of the role 'tool' in 3 of 10 rows "
        "(rows.jsonl:8 prompt[0].content, rows.jsonl:9 prompt[0].content, rows.jsonl:10 "
        "prompt[0].content); name a template that writes it with data.chat_template="
    )


def test_a_fifth_of_the_rows_may_be_set_aside(picky):
    rows = messages_rows(*GOOD[:8], ("tool", "x"), ("tool", "y"))
    assert len(prepare(rows, picky, on_bad_row="skip").set_aside) == 2


@pytest.mark.parametrize("key", ["data.train", "data.eval"])
def test_a_source_of_which_nothing_is_left_stops(tokenizer, key):
    good, useless = make_rows(*[("q", "yes", "no")] * 9), make_rows(("q", "same", "same"))
    train, evaluation = (useless, good) if key == "data.train" else (good, useless)
    with pytest.raises(UserError) as caught:
        prepare(train, tokenizer, evaluation, max_dropped=0.5)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{key}: no group is left out of 1 rows (1 identical_responses: ")
    assert f"name other rows with {key}=" in message


# Rows to evaluate on ------------------------------------------------------------------------------


def test_rows_to_evaluate_on_are_taken_whole(tokenizer):
    train = make_rows(*[(f"q{i}", "yes", "no") for i in range(10)], notes=["of train"])
    evaluation = make_rows(
        ("q1", "yes", "no"), ("p", "yes", "no"), ("p", "x", "x"), bad=1, notes=["of eval"], name="e"
    )
    data = prepare(train, tokenizer, evaluation, eval_fraction=0.5)
    assert [group.source for group in data.train] == [f"rows.jsonl:{i}" for i in range(1, 11)]
    assert [group.source for group in data.eval] == ["e:1", "e:2"]
    assert data.dropped == {"bad_row": 1, "identical_responses": 1}
    assert data.notes == [
        "of train",
        "of eval",
        "1 prompts of data.eval are in data.train too",
    ]


def test_nothing_is_held_out_of_one_prompt_and_that_is_said(tokenizer):
    rows = make_rows(*[("q", "yes", "no"), ("q", "no", "yes")])
    data = prepare(rows, tokenizer, eval_fraction=0.5)
    assert (len(data.train), len(data.eval)) == (2, 0)
    assert data.notes == ["all rows have one prompt, so none are held out to evaluate on"]
    assert prepare(rows, tokenizer, eval_fraction=0.0).notes == []


# The split ----------------------------------------------------------------------------------------


@settings(max_examples=examples(200))
@given(
    keys=st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=60),
    fraction=st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.9]),
    seed=st.integers(0, 5),
    shuffle=st.randoms(use_true_random=False),
)
def test_any_split(keys, fraction, seed, shuffle):
    groups = [token_group(key, number) for number, key in enumerate(keys)]
    train, held_out = split_by_prompt(groups, fraction=fraction, seed=seed)
    assert Counter(map(id, train + held_out)) == Counter(map(id, groups))
    sides = [{group.prompt_key for group in part} for part in (train, held_out)]
    assert not sides[0] & sides[1]
    assert train
    assert bool(held_out) == (len(set(keys)) > 1)
    numbers = [int(group.source.partition(":")[2]) for group in train]
    assert numbers == sorted(numbers)

    mixed = shuffle.sample(groups, len(groups))
    again, _ = split_by_prompt(mixed, fraction=fraction, seed=seed)
    assert {group.prompt_key for group in again} == sides[0]


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3])
def test_the_share_held_out_is_about_the_one_asked_for(fraction):
    sizes = random.Random(0)
    groups = [token_group(f"q{i}") for i in range(300) for _ in range(sizes.randint(1, 5))]
    _, held_out = split_by_prompt(groups, fraction=fraction, seed=1)
    assert abs(len(held_out) - fraction * len(groups)) < 5


def test_without_repeated_prompts_the_share_is_exact():
    groups = [token_group(f"q{i}") for i in range(200)]
    assert len(split_by_prompt(groups, fraction=0.1, seed=3)[1]) == 20
    assert len(split_by_prompt(groups[:4], fraction=0.1, seed=3)[1]) == 1
    assert split_by_prompt(groups, fraction=0.0, seed=3) == (groups, [])


def test_the_seed_decides_which_prompts_are_held_out():
    groups = [token_group(f"q{i}") for i in range(100)]
    chosen = [
        tuple(group.prompt_key for group in split_by_prompt(groups, fraction=0.1, seed=seed)[1])
        for seed in range(10)
    ]
    assert len(set(chosen)) == 10
    assert len({key for keys in chosen for key in keys}) > 40


def test_rows_that_come_later_leave_most_of_the_choice_as_it_was():
    groups = [token_group(f"q{i}") for i in range(100)]
    _, before = split_by_prompt(groups, fraction=0.1, seed=0)
    _, after = split_by_prompt([*groups, token_group("new")], fraction=0.1, seed=0)
    assert len({g.prompt_key for g in before} - {g.prompt_key for g in after}) <= 1


def test_a_prompt_of_very_many_groups_is_not_held_out():
    groups = [token_group("many") for _ in range(80)] + [token_group(f"q{i}") for i in range(20)]
    for seed in range(20):
        _, held_out = split_by_prompt(groups, fraction=0.1, seed=seed)
        assert len(held_out) == 10
        assert "many" not in {group.prompt_key for group in held_out}


def test_the_smallest_prompt_is_held_out_where_all_have_very_many_groups():
    groups = [token_group(key) for key in "a" * 30 + "b" * 25 + "c" * 45]
    for seed in range(5):
        _, held_out = split_by_prompt(groups, fraction=0.1, seed=seed)
        assert {group.prompt_key for group in held_out} == {"b"}


# The hash -----------------------------------------------------------------------------------------


def test_the_hash_is_of_every_part():
    group = token_group()
    variants = {
        "as it was": ([group], [group]),
        "prompt": ([replace(group, prompt=ids(1, 3))], [group]),
        "response": ([replace(group, responses=(ids(3, 0), ids(4, 6, 0)))], [group]),
        "order of responses": ([replace(group, responses=group.responses[::-1])], [group]),
        "boundary": (
            [replace(group, prompt=ids(1), responses=(ids(2, 3, 0), ids(4, 5, 0)))],
            [group],
        ),
        "boundary of responses": ([replace(group, responses=(ids(3, 0, 4), ids(5, 0)))], [group]),
        "ranks": ([replace(group, ranks=(1, 1))], [group]),
        "weight": ([replace(group, weight=2.0)], [group]),
        "confidence": ([replace(group, confidence=0.9)], [group]),
        "another confidence": ([replace(group, confidence=0.8)], [group]),
        "margin": ([replace(group, target_margin=0.9)], [group]),
        "eval": ([group], [replace(group, weight=2.0)]),
        "side": ([group, group], []),
        "other side": ([], [group, group]),
        "more": ([group, group], [group]),
    }
    hashes = {name: data_hash(*parts) for name, parts in variants.items()}
    assert len(set(hashes.values())) == len(variants)
    assert all(len(value) == 32 and int(value, 16) for value in hashes.values())


def test_the_hash_is_of_the_order_and_not_of_the_place():
    a, b = token_group("a"), replace(token_group("b"), weight=0.5)
    assert data_hash([a, b], []) != data_hash([b, a], [])
    moved = replace(a, source="elsewhere.jsonl:9", prompt=a.prompt.copy())
    assert data_hash([a], []) == data_hash([moved], [])
