"""Two ranks select the same checkpoint as one process, end early at the same step, and resume.

A metric is rank 0's, and the end of a training is everyone's: a rank that took another decision
would wait for the others for ever.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.recovery import assert_same_end, checkpoint, load, rows
from tests.support.runs import Run
from tests.support.selecting import EVERY, SELECTING
from tests.support.signals import DISTURBED
from tests.support.warm import run_apart

pytestmark = pytest.mark.long

PATIENCE = 2
# Held-out groups that two ranks cannot share equally. Without what draws, as each rank would draw
# its own; and soon over, as steps of this size let rounding grow: until the end it is at most a
# hundredth of what decides.
TASK = (
    *(word for word in SELECTING if not word.startswith(("plugins=", "trainer.callbacks="))),
    *("data.controlled.eval_groups=41", f"checkpoint.patience={PATIENCE}"),
    *("checkpoint.every_n_steps=1", "trainer.threads=1", "logger=none", *DISTURBED),
)
Undisturbed = Callable[[str], Run]
RANKS = {"one": (), "ddp": ("strategy=ddp",), "fsdp": ("strategy=fsdp",)}


def launched(folder: Path, ranks: str, *words: str, disturb: str = "vanish:99:0") -> Run:
    count = 1 if ranks == "one" else 2
    done = run_apart(
        *(f"hydra.run.dir={folder}", *TASK, *RANKS[ranks], f"trainer.devices={count}", *words),
        env={"DISTURB": disturb},
    )
    run = Run(done.returncode, folder)
    assert disturb != "vanish:99:0" or run.code == 0, done.stdout + done.stderr
    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Undisturbed:
    return functools.cache(lambda ranks: launched(tmp_path_factory.mktemp(ranks) / "run", ranks))


def saved_steps(run: Run) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (run.folder / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize("ranks", ["ddp", "fsdp"])
def test_two_ranks_decide_as_one_process(undisturbed: Undisturbed, ranks: str):
    one, two = undisturbed("one"), undisturbed(ranks)
    best, end = one.result["exported_step"], one.result["step"]
    assert one.result["selection"]["stopped_early"]
    assert 0 < best == end - PATIENCE * EVERY
    own, other = one.result["selection"], two.result["selection"]
    assert other.pop("best") == pytest.approx(own.pop("best"), rel=1e-5)
    assert other == own
    for name in ("step", "exported_step", "status"):
        assert two.result[name] == one.result[name], name
    assert [row["step"] for row in two.rows] == [row["step"] for row in one.rows]
    assert two.values("eval/loss") == pytest.approx(one.values("eval/loss"), rel=1e-4)
    assert saved_steps(two) == saved_steps(one) == [best, end]


@pytest.mark.parametrize("ranks", ["ddp", "fsdp"])
def test_two_ranks_export_the_best_weights(undisturbed: Undisturbed, ranks: str):
    two = undisturbed(ranks)
    best, last = (load(checkpoint(two, step))["state_dict"] for step in saved_steps(two))
    for name, tensor in load_file(two.folder / "model" / "model.safetensors").items():
        assert torch.equal(tensor, best[f"policy.{name}"]), name
    assert any(not torch.equal(best[name], last[name]) for name in best)
    assert two.result["metrics"]["eval/loss"] == pytest.approx(
        two.result["selection"]["best"], rel=1e-6
    )


@pytest.mark.parametrize(("ranks", "gone"), [("ddp", 1), ("fsdp", 0)])
def test_two_ranks_that_were_killed_select_the_same(
    undisturbed: Undisturbed, tmp_path, ranks: str, gone: int
):
    """In the last step, while the patience runs: the best one comes back, and the wait since."""
    whole = undisturbed(ranks)
    best, end = whole.result["exported_step"], whole.result["step"]
    folder = tmp_path / "run"
    killed = launched(folder, ranks, disturb=f"vanish:{end}:{gone}")
    assert killed.code != 0
    assert best in saved_steps(killed)
    again = launched(folder, ranks, "resume=auto")
    start = again.result["resumed"]["step"]
    assert best < start < end
    assert rows(again) == rows(whole)
    for name in ("selection", "exported_step", "step", "metrics", "status"):
        assert json.dumps(again.result[name]) == json.dumps(whole.result[name]), name
    assert_same_end(again, whole, after=start)
