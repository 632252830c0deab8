"""A run that selects its best checkpoint and ends early, stopped at ten moments and killed at ten.

What is the best, how long it waited, the sample and the evaluation at the start are those of an
undisturbed run, to the bit.
"""

import random
import time

import pytest

from tests.support.recovery import assert_same_end, checkpoint, rows
from tests.support.runs import Run, run_train
from tests.support.selecting import SELECTING
from tests.support.signals import DISTURBED, ended, start, wait_for_step

pytestmark = pytest.mark.faults

MOMENTS = 10


def assert_same_selection(run: Run, whole: Run) -> None:
    for key in ("selection", "exported_step", "step", "metrics", "status"):
        assert run.result[key] == whole.result[key], key


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = run_train(folder, *SELECTING, "checkpoint.every_n_steps=1", "checkpoint.keep=99")
    assert run.code == 0
    assert run.result["selection"]["stopped_early"]
    assert MOMENTS < run.result["step"] < 40
    return run


@pytest.mark.parametrize("step", range(1, MOMENTS + 1))
def test_stopped_at_ten_moments(whole: Run, tmp_path, step: int):
    """Into a folder of its own, which gets the best checkpoint from beside the resumed one."""
    resumed = run_train(
        tmp_path / "run", *SELECTING, "checkpoint.every_n_steps=1", "checkpoint.keep=99",
        f"resume={checkpoint(whole, step)}",
    )  # fmt: skip
    assert_same_end(resumed, whole, after=step)
    assert_same_selection(resumed, whole)
    assert not [row for row in resumed.rows if row["step"] == 0]
    assert checkpoint(resumed, whole.result["exported_step"]).exists()


def test_killed_at_ten_moments(tmp_path):
    task = (*SELECTING[:-2], "checkpoint.every_n_steps=3", *DISTURBED)
    whole = ended(tmp_path / "whole", start(tmp_path / "whole", *task, disturb="sleep:0:0"))
    assert whole.code == 0
    last, seed = whole.result["step"], random.randrange(1000)
    print(f"seed {seed}")
    moments = random.Random(seed)
    folder = tmp_path / "run"
    for target in sorted(moments.choices(range(2, last - 3), k=MOMENTS)):
        process = start(folder, *task, "resume=auto", disturb=f"sleep:{target + 3}:0")
        wait_for_step(folder, process, target)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -9, folder.with_suffix(".log").read_text()
    run = ended(folder, start(folder, *task, "resume=auto", disturb="sleep:0:0"))
    assert run.result["resumed"]["step"] > 0
    assert rows(run) == rows(whole)
    assert_same_selection(run, whole)
    assert_same_end(run, whole, after=run.result["resumed"]["step"])
