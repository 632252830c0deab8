"""Resuming: exact, refused for another experiment unless that is wanted, from what is whole."""

import json

import pytest
import torch

from tests.support.recovery import DRAWING, assert_same_end, checkpoint, load, rows
from tests.support.runs import TINY, Run, run_train

# Six steps a pass. An interval of four steps of metrics is open at every other checkpoint, and an
# evaluation is due at steps 4, 8 and 12.
LONG = (
    *TINY,
    *DRAWING,
    *("trainer.max_epochs=2", "trainer.log_every_n_steps=4", "evaluation.every_n_steps=4"),
    *("checkpoint.every_n_steps=2", "checkpoint.keep=9", "evaluation.partition_samples=0"),
    "optimizer.lr=0.01",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    run = run_train(tmp_path_factory.mktemp("whole") / "run", *LONG)
    assert run.code == 0
    assert run.result["resumed"] is None
    return run


@pytest.mark.parametrize("step", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_undisturbed_one_to_the_bit(whole: Run, tmp_path, step: int):
    """At 4 an evaluation was due when it was saved; at 6 two steps of an interval lie before it."""
    resumed = run_train(tmp_path / "run", *LONG, f"resume={checkpoint(whole, step)}")
    assert_same_end(resumed, whole, after=step)
    assert [row["step"] for row in rows(resumed) if "eval/loss" in row] == [
        s for s in (4, 8, 12) if s >= step
    ]
    assert resumed.result["resumed"] == {
        "from": str(checkpoint(whole, step)),
        "step": step,
        "changed": {},
    }


@pytest.mark.slow
def test_in_its_own_folder_no_row_is_lost_or_there_twice(whole: Run, tmp_path):
    """The evaluation of step 4 is done again after its rows were taken away."""
    first = run_train(tmp_path / "run", *LONG)
    for path in (first.folder / "checkpoints").glob("step-*"):
        if int(path.stem[5:]) > 4:
            path.unlink()
    (first.folder / "result.json").unlink()  # as if it had been killed
    again = run_train(first.folder, *LONG, "resume=auto")
    assert again.result["resumed"]["step"] == 4
    assert rows(again) == rows(whole)


def test_a_finished_run_that_is_resumed_says_the_same_again(whole: Run, tmp_path):
    resumed = run_train(tmp_path / "run", *LONG, f"resume={whole.folder}")
    assert resumed.result["step"] == 12
    assert_same_end(resumed, whole, after=12)


@pytest.mark.slow
def test_a_finished_run_goes_on_like_one_that_was_to_be_longer(tmp_path):
    """A schedule that does not know the end; the first run ended between two saves."""
    task = (*LONG[:-1], "optimizer.lr=0.01", "optimizer.schedule=constant", "optimizer.warmup=0")
    task = (*task, "checkpoint.every_n_steps=5", "trainer.log_every_n_steps=1")
    longer = run_train(tmp_path / "longer", *task)
    first = run_train(tmp_path / "run", *task, "trainer.max_epochs=1")
    assert {path.name for path in (first.folder / "checkpoints").glob("*.ckpt")} == {
        "step-000005.ckpt",
        "step-000006.ckpt",
    }
    second = run_train(first.folder, *task, "resume=auto", "overwrite=true")
    assert second.result["resumed"]["step"] == 6
    assert_same_end(second, longer, after=6)


def test_a_checkpoint_reads_without_running_anything_in_it(whole: Run):
    state = load(checkpoint(whole, 6))
    assert set(state["random_states"][0]) == {"python", "numpy", "torch"}
    assert state["metrics"]["rows"] == 0
    assert state["progress"]["last_evaluation"] == 4
    assert {name.partition(".")[0] for name in state["state_dict"]} == {"policy"}


@pytest.mark.slow
def test_a_changed_setting_is_refused_by_name_or_said_in_the_result(whole: Run, tmp_path):
    resume = (f"resume={checkpoint(whole, 6)}", "beta=0.5", "loss=ipo")
    refused = run_train(tmp_path / "a", *LONG, *resume)
    assert refused.code == 2
    for words in ("beta=0.1", "beta=0.5", "resume_changed=true"):
        assert words in refused.result["error"]
    assert not (tmp_path / "a" / "checkpoints").exists()
    allowed = run_train(tmp_path / "b", *LONG, *resume, "resume_changed=true")
    assert allowed.code == 0
    assert allowed.result["resumed"]["changed"] == {
        "beta": {"from": 0.1, "to": 0.5},
        "loss.name": {"from": "sigmoid", "to": "ipo"},
    }
    assert [row["step"] for row in allowed.rows if "train/loss" in row] == [8, 12]
    adaptive = ("loss.adaptive_beta=0.5", "resume_changed=true", f"resume={checkpoint(whole, 10)}")
    assert run_train(tmp_path / "c", *LONG, *adaptive).code == 0


def test_a_model_of_another_shape_cannot_be_allowed(whole: Run, tmp_path, tiny_model, pairs_file):
    run = run_train(
        tmp_path / "run",
        *(f"model.pretrained={tiny_model}", f"data.train={pairs_file}"),
        *("resume_changed=true", f"resume={checkpoint(whole, 6)}", "evaluation.samples=0"),
    )
    assert run.code == 2
    assert "shape" in run.result["error"]


def test_a_damaged_file_names_one_that_is_whole(whole: Run, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (4, 6):
        for path in (checkpoint(whole, step), checkpoint(whole, step).with_suffix(".json")):
            (folder / path.name).write_bytes(path.read_bytes())
    torn = folder / "step-000006.ckpt"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    named = run_train(tmp_path / "a", *LONG, f"resume={torn}")
    assert named.code == 4
    assert str(torn) in named.result["error"]
    assert f"resume={folder / 'step-000004.ckpt'}" in named.result["error"]
    resumed = run_train(tmp_path / "b", *LONG, f"resume={folder}")
    assert resumed.result["resumed"]["step"] == 4
    assert_same_end(resumed, whole, after=4)


def test_what_could_not_be_saved_stops_the_run(tmp_path):
    """A callback keeps a NumPy array, which weights_only=True refuses."""
    import lightning.pytorch as pl
    import numpy as np

    from dpo_lightning.plugins import CALLBACKS

    class Hoarder(pl.Callback):
        def state_dict(self):
            return {"seen": np.zeros(3)}

    CALLBACKS["hoarder"] = Hoarder
    run = run_train(tmp_path / "run", *TINY, "trainer.callbacks=[hoarder]", "trainer.max_steps=2")
    del CALLBACKS["hoarder"]
    assert run.code == 2
    assert "seen" in run.result["error"]
    assert "ndarray" in run.result["error"]
    assert list((tmp_path / "run" / "checkpoints").glob("step-*")) == []


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_run_in_wandb(tmp_path):
    short = (*TINY, "checkpoint.every_n_steps=2", "checkpoint.keep=9")
    first = run_train(tmp_path / "a", *short, "trainer.max_steps=4", logger="wandb")
    [identity] = [
        json.loads(path.read_text())["wandb_run_id"]
        for path in (first.folder / "checkpoints").glob("step-000002.json")
    ]
    assert identity == (first.folder / "wandb" / "id.txt").read_text().strip()
    resume = (*short, "trainer.max_steps=4", f"resume={checkpoint(first, 2)}")
    second = run_train(tmp_path / "b", *resume, logger="wandb")
    assert (second.folder / "wandb" / "id.txt").read_text().strip() == identity
    changed = run_train(tmp_path / "c", *resume, "beta=0.4", "resume_changed=true", logger="wandb")
    assert (changed.folder / "wandb" / "id.txt").read_text().strip() != identity


def test_a_state_of_the_generators_comes_back():
    import random

    import numpy as np

    from dpo_lightning.training.checkpoints.exact_resume import random_state, set_random_state

    def draw():
        return [random.random(), random.gauss(0, 1), np.random.randn(), torch.randn(()).item()]

    draw()
    state = random_state(torch.device("cpu"))
    first = draw()
    draw()
    set_random_state(state, torch.device("cpu"))
    assert draw() == first
