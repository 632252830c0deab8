"""Warnings that are not shown: those of the table, to the word, and no others."""

import logging
import warnings

import pytest

from dpo_lightning.tracking.quiet import QUIET_LOGGERS, UNSHOWN, hide_warnings, quiet_loggers

# As the libraries say them.
SAID = (
    "The 'train_dataloader' does not have many workers which may be a bottleneck. Consider "
    "increasing the value of the `num_workers` argument` to `num_workers=1` in the `DataLoader` to "
    "improve performance.",
    "You're resuming from a checkpoint that ended before the epoch ended and your dataloader is "
    "not resumable.",
    "Checkpoint directory outputs/runs/r/checkpoints exists and is not empty.",
    "`isinstance(treespec, LeafSpec)` is deprecated, use `isinstance(treespec, TreeSpec) and "
    "treespec.is_leaf()` instead.",
    "It is recommended to use `self.log('eval/loss', ..., sync_dist=True)` when logging on epoch "
    "level in distributed setting to accumulate the metric across devices.",
    "torch.distributed.nn.functional.all_gather is deprecated, use "
    "torch.distributed._functional_collectives.all_gather_single instead.",
)
OTHERS = (
    "The 'train_dataloader' is empty",
    "Checkpoint directory outputs/runs/r/checkpoints cannot be written",
    "It is recommended to use `self.log('x')` on one rank alone",
    "torch.distributed.nn.functional.all_reduce is deprecated",
    "lr_scheduler.step() before optimizer.step()",
    "Someone says: You're resuming from a checkpoint",
)


def shown(text: str) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hide_warnings()
        warnings.warn(text, UserWarning, stacklevel=1)
    return bool(caught)


@pytest.mark.parametrize("text", SAID)
def test_what_nobody_can_act_on_is_not_shown(text):
    assert not shown(text)


@pytest.mark.parametrize("text", OTHERS)
def test_everything_else_is_shown(text):
    assert shown(text)


def test_each_entry_is_that_of_one_text_and_has_a_reason():
    assert len(SAID) == len(UNSHOWN)
    for warning, text in zip(UNSHOWN, SAID, strict=True):
        assert text.startswith(warning.begins)
        assert warning.then in text
        assert len(warning.begins + warning.then) > 20, "short words are in many warnings"
        assert warning.reason
    assert all(QUIET_LOGGERS.values())


def test_loggers_that_are_quiet_say_errors_alone():
    before = {name: logging.getLogger(name).level for name in QUIET_LOGGERS}
    try:
        quiet_loggers()
        for name in QUIET_LOGGERS:
            assert logging.getLogger(name).isEnabledFor(logging.ERROR)
            assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
