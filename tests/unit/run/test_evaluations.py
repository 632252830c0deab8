"""Evaluations of a run: how many, on which rows, and what is refused because of it."""

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.splits import PreparedData
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.run.evaluations import EvaluationCourse, plan_evaluations, selection_notes
from dpo_lightning.settings.schema import CheckpointConfig, EvaluationConfig
from tests.support.properties import examples
from tests.support.reference_caches import pair


def groups(count: int, name: str, tokens: int = 10) -> list[TokenGroup]:
    """Groups of as many tokens, the prompt once."""
    responses = tuple(range(2, tokens)), (1,)
    return [replace(pair((1,), *responses), prompt_key=f"{name} {i}") for i in range(count)]


def plan(
    train: int = 4000,
    held_out: int = 400,
    *,
    steps: int = 100,
    sets: dict[str, int] | None = None,
    checkpoint: CheckpointConfig | None = None,
    tokens: tuple[int, int] = (10, 10),
    round_steps: int | None = None,
    **evaluation,
) -> EvaluationCourse:
    data = PreparedData(groups(train, "train", tokens[0]), groups(held_out, "eval", tokens[1]))
    data.sets = sets or {}
    return plan_evaluations(
        EvaluationConfig(**evaluation),
        checkpoint or CheckpointConfig(),
        data,
        total_steps=steps,
        round_steps=round_steps,
        batch_size=40,
        shared=True,
    )


@pytest.mark.parametrize(
    ("steps", "round_steps", "every"),
    [(99, 33, 33), (100, 2, 10), (1001, 7, 105), (100, 1, 10), (100, 100, 100)],
)
def test_with_rounds_evaluations_are_at_their_ends(steps: int, round_steps: int, every: int):
    """A tenth of 1,001 steps is 101, and the next end of a round of seven is after 105."""
    course = plan(steps=steps, round_steps=round_steps)
    assert course.every == every
    assert course.exact
    assert course.every % round_steps == 0


def test_with_rounds_few_rows_are_enough_for_an_evaluation():
    """5% of 120 rows are six, two for each of three rounds but the last: three before it."""
    assert plan(train=120, steps=3, round_steps=None).before_last == 0
    course = plan(train=120, steps=3, round_steps=1)
    assert (course.every, course.before_last, course.rows) == (1, 2, 3)


def test_an_interval_that_is_set_is_kept_with_rounds():
    assert plan(steps=99, round_steps=33, every_n_steps=10).every == 10


def test_ten_evaluations_of_which_nine_see_a_twentieth():
    """4,000 rows in 100 steps: 5% are 200 rows; the nine before the last one have 22 each."""
    course = plan()
    assert (course.every, course.before_last, course.rows) == (10, 9, 22)
    assert course.describe() == (
        "every 10 steps on a fixed sample of 22 of 400 rows (at most 0.05 of the trained tokens), "
        "all at the end"
    )


def test_one_at_the_start_takes_its_part():
    """Ten before the last one: 200 rows are 20 each."""
    course = plan(on_start=True)
    assert (course.every, course.before_last, course.rows) == (10, 10, 20)
    assert course.describe().startswith("at the start, every 10 steps on a fixed sample of 20")


def test_an_interval_that_is_set_sees_all_unless_a_share_is_set_too():
    """3 of 100 leave 33 before the last: 5% of 4,000 rows are 6 for each."""
    assert plan(every_n_steps=3).held_out.sample is None
    assert plan(every_n_steps=3).rows == 400
    assert plan(every_n_steps=3, max_token_share=0.05).rows == 6
    assert plan(max_token_share=1).rows == 400


# 400 rows of 10 tokens: 5% are 200, which are five held-out rows of 40 and no sample of 16.
TOO_LONG = {"train": 400, "steps": 10, "tokens": (10, 40)}


def test_where_no_row_fits_there_is_one_evaluation():
    course = plan(**TOO_LONG)
    assert (course.every, course.before_last, course.rows) == (10, 0, 400)
    assert course.describe() == "at the end, on 400 rows"


@pytest.mark.parametrize(
    ("train", "every", "before_last", "rows"),
    [(1000, 7, 3, 16), (640, 6, 2, 16), (320, 4, 1, 16), (319, 8, 0, 400)],
)
def test_few_rows_have_fewer_evaluations(train: int, every: int, before_last: int, rows: int):
    """5% of 1,000 rows are 50, enough for three evaluations of 16: after 7, 14 and 21 of 25 steps.

    640 have 32 for two of 16 steps, 320 have 16 for one of 8, and 319 have 15 and none.
    """
    steps = -(-train // 40)
    course = plan(train=train, steps=steps)
    assert (course.every, course.before_last, course.rows) == (every, before_last, rows)


def test_each_set_has_its_share():
    """200 rows are 100 for each set: six evaluations, every 15 of 100 steps, have 16 of each.

    Seven, every 13 steps, would have 14, which are too few.
    """
    course = plan(sets={"a": 300, "b": 100})
    sample = course.held_out.sample
    assert sample is not None
    assert (course.every, course.before_last) == (15, 6)
    assert sum(row < 300 for row in sample) == sum(row >= 300 for row in sample) == 16


@settings(max_examples=examples(25))
@given(
    st.integers(1, 90), st.integers(1, 60), st.integers(1, 200), st.booleans(),
    st.integers(5, 40), st.integers(5, 40),
)  # fmt: skip
def test_evaluations_before_the_last_take_a_twentieth_at_most(
    train: int, held_out: int, steps: int, on_start: bool, own: int, other: int
) -> None:
    """Counted step by step, with rows of one length on either side."""
    refused = contextlib.suppress(UserError) if on_start else contextlib.nullcontext()
    course = None
    with refused:
        course = plan(train, held_out, steps=steps, on_start=on_start, tokens=(own, other))
    if course is None:  # one was asked for, and has no room
        return
    trained = evaluated = place = 0
    for step in range(1, steps + 1):
        taken = min(40, train - place)
        trained += taken * own
        place = (place + taken) % train
        evaluated += (step % course.every == 0 and step < steps) * course.rows * other
    evaluated += course.on_start * course.rows * other
    assert evaluated <= 0.05 * trained + 1e-6
    assert sum(step % course.every == 0 for step in range(1, steps + 1)) <= 10


MONITORED = CheckpointConfig(monitor="eval/loss")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (TOO_LONG, "0.05 of the trained tokens leave no rows"),
        ({"every_n_steps": 100}, "evaluation.every_n_steps=100 leaves no evaluation before"),
        ({"every_n_steps": 100, "on_start": True}, "leaves no evaluation before the last"),
        ({"held_out": 0}, "checkpoint.monitor=eval/loss: no rows are held out"),
    ],
)
def test_a_monitor_that_is_measured_at_the_end_alone_is_refused(how: dict, said: str) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.monitor=eval/loss: ") as caught:
        plan(checkpoint=MONITORED, **how)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "how",
    [
        {"held_out": 0, "on_start": True},
        TOO_LONG | {"on_start": True},
        TOO_LONG | {"max_token_share": 0.01},
    ],
)
def test_what_is_asked_for_and_has_no_rows_is_refused(how: dict) -> None:
    with pytest.raises(UserError, match=r"^evaluation\.(on_start|max_token_share)="):
        plan(**how)


def test_rows_that_select_and_rank_are_said_and_a_set_of_its_own_is_not():
    rank, few = selection_notes(plan(checkpoint=MONITORED))
    assert "the rows that select checkpoints also rank trials" in rank
    assert "it is measured on 22 rows, which is rough" in few
    own = CheckpointConfig(monitor="eval/b/loss")
    assert selection_notes(plan(checkpoint=own, sets={"a": 300, "b": 100}, every_n_steps=5)) == []
    assert selection_notes(plan()) == []
