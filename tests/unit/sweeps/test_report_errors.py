"""The standard errors of a report: from items, from seeds, or as a run reported them."""

import json
import math

import pytest

from dpo_lightning.sweeps.report.analysis import Analysis, analyse
from dpo_lightning.sweeps.report.read import read_sweep
from dpo_lightning.sweeps.report.write import write_report
from tests.support.sweep_folders import scored, scored_metrics, write_trial

ACCURACY = "eval/rewards/accuracies"
EXACT_KL, SAMPLED_KL = "controlled/kl_policy_reference", "samples/kl"
REWARD = "controlled/expected_reward"


def analysed(sweep, metric=None) -> Analysis:
    return analyse(read_sweep(sweep), metric)


def seeds(sweep, *metrics: dict[str, float]) -> None:
    """Trials that differ in their seed only."""
    for seed, values in enumerate(metrics, start=1):
        write_trial(sweep, f"s{seed}", "beta=0.1", f"seed={seed}", metrics={ACCURACY: 0.5} | values)


# Items -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [None, math.nan])
def test_marks_that_are_no_numbers_do_not_count_as_nothing(tmp_path, missing):
    """100 answers score 9 and 11 in turn, 20 more have no mark.

    The mean of the marks is 10, one off it each, so the error is 1 / sqrt(100) = 0.1. With 0 for
    what is missing the marks would spread by sqrt(5/6 * 1 + 5/36 * 100) = 3.84, and the error be
    3.84 / sqrt(120) = 0.35. The second configuration misses other marks: 80 answers have both, and
    in each of them it is 2 behind.
    """
    marks = [9.0 + 2 * (i % 2) for i in range(100)]
    for beta, scores in (
        (0.1, [*marks, *[missing] * 20]),
        (0.2, [*[missing] * 20, *[mark - 2 for mark in marks[20:]], *[7.0] * 20]),
    ):
        known = [score for score in scores if score is not None and not math.isnan(score)]
        evaluation = scored(known, [0.0] * 100, [1.0] * 100)
        metrics = scored_metrics(evaluation)
        rows = [evaluation["samples"][0] | {"prompt": f"p{i}"} for i in range(120)]
        evaluation["samples"] = [row | {"judge": s} for row, s in zip(rows, scores, strict=True)]
        write_trial(
            tmp_path, f"b{beta}", f"beta={beta}", metrics=metrics, evaluation=evaluation
        )  # fmt: skip
    write_report(tmp_path)
    report = json.loads((tmp_path / "sweep.json").read_text())
    best = report["configurations"][0]
    assert (best["beta"], best["value"]["mean"]) == (0.1, 10.0)
    assert best["value"]["stderr"] == pytest.approx(0.1, rel=0.1)
    assert best["value"]["low"] == pytest.approx(10 - 1.96 * 0.1, abs=0.03)
    test = report["comparison"]["test"]
    assert (test["count"], test["difference"]) == (80, pytest.approx(2.0))


def test_seeds_and_items_both_widen_the_error(tmp_path):
    """Two seeds with 0.9 and 0.7 of 40 groups right, every group of its own.

    Of two drawn seeds both are the first in a quarter of the draws, and both the second in another.
    So the mean is 0.9, 0.7 or else 0.8: variance 0.1^2 / 2 = 0.005. An item varies by
    0.9 * 0.1 = 0.09 with the first alone and by 0.7 * 0.3 = 0.21 with the second; with both it is 1
    for 28 items, 1/2 for 8 and 0 for 4: 0.7 + 0.2 / 4 - 0.8^2 = 0.11. The mean of 40 drawn items
    adds (0.09 / 4 + 0.21 / 4 + 0.11 / 2) / 40 = 0.00325 to the variance. The root of their sum
    0.00825 is 0.0908; of the seeds' part alone it is 0.0707, of the items' 0.0570.
    """
    for seed, right in ((1, 36), (2, 28)):
        write_trial(
            tmp_path, f"s{seed}", "beta=0.1", f"seed={seed}", metrics={ACCURACY: right / 40},
            evaluation={"accuracies": [1.0] * right + [0.0] * (40 - right), "samples": []},
        )  # fmt: skip
    [found] = analysed(tmp_path).configurations
    assert found.value.mean == pytest.approx(0.8)
    assert found.value.stderr == pytest.approx(0.0908, rel=0.05)


# Seeds -------------------------------------------------------------------------------------------


def test_an_exact_value_of_one_seed_has_no_error_and_of_several_their_spread(tmp_path):
    """1 and 4: deviation 3 / sqrt(2), standard error 1.5."""
    seeds(tmp_path / "one", {REWARD: 1.0})
    seeds(tmp_path / "two", {REWARD: 1.0}, {REWARD: 4.0})
    [one], [two] = (analysed(tmp_path / name).configurations for name in ("one", "two"))
    assert (one.value.mean, one.value.stderr) == (1.0, 0.0)
    assert (two.value.mean, two.value.stderr) == (2.5, pytest.approx(1.5))


@pytest.mark.parametrize(
    ("kls", "errors", "mean", "stderr"),
    [
        # One seed has its own error, or none.
        ((2.0,), (0.3,), 2.0, 0.3),
        ((2.0,), (None,), 2.0, None),
        ((2.0,), (-1.0,), 2.0, None),
        # They agree: the error of a mean of two, sqrt(0.3^2 + 0.4^2) / 2, is that of their samples.
        ((2.0, 2.0), (0.3, 0.4), 2.0, 0.25),
        # They differ by more: deviation sqrt(0.5), standard error 0.5.
        ((2.0, 3.0), (0.3, 0.4), 2.5, 0.5),
        # Not of all is it known how far to trust them: their spread it is.
        ((2.0, 2.2), (0.3, None), 2.1, 0.1),
    ],
)
def test_the_error_of_a_sampled_kl(tmp_path, kls, errors, mean, stderr):
    seeds(
        tmp_path,
        *({SAMPLED_KL: kl, f"{SAMPLED_KL}_stderr": e} for kl, e in zip(kls, errors, strict=True)),
    )
    [found] = analysed(tmp_path).configurations
    assert found.kl.mean == pytest.approx(mean)
    assert found.kl.stderr == (None if stderr is None else pytest.approx(stderr))


# Where the KL comes from -------------------------------------------------------------------------


def test_the_kl_is_of_the_kind_that_the_metric_is(tmp_path):
    """An exact metric goes with the exact KL, a sampled one with that of the samples."""
    for beta, sampled in ((0.1, 3.0), (0.2, 2.0)):
        metrics = {REWARD: 5.0, ACCURACY: 0.8, EXACT_KL: 5 - sampled, SAMPLED_KL: sampled}
        write_trial(tmp_path, f"b{beta}", f"beta={beta}", metrics=metrics)
    exact = analysed(tmp_path)
    assert (exact.kl_metric, exact.pick.beta, exact.pick.kl.mean) == (EXACT_KL, 0.1, 2.0)
    assert exact.pick.sampled_kl.mean == 3.0
    by_accuracy = analysed(tmp_path, ACCURACY)
    assert (by_accuracy.kl_metric, by_accuracy.pick.beta) == (SAMPLED_KL, 0.2)
    assert (by_accuracy.pick.kl.mean, by_accuracy.pick.sampled_kl) == (2.0, None)


def test_a_kl_that_more_trials_have_comes_first(tmp_path):
    for beta, metrics in ((0.1, {EXACT_KL: 1.0, SAMPLED_KL: 1.1}), (0.2, {SAMPLED_KL: 2.0})):
        write_trial(tmp_path, f"b{beta}", f"beta={beta}", metrics={REWARD: 5.0} | metrics)
    found = analysed(tmp_path)
    assert (found.metric, found.kl_metric) == (REWARD, SAMPLED_KL)
    assert [c.kl.mean for c in found.configurations] == [1.1, 2.0]
