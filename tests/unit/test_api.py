"""The project from Python: what a run comes to, and the policy that it left."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_lightning import api, errors
from dpo_lightning.api import Result, load, train
from dpo_lightning.errors import UserError
from dpo_lightning.run import apart
from tests.support.runs import ROOT, TINY, run_train
from tests.support.state import changed, state

SHORT = (*TINY, "logger=none", "trainer.max_steps=2", "trainer.threads=1")

PUBLIC = {
    "api": [
        *("ComparedPolicy", "ComparisonResult", "EvaluationResult", "EvaluationSlice"),
        *("FrontierPoint", "InterpolationResult", "MetricDifference", "Policy", "Result"),
        *("compare", "evaluate", "interpolate", "lightning_modules", "load", "train"),
    ],
    "errors": [
        *("CorruptArtifactError", "DivergedError", "DpoLightningError", "OutOfMemoryError"),
        *("StorageError", "UserError"),
    ],
    "objectives": [
        *("LISTWISE_LOSSES", "PAIRWISE_LOSSES", "PairLogps", "PairwiseLoss", "StreamedPartition"),
        "UNPAIRED_LOSSES",
        *("estimate_log_partition", "exact_log_partition", "fit_tabular_policy", "group_shares"),
        *("listwise_loss", "log_partition", "optimal_logps", "pairwise_loss", "register_loss"),
        "unpaired_loss",
    ],
    "plugins": [
        *("SampleRequest", "load_plugins", "make_callbacks", "register_callback"),
        *("register_loss", "register_optimizer", "register_reader", "register_sampler"),
        "register_scorer",
    ],
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_these_and_no_others(name: str):
    module = importlib.import_module(f"dpo_lightning.{name}")
    assert sorted(module.__all__) == sorted(PUBLIC[name])
    assert [public for public in module.__all__ if not hasattr(module, public)] == []


def test_errors_that_are_raised_are_public():
    from dpo_lightning import errors

    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type)} - {"Any"}
    assert kinds == set(errors.__all__)


def test_importing_it_imports_no_torch():
    code = "import sys, dpo_lightning.api; print({'torch', 'peft'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Of a run that was started from a folder in which there is nothing else."""
    here, place = Path.cwd(), tmp_path_factory.mktemp("place")
    # By this name Python would find it ahead of the library.
    (place / "datasets.py").write_text("raise SystemExit('a file of the user was imported')")
    os.chdir(place)
    try:
        return train([*SHORT, "beta=0.3", "name=mine"])
    finally:
        os.chdir(here)


def test_a_run_comes_to_a_result(result):
    assert (result.status, result.exit_code, result.error) == ("finished", 0, None)
    assert (result.beta, result.loss, result.step) == (0.3, "sigmoid", 2)
    assert result.folder.parent.parent.name == "outputs"
    assert result.folder.name.endswith("mine")
    written = json.loads((result.folder / "result.json").read_text())
    assert result.metrics == written["metrics"]
    for name, value in written.items():
        assert getattr(result, name) == value, name
    assert (result.exported_step, result.resumed, result.selection) == (2, None, None)
    assert 0 < result.metrics["train/loss"] < 5
    assert result.data["train_groups"] == 96
    assert result.model["trainable"] == 74_624
    assert result.config_hash
    with pytest.raises(AttributeError):
        result.step = 3


def test_its_policy_is_loaded(result):
    import torch
    from transformers import AutoModelForCausalLM

    policy, tokenizer = load(result.folder)
    there = AutoModelForCausalLM.from_pretrained(result.folder / "model")
    tokens = torch.tensor([tokenizer("fog snow")["input_ids"]])
    assert not policy.training
    torch.testing.assert_close(policy(tokens).logits, there(tokens).logits)


def test_a_run_that_fails_is_a_result(tmp_path, tiny_model):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    words = [f"data.train={tmp_path / 'rows.jsonl'}", f"model.pretrained={tiny_model}"]
    found = train([*words, f"hydra.run.dir={tmp_path / 'run'}", "logger=none"])
    assert (found.status, found.exit_code, found.step) == ("failed", 2, 0)
    assert "rows.jsonl: the columns of every row are wrong" in found.error
    assert "\n" not in found.error


def test_a_start_that_fails_in_the_folder_of_an_earlier_run_has_its_reason(tmp_path, tiny_model):
    """The earlier run's result stays, so this start's error is in no file."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 7, "epoch": 1.0, "train/loss": 0.6}\n')
    (run / "result.json").write_text('{"status": "stopped", "step": 7}')
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    words = [f"data.train={tmp_path / 'rows.jsonl'}", f"model.pretrained={tiny_model}"]
    found = train([*words, f"hydra.run.dir={run}", "logger=none"])
    assert (found.status, found.exit_code, found.step) == ("failed", 2, 0)
    assert "rows.jsonl: the columns of every row are wrong" in found.error
    assert "\n" not in found.error
    assert (run / "result.json").read_text() == '{"status": "stopped", "step": 7}'


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bta=0.1"], "bta: unknown key; did you mean `beta`?"),
        (["beta=none"], "beta=none: must be a finite number"),
        (["beta=0.1,0.5"], "beta=0.1,0.5: these settings are a sweep's"),
        (["-m", "beta=0.1"], "-m: these settings are a sweep's"),
        (["experiment=frontier"], "-m: these settings are a sweep's"),
        (["sweep.resume=last"], "sweep.resume=last is for a sweep"),
        (["--config-dir", "nowhere"], "--config-dir nowhere: no such folder"),
    ],
)
def test_a_wrong_setting_is_raised_and_nothing_is_started(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "run_apart", None)
    with pytest.raises(UserError) as caught:
        train(words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_result_of_before_does_not_pass_for_this_runs(tmp_path, monkeypatch):
    (tmp_path / "result.json").write_text('{"status": "stopped", "step": 7}')
    monkeypatch.setattr(api, "run_apart", lambda arguments: (-9, None))
    found = train([f"hydra.run.dir={tmp_path}"])
    assert (found.status, found.exit_code, found.step) == ("failed", -9, 0)
    assert "signal 9" in found.error


def test_a_run_that_is_killed_is_failed_whatever_it_wrote(tmp_path, monkeypatch):
    def run(arguments):
        (tmp_path / "result.json").write_text('{"status": "running", "step": 7, "more": 1}')
        return -9, None

    monkeypatch.setattr(api, "run_apart", run)
    found = train([f"hydra.run.dir={tmp_path}"])
    assert (found.status, found.step, found.error) == ("failed", 7, "killed by signal 9")


def test_an_interrupt_is_passed_on_and_raised(monkeypatch):
    """The child says how it was asked to end by its exit code."""
    code = (
        "import os, signal, time\n"
        "try:\n    os.kill(os.getppid(), signal.SIGINT)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    os._exit(130)"
    )
    codes = []
    wait = subprocess.Popen.wait

    def noting(self, *args, **options):
        codes.append(wait(self, *args, **options))
        return codes[-1]

    monkeypatch.setattr(subprocess.Popen, "wait", noting)
    with pytest.raises(KeyboardInterrupt):
        apart.run_apart(["-c", code])
    assert codes == [130]


@pytest.mark.slow
def test_an_adapter_is_loaded_onto_its_base(tmp_path):
    """Of its weights the policy has those of the base; with them it says something else."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from dpo_lightning.assets import BUNDLED_MODEL

    run = run_train(tmp_path / "run", *TINY, "trainer.max_steps=3", "peft=lora", "optimizer.lr=0.1")
    assert run.code == 0
    policy, tokenizer = load(run.folder)
    base = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
    tokens = torch.tensor([tokenizer("fog snow")["input_ids"]])
    assert isinstance(policy, PeftModel)
    assert not policy.training
    with policy.disable_adapter():
        torch.testing.assert_close(policy(tokens).logits, base(tokens).logits)
    assert (policy(tokens).logits - base(tokens).logits).abs().max() > 1e-3
    # Where the package was when it was trained does not matter.
    path = run.folder / "model" / "adapter_config.json"
    values = json.loads(path.read_text())
    values["base_model_name_or_path"] = "/elsewhere/dpo_lightning/assets/tiny_llama"
    path.write_text(json.dumps(values))
    again, _ = load(run.folder)
    torch.testing.assert_close(again(tokens).logits, policy(tokens).logits)
    # Beside random weights there is nothing to load it onto.
    path.write_text(json.dumps(values | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match=r"random weights.*peft\.merge=true"):
        load(run.folder)
    (run.folder / "model").rename(run.folder / "model-merged")
    (run.folder / "model").mkdir()
    (run.folder / "model" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"^run=.*no model config"):
        load(run.folder)


def test_a_folder_without_an_export_is_answered_in_one_line(tmp_path):
    def said(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            load(folder)
        return str(caught.value)

    assert said(tmp_path / "none").startswith(f"run={tmp_path / 'none'}: no such folder; name a")
    assert "no model/ there, and no result.json" in said(tmp_path)
    (tmp_path / "result.json").write_text('{"status": "stopped"}')
    assert said(tmp_path).endswith(
        f"no model/ there, the run is stopped; resume={tmp_path} brings it to its end"
    )
    (tmp_path / "sweep.json").touch()
    assert said(tmp_path).endswith("a sweep's folder; name that of one of its trials")


# Evaluations ------------------------------------------------------------------------------------


EVALUATED = {
    **{"run": "r", "metrics": {"eval/loss": 0.5}, "intervals": {"eval/loss": [0.4, 0.6]}},
    **{"groups": 4, "prompts": 2, "beta": 0.3, "device": "cpu", "kl": None, "notes": ["n"]},
    "slices": [
        {"by": "topic", "value": "a", "groups": 1, "prompts": 1, "metrics": {}, "intervals": {}}
    ],
    "samples": [],
}
COMPARED = {
    "differences": [
        {
            **{"metric": "eval/loss", "a": "x", "b": "y", "value_a": 1.0, "value_b": 3.0},
            **{"difference": 2.0, "interval": [1.0, 3.0], "p": 0.1, "p_alone": 0.1},
            **{"items": 4, "prompts": 2, "better": "lower"},
        }
    ],
    "runs": [{"label": "x", "name": "runs/x", "beta": 0.1, "loss": "ipo", "rows": 4}],
    "notes": [],
}
FRONTIER = {
    **{"axis": "beta", "loss": "sigmoid", "beta": 0.1, "notes": [], "drawn": {"prompts": 8}},
    "points": [{"lambda": 0.5, "beta": 0.2, "method": "decoded", "reward": 1.5, "kl": 0.25}],
    "not_shown": [{"lambda": 4.0, "beta": 0.025, "method": "weights", "why": "too far"}],
}


@pytest.fixture
def printed(monkeypatch):
    """Output of the command, and the words that it was given."""
    given, answer = [], {}

    def run(arguments, *, stdout):
        given.append(list(arguments))
        stdout.write(json.dumps(answer).encode())
        return 0, None

    monkeypatch.setattr(apart, "run_apart", run)
    return given, answer


def test_an_evaluation_is_typed(printed, tmp_path):
    given, answer = printed
    answer |= EVALUATED
    run = Result(tmp_path, "finished", 0)
    found = api.evaluate(run, ["data.eval=x.jsonl"], reference="base", slices=["topic", "id"])
    words = ["--slice", "topic", "--slice", "id", "--reference=base", "data.eval=x.jsonl"]
    assert given == [["-m", "dpo_lightning", "evaluate", "--json", str(tmp_path), *words]]
    assert (found.metrics["eval/loss"], found.intervals["eval/loss"]) == (0.5, [0.4, 0.6])
    assert [(own.by, own.value, own.groups) for own in found.slices] == [("topic", "a", 1)]
    with pytest.raises(AttributeError):
        found.beta = 1


def test_a_comparison_is_typed(printed):
    given, answer = printed
    answer |= COMPARED
    found = api.compare(["x", Path("y")], ["trainer.threads=1"], reference="base", evaluate=True)
    words = ["x", "y", "--evaluate", "--reference=base", "trainer.threads=1"]
    assert given == [["-m", "dpo_lightning", "compare", "--json", *words]]
    [own] = found.differences
    assert own.difference == own.value_b - own.value_a == 2
    assert [run.label for run in found.runs] == ["x"]
    api.compare(["x", "y"])
    assert given[-1] == ["-m", "dpo_lightning", "compare", "--json", "x", "y"]


def test_a_frontier_is_typed(printed):
    """Of numbers no digit is lost: 0.1 + 0.2 is not 0.3."""
    given, answer = printed
    answer |= FRONTIER
    found = api.interpolate("x", betas=[0.1 + 0.2, 1], lambdas=(0, 0.5))
    words = ["x", "--betas=0.30000000000000004,1", "--lambdas=0,0.5"]
    assert given == [["-m", "dpo_lightning", "interpolate", "--json", *words]]
    [point], [hidden] = found.points, found.not_shown
    assert (point.lam, point.beta, point.reward, point.why) == (0.5, 0.2, 1.5, None)
    assert (hidden.lam, hidden.reward, hidden.why) == (4.0, None, "too far")


def test_a_command_answers_by_a_file(tmp_path):
    """The output of another process, however much, is read whole."""
    path = tmp_path / "out"
    with path.open("wb") as file:
        code, reason = apart.run_apart(["-c", "print('x' * 200_000)"], stdout=file)
    assert (code, reason, path.stat().st_size) == (0, None, 200_001)


@pytest.mark.parametrize(
    ("code", "reason", "kind", "said"),
    [
        (2, "error: run=x: name --reference MODEL", "UserError", "run=x: name reference=MODEL"),
        (2, "error: --betas=5: --lambdas 1", "UserError", "betas=5: lambdas=1"),
        (4, "error: damaged", "CorruptArtifactError", "damaged"),
        (3, "error: not finite", "DivergedError", "not finite"),
        (1, None, "DpoLightningError", "evaluate ended by exit code 1; stderr says more"),
        (-9, None, "DpoLightningError", "evaluate ended by signal 9; stderr says more"),
    ],
)
def test_an_error_of_a_command_is_raised(monkeypatch, code, reason, kind, said):
    monkeypatch.setattr(apart, "run_apart", lambda arguments, *, stdout: (code, reason))
    with pytest.raises(errors.DpoLightningError) as caught:
        api.evaluate("x")
    assert type(caught.value).__name__ == kind
    assert str(caught.value) == said


def test_a_wrong_policy_is_raised_by_the_command_itself(tmp_path, capfd):
    before = state()
    with pytest.raises(UserError, match=r"^run=.*nowhere: no such folder; name a run's"):
        api.evaluate(tmp_path / "nowhere")
    assert changed(before) == {}


def test_a_changed_state_is_seen(monkeypatch, tmp_path):
    import logging
    import random
    import warnings

    import torch

    # There may be no logger of this name yet, and one may have its level already.
    logger = logging.getLogger("lightning")
    monkeypatch.setattr(logger, "level", logging.INFO)
    before = state()
    monkeypatch.setenv("MINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(logger, "level", logging.CRITICAL)
    with warnings.catch_warnings(), torch.random.fork_rng(), (tmp_path / "f").open("w"):
        warnings.simplefilter("ignore")
        random.random()
        torch.rand(1)
        found = changed(before)
    names = {"environment", "folder", "words", "filters", "random", "torch", "files", "loggers"}
    assert names <= found.keys()
