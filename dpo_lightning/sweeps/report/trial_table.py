"""Every trial in a row: the table at the end of a report, and ``trials.csv``."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from dpo_lightning.files import REPORT_FILE
from dpo_lightning.run.page.text import MISSING, address, clean, number_text
from dpo_lightning.run.page.values import number
from dpo_lightning.sweeps.report.read import Sweep, TrialResult

TRIALS_FILE = "trials.csv"
_FACTS = ("trial", "folder", "status", "beta", "loss", "seed", "step", "wall_seconds")
_RATES = ("pairs_per_second", "tokens_per_second")
# A spreadsheet would compute a text that begins with one of these.
_FORMULA = ("=", "+", "-", "@", "\t")


@dataclass(frozen=True, slots=True)
class TrialRow:
    """A trial in the table.

    Attributes:
        name: Its name.
        link: Its folder.
        log: Its log, None without one.
        status: How it ended.
        seed: Its seed.
        step: Optimizer steps taken.
        seconds: Wall time of its process.
        speed: Pairs trained per second.
    """

    name: str
    link: str
    log: str | None
    status: str
    seed: str
    step: str
    seconds: str
    speed: str


def trial_rows(sweep: Sweep) -> tuple[TrialRow, ...]:
    """The trials in their order."""
    return tuple(
        TrialRow(
            name=clean(trial.name),
            link=folder_link(trial),
            log=None if trial.log is None else address(trial.log),
            status=clean(trial.status),
            seed=MISSING if trial.seed is None else str(trial.seed),
            step=MISSING if trial.step is None else f"{trial.step:,}",
            seconds=number_text(wall_seconds(trial)),
            speed=number_text(number(trial.section("throughput").get("pairs_per_second"))),
        )
        for trial in sweep.trials
    )


def folder_link(trial: TrialResult) -> str:
    """Link to a trial's page, from the report; to its folder where it has none."""
    return f"{address(trial.folder)}/{REPORT_FILE if trial.page else ''}"


def wall_seconds(trial: TrialResult) -> float | None:
    """Seconds of a trial's whole process."""
    return number(trial.section("throughput").get("total_seconds"))


def trials_csv(sweep: Sweep) -> str:
    """The trials as CSV: facts, swept settings, and the last value of every metric."""
    settings = [dict(_swept(trial)) for trial in sweep.trials]
    keys = list(dict.fromkeys(key for swept in settings for key in swept))
    keys = [key for key in keys if key not in _FACTS]
    metrics = sorted({name for trial in sweep.trials for name in trial.section("metrics")})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_cell(head) for head in (*_FACTS, *_RATES, *keys, *metrics)])
    for trial, swept in zip(sweep.trials, settings, strict=True):
        facts = (trial.name, trial.folder, trial.status, trial.beta, trial.loss, trial.seed)
        throughput = trial.section("throughput")
        writer.writerow(
            [
                *map(_cell, (*facts, trial.step, wall_seconds(trial))),
                *(_cell(number(throughput.get(name))) for name in _RATES),
                *(_cell(swept.get(key)) for key in keys),
                *(_cell(trial.metric(name)) for name in metrics),
            ]
        )
    return text.getvalue()


def _swept(trial: TrialResult) -> list[tuple[str, str]]:
    pairs = [line.partition("=") for line in trial.overrides]
    return [(key, value) for key, _, value in pairs]


def _cell(value: float | str | None) -> str:
    """A number in full, empty where there is none; a text that no spreadsheet computes."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return repr(value)
    text = clean(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
