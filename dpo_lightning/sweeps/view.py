"""Display of a sweep: a live table on a terminal, lines in a log, and the table at the end."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dpo_lightning.files import RESULT_FILE, json_object
from dpo_lightning.sweeps.trials import LOG_FILE, Trial

# In a log, a line about each running trial every so often.
_LINE_SECONDS = 60.0
_REFRESH_SECONDS = 1.0
_END_BYTES = 16384

_STYLES = {
    "finished": "green",
    "failed": "red",
    "diverged": "red",
    "stopped": "yellow",
    "pruned": "magenta",
    "paused": "blue",
    "running": "cyan",
    "waiting": "dim",
}


@dataclass(frozen=True, slots=True)
class TrialProgress:
    """Progress of a running trial; None and nan where it has not reported any yet."""

    step: int = 0
    total: int | None = None
    loss: float = math.nan
    accuracy: float = math.nan
    pairs_per_second: float = math.nan
    seconds_left: float = math.nan


class ProgressReader:
    """Follows the ``metrics.jsonl`` of one trial; only its two ends are read."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._total: int | None = None
        self._first: dict[str, float] | None = None
        self._begin = time.time()

    def read(self) -> TrialProgress:
        """The newest progress there is."""
        folder = self._trial.folder
        if self._total is None:
            self._total = _total_steps(folder / "config.yaml", since=self._begin)
        row = _training_row(folder / "metrics.jsonl", since=self._begin, first=False)
        if row is None:
            return TrialProgress(total=self._total)
        if self._first is None:
            found = _training_row(folder / "metrics.jsonl", since=self._begin, first=True)
            self._first = row if found is None else found
        step, seconds = int(row["step"]), row["time"] - self._first["time"]
        speed = (step - self._first["step"]) / seconds if seconds > 0 else math.nan
        left = (self._total - step) / speed if self._total and speed > 0 else math.nan
        return TrialProgress(
            step=step,
            total=self._total,
            loss=_number(row.get("train/loss")),
            accuracy=_number(row.get("train/rewards/accuracies")),
            pairs_per_second=speed * self._trial.plan.batch_size,
            seconds_left=left,
        )


def _total_steps(path: Path, *, since: float) -> int | None:
    """Total steps of the run, from the config it wrote at its start; None for an earlier run's."""
    try:
        if path.stat().st_mtime < since - 1:
            return None
        found = re.search(r"^  max_steps: (\d+)$", path.read_text(), flags=re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) if found else None


def _training_row(path: Path, *, since: float, first: bool) -> dict[str, float] | None:
    """The first or the last row of this attempt, as far as that end of the file shows it."""
    try:
        with path.open("rb") as file:
            if not first:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _END_BYTES))
            lines = file.read(_END_BYTES).splitlines()
    except OSError:
        return None
    for line in lines if first else reversed(lines):
        # None: being written, or cut by where reading began or ended.
        row = json_object(line)
        if row is not None and "train/loss" in row:
            # What an attempt before this one left does not count.
            if _number(row.get("time")) >= since - 1:
                return row
            if not first:
                return None
    return None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


class SweepView:
    """Shows a sweep while it runs.

    Args:
        trials: All trials of the command.
        console: Console to draw on.
    """

    def __init__(self, trials: Sequence[Trial], console: Console) -> None:
        self._trials = trials
        self._console = console
        self._readers: dict[str, ProgressReader] = {}
        self._began: dict[str, float] = {}
        self._last_refresh = 0.0
        self._last_lines = time.monotonic()
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> SweepView:
        """Begins to draw; names the trials that are done already."""
        if self._live is not None:
            self._live.start()
        for trial in self._trials:
            if trial.skipped:
                self.ended(trial, again=False)
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the live table away; the final one comes after it."""
        if self._live is not None:
            self._live.stop()

    def started(self, trial: Trial) -> None:
        """Notes that a trial was started."""
        self._readers[trial.folder.name] = ProgressReader(trial)
        self._began[trial.folder.name] = time.monotonic()
        again = f", attempt {trial.attempts}" if trial.attempts > 1 else ""
        self._say(f"{trial.folder.name}  started on {', '.join(trial.devices)}{again}")

    def ended(self, trial: Trial, *, again: bool) -> None:
        """Notes that a trial's process ended; ``again`` when it will be started once more."""
        if trial.skipped:
            self._say(f"{trial.folder.name}  already finished, skipped")
            return
        now = time.monotonic()
        seconds = now - self._began.get(trial.folder.name, now)
        if trial.status in ("finished", "paused"):
            how = "finished" if trial.status == "finished" else "reached its rung"
            self._say(f"{trial.folder.name}  {how} in {duration(seconds)}")
            return
        what = "failed, will be retried" if again else trial.status
        log = trial.folder / LOG_FILE
        self._say(f"{trial.folder.name}  {what} after {duration(seconds)}: {trial.error} ({log})")

    def refresh(self) -> None:
        """Draws again when some time has passed."""
        now = time.monotonic()
        if self._live is not None and now - self._last_refresh >= _REFRESH_SECONDS:
            self._last_refresh = now
            self._live.update(self._table(), refresh=True)
        elif self._live is None and now - self._last_lines >= _LINE_SECONDS:
            self._last_lines = now
            for trial in self._trials:
                if trial.status == "running":
                    self._say(_line(trial, self._readers[trial.folder.name].read()))

    def _say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def _table(self) -> Table:
        table = Table(title=_counts(self._trials), title_justify="left")
        for name in ("trial", "status", "device"):
            table.add_column(name, no_wrap=True)
        for name in ("step", "loss", "accuracy", "pairs/s", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        for trial in self._trials:
            cells = [""] * 5
            if trial.status == "running":
                progress = self._readers[trial.folder.name].read()
                total = "" if progress.total is None else f"/{progress.total}"
                cells = [
                    f"{progress.step}{total}",
                    show(progress.loss),
                    show(progress.accuracy),
                    show(progress.pairs_per_second, ".1f"),
                    duration(progress.seconds_left),
                ]
            table.add_row(
                trial.folder.name,
                Text(trial.status, _STYLES[trial.status]),
                ",".join(trial.devices),
                *cells,
            )
        return table


def _line(trial: Trial, progress: TrialProgress) -> str:
    if math.isnan(progress.loss):
        return f"{trial.folder.name}  no step yet"
    total = "" if progress.total is None else f"/{progress.total}"
    line = (
        f"{trial.folder.name}  step {progress.step}{total}  loss {show(progress.loss)}  "
        f"accuracy {show(progress.accuracy)}"
    )
    if not math.isnan(progress.pairs_per_second):
        line += f"  {show(progress.pairs_per_second, '.1f')} pairs/s"
    if not math.isnan(progress.seconds_left):
        line += f"  {duration(progress.seconds_left)} left"
    return line


def show_end(console: Console, trials: Sequence[Trial]) -> None:
    """Shows the outcome of each trial; a failed one names its log."""
    table = Table(title=_counts(trials), title_justify="left")
    table.add_column("trial", overflow="fold")
    table.add_column("status", no_wrap=True)
    for name in ("accuracy", "KL", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    notes = []
    for trial in trials:
        metrics = trial.metrics
        kl = metrics.get("controlled/kl_policy_reference", metrics.get("samples/kl"))
        table.add_row(
            trial.folder.name,
            Text(trial.status, _STYLES[trial.status]),
            show(_number(metrics.get("eval/rewards/accuracies"))),
            show(_number(kl)),
            "before" if trial.skipped else duration(trial.seconds or math.nan),
        )
        if trial.status == "waiting":
            notes.append(f"{trial.folder.name}: not started")
        elif trial.status == "paused":
            notes.append(f"{trial.folder.name}: waits at its rung for the others")
        elif trial.status == "pruned":
            notes.append(f"{trial.folder.name}: {trial.error}")
        elif trial.status != "finished":
            notes.append(f"{trial.folder.name}: {trial.error}; see {_log(trial.folder)}")
    console.print(table)
    for note in notes:
        console.print(Text(note), soft_wrap=True)


def _log(folder: Path) -> Path:
    """The file to read about a failure; a trial that was not started by us has another log."""
    return folder / (LOG_FILE if (folder / LOG_FILE).exists() else RESULT_FILE)


def _counts(trials: Sequence[Trial]) -> str:
    statuses = [trial.status for trial in trials]
    counts = [f"{statuses.count(status)} {status}" for status in _STYLES if status in statuses]
    return f"{len(trials)} trials: {', '.join(counts)}"


def show(value: float, form: str = ".3f") -> str:
    """A number, or an empty text where there is none."""
    return "" if math.isnan(value) else format(value, form)


def duration(seconds: float) -> str:
    """Seconds as people read them.

    Example:
        >>> duration(42.3), duration(3700)
        ('42s', '1h 01m')
    """
    if math.isnan(seconds):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"
