"""Header of a run: what it says of the rows."""

from types import SimpleNamespace

import pytest

from dpo_lightning.data.splits import PreparedData
from dpo_lightning.run.header import _counts, _steps
from tests.support.reference_caches import pair


def test_a_sample_of_the_held_out_rows_is_said():
    rows = [pair((1,), (2,), (3,))] * 6
    data = PreparedData(train=rows[:2], eval=rows)
    assert _counts(data) == "2 training and 6 evaluation rows"
    assert data.counts()["evaluated_groups"] == data.counts()["eval_groups"] == 6
    data.evaluated = [0, 4, 5]
    assert _counts(data) == (
        "2 training and 6 evaluation rows, a fixed sample of 3 of these is evaluated"
    )
    assert (data.counts()["eval_groups"], data.counts()["evaluated_groups"]) == (6, 3)


@pytest.mark.parametrize(
    ("steps", "warmup", "reason", "line"),
    [
        (
            *(1031, 104, "default for training all weights"),
            "1,031 steps x 32 prompts, learning rate 5e-07 (default for training all weights), "
            "104 warm-up steps",
        ),
        (1, 1, "", "1 step x 32 prompts, learning rate 5e-07, 1 warm-up step"),
    ],
)
def test_the_default_learning_rate_is_said_with_its_reason(steps, warmup, reason, line: str):
    schedule = SimpleNamespace(
        total_steps=steps, warmup_steps=warmup, learning_rate=5e-7, learning_rate_of=reason
    )
    assert _steps(SimpleNamespace(schedule=schedule, batches=SimpleNamespace(size=32))) == line
