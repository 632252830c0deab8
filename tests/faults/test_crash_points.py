"""Killed at each phase of a save: there is a whole checkpoint, and the run ends exactly."""

import pytest

from dpo_lightning.training.checkpoints.files import CHECKPOINTS, find_checkpoint, saved_checkpoints
from tests.support.crash import POINTS
from tests.support.crashes import TASK, drive
from tests.support.recovery import assert_same_end, differences, load, rows
from tests.support.runs import Run, run_train

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """Eight steps; all checkpoints kept."""
    run = run_train(tmp_path_factory.mktemp("whole") / "run", *TASK, "checkpoint.keep=9")
    assert run.code == 0
    return run


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_phase_of_a_save(whole: Run, tmp_path, point: str):
    """The save of step 4, with keep=1 and step 2 saved before."""
    folder = tmp_path / "run"
    done = drive(point, 4, folder)
    assert done.returncode == -9, done.stdout + done.stderr
    found = find_checkpoint("auto", folder)
    written = POINTS.index(point) >= POINTS.index("after the manifest")
    assert found == folder / CHECKPOINTS / f"step-00000{4 if written else 2}.ckpt"
    assert differences(load(found), load(whole.folder / CHECKPOINTS / found.name)) == []
    again = run_train(folder, *TASK, "resume=auto")
    assert_same_end(again, whole, after=4 if written else 2)
    assert rows(again) == rows(whole)
    assert [path.name for path in saved_checkpoints(folder)] == ["step-000008.ckpt"]
    # Nothing else is left, of the killed save least of all.
    assert sorted(path.name for path in (folder / CHECKPOINTS).iterdir()) == [
        "step-000008.ckpt",
        "step-000008.json",
    ]
