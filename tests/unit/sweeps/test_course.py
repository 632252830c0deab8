"""The course of a pruned sweep, over trials that are pretended: its decisions and its files."""

import contextlib
import itertools
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.errors import UserError
from dpo_lightning.files import read_json, write_json
from dpo_lightning.sweeps.trials import place_trials
from dpo_lightning.tracking.rungs import Goal, read_goal, read_reports, write_goal
from tests.support.properties import examples
from tests.support.pruned import (
    METRIC,
    SETTINGS,
    Killed,
    Pretended,
    decisions,
    make_course,
    outcome,
    plans,
    pretend,
    report,
)

BETAS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
GRID = plans([{"beta": beta} for beta in BETAS])
SCORES = dict(zip((plan.name for plan in GRID), (1, 2, 5, 9, 4, 6, 3, 0), strict=True))


def place(seed: int = 0, **options) -> Pretended:
    scores = options.pop("score", SCORES)
    return Pretended(scores, random.Random(seed), **options)


def test_a_sweep_over_eight_betas(tmp_path):
    """The hand-made decisions of ``test_halving``, from files: 4, 3 and 1 of eight go on."""
    trials = pretend(tmp_path / "s", GRID, place())
    kept = [decision["kept"] for decision in decisions(tmp_path / "s")]
    assert kept == [
        ["beta-0.2", "beta-0.4", "beta-0.8", "beta-1.6"],
        ["beta-0.2", "beta-0.4", "beta-0.8"],
        ["beta-0.4"],
    ]
    assert decisions(tmp_path / "s")[2]["spent"] == pytest.approx(0.34375)
    statuses = {trial.folder.name: trial.status for trial in trials}
    assert statuses == dict.fromkeys(SCORES, "pruned") | {"beta-0.4": "finished"}
    said = json.loads((tmp_path / "s" / "beta-1.6" / "result.json").read_text())
    assert said["status"] == "pruned"
    assert said["error"].startswith("pruned at step 4 of 16, rank 2 of 4 by eval/rewards")
    assert read_json(tmp_path / "s" / "beta-6.4" / "trial.json")["status"] == "pruned"
    # Four stops of the best: one at each rung, and the end.
    starts = {trial.folder.name: len((trial.folder / "starts").read_text()) for trial in trials}
    assert starts == {
        "beta-0.05": 1, "beta-0.1": 1, "beta-0.2": 3, "beta-0.4": 4, "beta-0.8": 3,
        "beta-1.6": 2, "beta-3.2": 1, "beta-6.4": 1,
    }  # fmt: skip


@given(st.integers(0, 10**6), st.integers(1, 8), st.permutations(range(8)))
@settings(max_examples=examples(10))
def test_neither_order_nor_places_change_a_decision(tmp_path_factory, seed, slots, order):
    folder = tmp_path_factory.mktemp("s")
    usual = pretend_once(tmp_path_factory)
    pretend(folder / "s", [GRID[i] for i in order], place(seed, slots=slots))
    found = outcome(folder / "s")
    assert found == usual


def pretend_once(tmp_path_factory):
    if not _USUAL:
        folder = tmp_path_factory.mktemp("usual") / "s"
        pretend(folder, GRID, place())
        _USUAL.append(outcome(folder))
    return _USUAL[0]


_USUAL: list = []


@given(st.integers(0, 10**6), st.lists(st.integers(0, 8), min_size=1, max_size=4))
@settings(max_examples=examples(10))
def test_a_sweep_that_is_killed_goes_on_with_the_same_decisions(tmp_path_factory, seed, kills):
    folder = tmp_path_factory.mktemp("s") / "s"
    usual = pretend_once(tmp_path_factory)
    for number, kill in enumerate(kills):
        with contextlib.suppress(Killed):
            pretend(folder, GRID, place(seed + number, dies_after=kill))
    pretend(folder, GRID, place(seed))
    assert outcome(folder) == usual


def test_a_decision_is_written_before_anyone_acts_on_it(tmp_path):
    """A trial starts towards rung 2 of 3 when rung 1 is decided, or it is sure of its place."""
    there = place(slots=8)
    pretend(tmp_path / "s", GRID, there)
    ahead = [(name, goal) for name, goal, decided in there.log
             if (3 if goal is None else goal) > decided]  # fmt: skip
    assert set(ahead) <= {("beta-0.4", 1), ("beta-0.4", 2), ("beta-0.4", None)}
    assert [goal for name, goal, _ in there.log if name == "beta-1.6"] == [0, 1]


def test_a_free_device_runs_ahead_what_is_sure_of_its_place(tmp_path):
    """Three of four have reported before the last rung, which keeps two: the best is sure of it.

    If the fourth comes in first it is second of four, if it fails the first of three, of which
    one stays. The second would be third of four.
    """
    settings = replace(SETTINGS, at=(0.5,))
    trials = place_trials(GRID[:4], tmp_path)
    course = make_course(tmp_path, trials, settings)
    course.begin()
    for trial, score in zip(trials, (7.0, 9.0, 8.0), strict=False):
        trial.folder.mkdir()
        assert course.goal(trial) == Goal(0, (0.5,), METRIC)
        report(trial.folder, 0, score)
        trial.status = "paused"
        course.ended(trial)
    assert [trial.folder.name for trial in course.released()] == ["beta-0.1"]
    assert course.goal(trials[1]) is None
    assert decisions(tmp_path) == []


def test_a_trial_alone_in_its_pool_never_stops(tmp_path):
    """Two rates for β 0.1, one for β 1: within β only the first two are compared."""
    grid = plans([{"beta": 0.1, "lr": 1}, {"beta": 0.1, "lr": 2}, {"beta": 1, "lr": 1}])
    scores = {"beta-0.1_lr-1": 1.0, "beta-0.1_lr-2": 2.0, "beta-1_lr-1": 0.0}
    there = place(score=scores)
    trials = pretend(tmp_path / "s", grid, there, replace(SETTINGS, within=("beta",)))
    assert [trial.status for trial in trials] == ["pruned", "finished", "finished"]
    assert [goal for name, goal, _ in there.log if name == "beta-1_lr-1"] == [None]
    # With one left of its pool there is nothing more to stop for.
    assert [goal for name, goal, _ in there.log if name == "beta-0.1_lr-2"] == [0, None]


def test_seeds_stay_or_go_together(tmp_path):
    grid = plans([{"beta": b, "seed": s} for b, s in itertools.product((0.1, 1), (1, 2))])
    scores = dict(zip((plan.name for plan in grid), (9.0, 3.0, 1.0, 8.0), strict=True))
    trials = pretend(tmp_path / "s", grid, place(score=scores), replace(SETTINGS, at=(0.5,)))
    assert [trial.status for trial in trials] == ["finished", "finished", "pruned", "pruned"]


def test_a_trial_that_fails_is_out_and_a_rerun_leaves_it_so(tmp_path):
    """Its rung goes by without it: the rerun takes the same decisions, and does not start it."""
    scores = SCORES | {"beta-0.8": "fails"}
    trials = pretend(tmp_path / "s", GRID, place(score=scores))
    assert {trial.folder.name: trial.status for trial in trials}["beta-0.8"] == "failed"
    before = decisions(tmp_path / "s")
    assert before[0]["ended"] == ["beta-0.8"]
    there = place(score=SCORES)
    trials = pretend(tmp_path / "s", GRID, there)
    assert there.log == []
    assert decisions(tmp_path / "s") == before
    assert {trial.folder.name: trial.status for trial in trials}["beta-0.8"] == "failed"


def test_a_rerun_without_pruning_finishes_what_was_pruned(tmp_path):
    pretend(tmp_path / "s", GRID, place())
    write_json(tmp_path / "s" / "sweep.json", read_json(tmp_path / "s" / "sweep.json") | {"a": 1})
    there = place()
    trials = pretend(tmp_path / "s", GRID, there, settings=None)
    assert {trial.status for trial in trials} == {"finished"}
    assert sorted(there.log) == [(name, None, 3) for name in sorted(SCORES) if name != "beta-0.4"]
    # And the pruned sweep once more: all are finished, and nothing is asked or decided again.
    there = place()
    trials = pretend(tmp_path / "s", GRID, there)
    assert {trial.status for trial in trials} == {"finished"}
    assert there.log == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep": 0.25}, "sweep.prune_keep=0.25: the sweep in .* is pruned with 0.5"),
        ({"budget": 0.5}, "sweep.budget=0.5"),
        ({"metric": "samples/judge"}, "sweep.prune_metric=samples/judge"),
        ({"at": (0.5,)}, r"sweep.prune_at=\[0.5\]"),
    ],
)
def test_another_pruning_of_the_same_sweep_is_refused(tmp_path, changes, said):
    trials = place_trials(GRID, tmp_path)
    make_course(tmp_path, trials).begin()
    with pytest.raises(UserError, match=said):
        make_course(tmp_path, trials, replace(SETTINGS, **changes)).begin()


def test_other_trials_and_a_damaged_file_are_refused(tmp_path):
    make_course(tmp_path, place_trials(GRID, tmp_path)).begin()
    with pytest.raises(UserError, match="pruned among other trials than these"):
        make_course(tmp_path, place_trials(GRID[1:], tmp_path)).begin()
    write_json(tmp_path / "sweep.json", {"pruning": {"rungs": 3}})
    with pytest.raises(UserError, match=r"sweep.json: its pruning is damaged"):
        make_course(tmp_path, place_trials(GRID, tmp_path)).begin()


def test_a_trial_killed_after_its_report_is_at_its_rung(tmp_path):
    trials = place_trials(GRID, tmp_path)
    course = make_course(tmp_path, trials)
    course.begin()
    first = trials[0]
    first.folder.mkdir()
    course.goal(first)
    report(first.folder, 0, 1.0)
    first.status, first.exit_code = "failed", -9
    course.ended(first)
    assert first.status == "paused"
    assert read_json(first.folder / "result.json")["status"] == "paused"


def test_the_page_of_a_pruned_trial_says_so(tmp_path):
    """Each wrote its page at its rung, before anybody knew who goes on."""
    trials = place_trials(GRID, tmp_path)
    course = make_course(tmp_path, trials)
    course.begin()
    for trial in trials:
        trial.folder.mkdir()
        (trial.folder / "metrics.jsonl").write_text('{"step": 2, "train/loss": 0.6}\n')
        course.goal(trial)
        report(trial.folder, 0, SCORES[trial.folder.name])
        write_json(trial.folder / "result.json", {"status": "paused", "error": None})
        trial.status, trial.exit_code = "paused", 0
        course.ended(trial)
    course.released()
    page = (tmp_path / "beta-6.4" / "report.html").read_text()
    assert ">pruned</span>" in page
    assert "pruned at step 2 of 16, rank 8 of 8 by eval/rewards/accuracies" in page
    assert not (tmp_path / "beta-0.4" / "report.html").exists()  # goes on, and is not written twice


# rungs.jsonl --------------------------------------------------------------------------------------


def test_a_report_is_one_line_whatever_came_before(tmp_path):
    """A torn line is gone, a rung that is reported again has its new line alone."""
    (tmp_path / "rungs.jsonl").write_text('{"rung": 0, "metric": "x"\n{"rung": "a"}\n7\n')
    report(tmp_path, 1, 2.0)
    report(tmp_path, 0, 1.0)
    report(tmp_path, 1, 3.0)
    lines = [json.loads(line) for line in (tmp_path / "rungs.jsonl").read_text().splitlines()]
    assert [(line["rung"], line["step"], line["value"]) for line in lines] == [
        (0, 2, 1.0),
        (1, 4, 3.0),
    ]
    assert read_reports(tmp_path, METRIC)[1].value == 3.0
    assert read_reports(tmp_path, "samples/judge") == {}


def test_a_goal_is_there_until_there_is_none(tmp_path):
    goal = Goal(1, (0.125, 0.5), METRIC)
    write_goal(tmp_path, goal)
    assert read_goal(tmp_path) == goal
    write_goal(tmp_path, None)
    assert read_goal(tmp_path) is None


@pytest.mark.parametrize(
    ("total", "warmup", "steps"),
    [
        (200, 0, (25, 50, 100)),
        (200, 10, (30, 50, 100)),
        (200, 20, (60, 60, 100)),
        (10, 0, (2, 3, 5)),
    ],
)
def test_no_rung_comes_before_three_times_the_warm_up(total, warmup, steps):
    """Shares are rounded up: 1/8 of 10 steps is 1.25, 1/4 is 2.5."""
    assert Goal(0, (0.125, 0.25, 0.5), METRIC).steps(total=total, warmup=warmup) == steps
