"""Pruned sweeps of trials that are pretended: what they report is known, and nothing is trained."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from dpo_lightning.files import RESULT_FILE, read_json, write_json
from dpo_lightning.settings.pruning import PruneSettings
from dpo_lightning.sweeps import dispatch
from dpo_lightning.sweeps.course import Course
from dpo_lightning.sweeps.dispatch import Dispatcher
from dpo_lightning.sweeps.places.base import Ending
from dpo_lightning.sweeps.trials import Plan, Trial, place_trials
from dpo_lightning.tracking.rungs import RungReport, read_goal, write_reports
from tests.support.trials import Silent

METRIC = "eval/rewards/accuracies"
TOTAL = 16
ITEMS = 8

SETTINGS = PruneSettings(at=(0.125, 0.25, 0.5), keep=0.5, within=(), metric=METRIC, budget=0.36)


def plans(grid: Sequence[Mapping[str, Any]], act: str = "") -> list[Plan]:
    """Plans of trials with these swept settings: ``beta``, and any others."""
    found = []
    for values in grid:
        name = "_".join(f"{key}-{value}" for key, value in values.items())
        facts = {"beta": values["beta"], "loss": "sigmoid", "seed": values.get("seed", 1)}
        found.append(
            Plan(
                name=name,
                overrides=tuple(f"{key}={value}" for key, value in values.items()),
                arguments=(act,),
                settings_hash=name.ljust(32, "0"),
                kind="cpu",
                width=1,
                facts=facts | {"command": "train"},
            )
        )
    return found


def make_course(
    folder: Path, trials: Sequence[Trial], settings: PruneSettings = SETTINGS
) -> Course:
    """A course whose pools are the values of ``within`` among the swept settings."""
    pools = {}
    for trial in trials:
        values = dict(line.split("=") for line in trial.plan.overrides)
        pools[trial.plan.settings_hash] = tuple(values[key] for key in settings.within)
    return Course(settings, trials, pools, folder)


def report(folder: Path, rung: int, score: float, *, total: int = TOTAL) -> None:
    """Leaves the report of a trial at a rung: its score, and items that scatter around it."""
    values = tuple(score + (item % 2 - 0.5) / 8 for item in range(ITEMS))
    step = round(SETTINGS.at[rung] * total)
    write_reports(folder, [RungReport(rung, step, total, METRIC, score, values)])


@dataclass
class Pretended:
    """A place whose trials end when a generator says so, by files alone.

    Attributes:
        score: What each trial reports, by its folder's name; ``fails`` is an exit code 1.
        draw: Says which attempt ends next.
        slots: How many run at once.
        log: The trial, the goal and the number of decisions at each start.
    """

    score: Mapping[str, float | str]
    draw: random.Random
    slots: int = 2
    log: list[tuple[str, int | None, int]] = field(default_factory=list)
    running: int = 0
    grace_seconds: float = 0.0
    dies_after: int = 10**9

    def fits(self, trial: Trial) -> bool:
        return self.running < self.slots

    def find(self, trial: Trial) -> None:
        return None

    def start(self, trial: Trial) -> "_Attempt":
        goal = read_goal(trial.folder)
        decided = decisions(trial.folder.parent)
        self.log.append((trial.folder.name, None if goal is None else goal.rung, len(decided)))
        if len(self.log) > self.dies_after:
            raise Killed
        self.running += 1
        return _Attempt(self, trial)


class Killed(BaseException):
    """The end of a sweep that says nothing and clears nothing up."""


@dataclass
class _Attempt:
    place: Pretended
    trial: Trial
    ended: bool = False

    @property
    def labels(self) -> list[str]:
        return ["cpu:0"]

    def starts(self) -> int:
        return 1

    def ending(self) -> Ending | None:
        if self.place.draw.random() < 0.5:
            return None
        self.place.running -= 1
        folder = self.trial.folder
        goal, score = read_goal(folder), self.place.score[folder.name]
        if isinstance(score, str):
            return Ending(1)
        (folder / "starts").open("a").write("x")
        status = "finished"
        if goal is not None:
            report(folder, goal.rung, score)
            status = "paused"
        result = {"status": status, "settings_hash": self.trial.plan.settings_hash}
        write_json(folder / RESULT_FILE, result | {"metrics": {METRIC: score}})
        return Ending(0)

    def ask(self) -> None:
        """Nothing: it ends when it is killed."""

    def kill(self) -> Ending:
        return Ending(-9)


def decisions(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_json(folder / "sweep.json")["pruning"]["rungs"]
    return found


def pretend(
    folder: Path,
    all_plans: Sequence[Plan],
    place: Pretended,
    settings: PruneSettings | None = SETTINGS,
) -> list[Trial]:
    """Runs a sweep to its end, or to its kill."""
    folder.mkdir(exist_ok=True)
    trials = place_trials(all_plans, folder)
    course = None
    if settings is not None:
        course = make_course(folder, trials, settings)
        course.begin()
    # Hundreds of small files: what they mean does not depend on the disk.
    with mock.patch.object(dispatch, "_POLL_SECONDS", 0.0), mock.patch("os.fsync"):
        Dispatcher(
            trials, place=place, max_failures=None, retries=0, view=Silent(), course=course
        ).run()
    return trials


def outcome(folder: Path) -> dict[str, Any]:
    """All that a sweep left, but for times."""
    found: dict[str, Any] = {"decisions": decisions(folder)}
    for path in sorted(folder.glob("*/result.json")):
        result = json.loads(path.read_text())
        found[path.parent.name] = (result["status"], result.get("metrics"), result.get("error"))
    return found
