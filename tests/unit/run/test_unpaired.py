"""Rows of one response in a run: losses that take them, what is said, what inspect tells."""

import json
from dataclasses import replace

import pytest
import torch

from dpo_lightning.data.groups import PreferenceGroup
from dpo_lightning.data.records import Rows
from dpo_lightning.data.splits import PreparedData
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.answers import Answering, choose_prompts
from dpo_lightning.objectives.registry import UNPAIRED_LOSSES
from dpo_lightning.run.evaluate.slices import slices_by_column
from dpo_lightning.run.header import _counts
from dpo_lightning.run.inputs import SourceRows, check_labels, read_named
from dpo_lightning.run.inspect.oddities import count_oddities, leaks, told_rows
from dpo_lightning.settings.schema import Config, DataConfig, LossConfig
from tests.support.groups import ids, token_group
from tests.support.inspected import inspect_json
from tests.support.models import byte_tokenizer
from tests.support.odd_rows import refusal

PAIR = PreferenceGroup("q", ("a", "b"), (1, 2), 1.0, None, "pairs.jsonl:1")
RANKED = PreferenceGroup("q", ("a", "b", "c"), (1, 2, 3), 1.0, None, "ranked.jsonl:1")


def answer(label=True, *, prompt="q", response="a", place="thumbs.jsonl:1"):
    return PreferenceGroup(prompt, (response,), (1,), 1.0, None, place, label=label)


def source(*groups):
    return Rows(list(groups), [], len(groups), [])


def told(loss, train, evaluation=None, **sets):
    """The reason against rows with a loss; None where it takes them."""
    rows = SourceRows(source(*train), evaluation and source(*evaluation), sets)
    settings = loss if isinstance(loss, LossConfig) else LossConfig(name=loss)
    return refusal(lambda: check_labels(rows, settings))


# Losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "sft", "plackett_luce", "kto_pair"])
def test_a_loss_that_compares_refuses_single_responses_by_name(loss):
    message = told(loss, [PAIR, answer(), answer(False)])
    assert message == (
        "data.train: thumbs.jsonl:1 has one response and a label (2 of 3 rows), and "
        f"loss={loss} compares responses; use loss=kto or loss=bco or loss=apo_zero_unpaired, or "
        "give rows with chosen and rejected"
    )
    assert told(loss, [PAIR]) is None


@pytest.mark.parametrize("loss", UNPAIRED_LOSSES)
def test_a_loss_of_single_responses_takes_labels_and_pairs(loss):
    assert told(loss, [answer(), answer(False), PAIR]) is None
    assert told(loss, [PAIR], [answer()]) is None
    message = told(loss, [answer(), RANKED])
    assert message.startswith(
        "data.train: ranked.jsonl:1 has 3 ranked responses (1 of 2 rows), and "
        f"loss={loss} takes each as desirable or undesirable"
    )


def test_held_out_rows_are_looked_at_too():
    assert told("sigmoid", [PAIR], [answer()]).startswith("data.eval: thumbs.jsonl:1 has one")
    message = told("sigmoid", [PAIR], [PAIR], first=source(PAIR), second=source(answer()))
    assert message.startswith("data.eval.second: thumbs.jsonl:1 has one response")


def test_of_several_losses_each_has_to_take_them():
    both = LossConfig(name="mine", terms={"kto": 1.0, "sigmoid": 1.0})
    assert "loss=kto,sigmoid compares responses" in told(both, [answer()])
    assert told(LossConfig(name="mine", terms={"kto": 1.0, "bco": 1.0}), [answer()]) is None


def test_rows_are_named_by_the_key_that_the_user_typed():
    rows = SourceRows(source(answer()), None)
    with pytest.raises(UserError, match=r"^data\.eval: thumbs"):
        check_labels(rows, LossConfig(), key="data.eval")


# The threshold ------------------------------------------------------------------------------------


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_threshold_of_the_settings_reaches_the_rows(tmp_path):
    rows = [{"prompt": "q", "response": "a", "label": n} for n in (2, 5)]
    path = write(tmp_path / "a.jsonl", *rows)
    found = read_named(replace(Config(), data=DataConfig(train=path, threshold=4.0)))
    assert [group.label for group in found.train.groups] == [False, True]
    assert not any("data.threshold" in note for note in found.train.notes)


def test_a_threshold_that_nothing_is_compared_with_is_said(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "q", "response": "a", "label": True})
    found = read_named(replace(Config(), data=DataConfig(train=path, threshold=4.0)))
    assert (
        "data.threshold=4: no row has a number as its label; 'data.columns={label: <column>}' "
        "names the column of the ratings"
    ) in found.train.notes


# What is told -------------------------------------------------------------------------------------


def token(label, *, key="q", number=1):
    return replace(token_group(key, number), responses=(ids(3, 0),), ranks=(1,), label=label)


def test_the_header_counts_labels_and_unrated_answers():
    data = PreparedData(train=[token(True), token(True), token(False)], eval=[], unrated=1)
    assert _counts(data) == (
        "3 training and 0 evaluation rows; of the training rows 2 desirable, 1 undesirable; 1 "
        "unrated answer left out"
    )


def kinds(*rows):
    return {name: own.count for name, own in count_oddities(told_rows(rows)).items() if own.count}


def test_an_answer_with_both_labels_is_one_contradiction():
    """Up in rows 1 and 2, down in 3 and 4: one answer, however often; 2 and 4 are duplicates."""
    up, down = answer(True), answer(False)
    assert kinds(up, up, down, down) == {
        "contradictory_labels": 1,
        "duplicates": 2,
        "repeated_prompts": 3,
    }
    assert kinds(up, answer(False, response="b")) == {"repeated_prompts": 1}
    assert kinds(up, answer(False, prompt="r")) == {}


def test_one_response_is_no_tie():
    assert kinds(answer(True)) == {}
    assert kinds(replace(answer(True), label=None)) == {"tied": 1}


def test_another_turn_of_a_conversation_leaks():
    later = '[["user", "q"], ["assistant", "a"], ["user", "r"]]'
    first = '[["user", "q"]]'
    found = leaks([token(True, key=later)], [token(False, key=first, number=2)])
    assert found.count == 1
    assert leaks([token(True, key=first)], [token(False, key=later, number=2)]).count == 1
    assert leaks([token_group(later)], [token_group(first)]).count == 0


def test_a_slice_finds_the_row_of_an_answer():
    groups = [replace(token(True), source=f"log.jsonl:{n}[3]") for n in (1, 2)]
    found = slices_by_column(groups, "country", {"log.jsonl:1": "a", "log.jsonl:2": "b"})
    assert [(own.value, own.groups.tolist()) for own in found] == [("a", [0]), ("b", [1])]


def test_an_undesirable_answer_is_never_shown_as_the_preferred_one():
    """Of both answers to one prompt the desirable one is; without it there is none."""
    tokenizer = byte_tokenizer()
    said = tokenizer("Yes.")["input_ids"]
    down, up = (replace(token(label), responses=(ids(*said),)) for label in (False, True))
    assert [g.label for g in choose_prompts([down, up], count=1, max_tokens=9)] == [True]
    assert [g.label for g in choose_prompts([up, down], count=1, max_tokens=9)] == [True]
    assert [g.label for g in choose_prompts([down], count=1, max_tokens=9)] == [False]
    answering = Answering(tokenizer, 4, 16, torch.no_grad)
    assert (answering.preferred(down), answering.preferred(up)) == ("", "Yes.")
    assert answering.preferred(token_group()) == answering.text(ids(3, 0)).strip()


# It loads a model's config and tokenizer.
@pytest.mark.slow
def test_inspect_tells_labels_and_refuses_a_loss_that_compares(
    tmp_path, monkeypatch, capsys, tiny_model
):
    """Six rated answers, one of them twice and both ways, and one that nobody rated."""
    monkeypatch.chdir(tmp_path)

    def turn(content, **more):
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": content, **more}]

    rows = [
        *({"messages": turn(f"a{n}", rating=n < 4)} for n in range(5)),
        {"messages": turn("a0", rating=False)},
        {"messages": turn("x")},
    ]
    write(tmp_path / "log.jsonl", *rows)
    words = [f"model.pretrained={tiny_model}", "data.train=log.jsonl", "logger=none"]
    words += ["data.eval_fraction=0", "data.chat_template='{% for m in messages %}{{m.content}} "
              "{% endfor %}'"]  # fmt: skip
    found = inspect_json(capsys, *words, code=2)
    train = found["rows"]["train"]
    assert (train["read"], train["unrated"], train["forms"]) == (6, 1, {"label": 6})
    assert train["labels"] == found["groups"]["labels"] == {"desirable": 4, "undesirable": 2}
    assert found["groups"]["responses"] == {"1": 6}
    oddities = found["oddities"]["train"]
    assert oddities["contradictory_labels"] == {"count": 1, "places": ["log.jsonl:6[1]"]}
    assert oddities["tied"]["count"] == 0
    assert found["example"]["label"] in (True, False)
    [refused] = found["refused"]
    assert "data.train: log.jsonl:1[1] has one response and a label (6 of 6 rows)" in refused
