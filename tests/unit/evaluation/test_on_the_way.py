"""Answers at evaluations: how they are kept, and when their share of the wall time is said."""

import json
import math
from types import SimpleNamespace

import pytest

from dpo_lightning.evaluation import on_the_way
from dpo_lightning.evaluation.answer_rows import AnswerRows
from dpo_lightning.evaluation.on_the_way import AnswersOnTheWay, mean_mark


class Folder:
    """A run's folder that begins when it is told."""

    def __init__(self, path=None, *, begun: bool = True) -> None:
        self.path, self.begun = path, begun
        self.texts, self.hooks = {}, []

    def put(self, name, content) -> None:
        self.texts[name] = content
        if self.begun:
            self._write()

    def when_begun(self, hook) -> None:
        self.hooks.append(hook)
        if self.begun:
            hook()

    def begin(self) -> None:
        self._write()
        for hook in self.hooks:
            hook()

    def _write(self) -> None:
        for name, content in self.texts.items():
            (self.path / name).write_bytes(content())


def steps_of(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_answers_wait_until_the_run_has_begun(tmp_path):
    """Those before the first step too; an earlier run's file stays until then."""
    file = tmp_path / "samples.jsonl"
    file.write_text("an earlier run's")
    folder = Folder(tmp_path, begun=False)
    rows = AnswerRows(tmp_path, folder)
    rows.start(0, None)
    rows.add([(0, "sun", "rain", None)])
    assert file.read_text() == "an earlier run's"
    folder.begin()
    rows.add([(2, "sun", "a\nb", 0.5)])
    assert steps_of(file) == [0, 2]
    assert rows.table() == [[0, "sun", "rain", None], [2, "sun", "a\nb", 0.5]]
    assert file.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize(
    ("step", "last", "kept"),
    [(4, 4, [2, 4]), (4, 2, [2]), (5, 4, [2, 4]), (0, None, []), (4, None, [])],
)
def test_a_run_that_goes_on_keeps_what_its_checkpoint_knew_of(tmp_path, step, last, kept):
    """At step 4 an evaluation may have been before the checkpoint, or comes again behind it."""
    file = tmp_path / "samples.jsonl"
    lines = [json.dumps({"step": s, "prompt": "p", "answer": "a", "judge": 1}) for s in (2, 4, 6)]
    file.write_text("\n".join(lines) + '\n{"step": 8, "pro')
    rows = AnswerRows(tmp_path, Folder(tmp_path))
    rows.start(step, last)
    assert steps_of(file) == kept
    rows.add([(9, "p", "b", None)])
    assert steps_of(file) == [*kept, 9]


@pytest.mark.parametrize(
    ("marks", "mean"),
    [([1.0, 2.0, 6.0], 3.0), ([None] * 2, math.nan), ([4.0, None, None, None], math.nan)],
)
def test_the_mean_mark_of_an_evaluation(marks, mean: float):
    """None is given where most marks are missing."""
    assert mean_mark(marks) == pytest.approx(mean, nan_ok=True)


def test_a_disk_that_is_full_costs_answers_alone(tmp_path, caplog):
    rows = AnswerRows(tmp_path, Folder(tmp_path))
    rows.start(0, None)
    (tmp_path / "samples.jsonl").unlink()
    (tmp_path / "samples.jsonl").mkdir()
    rows.add([(1, "p", "a", None)])
    rows.add([(2, "p", "a", None)])
    assert len(caplog.records) == 1
    assert [row[0] for row in rows.table()] == [1, 2]


def test_a_judge_on_the_way_shows_how_far_it_is(tmp_path):
    """Its progress goes where that of the answers goes, which the session chose."""
    given = {}

    def mark(prompts, texts, *, show):
        given.update(prompts=prompts, texts=texts, show=show)
        return [0.5], {}

    answers = AnswersOnTheWay(
        count=1, total_steps=9, seed=1, last_too=False, rows=AnswerRows(tmp_path, Folder())
    )
    groups = [SimpleNamespace(prompt_key=json.dumps("sun"))]
    judge = SimpleNamespace(gives_marks=True, mark=mark)
    answering = SimpleNamespace(show=object())
    answers.ask(groups, models=None, answering=answering, judge=judge)
    assert answers._marks(groups, ["rain"]) == [0.5]
    assert (given["texts"], given["show"]) == (["rain"], answering.show)


@pytest.mark.parametrize(
    ("seconds", "step", "said"), [(2.0, 30, True), (2.0, 20, False), (0.9, 30, False)]
)
def test_answers_that_take_a_tenth_of_the_time_are_said_with_their_key(
    monkeypatch, caplog, tmp_path, seconds: float, step: int, said: bool
):
    """2 of 10 s are 20%, 0.9 s are 9%; the first quarter of 100 steps may yet be warming up."""
    monkeypatch.setattr(on_the_way.time, "perf_counter", lambda: 10.0)
    answers = AnswersOnTheWay(
        count=32, total_steps=100, seed=1, last_too=False, rows=AnswerRows(tmp_path, Folder())
    )
    answers.seconds = seconds
    with caplog.at_level("INFO"):
        answers._say_if_slow(step)
        answers._say_if_slow(step + 1)
    assert answers.share() == pytest.approx(seconds / 10)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == said
    if said:
        assert lines[0].startswith("answers at evaluations took 20% of the wall time so far")
        assert "evaluation.intermediate_samples=" in lines[0]
