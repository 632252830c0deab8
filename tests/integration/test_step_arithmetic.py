"""The numbers of a whole run, from its files alone: rates, betas, the clip, accuracies."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.recovery import checkpoint, load
from tests.support.runs import TINY, Run, run_train

CLIP = 0.1

# Six steps of sixteen groups.
TASK = (
    *TINY,
    "trainer.accelerator=cpu",
    *("optimizer.lr=0.01", "optimizer.schedule=linear", "optimizer.warmup=0.2"),
    *(f"optimizer.max_grad_norm={CLIP}", "optimizer.betas=[0.8,0.96]"),
    *("loss.beta_schedule=linear", "loss.beta_end=0.6"),
    *("evaluation.partition_samples=0", "checkpoint.every_n_steps=1", "checkpoint.keep=9"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = run_train(tmp_path_factory.mktemp("sweep") / "run", *TASK)
    assert run.code == 0
    return run


@pytest.fixture(scope="module")
def margins(run: Run) -> list[float]:
    """Margins of the evaluation groups by plain forward passes of exported and bundled model."""
    from dpo_lightning.assets import BUNDLED_MODEL
    from dpo_lightning.data.controlled import ControlledTask

    models = [
        AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (run.folder / "model", BUNDLED_MODEL)
    ]
    task = ControlledTask()
    groups = task.groups(40, seed=0, reference_logps=task.outcome_logps(models[1]))
    found = []
    for group in groups:
        sides = []
        for response in group.responses:
            row = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
            with torch.no_grad():
                logps = [model(input_ids=row).logits[0].log_softmax(-1) for model in models]
            places = range(len(group.prompt) - 1, row.shape[1] - 1)
            said = [sum(own[i, row[0, i + 1]].item() for i in places) for own in logps]
            sides.append(said[0] - said[1])
        found.append(sides[0] - sides[1])
    return found


def test_the_learning_rate_of_each_step(run: Run):
    """A fifth of six steps is 1.2, so two warm up: 0, 1/2; then 4/4 ... 1/4 of the peak 0.01."""
    expected = [0, 0.005, 0.01, 0.0075, 0.005, 0.0025]
    assert run.values("train/learning_rate") == pytest.approx(expected, abs=1e-9)


def test_the_beta_of_each_step_and_of_the_evaluation(run: Run, margins: list[float]):
    """Beta goes from 0.1 to 0.6 in six steps; the last evaluation has that of the last step."""
    betas = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert run.values("train/beta") == pytest.approx(betas)
    expected = sum(math.log1p(math.exp(-0.6 * margin)) for margin in margins) / len(margins)
    assert run.values("eval/loss") == pytest.approx([expected], rel=1e-4)


def test_the_first_moments_have_the_norm_of_the_clip(run: Run):
    """A gradient clipped to c gives AdamW's moments (1 - 0.8) c and sum v = (1 - 0.96) c^2."""
    assert run.values("train/grad_norm")[0] > 2 * CLIP
    states = load(checkpoint(run, 1))["optimizer_states"][0]["state"].values()
    first = math.hypot(*(state["exp_avg"].norm().item() for state in states))
    second = sum(state["exp_avg_sq"].double().sum().item() for state in states)
    assert first == pytest.approx(0.2 * CLIP, rel=1e-4)
    assert second == pytest.approx(0.04 * CLIP**2, rel=1e-4)


def test_the_accuracies_of_groups_and_the_standard_error_that_a_report_makes_of_them(
    run: Run, margins: list[float]
):
    """1 where the exported model prefers the chosen response more than the bundled one, else 0.

    The report's error of their mean p is that of drawing the 40 groups again: sqrt(p (1-p) / 40).
    """
    from dpo_lightning.sweeps.report.analysis import analyse
    from dpo_lightning.sweeps.report.read import read_sweep

    expected = [float(margin > 0) for margin in margins]
    found = json.loads((run.folder / "evaluation.json").read_text())["accuracies"]
    assert found == expected
    share = sum(expected) / 40
    assert 0.5 < share < 1
    assert run.result["metrics"]["eval/rewards/accuracies"] == pytest.approx(share)
    [configuration] = analyse(read_sweep(run.folder.parent)).configurations
    assert configuration.accuracy.mean == pytest.approx(share)
    error = math.sqrt(share * (1 - share) / 40)
    assert configuration.accuracy.stderr == pytest.approx(error, rel=0.05)
