"""The command ``interpolate``: from a run's folder to points, a file and a section of a report."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_lightning.assets import BUNDLED_MODEL
from dpo_lightning.data.controlled import ControlledTask
from dpo_lightning.objectives.interpolation import interpolated_logps
from dpo_lightning.run.interpolate.command import main
from dpo_lightning.sweeps.report.write import write_report
from tests.support.runs import TINY, Run, run_train

SHORT = ("evaluation.partition_samples=0", "trainer.accelerator=cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Six large steps on the embedded task, in the folder of a sweep."""
    folder = tmp_path_factory.mktemp("sweep") / "only"
    found = run_train(folder, *TINY, *SHORT, "beta=0.5", "optimizer.lr=4e-3")
    assert found.code == 0
    return found


def ask(capsys, *words: object) -> dict:
    """The object that is printed."""
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *words: object) -> str:
    capsys.readouterr()
    assert main([*map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("error: ") == 1
    return said.err.splitlines()[-1]


def changed(run: Run, folder: Path, before: str, after: str) -> Path:
    """The same run as if it had been trained with another setting."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("checkpoints"))
    text = (folder / "config.yaml").read_text()
    assert text.count(before) == 1
    (folder / "config.yaml").write_text(text.replace(before, after))
    return folder


def test_points_are_those_of_the_exact_policies(run, capsys):
    """Reward and KL within twice their intervals' half width of what enumeration gives.

    Of decoded points the KL is summed token by token; the reference has KL 0 and no gain.
    """
    found = ask(capsys, run.folder, "--betas", "1,0.25")
    assert json.loads((run.folder / "interpolation.json").read_text()) == found
    assert (found["axis"], found["loss"], found["beta"]) == ("beta", "sigmoid", 0.5)
    points = {(p["lambda"], p["method"]): p for p in found["points"]}
    assert {*points} == {(0, "decoded")} | {
        (x, m) for x in (0.5, 2) for m in ("decoded", "weights")
    }
    assert [points[x, "weights"]["beta"] for x in (0.5, 2)] == [1.0, 0.25]
    task = ControlledTask()
    reference, policy = (
        task.outcome_logps(AutoModelForCausalLM.from_pretrained(path).eval())
        for path in (BUNDLED_MODEL, run.folder / "model")
    )
    for lam in (0.5, 2):
        exact = interpolated_logps(reference, policy, lam)
        truth = {
            "reward": (exact.exp() * task.rewards).sum(1).mean(),
            "kl": (exact.exp() * (exact - reference)).sum(1).mean(),
        }
        point = points[lam, "weights"]
        for name, value in truth.items():
            low, high = point[f"{name}_interval"]
            assert abs(point[name] - float(value)) <= high - low
        expected = task.report(exact, reference, beta=1.0)["gain_ratio"]
        assert point["gain_ratio"] == pytest.approx(expected, abs=1e-3)
        assert points[lam, "decoded"]["gain_ratio"] == pytest.approx(expected, abs=0.1)
        assert points[lam, "decoded"]["kl"] == pytest.approx(point["kl"], rel=0.3)
    assert (points[0, "decoded"]["kl"], points[0, "decoded"]["gain_ratio"]) == (0.0, None)
    assert found["drawn"] == {
        "prompts": 8,
        "answers": {"0": 16, "1": 16, "0.5": 16, "2": 16},
        "temperature": 1.0,
        "max_new_tokens": 4,
        "policy_cut_off": found["drawn"]["policy_cut_off"],
        "judge": "true reward",
        "as_run": True,
    }
    assert 0 < found["drawn"]["policy_cut_off"] < 1
    assert [len(p.get("samples", ())) for p in found["points"]] == [4, 4, 0, 4, 0]


@pytest.mark.long
def test_it_repeats_and_is_said_in_the_report_of_its_sweep(run, capsys):
    first = ask(capsys, run.folder, "--lambdas=0.5,1")
    assert ask(capsys, run.folder, "--lambdas", "0.5,1") == first
    sweep = run.folder.parent
    write_report(sweep)
    page, text = (sweep / "report.html").read_text(), (sweep / "report.md").read_text()
    for written in (page, text):
        assert "The frontier of one policy: only" in written
        assert "by weights" in written
    [weighted] = [p for p in first["points"] if (p["lambda"], p["method"]) == (0.5, "weights")]
    assert f"{weighted['reward']:.2f} ± " in page
    assert main([str(run.folder), "--lambdas=1"]) == 0
    assert "frontier of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--betas=0"], "error: --betas=0: needs finite numbers > 0, such as --betas 0.1,0.5"),
        (["--betas"], "error: --betas: needs a value behind it"),
        (["--lambdas=-1"], "error: --lambdas=-1: needs finite numbers >= 0"),
        (["--lambdas=1e9"], "error: --lambdas=1e9: needs finite numbers >= 0 and <= 100"),
        (["--betas=0.001"], "error: --betas=0.001: at β 0.001 the logits' difference would count"),
        (["beta=0.3"], "error: beta: it is what "),
        (["--jsn"], "error: --jsn: `"),
        (["evaluation.batch_size=0"], "error: evaluation.batch_size=0: "),
    ],
)
def test_wrong_words_are_one_line(run, capsys, words: list[str], said: str):
    assert refusal(capsys, run.folder, *words).startswith(said)


def test_wrong_folders_are_one_line(run, capsys, tmp_path):
    assert "name the folder of one run" in refusal(capsys, run.folder, run.folder)
    (tmp_path / "sweep.json").write_text("{}")
    assert "it is a sweep's folder" in refusal(capsys, tmp_path)
    bare = changed(run, tmp_path / "bare", "name: sigmoid", "name: sigmoid")
    (bare / "config.yaml").unlink()
    assert refusal(capsys, bare).endswith("its config.yaml is gone, which describes it")


def test_losses_without_a_reference_are_refused_by_name(run, capsys, tmp_path):
    folder = changed(run, tmp_path / "run", "name: sigmoid", "name: simpo")
    said = refusal(capsys, folder)
    assert said.startswith(f"error: run={folder}: loss=simpo compares with no reference")
    assert "name a run of sigmoid" in said
    alone = changed(run, tmp_path / "alone", "kind: auto", "kind: none")
    assert "it was trained with reference=none" in refusal(capsys, alone)


@pytest.mark.slow
def test_losses_of_another_optimum_have_no_beta(run, capsys, tmp_path):
    folder = changed(run, tmp_path / "run", "name: sigmoid", "name: hinge")
    said = refusal(capsys, folder, "--betas=1")
    assert said.startswith("error: --betas=1: the optimum of loss=hinge is not π_ref·exp(r/β)/Z")
    found = ask(capsys, folder, "--lambdas=0.5")
    assert found["axis"] == "lambda"
    assert {point["beta"] for point in found["points"]} == {None}
    assert found["notes"][0].startswith("The axis is λ, not β: the optimum of loss=hinge is not")


@pytest.mark.slow  # the same with other models
def test_an_adapter_and_its_base_are_two_policies_in_one_model(capsys, tmp_path):
    """At lambda 1 it is the run's own policy, whose KL the run has exactly."""
    trained = run_train(
        tmp_path / "run", *TINY, *SHORT, "peft=lora", "optimizer.lr=2e-2", "beta=0.5"
    )
    assert trained.code == 0
    found = ask(capsys, trained.folder, "--lambdas=0.5,1")
    points = {(p["lambda"], p["method"]): p for p in found["points"]}
    metrics = trained.result["metrics"]
    own = points[1, "decoded"]
    assert own["gain_ratio"] == pytest.approx(metrics["controlled/gain_ratio"], abs=1e-3)
    assert metrics["controlled/kl_policy_reference"] > 0.05
    low, high = own["kl_interval"]
    assert abs(own["kl"] - metrics["controlled/kl_policy_reference"]) <= high - low
    assert 0 < points[0.5, "decoded"]["kl"] < own["kl"]


JUDGE = """
def vowels(prompts, answers):
    assert len(prompts) == len(answers)
    return [float(sum(c in "aeiou" for c in answer)) for answer in answers]
"""


@pytest.mark.slow  # rows and a model of their own
def test_a_judge_marks_answers_to_held_out_prompts(capsys, tmp_path, tiny_model, pairs_file):
    """Answers are cut off at five tokens, which is said; a judge may be named later."""
    trained = run_train(
        tmp_path / "run", f"model.pretrained={tiny_model}", f"data.train={pairs_file}",
        "data.batch_size=8", "data.eval_fraction=0.4", "evaluation.samples=0",
        "evaluation.max_new_tokens=5", "optimizer.lr=1e-2", *SHORT,
    )  # fmt: skip
    assert trained.code == 0
    bare = ask(capsys, trained.folder, "--lambdas=0.5")
    assert {point["reward"] for point in bare["points"]} == {None}
    assert any("evaluation.judge= names one" in note for note in bare["notes"])
    (tmp_path / "judge_of_vowels.py").write_text(JUDGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        found = ask(
            capsys, trained.folder, "--lambdas=0.5", "plugins=[judge_of_vowels]",
            "evaluation.judge=judge_of_vowels.vowels",
        )  # fmt: skip
    del sys.modules["judge_of_vowels"]
    prompts = found["drawn"]["prompts"]
    assert prompts > 5
    assert found["drawn"]["judge"] == "judge_of_vowels.vowels"
    assert found["drawn"]["as_run"] is False
    assert found["drawn"]["policy_cut_off"] > 0.9
    decoded = [p for p in found["points"] if p["method"] == "decoded"]
    assert len(decoded) == 2
    for point in decoded:
        low, high = point["reward_interval"]
        assert low < point["reward"] < high
        inner = point["reward_interval_within"]
        assert low < high
        assert inner[0] < point["reward"] < inner[1]
    assert [p["kl"] for p in decoded] == [
        p["kl"] for p in bare["points"] if p["method"] == "decoded"
    ]
    assert decoded[0]["samples"][0]["prompt"].startswith("Add ")
    assert torch.isfinite(torch.tensor([p["kl"] for p in found["points"]])).all()
