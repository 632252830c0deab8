"""Training through the command line, on the embedded task."""

import dataclasses
import math
import signal
import subprocess

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lightning.data.controlled import PROMPTS, word_values
from dpo_lightning.settings.schema import Config
from dpo_lightning.settings.validation import validate
from tests.support.runs import TINY, Run, run_train
from tests.support.warm import run_apart, start_train


def outcomes() -> list[tuple[int, ...]]:
    """All responses of at most four tokens, by recursion: words 1..8 until 0 or the fourth."""
    found = []

    def extend(prefix: tuple[int, ...]) -> None:
        for token in range(9):
            response = (*prefix, token)
            if token == 0 or len(response) == 4:
                found.append(response)
            else:
                extend(response)

    extend(())
    return found


def brute_force(folder, prompts: list[list[int]]) -> np.ndarray:
    """log pi(y|x) of every response with transformers alone, one padded batch per prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    responses = outcomes()
    logps = []
    for prompt in prompts:
        ids = torch.zeros(len(responses), len(prompt) + 4, dtype=torch.int64)
        mask = torch.zeros(len(responses), 4)
        for i, response in enumerate(responses):
            ids[i, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
            mask[i, : len(response)] = 1
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, len(prompt) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(2, ids[:, len(prompt) :, None])[..., 0]
        logps.append((chosen * mask).sum(1).numpy())
    return np.array(logps)


@pytest.fixture(scope="module")
def default_run(tmp_path_factory) -> Run:
    """Runs the main job as typed, in a process of its own."""
    folder = tmp_path_factory.mktemp("default") / "run"
    done = run_apart("logger=none", f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    # Nor what libraries say, of kernels that are missing and of each other's changes.
    assert done.stderr == ""
    (folder / "stdout").write_text(done.stdout)
    return Run(done.returncode, folder)


def test_the_main_job_learns(default_run: Run):
    result = default_run.result
    metrics = result["metrics"]
    assert result["status"] == "finished"
    assert result["error"] is None
    assert default_run.values("train/loss")[0] == pytest.approx(math.log(2), abs=1e-3)
    assert default_run.rows[0]["step"] == 1
    assert metrics["controlled/bayes_accuracy"] >= 0.8
    accuracy = metrics["eval/rewards/accuracies"]
    assert accuracy >= 0.95 * metrics["controlled/bayes_accuracy"]
    assert metrics["controlled/expected_reward"] > metrics["controlled/reference_reward"] + 0.5
    assert metrics["controlled/optimal_reward"] >= metrics["controlled/reference_reward"]


@pytest.mark.long
def test_exact_quantities_equal_a_brute_force_over_the_exported_model(default_run: Run):
    """Everything is worked out again from the exported and the bundled folder alone.

    E[r] = sum pi r, KL(p||q) = sum p (log p - log q), log Z = log sum pi_ref exp(r / beta), and
    pi* = pi_ref exp(r / beta) / Z, each averaged over the prompts.
    """
    from dpo_lightning.assets import BUNDLED_MODEL

    tokenizer = AutoTokenizer.from_pretrained(default_run.folder / "model")
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    values = np.array(word_values())
    rewards = np.array([[sum(row[t - 1] for t in y if t) for y in outcomes()] for row in values])
    policy = brute_force(default_run.folder / "model", prompts)
    reference = brute_force(BUNDLED_MODEL, prompts)
    beta = default_run.result["beta"]
    scores = reference + rewards / beta
    top = scores.max(1, keepdims=True)
    log_z = top[:, 0] + np.log(np.exp(scores - top).sum(1))
    optimum = scores - log_z[:, None]

    def kl(p: np.ndarray, q: np.ndarray) -> float:
        return (np.exp(p) * (p - q)).sum(1).mean()

    expected = {
        "probability_sum": np.exp(policy).sum(1).mean(),
        "expected_reward": (np.exp(policy) * rewards).sum(1).mean(),
        "reference_reward": (np.exp(reference) * rewards).sum(1).mean(),
        "optimal_reward": (np.exp(optimum) * rewards).sum(1).mean(),
        "kl_policy_reference": kl(policy, reference),
        "kl_reference_policy": kl(reference, policy),
        "kl_optimum_reference": kl(optimum, reference),
        "kl_optimum_policy": kl(optimum, policy),
        "kl_policy_optimum": kl(policy, optimum),
        "log_z": log_z.mean(),
    }
    metrics = default_run.result["metrics"]
    for name, value in expected.items():
        assert metrics[f"controlled/{name}"] == pytest.approx(value, rel=1e-5), name
    assert expected["probability_sum"] == pytest.approx(1, abs=1e-6)


def test_a_user_sees_header_result_answers_and_folders(default_run: Run):
    text = (default_run.folder / "stdout").read_text()
    for words in (
        "bundled tiny Llama",
        "16,384 training",
        "cpu",
        "32-true",
        "rewards/accuracies",
        "bayes_accuracy",
        "reference",
        "after",
        "try it",
    ):
        assert words in text, words
    files = {"config.yaml", ".hydra", "metrics.jsonl", "result.json", "report.html"}
    assert files | {"model", "train.log"} <= {path.name for path in default_run.folder.iterdir()}


def test_the_defaults_are_llama_and_one_tenth_to_the_bit(tmp_path):
    first = run_train(tmp_path / "a", *TINY)
    second = run_train(tmp_path / "b", *TINY, "model=llama", "beta=0.1")
    for run in (first, second):
        assert run.code == 0
    names = ["train/loss", "train/grad_norm", "eval/loss"]
    assert [first.values(n) for n in names] == [second.values(n) for n in names]
    weights = [(r.folder / "model" / "model.safetensors").read_bytes() for r in (first, second)]
    assert weights[0] == weights[1]
    assert first.result["config_hash"] == second.result["config_hash"]


def first_step_groups(run_beta: float, overrides: tuple[str, ...]):
    """The groups of the first step, drawn again from the seed."""
    from dpo_lightning.assets import BUNDLED_MODEL
    from dpo_lightning.data.controlled import ControlledTask
    from dpo_lightning.data.packing import epoch_order

    task = ControlledTask()
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
    groups = task.groups(96, seed=2, reference_logps=task.outcome_logps(model))
    return model, [groups[i] for i in epoch_order(96, seed=1, epoch=0)[:16]]


def response_logps(model, group) -> list[float]:
    sums = []
    for response in group.responses:
        row = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
        with torch.no_grad():
            logps = model(input_ids=row).logits[0].double().log_softmax(-1)
        p = len(group.prompt)
        sums.append(sum(logps[p - 1 + i, t].item() for i, t in enumerate(response.tolist())))
    return sums


def test_without_a_reference_the_first_loss_is_the_founding_formula(tmp_path):
    """Z = exp(beta log pi(y+)) + exp(beta log pi(y-)); loss = -log(exp(beta log pi(y+)) / Z)."""
    beta = 0.7
    run = run_train(
        tmp_path / "run", *TINY, "reference=none", f"beta={beta}", "trainer.max_steps=1"
    )
    model, groups = first_step_groups(beta, TINY)
    losses, log_zs = [], []
    for group in groups:
        chosen, rejected = response_logps(model, group)
        z = math.exp(beta * chosen) + math.exp(beta * rejected)
        losses.append(-math.log(math.exp(beta * chosen) / z))
        log_zs.append(math.log(z))
    assert run.code == 0
    assert run.values("train/loss")[0] == pytest.approx(np.mean(losses), rel=1e-5)
    assert run.values("train/partition/log_z")[0] == pytest.approx(np.mean(log_zs), rel=1e-5)
    assert run.values("train/loss")[0] != pytest.approx(math.log(2), abs=1e-3)
    assert run.result["reference"]["rows"] == 0


def test_sft_is_the_mean_negative_log_likelihood_of_the_best_response(tmp_path):
    run = run_train(tmp_path / "run", *TINY, "loss=sft", "trainer.max_steps=6")
    model, groups = first_step_groups(0.1, TINY)
    expected = np.mean([-response_logps(model, g)[0] / len(g.responses[0]) for g in groups])
    assert run.code == 0
    assert run.values("train/loss")[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_label_smoothing_acts(tmp_path):
    """At a zero margin both labels cost ln 2; later the smoothed loss is the higher one."""
    plain = run_train(tmp_path / "a", *TINY, "optimizer.lr=0.01")
    smooth = run_train(tmp_path / "b", *TINY, "optimizer.lr=0.01", "loss.label_smoothing=0.3")
    assert smooth.values("train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert smooth.values("train/loss")[-1] > plain.values("train/loss")[-1] + 1e-3


@pytest.mark.parametrize("micro", [pytest.param(8, marks=pytest.mark.slow), 40])
def test_micro_batches_do_not_change_the_step(tmp_path, micro: int):
    whole = run_train(tmp_path / "a", *TINY)
    split = run_train(tmp_path / "b", *TINY, f"data.micro_batch_tokens={micro}")
    for name in ("train/loss", "train/grad_norm", "eval/loss", "eval/rewards/accuracies"):
        assert split.values(name) == pytest.approx(whole.values(name), rel=1e-4), name


@pytest.mark.long
def test_a_resumed_run_ends_like_an_undisturbed_one(tmp_path):
    """Two passes of six steps, stopped at 4, at the pass's end (6) and in the second pass (9)."""
    long = [*TINY, "trainer.max_epochs=2", "checkpoint.every_n_steps=1", "checkpoint.keep=20"]
    whole = run_train(tmp_path / "whole", *long)
    assert whole.code == 0
    weights = (whole.folder / "model" / "model.safetensors").read_bytes()
    for step in (4, 6, 9):
        checkpoint = whole.folder / "checkpoints" / f"step-{step:06d}.ckpt"
        resumed = run_train(tmp_path / f"at-{step}", *long, f"resume={checkpoint}")
        assert resumed.code == 0
        assert [row["step"] for row in resumed.rows if "train/loss" in row] == list(
            range(step + 1, 13)
        )
        assert (resumed.folder / "model" / "model.safetensors").read_bytes() == weights
        assert resumed.result["status"] == "finished"
    # In the same folder the rows after the checkpoint are written anew, none twice.
    again = run_train(whole.folder, *long, f"resume={checkpoint}")
    assert [row["step"] for row in again.rows if "train/loss" in row] == list(range(1, 13))


@pytest.mark.slow
def test_a_checkpoint_of_another_experiment_is_refused(tmp_path, capsys):
    run = run_train(tmp_path / "a", *TINY, "trainer.max_steps=2")
    other = run_train(
        tmp_path / "b", *TINY, "trainer.max_steps=4", "beta=0.5", f"resume={run.folder}"
    )
    assert other.code == 2
    assert other.result["status"] == "failed"
    assert "beta=0.1" in other.result["error"]
    damaged = run.folder / "checkpoints" / "step-000002.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    torn = run_train(tmp_path / "c", *TINY, "trainer.max_steps=4", f"resume={damaged}")
    assert torn.code == 4
    assert str(damaged) in torn.result["error"]


def test_checkpoints_hold_the_policy_alone_and_no_pickled_objects(tmp_path):
    run = run_train(tmp_path / "run", *TINY, "trainer.max_steps=2")
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == [
        "step-000002.ckpt",
        "step-000002.json",
    ]
    path = run.folder / "checkpoints" / "step-000002.ckpt"
    state = torch.load(path, weights_only=True)
    assert state["global_step"] == 2
    assert {name.partition(".")[0] for name in state["state_dict"]} == {"policy"}


def test_a_diverged_run_stops_before_the_step(tmp_path):
    run = run_train(tmp_path / "run", *TINY, "optimizer.lr=1e30", "optimizer.max_grad_norm=null")
    assert run.code == 3
    assert run.result["status"] == "diverged"
    assert "optimizer.lr" in run.result["error"]
    assert not (run.folder / "model").exists()


@pytest.mark.slow
def test_evaluation_in_between_and_limits(tmp_path):
    run = run_train(
        tmp_path / "run",
        *TINY,
        "evaluation.every_n_steps=2",
        "trainer.max_steps=5",
        "trainer.log_every_n_steps=2",
    )
    assert [row["step"] for row in run.rows if "eval/loss" in row] == [2, 4, 5]
    assert [row["step"] for row in run.rows if "train/loss" in row] == [1, 2, 4, 5]
    assert run.result["step"] == 5
    assert run.result["epoch"] == pytest.approx(5 / 6)


@pytest.mark.slow
def test_gradient_checkpointing_is_on_while_training(tmp_path, monkeypatch):
    """One step of one micro-batch: each of the two layers computes its attention once more."""
    from transformers import AttentionInterface

    from dpo_lightning.models.attention import GROUP_ATTENTION, group_attention

    calls = []

    def counted(module, query, *args, **kwargs):
        if query.device.type != "meta":  # those of the trace for memory
            calls.append(1)
        return group_attention(module, query, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, GROUP_ATTENTION, counted)
    counts = []
    for value in ("false", "true"):
        calls.clear()
        run = run_train(
            tmp_path / value,
            *TINY,
            "trainer.max_steps=1",
            f"model.gradient_checkpointing={value}",
            # What one has computed the other would read, and check.
            f"reference.cache_dir={tmp_path / value / 'cache'}",
        )
        assert run.code == 0
        counts.append(len(calls))
    assert counts[1] == counts[0] + 2


@pytest.mark.parametrize(
    ("signal_name", "code"), [pytest.param("SIGINT", 130, marks=pytest.mark.long), ("SIGTERM", 143)]
)
def test_a_signal_stops_with_its_code(tmp_path, signal_name: str, code: int):
    arguments = ("logger=none", f"hydra.run.dir={tmp_path / 'run'}")
    with start_train(*arguments, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if line.startswith("step 25/"):
                process.send_signal(getattr(signal, signal_name))
                break
        process.stdout.read()
    assert process.returncode == code
    result = Run(code, tmp_path / "run").result
    assert result["status"] == "stopped"
    assert 25 <= result["step"] < 512
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_a_grid_in_one_process_keeps_its_trials_apart(tmp_path):
    from dpo_lightning.cli import main

    arguments = [*TINY, "logger=none", "trainer.max_steps=2", f"hydra.sweep.dir={tmp_path}"]
    assert main(["-m", "hydra/launcher=basic", "beta=0.05,0.5", *arguments]) == 0
    runs = [Run(0, tmp_path / f"beta-{beta}") for beta in ("0.05", "0.5")]
    assert [run.result["beta"] for run in runs] == [0.05, 0.5]
    assert len({run.result["config_hash"] for run in runs}) == 2
    rewards = [run.values("eval/rewards/margins")[0] for run in runs]
    assert rewards[1] > rewards[0]


def test_the_resolved_config_on_disk_is_a_config_again(tmp_path):
    """Every setting with the value that ran; what was left to the run is what it chose."""
    import yaml
    from omegaconf import OmegaConf

    run = run_train(tmp_path / "run", *TINY, "trainer.max_steps=1", "beta=0.25")
    text = (run.folder / "config.yaml").read_text()
    config = yaml.safe_load(text)
    assert dataclasses.asdict(validate(OmegaConf.create(config), explicit_run_dir=True)) == config
    assert (config["beta"], config["trainer"]["max_steps"]) == (0.25, 1)
    assert Config().data.max_length is None
    assert config["data"]["max_length"] == 16
    assert "${" not in text
