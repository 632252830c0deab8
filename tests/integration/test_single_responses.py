"""Runs on single responses through the front door: files, resume, evaluate, what is learnt."""

import json
import math

import pytest
from safetensors.torch import load_file

from tests.support.ranks import launch
from tests.support.runs import TINY, Run, run_train

UNPAIRED = (*TINY, "data.controlled.form=unpaired", "evaluation.partition_samples=0")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return f"reference.cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def kto(tmp_path_factory, cache) -> Run:
    run = run_train(
        tmp_path_factory.mktemp("kto") / "run",
        *(*UNPAIRED, "loss=kto", "trainer.max_steps=3", "optimizer.lr=0.01", cache),
    )
    assert run.code == 0, run.result["error"]
    return run


def test_the_files_of_a_run(kto: Run):
    """One half at the start, metrics of the two kinds, the speed in examples, no accuracies."""
    assert kto.values("train/loss")[0] == pytest.approx(0.5, rel=1e-4)
    assert kto.values("train/kto/z0")[0] == pytest.approx(0, abs=1e-5)
    names = {name for row in kto.rows for name in row}
    assert {"eval/label_gain", "eval/logratios/separation", "eval/kto/z0"} <= names
    assert not any(word in name for name in names for word in ("accurac", "margins", "chosen"))
    result = kto.result
    assert result["throughput"]["examples_per_second"] > 0
    assert result["throughput"]["pairs_per_second"] == 0
    assert 0.5 < result["metrics"]["controlled/bayes_accuracy"] < 1
    assert "accuracies" not in json.loads((kto.folder / "evaluation.json").read_text())


def test_mismatched_responses_are_of_the_cache(kto: Run, tmp_path, cache):
    """A second run computes nothing, BCO's neither, which has no such responses."""
    again = run_train(
        tmp_path / "again", *UNPAIRED, "loss=kto", "trainer.max_steps=3", "optimizer.lr=0.01", cache
    )
    assert kto.result["reference"]["computed"] > 0
    assert again.result["reference"]["computed"] == 0
    assert again.values("train/kto/z0") == kto.values("train/kto/z0")
    assert again.values("eval/loss") == kto.values("eval/loss")


@pytest.mark.slow
def test_evaluate_gives_the_numbers_of_the_run(kto: Run, capsys):
    from dpo_lightning.run.evaluate.command import main

    capsys.readouterr()
    assert main([str(kto.folder), "--json", "evaluation.samples=0"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ("eval/loss", "eval/label_gain", "eval/logratios/separation", "eval/kto/z0"):
        assert found["metrics"][name] == pytest.approx(kto.result["metrics"][name], rel=1e-4)
    assert found["intervals"]["eval/label_gain"][0] <= found["metrics"]["eval/label_gain"]
    assert main([str(kto.folder), "evaluation.samples=0"]) == 0
    assert "separation" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, cache, loss: str):
    settings = (*UNPAIRED, f"loss={loss}", "optimizer.lr=0.01", "optimizer.schedule=constant")
    every = ("trainer.max_steps=4", "checkpoint.every_n_steps=2", "checkpoint.keep=2", cache)
    whole = run_train(tmp_path / "whole", *settings, *every)
    resume = f"resume={tmp_path / 'whole' / 'checkpoints' / 'step-000002.ckpt'}"
    again = run_train(tmp_path / "again", *settings, *every, resume)
    anchor = {"kto": "kto/z0", "bco": "bco/delta"}[loss]
    for name in ("train/loss", f"train/{anchor}", "train/grad_norm"):
        assert again.values(name)[-2:] == whole.values(name)[-2:]
    assert again.result["metrics"]["eval/loss"] == whole.result["metrics"]["eval/loss"]
    files = [load_file(run.folder / "model" / "model.safetensors") for run in (whole, again)]
    assert all((files[0][name] == files[1][name]).all() for name in files[0])


@pytest.mark.slow
def test_evaluate_has_the_shift_of_the_training(tmp_path, cache, capsys):
    from dpo_lightning.run.evaluate.command import main

    settings = (*UNPAIRED, "loss=bco", "optimizer.lr=0.01", "trainer.max_steps=3", cache)
    run = run_train(tmp_path / "run", *settings)
    assert run.result["metrics"]["eval/bco/delta"] != 0
    capsys.readouterr()
    assert main([str(run.folder), "--json", "evaluation.samples=0"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    for name in ("eval/loss", "eval/bco/delta"):
        assert found[name] == pytest.approx(run.result["metrics"][name], rel=1e-4)


@pytest.mark.slow
def test_pairs_are_two_rows_each(tmp_path, cache):
    """The same 16 groups of a step, of which each counts twice."""
    run = run_train(tmp_path / "run", *TINY, "loss=kto", "trainer.max_steps=2", cache)
    assert run.code == 0, run.result["error"]
    assert run.values("train/loss")[0] == pytest.approx(0.5, rel=1e-4)
    throughput = run.result["throughput"]
    assert throughput["examples_per_second"] == pytest.approx(
        2 * throughput["pairs_per_second"], rel=1e-6
    )


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_two_ranks_equal_one_process(tmp_path, loss: str):
    task = [
        *("data.controlled.form=unpaired", f"loss={loss}", "data.batch_size=4"),
        *("data.controlled.train_groups=21", "data.controlled.eval_groups=5"),
        *("data.micro_batch_tokens=20", "optimizer.warmup=0", "evaluation.partition_samples=0"),
    ]
    one = launch(tmp_path / "one", *task)
    two = launch(tmp_path / "two", *task, "strategy=ddp", "trainer.devices=2")
    anchor = {"kto": "kto/z0", "bco": "bco/delta"}[loss]
    for name in ("train/loss", "train/grad_norm", "eval/loss", "eval/label_gain"):
        assert two.values(name) == pytest.approx(one.values(name), rel=1e-5), name
    for name in (f"train/{anchor}", f"eval/{anchor}"):
        assert two.values(name) == pytest.approx(one.values(name), rel=1e-4, abs=1e-6), name


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("loss", "least"), [("kto", 0.6), ("bco", 0.7)])
def test_the_embedded_task_is_learnt_in_the_order_of_beta(tmp_path, cache, loss: str, least: float):
    """Labels by a logistic of the true reward: more reward and more KL at the smaller beta.

    A label tells less than a pair, and its logistic has one offset for all prompts: a policy has
    most of what is possible at its own KL. KTO, bounded on both sides, stops earlier: at beta 0.1
    its reward goes from 1.49 to 3.60, 0.65 of what its KL of 1.10 allows.
    """
    found = {}
    for beta in (0.1, 0.3, 1.0):
        run = run_train(
            tmp_path / f"{beta}",
            *("data.controlled.form=unpaired", "evaluation.samples=0", f"loss={loss}", cache),
            f"beta={beta}",
        )
        assert run.code == 0, run.result["error"]
        found[beta] = run.result["metrics"]
    rewards, kls, gains = (
        [found[beta][f"controlled/{name}"] for beta in (0.1, 0.3, 1.0)]
        for name in ("expected_reward", "kl_policy_reference", "gain_ratio")
    )
    start = found[0.1]["controlled/reference_reward"]
    assert rewards[0] > rewards[1] > rewards[2] > start
    assert kls[0] > kls[1] > kls[2] > 0
    assert min(gains) > least
    assert all(found[beta]["eval/label_gain"] > 0.02 for beta in found)
    assert all(math.isfinite(value) for value in rewards)
