"""The best value of a metric and the patience, beside a plain account of all values."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.settings.selection import Selection
from dpo_lightning.training.checkpoints.best import BestCheckpoint, _Course
from dpo_lightning.training.checkpoints.files import checkpoint_path, manifest_path, prune
from tests.support.properties import examples


def selection(sign: int = -1, patience: int | None = None, min_delta: float = 0.0) -> Selection:
    return Selection("eval/loss", sign, patience, min_delta, "last")


def taken(values: list[float], chosen: Selection) -> _Course:
    course = _Course()
    for step, value in enumerate(values, start=1):
        course.take(value, step, chosen)
    return course


def test_the_smaller_loss_is_better_and_of_equal_ones_the_earlier():
    """0.5 at step 2 is the least; it comes again at step 4, and NaN and infinities never count."""
    course = taken([0.6, 0.5, math.nan, 0.5, -math.inf], selection())
    assert (course.best, course.best_step, course.waited) == (0.5, 2, 3)
    course = taken([0.6, 0.5, 0.7, 0.7], selection(sign=1))
    assert (course.best, course.best_step, course.waited) == (0.7, 3, 1)


def test_the_patience_waits_for_an_improvement_of_its_own_size():
    """From 1.0 with 0.1: 0.95 and 0.92 are none, 0.85 is; but 0.92 was the best on the way."""
    chosen = selection(min_delta=0.1)
    course = taken([1.0, 0.95, 0.92], chosen)
    assert (course.best, course.best_step, course.anchor, course.waited) == (0.92, 3, 1.0, 2)
    course.take(0.85, 4, chosen)
    assert (course.best_step, course.anchor, course.waited) == (4, 0.85, 0)


def test_as_many_lead_as_are_kept_and_the_earlier_of_equal_ones():
    """Losses 0.6, 0.5, 0.5, 0.7, 0.4: of two the step of 0.5 that came first is pushed out last."""
    course = _Course()
    entered = [
        course.take(value, step, selection(), keep=2)
        for step, value in enumerate((0.6, 0.5, 0.5, 0.7, math.nan, 0.4), start=1)
    ]
    assert entered == [True, True, True, False, False, True]
    assert course.leaders == [(0.4, 6), (0.5, 2)]
    assert (course.best, course.best_step) == (0.4, 6)


def test_there_is_no_best_of_what_is_not_finite():
    assert taken([math.nan, math.inf], selection()).best_step is None


@settings(max_examples=examples(100))
@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.3, math.nan]), min_size=1, max_size=12),
    st.sampled_from([1, -1]),
    st.sampled_from([0.0, 0.05, 0.15]),
)
def test_the_course_is_that_of_all_values_at_once(
    values: list[float], sign: int, min_delta: float
) -> None:
    course = taken(values, selection(sign, min_delta=min_delta))
    finite = [(sign * value, -step) for step, value in enumerate(values, 1) if value == value]
    if finite:
        best, step = max(finite)
        assert (sign * course.best, course.best_step) == (best, -step)
    anchor, waited = None, 0
    for value in values:
        improves = value == value and (anchor is None or sign * (value - anchor) > min_delta)
        anchor, waited = (value, 0) if improves else (anchor, waited + 1)
    assert (course.anchor, course.waited) == (anchor, waited)


def callback(folder: Path, patience: int | None = 2, sample: str = "rows") -> BestCheckpoint:
    return BestCheckpoint(
        folder, selection(patience=patience), sample=sample, every=1, total_steps=9, keep=1,
        resumed=None, logged=dict,
    )  # fmt: skip


def test_a_state_is_taken_if_it_measured_the_same(tmp_path, caplog):
    first = callback(tmp_path)
    for step, value in enumerate((0.5, 0.6, 0.7), start=1):
        first._course.take(value, step, selection())
    assert first.stops
    assert first.entry() == {
        **{"monitor": "eval/loss", "best": 0.5, "best_step": 1, "stopped_early": True}
    }
    again = callback(tmp_path)
    again.load_state_dict(first.state_dict())
    assert again.state_dict() == first.state_dict()
    other = callback(tmp_path, sample="others")
    with caplog.at_level("INFO"):
        other.load_state_dict(first.state_dict())
    assert other.step is None
    assert "another sample of held-out rows" in caplog.text


def make(folder: Path, *steps: int) -> None:
    folder.mkdir(exist_ok=True)
    for step in steps:
        checkpoint_path(folder, step).touch()
        manifest_path(checkpoint_path(folder, step)).touch()


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        *((1, (), [4]), (2, (), [3, 4]), (1, (2,), [2, 4]), (1, (4,), [4]), (2, (2,), [2, 4])),
        *((2, (1, 2), [1, 2, 4]), (3, (2,), [2, 3, 4]), (2, (4, 1), [1, 4]), (1, (9,), [4])),
    ],
)
def test_the_best_stay_beside_the_newest(tmp_path, keep: int, best: tuple, left: list[int]):
    """The newest are those up to ``keep`` where fewer were measured."""
    make(tmp_path, 1, 2, 3, 4)
    own = [checkpoint_path(tmp_path, step) for step in best]
    prune(tmp_path, newest=checkpoint_path(tmp_path, 4), keep=keep, best=own)
    assert sorted(int(path.stem[5:]) for path in tmp_path.glob("*.ckpt")) == left


def test_the_best_is_looked_for_here_and_beside_what_is_resumed(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    make(here)
    make(there, 3, 5)
    own = callback(here)
    own._resumed = checkpoint_path(there, 5)
    own._course.take(0.1, 3, selection())
    assert own.path_of_best() == checkpoint_path(there, 3)
    own._fetch()
    assert own.path_of_best() == checkpoint_path(here, 3)
    # What is resumed may have any name.
    named = there / "copy.ckpt"
    named.touch()
    named.with_suffix(".json").touch()
    other = callback(tmp_path / "other")
    other._resumed, other._start = named, 7
    other._course.take(0.1, 7, selection())
    assert other.path_of_best() == named
    other._fetch()
    assert other.path_of_best() == checkpoint_path(tmp_path / "other", 7)
    # Two that are kept are both fetched, but for one that is gone.
    both = callback(tmp_path / "both")
    both._resumed = checkpoint_path(there, 5)
    for step, value in ((3, 0.3), (4, 0.2), (5, 0.1)):
        both._course.take(value, step, selection(), keep=3)
    both._fetch()
    assert sorted(path.name for path in (tmp_path / "both").glob("*.ckpt")) == [
        checkpoint_path(there, step).name for step in (3, 5)
    ]
    checkpoint_path(here, 3).unlink()
    manifest_path(checkpoint_path(here, 3)).unlink()
    manifest_path(checkpoint_path(there, 3)).unlink()
    assert own.path_of_best() is None
