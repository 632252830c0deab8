"""Rounds in a report: their points, a curve for each, and the table."""

from dataclasses import replace
from pathlib import Path

import pytest

from dpo_lightning.sweeps.report.analysis import analyse
from dpo_lightning.sweeps.report.read import Sweep, TrialResult
from dpo_lightning.sweeps.report.rounds import (
    RoundCurve,
    mean_points,
    points_of,
    round_curves,
    round_tables,
)

REWARD, KL = "controlled/expected_reward", "controlled/kl_policy_reference"


def trial(beta: float, seed: int, points: list[tuple[float, float]], **words) -> TrialResult:
    """A finished trial of rounds of four steps that ended at these KLs and rewards."""
    rows = [{"step": 4 * number, "rounds/round": number + 1.0} for number in range(len(points))]
    rows += [
        {"step": 4 * number, KL: kl, REWARD: reward}
        for number, (kl, reward) in enumerate(points, start=1)
    ]
    kl, reward = points[-1]
    overrides = [f"beta={beta}", f"seed={seed}", *(f"{k}={v}" for k, v in words.items())]
    return TrialResult(
        name="-".join(overrides),
        folder="-".join(overrides),
        overrides=tuple(overrides),
        status="finished",
        error=None,
        result={"beta": beta, "seed": seed, "loss": "sigmoid", "metrics": {KL: kl, REWARD: reward}},
        rows=rows,
        evaluation={},
        log=None,
    )


def analysis_of(*trials: TrialResult):
    return analyse(Sweep(Path("sweep"), trials, ()))


def test_a_round_ends_where_the_next_one_begins():
    own = trial(0.1, 1, [(1.0, 2.0), (3.0, 5.0), (4.0, 6.0)])
    assert points_of(own, REWARD, KL) == {1: (1.0, 2.0), 2: (3.0, 5.0), 3: (4.0, 6.0)}


def test_a_round_that_was_not_measured_has_no_point():
    own = trial(0.1, 1, [(1.0, 2.0), (3.0, 5.0), (4.0, 6.0)])
    own = replace(own, rows=[row for row in own.rows if row.get(KL) != 3.0])
    assert points_of(own, REWARD, KL) == {1: (1.0, 2.0), 3: (4.0, 6.0)}


def test_a_trial_without_rounds_has_none():
    own = replace(trial(0.1, 1, [(1.0, 2.0)]), rows=[{"step": 4, KL: 1.0, REWARD: 2.0}])
    assert points_of(own, REWARD, KL) == {}
    assert list(round_tables(analysis_of(own))) == []


def test_points_are_means_over_seeds():
    """KLs 1 and 2, rewards 2 and 5: 1.5 and 3.5."""
    found = analysis_of(
        trial(0.1, 1, [(1.0, 2.0), (3.0, 5.0)]), trial(0.1, 2, [(2.0, 5.0), (3.0, 7.0)])
    )
    assert mean_points(found.configurations[0], found) == {1: (1.5, 3.5), 2: (3.0, 6.0)}


def test_a_curve_for_each_round_runs_over_the_betas():
    found = analysis_of(
        trial(0.1, 1, [(2.0, 3.0), (5.0, 6.0), (6.0, 7.0)]),
        trial(0.5, 1, [(1.0, 2.0), (1.5, 2.6), (1.8, 2.9)]),
    )
    assert round_curves(found) == [
        RoundCurve("after round 1", ((1.0, 2.0), (2.0, 3.0))),
        RoundCurve("after round 2", ((1.5, 2.6), (5.0, 6.0))),
    ]


def test_of_one_beta_a_curve_runs_over_the_rounds():
    found = analysis_of(
        trial(0.1, 1, [(2.0, 3.0), (5.0, 6.0)], **{"rounds.num_generations": 2}),
        trial(0.1, 1, [(2.5, 3.0), (5.5, 6.5)], **{"rounds.num_generations": 4}),
    )
    assert {curve.points for curve in round_curves(found)} == {
        ((2.0, 3.0), (5.0, 6.0)),
        ((2.5, 3.0), (5.5, 6.5)),
    }


@pytest.mark.parametrize(("count", "shown"), [(4, 3), (30, 4)])
def test_few_curves_are_drawn(count: int, shown: int):
    """Of thirty rounds four, evenly spread; never the last, whose points are there anyway."""
    points = [(0.1 * n, 0.2 * n) for n in range(1, count + 1)]
    found = analysis_of(trial(0.1, 1, points), trial(0.5, 1, [(2 * x, y) for x, y in points]))
    labels = [curve.label for curve in round_curves(found)]
    assert len(labels) == shown
    assert labels[0] == "after round 1"
    assert f"after round {count}" not in labels


def test_the_table_has_the_reward_at_the_kl_of_each_round():
    [table] = round_tables(analysis_of(trial(0.1, 1, [(2.0, 3.0), (5.0, 6.5)])))
    assert table.heads == ("settings", "round 1", "round 2")
    assert table.rows == (("β 0.1", "3.00 at 2.00", "6.50 at 5.00"),)
