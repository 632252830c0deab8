"""The end of a run that overfits on purpose, step by step."""

import logging
from types import SimpleNamespace

import pytest

from dpo_lightning.data.splits import PreparedData
from dpo_lightning.training.overfit import UntilOverfit
from tests.support.reference_caches import pair


def run_of(losses: list[float | None]) -> SimpleNamespace:
    """A trainer that has these losses, step by step, and stops where it is told."""
    trainer = SimpleNamespace(
        callback_metrics={}, should_stop=False, global_step=0, is_global_zero=True
    )
    callback = UntilOverfit(8)
    for loss in losses:
        trainer.global_step += 1
        if loss is not None:
            trainer.callback_metrics["train/loss"] = loss
        callback.on_train_batch_end(trainer, None, None, None, 0)
        if trainer.should_stop:
            break
    callback.on_train_end(trainer, None)
    return trainer


def test_it_ends_where_the_loss_is_half_of_the_first_one(caplog):
    """0.6931 / 2 = 0.34655: the third loss is above it, the fourth is not."""
    caplog.set_level(logging.INFO)
    trainer = run_of([None, 0.6931, 0.5, 0.3466, 0.3465, 0.1])
    assert trainer.global_step == 5
    assert caplog.messages == ["overfit: loss 0.6931 -> 0.3465 on 8 groups in 5 steps"]


def test_a_loss_that_does_not_fall_is_a_warning(caplog):
    trainer = run_of([0.6931, 0.69, 0.6])
    assert not trainer.should_stop
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith("did not overfit: loss 0.6931 -> 0.6 on 8 groups in 3 steps;")


@pytest.mark.parametrize("count", [None, 2, 9])
def test_the_first_groups_are_trained_and_evaluated_on(count: int | None):
    rows = [pair((n,), (2,), (3,)) for n in range(4)]
    data = PreparedData(train=rows[:3], eval=rows[3:], sets={"a": 1})
    data.overfit(count)
    if count is None:
        assert (data.train, data.eval, data.sets) == (rows[:3], rows[3:], {"a": 1})
    else:
        assert data.train == data.eval == rows[: min(count, 3)]
        assert data.ranking() == data.evaluated_groups() == data.train
