"""Number of steps of a run, its warmup steps, and its peak learning rate."""

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.settings.schema import Config
from dpo_lightning.training.schedule import Schedule, make_schedule


def schedule(*, groups: int = 100, bundled: bool = False, **settings) -> Schedule:
    """Settings by their keys, `.` written as `__`; 10 groups a step."""
    config = Config()
    config.data.batch_size = 10
    for key, value in settings.items():
        group, name = key.split("__")
        setattr(getattr(config, group), name, value)
    return make_schedule(config, groups=groups, bundled=bundled)


@pytest.mark.parametrize(
    ("groups", "max_steps", "max_epochs", "total"),
    [
        (100, None, None, 10),
        (101, None, None, 11),  # the last step is of one group
        (101, None, 3, 33),
        (101, 7, None, 7),
        (101, 50, None, 50),  # more than a pass
        (101, 30, 2, 22),  # whichever ends first
        (101, 20, 2, 20),
    ],
)
def test_steps_of_a_run(groups, max_steps, max_epochs, total):
    found = schedule(groups=groups, trainer__max_steps=max_steps, trainer__max_epochs=max_epochs)
    assert found.total_steps == total


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [
        (0.1, 100, 10),
        (0.1, 15, 2),  # 1.5: a part of a step is one
        (0.1, 4, 1),  # 0.4: a share above 0 warms up
        (0.25, 10, 3),  # 2.5
        (0.99, 10, 10),
        (0, 10, 0),
        (1, 10, 1),  # from 1 on a number of steps
        (7, 10, 7),
    ],
)
def test_a_share_of_the_steps_warms_up_rounded_up(warmup, total, steps):
    found = schedule(optimizer__warmup=warmup, trainer__max_steps=total)
    assert found.warmup_steps == steps


def test_by_default_a_tenth_warms_up():
    assert schedule(trainer__max_steps=25).warmup_steps == 3


@pytest.mark.parametrize(
    ("bundled", "kind", "lr", "expected"),
    [
        (True, "none", None, 1e-3),
        (True, "lora", None, 1e-3),
        (False, "none", None, 5e-7),
        (False, "lora", None, 5e-6),
        (True, "none", 2e-4, 2e-4),
        (False, "lora", 2e-4, 2e-4),
    ],
)
def test_the_learning_rate_follows_what_is_trained(bundled, kind, lr, expected):
    found = schedule(bundled=bundled, peft__kind=kind, optimizer__lr=lr)
    assert found.learning_rate == expected


@pytest.mark.parametrize(
    ("steps", "every", "expected"), [(200, None, 1), (201, None, 10), (201, 3, 3), (5, 4, 4)]
)
def test_long_runs_log_every_tenth_step(steps, every, expected):
    found = schedule(trainer__max_steps=steps, trainer__log_every_n_steps=every)
    assert found.log_every_n_steps == expected


@pytest.mark.parametrize(
    ("settings", "rate", "reason"),
    [
        ({"bundled": True}, 1e-3, "default for the bundled model"),
        ({}, 5e-7, "default for training all weights"),
        ({"peft__kind": "lora"}, 5e-6, "default for LoRA"),
        ({"optimizer__lr": 5e-7}, 5e-7, ""),
        # Twenty times 5e-7, and of 5e-6; the bundled model learns a few groups as it is.
        ({"data__overfit_groups": 8}, 1e-5, "20 x the default for training all weights"),
        ({"data__overfit_groups": 8, "peft__kind": "lora"}, 1e-4, "20 x the default for LoRA"),
        ({"data__overfit_groups": 8, "bundled": True}, 1e-3, "default for the bundled model"),
        ({"data__overfit_groups": 8, "optimizer__lr": 1.0}, 1.0, ""),
    ],
)
def test_a_default_learning_rate_has_its_reason(settings: dict, rate: float, reason: str):
    found = schedule(**settings)
    assert found.learning_rate == pytest.approx(rate)
    assert found.learning_rate_of == reason or found.learning_rate_of == f"{reason}, to overfit"


@pytest.mark.parametrize(
    ("settings", "steps", "total"),
    [
        ({"rounds__count": 3, "trainer__max_steps": 14}, 4, 12),  # 14 / 3 rounded down
        ({"rounds__count": 3, "rounds__steps": 7}, 7, 21),  # whatever a pass has
        ({"rounds__count": 3}, 3, 9),  # a pass of ten steps
        ({"rounds__count": 2, "trainer__max_epochs": 3}, 15, 30),
        ({}, None, 10),
    ],
)
def test_steps_of_rounds(settings, steps, total):
    found = schedule(groups=100, **settings)
    assert (found.round_steps, found.total_steps) == (steps, total)


def test_more_rounds_than_steps_are_refused():
    with pytest.raises(UserError, match=r"rounds.count=11: a pass over the rows has 10 steps"):
        schedule(groups=100, rounds__count=11)
