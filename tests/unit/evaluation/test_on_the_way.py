"""Share of the wall time that answers at evaluations take, and when it is said."""

import pytest

from dpo_lightning.evaluation import on_the_way
from dpo_lightning.evaluation.on_the_way import AnswersOnTheWay


@pytest.mark.parametrize(
    ("seconds", "step", "said"), [(2.0, 30, True), (2.0, 20, False), (0.9, 30, False)]
)
def test_answers_that_take_a_tenth_of_the_time_are_said_with_their_key(
    monkeypatch, caplog, seconds: float, step: int, said: bool
):
    """2 of 10 s are 20%, 0.9 s are 9%; the first quarter of 100 steps may yet be warming up."""
    monkeypatch.setattr(on_the_way.time, "perf_counter", lambda: 10.0)
    answers = AnswersOnTheWay(count=32, total_steps=100, seed=1)
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
