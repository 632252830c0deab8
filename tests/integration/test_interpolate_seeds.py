"""Frontiers of trained policies against the closed form, ten seeds of the embedded task."""

import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_lightning.assets import BUNDLED_MODEL
from dpo_lightning.data.controlled import ControlledTask
from dpo_lightning.evaluation.interpolated import Pair
from dpo_lightning.evaluation.one_policy import LAMBDAS, ExactGains, plan_mixtures
from dpo_lightning.models.probe import choose_path
from tests.support.redraws import Enumerated, coverage, pooled
from tests.support.runs import run_train

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

BETA = 0.5
SEEDS = range(1, 11)
QUIET = ("evaluation.samples=0", "evaluation.partition_samples=0", "trainer.accelerator=cpu")


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> list[Path]:
    """Policies at beta 0.5, trained as the defaults have it."""
    folder, found = tmp_path_factory.mktemp("seeds"), []
    for seed in SEEDS:
        run = run_train(folder / str(seed), *QUIET, f"beta={BETA}", f"seed={seed}")
        assert run.code == 0
        found.append(run.folder / "model")
    return found


def gains_of(export: Path) -> ExactGains:
    reference, policy = (
        AutoModelForCausalLM.from_pretrained(path).eval() for path in (BUNDLED_MODEL, export)
    )
    scorer = choose_path(reference, max_length=16)[0]
    scorer.prepare(policy)
    return ExactGains.of(ControlledTask(), Pair(policy, reference, scorer))


def test_decoded_gains_are_those_of_the_closed_form_but_for_little(exports):
    """Beta 5 to 0.1 from policies at 0.5; the gain at the same KL, as a share of the best."""
    found: dict[float, list[float]] = {lam: [] for lam in LAMBDAS}
    for export in exports:
        gains = gains_of(export)
        for lam, ratios in found.items():
            ratio = gains.gain_ratio(lam, "decoded")
            assert ratio is not None
            ratios.append(ratio)
    means = {BETA / lam: statistics.fmean(ratios) for lam, ratios in found.items()}
    print({f"{beta:.3g}": round(mean, 3) for beta, mean in means.items()})
    assert (min(means), max(means)) == (pytest.approx(0.1), pytest.approx(5))
    assert min(means.values()) >= 0.92


def test_shown_points_of_a_trained_policy_are_covered(exports):
    """A thousand redraws of what the command draws, and of policy and reference alone."""
    gains = gains_of(exports[0])
    mixtures = plan_mixtures(LAMBDAS, prompts=8, seed=0)
    models = torch.stack([gains.logps(mixture.lam, "decoded") for mixture in mixtures])
    counts = [mixture.count for mixture in mixtures]
    for used in (2, len(models)):
        drawn = Enumerated(models[:used], counts[:used], gains.task.rewards)
        found = pooled([coverage(drawn, lam, draws=1000) for lam in LAMBDAS])
        print(f"{used} models: {found}")
        assert 0.92 <= found.reward <= 0.98
        assert 0.92 <= found.kl <= 0.98
