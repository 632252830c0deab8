"""A log with thumbs through the front door: a run, its counts, and the commands that look at it."""

import json
from pathlib import Path

import pytest

from dpo_lightning.run.evaluate.command import main as evaluate
from dpo_lightning.sweeps.compare.command import main as compare
from dpo_lightning.sweeps.generate.command import main as generate
from tests.support.runs import Run, run_train

# They train a tiny model for two steps.
pytestmark = pytest.mark.slow

STEPS = (
    *("trainer.max_steps=2", "data.batch_size=16", "evaluation.samples=0", "logger=none"),
    *("trainer.accelerator=cpu", "evaluation.partition_samples=0"),
)


def talk(number: int) -> dict[str, object]:
    """Two rated answers, with stars, and one that nobody rated; every sixth has no first rating."""
    first = {"role": "assistant", "content": f"It is {2 * number}."}
    if number % 6:
        first["rating"] = 5
    return {
        "messages": [
            {"role": "user", "content": f"Add {number} and {number}."},
            first,
            {"role": "user", "content": "And one more?"},
            {"role": "assistant", "content": f"No idea{'!' * (number % 3)}", "rating": 1},
            {"role": "user", "content": "Try."},
            {"role": "assistant", "content": "I cannot."},
        ]
    }


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    path.write_text("".join(json.dumps(talk(number)) + "\n" for number in range(30)))
    return path


@pytest.fixture(scope="module")
def thumbs(tmp_path_factory, tiny_model, log) -> Run:
    words = [f"model.pretrained={tiny_model}", f"data.train={log}", "data.threshold=4"]
    run = run_train(tmp_path_factory.mktemp("thumbs") / "run", *words, *STEPS, "loss=kto")
    assert run.code == 0, run.result["error"]
    return run


def test_the_answers_of_a_log_are_counted(thumbs: Run):
    """30 conversations with 2 ratings each, 5 of which lack the first: 55 rows, 35 unrated.

    A tenth of the rows is held out, whole conversations: 6 rows of three of them or so.
    """
    counts = thumbs.result["data"]
    train, held_out = counts["labels"]["train"], counts["labels"]["eval"]
    assert train["desirable"] + held_out["desirable"] == 25
    assert train["undesirable"] + held_out["undesirable"] == 30
    assert counts["train_groups"] + counts["eval_groups"] == 55
    assert 4 <= counts["eval_groups"] <= 8
    assert (counts["unrated"], counts["train_pairs"], counts["dropped"]) == (35, 0, {})


def test_evaluate_compare_and_generate_take_the_run(thumbs: Run, log, tmp_path, capsys):
    """Its own rows again; other rows of stars; the log as prompts is refused by name."""
    assert evaluate([str(thumbs.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["eval/loss"] == pytest.approx(thumbs.values("eval/loss")[-1], abs=1e-6)
    assert evaluate([str(thumbs.folder), f"data.eval={log}", "data.threshold=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == 55
    assert compare([str(thumbs.folder), str(thumbs.folder), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)["differences"]
    assert {own["difference"] for own in compared} <= {0.0, None}
    output = ["--output", str(tmp_path / "answers.jsonl")]
    assert generate([str(thumbs.folder), str(log), *output]) == 2
    assert f"{log}:1: prompt: missing; the row has 'messages'" in capsys.readouterr().err


def test_a_loss_that_compares_stops_before_anything_is_written(tiny_model, log, tmp_path, capsys):
    words = [f"model.pretrained={tiny_model}", f"data.train={log}", "data.threshold=4"]
    run = run_train(tmp_path / "run", *words, *STEPS, "loss=sigmoid")
    assert run.code == 2
    said = capsys.readouterr().err
    assert f"{log}:1[3] has one response and a label (55 of 55 rows), and loss=sigmoid" in said
    assert "use loss=kto" in said


def test_a_run_is_weighed_by_its_prompts_and_other_rows_are_not(tiny_model, log, tmp_path, capsys):
    """First questions have good answers and second ones bad: a prompt tells the label."""
    words = [f"model.pretrained={tiny_model}", f"data.train={log}", "data.threshold=4", "loss=bco"]
    run = run_train(tmp_path / "run", *words, *STEPS, "data.density_ratio=[0.5,4]")
    assert run.code == 0, run.result["error"]
    said = "".join(capsys.readouterr())
    assert "data.density_ratio: undesirable rows weigh 0.5 to " in said
    assert evaluate([str(run.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["eval/loss"] == pytest.approx(run.values("eval/loss")[-1], abs=1e-6)
    assert evaluate([str(run.folder), f"data.eval={log}", "--json"]) == 0
    assert "undesirable rows weigh" not in "".join(capsys.readouterr())
