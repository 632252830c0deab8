"""Questions to a judge, and what its replies are read as."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.evaluation.rubric import (
    QUESTIONS,
    conversation,
    question,
    read_mark,
    read_verdict,
)
from dpo_lightning.settings.judging import PLACES
from tests.support.properties import examples


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ('It is fine.\n{"mark": 7}', 7.0),
        ('{"mark": 7.5}', 7.5),
        ('{"mark": "8"}', 8.0),
        ('First {"mark": 3}, no:\n{"mark": 4}', 4.0),  # the last one counts
        ('```json\n{"mark": 2}\n```', 2.0),
        ('{"mark": 6}\nThank you.', 6.0),
        ("Well done.\n9", 9.0),
        ("Mark: 9", 9.0),
        ("**Score: 3/10**", 3.0),
        ('{"mark": NaN}', None),
        ('{"mark": Infinity}', None),
        ('{"mark": "nan"}', None),
        ('{"mark": 1e999}', None),
        ('{"mark": true}', None),
        ('{"mark": null}', None),
        ('{"mark": [7]}', None),
        ('{"mark": 0}', None),  # beyond the scale
        ('{"mark": 11}', None),
        ('{"mark": 10000000000000000000000000}', None),
        ("I would say 7 or 8.", None),
        ("As a language model I cannot judge.", None),
        ("", None),
        ("{" * 100_000, None),
    ],
)
def test_a_mark_is_read_or_is_nonsense(reply, mark):
    assert read_mark(reply, bounded=True) == mark


def test_a_question_of_ones_own_may_have_another_scale():
    assert read_mark('{"mark": 85}', bounded=False) == 85
    assert read_mark('{"mark": -1.5}', bounded=False) == -1.5
    assert read_mark('{"mark": NaN}', bounded=False) is None


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ('Shorter.\n{"better": "first"}', "first"),
        ('{"better": "Second"}', "second"),
        ('{"better": "tie"}', "tie"),
        ('{"better": "first"} or rather {"better": "second"}', "second"),
        ("Reasons.\n**First**", "first"),
        ('{"better": "both"}', None),
        ('{"better": 1}', None),
        ("The first answer is better in all ways.", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_or_is_nonsense(reply, verdict):
    assert read_verdict(reply) == verdict


@given(st.text(max_size=200))
@settings(max_examples=examples(25))
def test_whatever_a_reply_is_it_becomes_a_value_or_nothing(reply):
    mark = read_mark(reply, bounded=True)
    assert mark is None or 1 <= mark <= 10
    assert read_verdict(reply) in (None, "first", "second", "tie")


def test_braces_in_texts_stay_as_they_are():
    """An answer that names a place is not filled again, and JSON in the question stays."""
    texts = {"prompt": "{answer}", "answer": "{prompt} {x}"}
    assert question('{prompt}|{answer}|{"mark": 7}', texts) == '{answer}|{prompt} {x}|{"mark": 7}'


@pytest.mark.parametrize("form", ["pairs", "marks"])
def test_our_own_questions_have_all_places_and_show_what_is_read(form):
    texts = {place: f"<{place}>" for place in PLACES[form]}
    written = question(QUESTIONS[form], texts)
    assert all(text in written for text in texts.values())
    read = read_verdict if form == "pairs" else lambda text: read_mark(text, bounded=True)
    assert read(written) is not None


def test_messages_are_written_out_with_their_roles():
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert conversation(messages) == "system: Be kind.\n\nuser: Hi"
    assert conversation(" Hi ") == "Hi"
