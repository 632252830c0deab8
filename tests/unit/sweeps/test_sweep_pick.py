"""The pick of a sweep: who qualifies, what is undecided, and what would decide."""

import json

import numpy as np
import pytest

from dpo_lightning.sweeps.report.analysis import Analysis, analyse
from dpo_lightning.sweeps.report.pick import PickRule
from dpo_lightning.sweeps.report.read import read_sweep
from dpo_lightning.sweeps.report.write import main, write_report
from tests.support.sweep_folders import scored, scored_metrics, write_trial

ACCURACY = "eval/rewards/accuracies"
REWARD = "controlled/expected_reward"
KL = "samples/kl"


def analysed(sweep, **rule) -> Analysis:
    return analyse(read_sweep(sweep), None, PickRule(**rule))


def accurate(sweep, beta: float, right: list[float], kl: float | None, *, seed: int = 1, **more):
    """A trial with so many held-out rows right."""
    metrics = {ACCURACY: sum(right) / len(right), **more}
    metrics |= {} if kl is None else {KL: kl}
    write_trial(
        sweep, f"b{beta}s{seed}", f"beta={beta}", f"seed={seed}",
        metrics=metrics, evaluation={"accuracies": right, "samples": []},
    )  # fmt: skip


def rows(count: int, wrong: range) -> list[float]:
    return [float(i not in wrong) for i in range(count)]


# Who qualifies -----------------------------------------------------------------------------------


def test_of_those_that_surely_lose_no_more_than_the_margin_the_smallest_kl_is_picked(tmp_path):
    """400 rows. β 0.1 has 40 wrong; β 0.3 these and one more; β 1 these and 20 more.

    β 0.3 loses 0.0025: of one that differs the variance is 1 / 400^2, the floor is the same, and
    the root of their sum is 0.00354. With 1.6 to 2 errors for two comparisons it loses at most
    0.0082 to 0.0096, within 0.02. β 1 loses 0.05 and does not qualify, close to the reference as
    it is.
    """
    accurate(tmp_path, 0.1, rows(400, range(40)), 9.0)
    accurate(tmp_path, 0.3, rows(400, range(41)), 4.0)
    accurate(tmp_path, 1.0, rows(400, range(60)), 1.0)
    found = analysed(tmp_path)
    assert (found.pick.beta, found.decision.best.beta) == (0.3, 0.1)
    assert not found.decision.undecided
    _, close, far = found.decision.candidates
    assert close.loss == pytest.approx(0.0025)
    assert 0.0082 < close.upper < 0.0096
    assert (close.eligible, far.eligible, far.may_be_best) == (True, False, False)
    assert "within the margin of 0.0200" in found.reason
    assert "paired over 400 held-out rows" in found.reason
    assert "KL 4.00 nats, not 9.00" in found.reason
    assert "one seed, so the variance of training is not covered" in found.reason
    test = found.comparison
    assert (test.first.beta, test.second.beta, test.unit) == (0.1, 0.3, "held-out rows")
    # A margin that β 1 keeps too, and one that nobody keeps.
    assert analysed(tmp_path, margin=0.09).pick.beta == 1.0
    assert analysed(tmp_path, margin=0.003).pick.beta == 0.1


def test_not_significant_is_not_equal(tmp_path):
    """109 rows, 5 more wrong and 4 more right: too few to say that β 0.3 loses at most 0.02.

    The loss is 1 / 109 = 0.00917. Squares sum to 9: variance (9 - 1 / 109) / 108 / 109 = 0.000764,
    of n rows 0.0833 / n, with the floor of 1 / n^2. Within the margin of 0.02 the error has to be
    0.01083 / 1.645 = 0.00658, its square 4.33e-5: 1,935 rows, said as 2,000; a quantile that is
    drawn a little larger makes it 2,100.
    """
    accurate(tmp_path, 0.1, rows(109, range(20)), 9.0)
    accurate(tmp_path, 0.3, [0.0] * 16 + [1.0] * 4 + [0.0] * 5 + [1.0] * 84, 4.0)
    found = analysed(tmp_path)
    assert found.decision.undecided
    assert found.pick.beta == 0.1
    assert found.reason.startswith("Undecided: β 0.1 has the best held-out accuracy, 0.817, but ")
    assert found.decision.rows_needed in (2000, 2100)
    assert "held-out rows would decide" in found.reason
    assert "there are 109" in found.reason
    report = write_report(tmp_path)
    assert (report["pick"]["label"], report["pick"]["undecided"]) == ("β 0.1", True)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert "Undecided" in text
        # What is undecided is recommended nowhere.
        assert "ecommended" not in text
        assert "est so far" in text


def test_what_would_decide_is_more_than_there_is(tmp_path):
    """Three β of two seeds on 325 rows, ten times: where it is undecided, these rows do not decide.

    The best of several that are close is not known either, so a bound against the observed best
    alone would call fewer rows than there are enough.
    """
    rng = np.random.default_rng(1)
    told = 0
    for draw in range(10):
        sweep = tmp_path / str(draw)
        for beta, share in ((0.1, 0.8), (0.3, 0.8), (1.0, 0.78)):
            for seed in (1, 2):
                right = (rng.random(325) < share).astype(float).tolist()
                accurate(sweep, beta, right, beta, seed=seed)
        decision = analysed(sweep).decision
        if decision.rows_needed is not None:
            assert decision.undecided
            assert decision.rows_needed > 325
            told += 1
        if decision.seeds_needed is not None:
            assert decision.rows_needed is None
            assert decision.seeds_needed > 2
    assert told


def test_a_best_that_all_others_are_surely_worse_than_is_decided(tmp_path):
    accurate(tmp_path, 0.1, rows(400, range(40)), 9.0)
    accurate(tmp_path, 1.0, rows(400, range(140)), 1.0)
    found = analysed(tmp_path)
    assert (found.pick.beta, found.decision.undecided) == (0.1, False)
    assert "all others are worse (95% for all 2 at once" in found.reason


def test_answers_to_one_prompt_are_one_item(tmp_path):
    """Four answers to each of 30 prompts, which agree: 30 items, not 120."""
    for beta, shift in ((0.1, 0.0), (0.2, 0.3)):
        marks = [float(i // 4 % 2) - shift * (i // 4 % 3 == 0) for i in range(120)]
        evaluation = scored(marks, [0.0] * 120, [1.0] * 120)
        for i, row in enumerate(evaluation["samples"]):
            row["prompt"] = f"prompt {i // 4}"
        write_trial(
            tmp_path, f"b{beta}", f"beta={beta}",
            metrics=scored_metrics(evaluation), evaluation=evaluation,
        )  # fmt: skip
    found = analysed(tmp_path).decision
    assert (found.ground.items, found.ground.unit) == (30, "held-out prompts")
    # A third of the prompts lose 0.3 each.
    assert found.candidates[1].loss == pytest.approx(0.1)


def test_rows_are_paired_by_what_they_are_and_not_by_their_place(tmp_path):
    """The same six rows in another order: no difference is left."""
    names = [f"{i:02}-x" for i in range(6)]
    right = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    for beta, order in ((0.1, range(6)), (0.2, [5, 4, 3, 2, 1, 0])):
        write_trial(
            tmp_path, f"b{beta}", f"beta={beta}", metrics={ACCURACY: 4 / 6},
            evaluation={
                "accuracies": [right[i] for i in order], "groups": [names[i] for i in order],
            },
        )  # fmt: skip
    found = analysed(tmp_path)
    assert found.comparison.test.low == found.comparison.test.high == 0


# Seeds -------------------------------------------------------------------------------------------


def test_seeds_are_blocks_and_one_seed_is_said(tmp_path):
    """Exact rewards. All seeds of both go up and down together, so their difference is 1 each time.

    The margin is a hundredth of the gain of the best, 0.01 * (5 - 1) = 0.04.
    """
    for beta, rewards in ((0.1, (4.0, 5.0, 6.0)), (1.0, (3.99, 4.98, 5.97))):
        for seed, reward in enumerate(rewards, start=1):
            write_trial(
                tmp_path, f"b{beta}s{seed}", f"beta={beta}", f"seed={seed}",
                metrics={
                    REWARD: reward, "controlled/reference_reward": 1.0,
                    "controlled/kl_policy_reference": 5.0 - beta,
                },
            )  # fmt: skip
    found = analysed(tmp_path)
    assert found.decision.margin == pytest.approx(0.04)
    assert found.decision.ground.seeds == 3
    # Differences 0.01, 0.02, 0.03: error 0.01 / sqrt(3), t with 2 degrees 2.92.
    assert found.decision.candidates[1].upper == pytest.approx(0.02 + 2.92 * 0.00577, abs=0.002)
    assert found.pick.beta == 1.0
    assert "one seed" not in found.reason


def test_who_lacks_a_seed_takes_no_part(tmp_path):
    for beta, seeds in ((0.1, (1, 2)), (0.2, (1, 2)), (0.3, (1,))):
        for seed in seeds:
            accurate(tmp_path, beta, rows(50, range(int(beta * 10))), 1.0, seed=seed)
    found = analysed(tmp_path)
    assert [(c.label, why) for c, why in found.decision.left_out] == [
        ("β 0.3", "it has 1 of 2 seeds")
    ]
    assert "β 0.3 takes no part: it has 1 of 2 seeds." in found.reason


# KL ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "picked", "said"),
    [
        (5.0, 0.3, "β 0.3 has the best held-out accuracy within 5 nats of the reference"),
        (2.0, 1.0, "β 1.0 is the only configuration left within 2 nats of the reference"),
        (0.5, None, "No pick: no configuration has a known KL within sweep.kl_budget=0.5"),
    ],
)
def test_a_budget_picks_the_best_within_a_kl(tmp_path, budget, picked, said):
    accurate(tmp_path, 0.1, rows(400, range(20)), 9.0)
    accurate(tmp_path, 0.2, rows(400, range(40)), None)
    accurate(tmp_path, 0.3, rows(400, range(80)), 4.0)
    accurate(tmp_path, 1.0, rows(400, range(160)), 1.0)
    report = write_report(tmp_path, kl_budget=budget)
    assert (report["pick"] and report["pick"]["beta"]) == picked
    assert said in report["reason"]
    if picked is not None:
        assert "takes no part: its KL is unknown" in report["reason"]
        assert "its KL is above the budget" in report["reason"]


@pytest.mark.parametrize("cut", [0.05, 0.06])
def test_above_five_percent_cut_off_there_is_no_pick_by_judge(tmp_path, cut):
    for beta in (0.1, 0.2):
        evaluation = scored([1.0, 2.0, 3.0 - beta], [0.0] * 3, [1.0] * 3)
        metrics = scored_metrics(evaluation) | {"samples/cut_off": cut}
        write_trial(
            tmp_path, f"b{beta}", f"beta={beta}", metrics=metrics, evaluation=evaluation
        )  # fmt: skip
    report = write_report(tmp_path)
    assert report["metric"] == "samples/judge"
    assert (report["pick"] is None) == (cut > 0.05)
    if cut > 0.05:
        assert report["reason"].startswith(
            "No pick by the judge's mark of sampled responses: more than 5%"
        )
        assert "6% of its answers were cut off at the limit" in report["reason"]


def test_a_kl_of_answers_that_were_cut_off_does_not_decide(tmp_path):
    """Both are as accurate; the one whose KL is smaller has it of beginnings of answers."""
    accurate(tmp_path, 0.1, rows(400, range(40)), 9.0, **{"samples/cut_off": 0.0})
    accurate(tmp_path, 1.0, rows(400, range(40)), 1.0, **{"samples/cut_off": 0.5})
    found = analysed(tmp_path)
    assert found.pick.beta == 0.1
    assert [c.kl for c in found.decision.candidates] == [9.0, None]


# The command -------------------------------------------------------------------------------------


def test_the_command_takes_the_rule_and_says_it_again(tmp_path, capsys):
    accurate(tmp_path, 0.1, rows(300, range(30)), 9.0)
    accurate(tmp_path, 0.3, rows(300, range(60)), 4.0)
    assert main([str(tmp_path), "--margin", "0.1", "--kl-budget", "20"]) == 0
    assert (
        "pick      β 0.1 has the best held-out accuracy within 20 nats" in capsys.readouterr().out
    )
    assert "--margin=0.1 --kl-budget=20.0" in (tmp_path / "report.md").read_text()
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert (report["decision"]["margin"], report["decision"]["kl_budget"]) == (0.1, 20)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--margin", "-1"])
    assert stop.value.code == 2
    assert "-1: must be a finite number >= 0" in capsys.readouterr().err
