"""Runs that select a checkpoint: which one, what stays of the others, and what is exported."""

import itertools
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.support import marks
from tests.support.recovery import checkpoint, load
from tests.support.runs import TINY, Run, run_train
from tests.support.selecting import EVERY, SELECTING, names_written, unknown

# Each of them trains, or goes on with such a run.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def best(tmp_path_factory) -> Run:
    run = run_train(tmp_path_factory.mktemp("best") / "run", *SELECTING)
    assert run.code == 0
    return run


def losses(run: Run) -> dict[int, float]:
    """The held-out loss after each step that was evaluated; all rows count at each."""
    return {row["step"]: row["eval/loss"] for row in run.rows if "eval/loss" in row}


def test_the_best_step_is_exported_with_its_metrics(best: Run):
    """By the rows of metrics alone: the least loss, not that of the policy as it starts."""
    found = losses(best)
    assert found.pop(0) == pytest.approx(math.log(2))
    step = min(found, key=found.__getitem__)
    assert 0 < step < best.result["step"]
    assert best.result["selection"] == {
        **{"monitor": "eval/loss", "best": found[step], "best_step": step, "stopped_early": True}
    }
    assert best.result["exported_step"] == step
    assert best.result["metrics"]["eval/loss"] == pytest.approx(found[step], rel=1e-6)
    saved = load(checkpoint(best, step))["state_dict"]
    for name, tensor in load_file(best.folder / "model" / "model.safetensors").items():
        assert torch.equal(tensor, saved[f"policy.{name}"]), name
    last = load(checkpoint(best, best.result["step"]))["state_dict"]
    assert any(not torch.equal(saved[name], last[name]) for name in saved)


def test_the_training_ends_when_the_patience_is_over(best: Run):
    """Five evaluations in a row are no better by 0.001 than the one before them."""
    found = losses(best)
    anchor, waited, end = math.inf, 0, None
    for step in sorted(found):
        if step:
            better = found[step] < anchor - 0.001
            anchor, waited = (found[step], 0) if better else (anchor, waited + 1)
        if waited == 5:
            end = step
            break
    assert end == best.result["step"] == max(found)
    assert end % EVERY == 0


def test_the_best_and_the_newest_stay(best: Run):
    steps = sorted(int(path.stem[5:]) for path in (best.folder / "checkpoints").glob("*.ckpt"))
    assert steps == [best.result["exported_step"], best.result["step"]]


def test_a_run_that_ended_early_ends_at_once_when_it_is_resumed(best: Run, tmp_path):
    again = run_train(tmp_path / "run", *SELECTING, f"resume={best.folder}")
    assert again.code == 0
    for key in ("step", "selection", "exported_step", "metrics"):
        assert again.result[key] == best.result[key], key
    assert not (again.folder / "checkpoints").exists()


def test_a_best_checkpoint_that_is_gone_is_answered(best: Run, tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    last = checkpoint(best, best.result["step"])
    for path in (last, last.with_suffix(".json")):
        (folder / path.name).write_bytes(path.read_bytes())
    refused = run_train(tmp_path / "run", *SELECTING, f"resume={folder / last.name}")
    assert refused.code in (2, 4)
    assert "checkpoint.export=best: " in refused.result["error"]
    assert "gone" in refused.result["error"]


def test_each_metric_that_runs_write_has_a_direction(best: Run, tmp_path):
    """Of a run with all that adds metrics: red for a name that the table does not know."""
    rich = run_train(
        tmp_path / "run", *TINY[:3], "trainer.max_steps=2", "evaluation.every_n_steps=1",
        "loss.adaptive_beta=0.5", "trainer.max_skipped_steps=1", "evaluation.samples=4",
        "evaluation.partition_samples=4", "evaluation.intermediate_samples=2", "reference=live",
        "data.controlled.population=true", "plugins=[tests.support.marks]",
        "evaluation.scorer=brevity",
    )  # fmt: skip
    assert rich.code == 0
    names = names_written(best, rich)
    assert {"samples/win_rate", "train/skipped_steps", "controlled/bayes_accuracy"} <= names
    assert unknown(names) == set()
    # Those of the one evaluation before the last; the reference is in memory.
    [row] = [row for row in rich.rows if "samples/length" in row]
    assert row["step"] == 1
    assert row["samples/length"] > 0
    assert abs(row["samples/kl"]) < 1
    kept = [json.loads(line) for line in (rich.folder / "samples.jsonl").read_text().splitlines()]
    assert [own["step"] for own in kept] == [1, 1]
    # Shorter answers are better.
    assert [own["judge"] for own in kept] == [-len(own["answer"]) for own in kept]
    assert row["samples/judge"] == sum(own["judge"] for own in kept) / 2


def test_a_judge_selects_and_a_run_that_goes_on_has_the_same_answers(tmp_path):
    """Of 3 steps each is evaluated, the last one too, whose weights are the second checkpoint's."""
    words = (
        *TINY[:3], "trainer.max_steps=3", "trainer.threads=1", "evaluation.every_n_steps=1",
        "evaluation.samples=4", "evaluation.partition_samples=0", "checkpoint.every_n_steps=2",
        "evaluation.intermediate_samples=2", "plugins=[tests.support.marks]", "logger=none",
        "evaluation.judge=brevity", "checkpoint.monitor=samples/judge", "checkpoint.keep=3",
    )  # fmt: skip
    run = run_train(tmp_path / "run", *words)
    assert run.code == 0
    rows = (run.folder / "samples.jsonl").read_bytes()
    means = {row["step"]: row["samples/judge"] for row in run.rows if "samples/judge" in row}
    assert [*means] == [1, 2, 3]
    selection = run.result["selection"]
    assert selection["best"] == max(means.values())
    assert means[selection["best_step"]] == selection["best"]
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    saved = copy / "checkpoints" / checkpoint(run, 2).name
    again = run_train(copy, *words, f"resume={saved}", "overwrite=true")
    assert again.code == 0
    assert again.result["resumed"]["step"] == 2
    assert (copy / "samples.jsonl").read_bytes() == rows
    assert again.result["selection"] == selection


def test_an_evaluation_that_the_judge_failed_at_is_never_the_best(tmp_path, monkeypatch):
    """The first has a mark; the second and the third have none, and wait in vain for two."""
    monkeypatch.setattr(marks, "calls", itertools.count(1))
    run = run_train(
        tmp_path / "run", *TINY[:3], "trainer.max_steps=6", "evaluation.every_n_steps=1",
        "evaluation.samples=4", "evaluation.partition_samples=0", "logger=none",
        "evaluation.intermediate_samples=2", "plugins=[tests.support.marks]",
        "evaluation.judge=fickle", "checkpoint.monitor=samples/judge", "checkpoint.patience=2",
    )  # fmt: skip
    assert run.code == 0
    [first, *others] = [row["samples/judge"] for row in run.rows if "samples/judge" in row]
    assert others == [None, None]
    assert run.result["selection"] == {
        **{"monitor": "samples/judge", "best": first, "best_step": 1, "stopped_early": True}
    }
    assert run.result["step"] == 3
    assert run.result["metrics"]["samples/judge"] is None


def test_the_first_set_ranks_and_another_selects(shared, tmp_path):
    lines = (shared / "data" / "politeness.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("train", lines[:300]), ("a", lines[300:340]), ("b", lines[340:400])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    sets = {name: str(tmp_path / f"{name}.jsonl") for name in ("a", "b")}
    run = run_train(
        tmp_path / "run", f"model.pretrained={shared / 'models' / 'stories260k'}",
        f"data.train={tmp_path / 'train.jsonl'}", f"data.eval={{a: {sets['a']}, b: {sets['b']}}}",
        "optimizer.lr=5e-4", "trainer.max_steps=6", "data.batch_size=16", "data.max_dropped=1",
        "evaluation.samples=0", "evaluation.partition_samples=0", "evaluation.every_n_steps=2",
        "checkpoint.monitor=eval/b/loss",
    )  # fmt: skip
    assert run.code == 0
    assert unknown(names_written(run)) == set()
    assert run.values("eval/loss") == run.values("eval/a/loss")
    assert run.values("eval/loss") != run.values("eval/b/loss")
    assert run.result["selection"]["best"] == min(run.values("eval/b/loss"))
    sizes = run.result["data"]["eval_sets"]
    assert run.result["data"]["evaluated_groups"] == run.result["data"]["eval_groups"] == sizes["a"]
    found = json.loads((run.folder / "evaluation.json").read_text())
    assert len(found["groups"]) == len(found["accuracies"]) == sizes["a"]
    accuracy = sum(found["accuracies"]) / sizes["a"]
    assert run.values("eval/a/rewards/accuracies")[-1] == pytest.approx(accuracy)
