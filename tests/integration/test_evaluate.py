"""The commands ``evaluate`` and ``compare``: a run's own numbers again, other rows and models."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dpo_lightning.run.evaluate.command import main
from dpo_lightning.run.interpolate.command import main as interpolate_main
from dpo_lightning.run.typed_answers import ComparisonResult, EvaluationResult, InterpolationResult
from dpo_lightning.sweeps.compare.command import main as compare_main
from tests.support.runs import Run, run_train

TINY = (
    *("data.controlled.train_groups=96", "data.controlled.eval_groups=40", "data.batch_size=16"),
    *("evaluation.samples=16", "evaluation.partition_samples=16", "trainer.accelerator=cpu"),
)
ROWS = (
    *("data.batch_size=8", "trainer.max_steps=4", "trainer.accelerator=cpu", "optimizer.lr=3e-3"),
    *("evaluation.samples=8", "evaluation.partition_samples=8", "evaluation.max_new_tokens=8"),
)


def state(folder: Path) -> dict[str, Any]:
    """Content and time of every file; a run in this process leaves its log open behind it."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "train.log"
    }


TYPES = {
    **{main: EvaluationResult, compare_main: ComparisonResult},
    interpolate_main: InterpolationResult,
}


def ask(capsys, *words: object, command: Any = main) -> dict[str, Any]:
    """The object that is printed."""
    capsys.readouterr()
    code = command([*map(str, words), "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    found = json.loads(said.out)
    # From Python it has the same entries, no more and no less.
    typed = TYPES[command].of(found)
    assert {own.name for own in fields(typed)} == found.keys()
    return found


def refusal(capsys, *words: object, command: Any = main) -> str:
    capsys.readouterr()
    assert command([*map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("error: ") == 1
    return said.err.splitlines()[-1]


def of_the_run(run: Run) -> dict[str, float]:
    """Metrics of the result but those of the training."""
    found = run.result["metrics"]
    return {name: value for name, value in found.items() if not name.startswith("train/")}


def agrees(found: dict[str, Any], run: Run, *, within: float = 1e-6) -> None:
    expected = of_the_run(run)
    assert {"eval/loss", "samples/kl", "partition/self_check"} <= {*expected}
    assert found["metrics"] == pytest.approx(expected, rel=within, abs=within)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Six steps on the embedded task, with a beta that changes from step to step."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    changing = ("beta=0.5", "loss.beta_schedule=linear", "loss.beta_end=0.9")
    found = run_train(folder, *TINY, *changing, "optimizer.lr=4e-3")
    assert found.code == 0
    return found


def test_a_run_has_its_own_numbers_again(run, capsys, tmp_path):
    """All of result.json, to 1e-6; its folder stays as it was, and the loss is of the last beta."""
    before = state(run.folder)
    output = tmp_path / "found.json"
    found = ask(capsys, run.folder, "--output", output)
    agrees(found, run)
    assert json.loads(output.read_text()) == found
    assert state(run.folder) == before
    assert {own["by"] for own in found["slices"]} == {"prompt_tokens", "chosen_tokens"}
    assert sum(own["groups"] for own in found["slices"]) == 2 * 40
    for name in ("eval/loss", "eval/rewards/accuracies", "samples/kl"):
        low, high = found["intervals"][name]
        assert low < found["metrics"][name] < high
    assert len(found["samples"]) == 16


def test_a_run_with_itself_is_no_difference(run, capsys, tmp_path):
    page = tmp_path / "page.html"
    before = state(run.folder)
    words = (run.folder, run.folder, "--html", page)
    found = ask(capsys, *words, command=compare_main)
    assert {own["metric"] for own in found["differences"]} == {
        "eval/rewards/accuracies",
        "samples/kl",
    }
    for own in found["differences"]:
        assert (own["difference"], own["p"], own["interval"]) == (0.0, 1.0, [0.0, 0.0])
    assert "one (2)" in page.read_text()
    assert state(run.folder) == before
    assert compare_main([str(run.folder)] * 2) == 0
    assert "differences" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["beta=0.3"], "error: beta: it is what "),
        (["seed=3"], "error: seed: it is what "),
        (["optimizer.lr=1"], "error: optimizer.lr: `"),
        (["data.max_length=9"], "error: data.max_length: "),
        (["trainer.devices=2"], "error: trainer.devices=2: an evaluation is computed on one"),
        (["evaluation.samples=-1"], "error: evaluation.samples=-1: "),
        (["evaluation.every_n_steps=2"], "error: evaluation.every_n_steps: it is for training, "),
        (["--slice", "x"], "error: --slice x: the controlled task has no columns"),
        (["--output", "/nowhere/x.json"], "error: --output /nowhere/x.json: needs a file"),
        (["--reference", "a/b"], "error: --reference a/b: run="),
        (["data.eval=x.jsonl"], "error: data.eval=x.jsonl: the bundled model speaks only"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(run, capsys, words: list[str], said: str):
    before = state(run.folder)
    assert refusal(capsys, run.folder, *words).startswith(said)
    assert state(run.folder) == before


def test_the_answer_is_not_written_into_what_is_evaluated(run, capsys):
    said = refusal(capsys, run.folder, "--output", run.folder / "x.json")
    assert "nothing is written into the folder of what is evaluated" in said
    assert "name one policy" in refusal(capsys)
    assert "name two policies or more" in refusal(capsys, run.folder, command=compare_main)
    assert "no such folder" in refusal(capsys, "none")


# Rows and models of one's own -------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_rows(tmp_path_factory, tiny_model, pairs_file) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "rows"
    source = (f"model.pretrained={tiny_model}", f"data.train={pairs_file}")
    found = run_train(folder, *source, *ROWS)
    assert found.code == 0
    return found


@pytest.fixture(scope="module")
def other_rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "other.jsonl"
    rows = [
        {
            "prompt": f"Name {n}.",
            "chosen": " Yes" + "!" * (n % 3),
            "rejected": " No, not that.",
            "source": ["web", "book"][n % 2],
        }
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_rows_that_are_named_are_all_held_out(on_rows, other_rows, capsys):
    """Beside those the run has its own again; columns are slices whose rows add up."""
    agrees(ask(capsys, on_rows.folder), on_rows)
    words = (on_rows.folder, f"data.eval={other_rows}")
    found = ask(capsys, *words, "data.ignore_fields=[source]", "--slice", "source")
    assert (found["groups"], found["prompts"]) == (12, 12)
    of_column = [own for own in found["slices"] if own["by"] == "source"]
    assert [(own["value"], own["groups"]) for own in of_column] == [("book", 6), ("web", 6)]
    mean = sum(own["metrics"]["eval/loss"] for own in of_column) / 2
    assert mean == pytest.approx(found["metrics"]["eval/loss"], rel=1e-6)
    said = refusal(capsys, *words, "data.ignore_fields=[source]", "--slice", "sorce")
    assert said.startswith("error: --slice sorce: no row of data.eval=")
    bad = refusal(capsys, on_rows.folder, "data.eval=gone.jsonl")
    assert bad.startswith("error: data.eval=gone.jsonl")


@pytest.mark.slow
def test_a_model_folder_has_the_numbers_of_its_run(on_rows, other_rows, tiny_model, capsys):
    """The export with the start as its reference; without beta= what is free of beta alone."""
    rows = (f"data.eval={other_rows}", "data.ignore_fields=[source]")
    same = ("evaluation.samples=8", "evaluation.partition_samples=8", "evaluation.max_new_tokens=8")
    of_run = ask(capsys, on_rows.folder, *rows)
    model = (on_rows.folder / "model", "--reference", tiny_model, *rows, *same)
    found = ask(capsys, *model, "beta=0.1", "trainer.threads=1")
    assert found["metrics"] == pytest.approx(of_run["metrics"], rel=1e-5, abs=1e-5)
    free = ask(capsys, *model, "trainer.threads=1")
    gone = {*found["metrics"]} - {*free["metrics"]}
    assert {"eval/loss", "eval/rewards/margins", "eval/partition/log_z"} <= gone
    assert free["metrics"] == {name: found["metrics"][name] for name in free["metrics"]}
    assert "eval/rewards/accuracies" in free["metrics"]
    words = (on_rows.folder, on_rows.folder / "model", "--reference", tiny_model, *rows, *same)
    pair = ask(capsys, *words, "trainer.threads=1", command=compare_main)
    assert {own["metric"] for own in pair["differences"]} >= {"eval/fitted_log_loss"}
    assert all(abs(own["difference"]) < 1e-5 for own in pair["differences"])


@pytest.mark.slow
def test_interpolate_takes_a_model_alone(on_rows, other_rows, tiny_model, tmp_path, capsys):
    """The points of its run on the same rows; it has no beta, and keeps nothing but by --output."""
    rows = (f"data.eval={other_rows}", "data.ignore_fields=[source]", "--lambdas=0.5,1")
    rows = (*rows, "evaluation.max_new_tokens=4", "trainer.threads=1")
    before, output = state(on_rows.folder), tmp_path / "found.json"
    of_run = ask(capsys, on_rows.folder, *rows, command=interpolate_main)
    model = (on_rows.folder / "model", "--reference", tiny_model)
    found = ask(capsys, *model, *rows, "--output", output, command=interpolate_main)
    assert (of_run["axis"], of_run["beta"]) == ("beta", 0.1)
    assert (found["axis"], found["beta"]) == ("lambda", None)
    assert {point["beta"] for point in found["points"]} == {None}
    for name in ("lambda", "method", "kl", "ess"):
        own, expected = ([p[name] for p in of["points"]] for of in (found, of_run))
        assert own == (
            pytest.approx(expected, rel=1e-4, abs=1e-5) if name != "method" else expected
        )
    assert json.loads(output.read_text()) == found
    assert state(on_rows.folder) == before
    said = refusal(capsys, *model, *rows[:2], "--betas=0.5", command=interpolate_main)
    assert "it is not known at which beta this model was trained; beta= names it" in said
    said = refusal(capsys, *model, "--lambdas=1", command=interpolate_main)
    assert "a model alone has no rows of its own" in said


@pytest.mark.slow
def test_an_adapter_is_on_in_the_policy_and_off_in_its_reference(
    tmp_path, tiny_model, pairs_file, other_rows, capsys
):
    source = (f"model.pretrained={tiny_model}", f"data.train={pairs_file}")
    lora = run_train(tmp_path / "lora", *source, *ROWS, "peft=lora", "peft.r=4")
    assert lora.code == 0
    agrees(ask(capsys, lora.folder), lora)
    rows = (f"data.eval={other_rows}", "data.ignore_fields=[source]", "trainer.threads=1")
    same = ("evaluation.samples=8", "evaluation.partition_samples=8", "evaluation.max_new_tokens=8")
    of_run = ask(capsys, lora.folder, *rows)
    found = ask(capsys, lora.folder / "model", *rows, *same, "beta=0.1")
    assert found["metrics"] == pytest.approx(of_run["metrics"], rel=1e-5, abs=1e-5)
    assert abs(found["metrics"]["eval/logratios/margins"]) > 1e-4


@pytest.mark.slow
def test_a_run_in_bfloat16_has_its_numbers_as_it_computed(tmp_path, tiny_model, pairs_file, capsys):
    """The rounding of its float32 weights, as in its last evaluation: the same to 1e-3."""
    source = (f"model.pretrained={tiny_model}", f"data.train={pairs_file}")
    half = run_train(tmp_path / "half", *source, *ROWS, "trainer.precision=bf16-mixed")
    assert half.code == 0
    agrees(ask(capsys, half.folder), half, within=1e-3)
