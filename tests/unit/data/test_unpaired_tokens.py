"""Groups of one response with a label: limits, token ids on disk, splits and their account."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dpo_lightning.data.conversations import ResponseName
from dpo_lightning.data.held_out import in_lots
from dpo_lightning.data.labels import LabelCounts
from dpo_lightning.data.packing import collate_groups, make_step_batch
from dpo_lightning.data.records import PreferenceGroup, Rows, read_rows
from dpo_lightning.data.splits import data_hash, group_id, prepare_rows
from dpo_lightning.data.templates import PLAIN_CHAT_TEMPLATE
from dpo_lightning.data.texts import Message
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from tests.support.groups import ids, token_group
from tests.support.models import byte_tokenizer
from tests.support.properties import examples
from tests.support.token_caches import TEMPLATE, same, tokens
from tests.support.tokens import ANY_TEXT, END, make_tokenizer, tokenize


def answer(prompt, response, label=True, *, line=1, weight=1.0):
    source = f"rows.jsonl:{line}"
    return PreferenceGroup(prompt, (response,), (1,), weight, None, source, label=label)


def labelled(label, *, prompt=(1, 2), response=(3, 0), key="q", number=0):
    place = f"rows.jsonl:{number}"
    return TokenGroup(ids(*prompt), (ids(*response),), (1,), 1.0, place, key, label=label)


# Token ids ----------------------------------------------------------------------------------------


def test_one_response_is_enough_with_a_label():
    """BOS and " x" are the prompt; "ab" and EOS are scored."""
    tokenizer = make_tokenizer()
    result = tokenize(answer(" x", "ab", False), tokenizer=tokenizer)
    [group] = result.groups
    assert tokenizer.convert_ids_to_tokens(group.responses[0]) == ["ab", END]
    assert (group.label, group.ranks, group.pairs, len(group.prompt)) == (False, (1,), 0, 2)
    assert not result.dropped


def test_one_response_without_a_label_is_not():
    result = tokenize(answer(" x", "ab", None))
    assert not result.groups
    assert result.dropped == {"nothing_to_compare": 1}


def test_an_empty_answer_is_dropped_as_such():
    result = tokenize(answer("x", "", False), answer("x", " \n", True, line=2))
    assert result.dropped == {"empty_response": 2}
    assert not result.groups


@pytest.mark.parametrize(
    ("truncation", "prompt", "response", "outcome"),
    [
        ("drop", "cccc", "cc", "too_long"),
        ("response", "cccc", "cc", (5, 1)),
        ("response", "ccccc", "cc", "too_long"),
        ("prompt", "cccc", "cc", (3, 3)),
        ("prompt", "c", "cccccc", "too_long"),
        ("drop", "cc", "cc", (3, 3)),
    ],
)
def test_the_limit_of_six_tokens(truncation, prompt, response, outcome):
    """BOS and a token a letter, EOS behind the response.

    "cccc" and "cc" are 1 + 4 + 2 + 1 = 8 tokens. Cut in the response one is left, and cut in the
    prompt two go. "ccccc" with BOS fills the limit alone: nothing of the response would be left.
    """
    result = tokenize(answer(prompt, response), max_length=6, truncation=truncation)
    if isinstance(outcome, str):
        assert result.dropped == {outcome: 1}
        assert not result.groups
        return
    [group] = result.groups
    assert (len(group.prompt), len(group.responses[0])) == outcome


def test_the_remedies_for_long_answers_are_those_that_keep_them():
    """Of 8 tokens with a limit of 6 both cuts keep the row; where the prompt fills it, one does."""
    assert tokenize(answer("cccc", "cc"), max_length=6).kept_by == {
        "max_length": 1,
        "prompt": 1,
        "response": 1,
    }
    found = tokenize(answer("ccccc", "cc"), max_length=6)
    assert found.kept_by == {"max_length": 1, "prompt": 1}
    assert found.longest == 9


@settings(max_examples=examples(60))
@given(
    texts=st.lists(st.tuples(ANY_TEXT, ANY_TEXT, st.booleans()), min_size=1, max_size=6),
    max_length=st.integers(2, 12),
    truncation=st.sampled_from(["drop", "prompt", "response"]),
)
def test_any_labelled_answers_add_up(texts, max_length, truncation):
    groups = [answer(p, r, label, line=n) for n, (p, r, label) in enumerate(texts)]
    result = tokenize(*groups, max_length=max_length, truncation=truncation)
    assert len(result.groups) + result.dropped.total() == len(groups)
    assert set(result.dropped) <= {"too_long", "empty_response"}
    by_source = {group.source: group for group in groups}
    for group in result.groups:
        assert group.label is by_source[group.source].label
        assert len(group.prompt) + len(group.responses[0]) <= max_length
        assert len(group.responses[0]) >= 1


def test_messages_go_through_the_template(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    group = answer((Message("user", "q"),), (Message("assistant", "a"),), False)
    [made] = tokens(None, tokenizer, [group]).groups
    assert tokenizer.decode(made.prompt) == "[user]q[assistant]"
    assert made.label is False


def test_the_template_names_the_only_response():
    assert str(ResponseName(0, 1)) == "response"
    assert [str(ResponseName(n, 2)) for n in (0, 1)] == ["chosen", "rejected"]


def test_labels_are_found_again_on_disk(tmp_path):
    """Two rows of one record, one of them dropped: each label comes back to its own row."""
    tokenizer = byte_tokenizer()
    groups = [
        replace(answer("q", "", True), source="log.jsonl:1[1]"),
        replace(answer("q", "a", False), source="log.jsonl:1[3]"),
        replace(answer("q", "b", True), source="log.jsonl:2"),
    ]
    made = [tokens(tmp_path, tokenizer, groups) for _ in range(2)]
    assert same(*made)
    for found in made:
        assert [(g.source, g.label) for g in found.groups] == [
            ("log.jsonl:1[3]", False),
            ("log.jsonl:2", True),
        ]
    turned = [replace(groups[1], label=True), groups[2]]
    assert [g.label for g in tokens(tmp_path, tokenizer, turned).groups] == [True, True]
    # Without a label the same texts are nothing to learn from, and with one they are.
    assert tokens(tmp_path, tokenizer, [replace(groups[1], label=None)]).groups == []
    assert [g.label for g in tokens(tmp_path, tokenizer, [groups[1]]).groups] == [False]


# The layout ---------------------------------------------------------------------------------------


def test_a_group_of_one_lies_flat():
    """(1, 2 | 3, 0) beside the pair (1, 2 | 3, 0 | 4, 5, 0): one response, and then a pair."""
    batch = collate_groups([labelled(False), token_group()], [0, 1])
    assert batch.input_ids.tolist() == [1, 2, 3, 0, 1, 2, 3, 0, 4, 5, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 2, 3, 4]
    assert batch.score_from.tolist() == [1, 2, 5, 6, 5, 8, 9]
    assert batch.group.tolist() == [0, 1, 1]
    assert batch.segments == ((2, 2), (2, 2, 3))
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([1], [2])
    assert batch.pair_share.tolist() == [1.0]


def test_a_step_of_single_responses_has_no_pairs():
    step = make_step_batch(
        [labelled(True), labelled(False, response=(4, 5, 0))],
        [0, 1],
        rank=0,
        world_size=1,
        micro_batch_tokens=64,
        shared=True,
    )
    assert (step.pairs, step.tokens, step.total_weight) == (0, 4 + 5, 2.0)
    assert step.micro_batches[0].chosen.numel() == 0


# The account --------------------------------------------------------------------------------------


def rows_of(*groups, unrated=0, name="rows.jsonl"):
    placed = [replace(g, source=f"{name}:{n}") for n, g in enumerate(groups, start=1)]
    return Rows(placed, [], len(placed), [], unrated=unrated)


def prepare(train, evaluation=None, **changes):
    options = {
        "max_length": 100,
        "truncation": "drop",
        "eval_fraction": 0.25,
        "split_seed": 0,
        "max_dropped": 1.0,
    } | changes
    return prepare_rows(train, evaluation, make_tokenizer(), **options)


def test_labels_and_unrated_answers_are_counted():
    groups = [answer(f"q{n}", "a", n % 4 != 0) for n in range(8)]
    data = prepare(rows_of(*groups, unrated=5), eval_fraction=0.0)
    assert data.labels() == {"train": LabelCounts(6, 2), "eval": LabelCounts(0, 0)}
    counts = data.counts()
    assert counts["labels"] == {
        "train": {"desirable": 6, "undesirable": 2},
        "eval": {"desirable": 0, "undesirable": 0},
    }
    assert (counts["unrated"], counts["train_pairs"], counts["dropped"]) == (5, 0, {})


def test_pairs_have_no_labels_to_count():
    pair = PreferenceGroup("q", ("a", "b"), (1, 2), 1.0, None, "f:1")
    counts = prepare(rows_of(pair), eval_fraction=0.0).counts()
    assert not {"labels", "unrated"} & counts.keys()


def test_unrated_answers_of_held_out_rows_count_too():
    data = prepare(
        rows_of(answer("q", "a"), unrated=1),
        rows_of(answer("r", "a", False), unrated=2, name="eval.jsonl"),
    )
    assert data.unrated == 3
    assert data.labels() == {"train": LabelCounts(1, 0), "eval": LabelCounts(0, 1)}


def turns(*texts):
    roles = ("user", "assistant") * len(texts)
    return tuple(Message(role, text) for role, text in zip(roles, texts, strict=False))


def test_a_conversation_in_both_files_is_said():
    """Another turn of it is trained on: its first question is in both."""
    train = rows_of(answer(turns("q", "a", "r"), "b"), answer(turns("s"), "b"))
    held_out = rows_of(answer(turns("q"), "a"), answer(turns("t"), "a"), name="eval.jsonl")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    data = prepare_rows(
        train, held_out, tokenizer, max_length=100, truncation="drop", eval_fraction=0.0,
        split_seed=0, max_dropped=1.0,
    )  # fmt: skip
    assert "1 prompts of data.eval are in data.train too" in data.notes


def test_the_rows_hash_and_the_names_of_groups_know_the_label():
    up, down = labelled(True), labelled(False)
    assert data_hash([up], []) != data_hash([down], [])
    assert data_hash([up], []) != data_hash([labelled(None)], [])
    assert len({group_id(up), group_id(down), group_id(labelled(None))}) == 3


def test_both_labels_of_one_answer_have_one_order():
    """Of one prompt and one answer: sorted by what the groups are, not by where they stand."""
    up, down = labelled(True, number=1), labelled(False, number=2)
    orders = [[group.label for group in given] for given in ([up, down], [down, up])]
    sampled = [
        [labels[n] for n in in_lots(groups)]
        for labels, groups in zip(orders, ([up, down], [down, up]), strict=True)
    ]
    assert sampled[0] == sampled[1]


def test_a_row_that_the_template_refuses_is_set_aside_with_its_label():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') if messages[0].content == 'x' }}" + TEMPLATE
    groups = [answer(turns(f"q{n}"), "a", True) for n in range(9)] + [
        answer(turns("x"), "a", False)
    ]
    options = {"max_length": 100, "truncation": "drop", "eval_fraction": 0.0, "split_seed": 0}
    data = prepare_rows(
        rows_of(*groups), None, tokenizer, max_dropped=1.0, on_bad_row="skip", **options
    )
    [row] = [json.loads(bad.row) for bad in data.set_aside]
    assert row == {"prompt": [{"role": "user", "content": "x"}], "response": "a", "label": False}
    assert data.labels()["train"] == LabelCounts(9, 0)


def test_dropping_too_many_names_the_reasons():
    groups = [answer(f"q{n}", "" if n % 2 else "a") for n in range(8)]
    with pytest.raises(UserError, match=r"4 of 8 rows were dropped \(4 empty_response"):
        prepare(rows_of(*groups), max_dropped=0.1)


# Real rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["rows", "log"])
def test_real_pairs_as_thumbs_add_up(shared, tmp_path, form):
    """Each pair of the politeness data as a thumb up and a thumb down, and a third left unrated."""
    pairs = [json.loads(x) for x in (shared / "data" / "politeness.jsonl").open()][:200]
    made = []
    for number, pair in enumerate(pairs):
        for field, label in (("chosen", True), ("rejected", False)):
            label = None if number % 3 == 0 else label
            if form == "rows":
                made.append({"prompt": pair["prompt"], "completion": pair[field], "label": label})
            else:
                turn = {"role": "assistant", "content": pair[field], "rating": label}
                made.append({"messages": [{"role": "user", "content": pair["prompt"]}, turn]})
    path = tmp_path / "thumbs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    rows = read_rows(str(path), format="auto", columns={}, split=None, subset=None, revision=None)
    unrated = 2 * len(range(0, 200, 3))
    assert (rows.unrated, rows.total, rows.bad) == (unrated, 400 - unrated, [])
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    data = prepare_rows(
        rows, None, tokenizer, max_length=512, truncation="response", eval_fraction=0.1,
        split_seed=0, max_dropped=0.5,
    )  # fmt: skip
    assert len(data.train) + len(data.eval) + data.dropped.total() == rows.total
    assert set(data.dropped) <= {"too_long"}
    labels = Counter(group.label for group in [*data.train, *data.eval])
    assert labels[True] + labels[False] == len(data.train) + len(data.eval)
    assert not {g.prompt_key for g in data.train} & {g.prompt_key for g in data.eval}
    assert data.eval
