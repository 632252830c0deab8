"""Marks that somebody else gave a sweep's trials: a leaderboard's CSV, read back into its report.

A row is a trial's if it has the trial's name, which ``generate`` gives a trial's answers.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.run.page.text import MISSING, clean, cut, number_text
from dpo_lightning.run.page.values import as_mapping, number
from dpo_lightning.sweeps.report.read import Sweep
from dpo_lightning.sweeps.report.sections import TextTable

MARKS = "marks"
"""Entry of ``sweep.json``."""

_NAMES = ("name", "generator", "model", "model_id")
_SHOWN = 5
_LARGEST_FILE = 1 << 24

Cell = float | str | None


@dataclass(frozen=True, slots=True)
class TrialMarks:
    """Marks of a sweep's trials.

    Attributes:
        file: Name of the file that they were read from.
        columns: Names of the marks.
        trials: By a trial's folder the marks, by column.
        unmatched: Names of rows that are no trial's.
        without: Folders of finished trials that have no row.
    """

    file: str
    columns: tuple[str, ...]
    trials: Mapping[str, Mapping[str, Cell]]
    unmatched: tuple[str, ...]
    without: tuple[str, ...]

    def entry(self) -> dict[str, Any]:
        """The marks as plain values."""
        return asdict(self)

    def notes(self) -> list[str]:
        """Facts of what was not matched, a sentence each."""
        notes = []
        if self.unmatched:
            notes.append(f"{self.file} has rows that match no trial: {_listed(self.unmatched)}.")
        if self.without:
            notes.append(f"{self.file} has no row for these trials: {_listed(self.without)}.")
        return notes

    def table(self, sweep: Sweep) -> TextTable:
        """The marks for a reader, the best of the first column first.

        Args:
            sweep: The trials.
        """
        trials = [trial for trial in sweep.trials if trial.folder in self.trials]
        first = next((c for c in self.columns if self._is_number(c)), None)
        trials.sort(key=lambda t: -_sortable(self.trials[t.folder].get(first or "")))
        rows = tuple(
            (clean(t.name), *(_text(self.trials[t.folder].get(c)) for c in self.columns))
            for t in trials
        )
        text = "Rows are matched to trials by name. "
        return TextTable(
            f"Marks of {clean(self.file)}",
            f"{text}{' '.join(self.notes())}".strip(),
            ("trial", *map(clean, self.columns)),
            rows,
        )

    def _is_number(self, column: str) -> bool:
        return any(isinstance(own.get(column), float) for own in self.trials.values())


def read_marks(path: Path, sweep: Sweep) -> TrialMarks:
    """Reads a leaderboard.

    Args:
        path: A CSV file with a column ``name``, ``generator`` or ``model``, or without a name for
            its first one, as AlpacaEval writes it.
        sweep: The trials.

    Raises:
        UserError: If it is no such table, or has no row of any trial.
    """
    rows = _rows(path)
    heads, body = rows[0], rows[1:]
    at = _name_column(heads, path)
    by_name: dict[str, str] = {}
    for trial in sweep.trials:
        by_name |= {trial.name: trial.folder, trial.folder: trial.folder}
    found: dict[str, dict[str, Cell]] = {}
    unmatched = []
    columns = tuple(head for n, head in enumerate(heads) if n != at)
    for line, row in body:
        name = row[at].strip()
        if name not in by_name:
            unmatched.append(name)
            continue
        if by_name[name] in found:
            raise UserError(f"{path}:{line}: {name} is there twice; leave one row of it")
        found[by_name[name]] = {h: _cell(row[n]) for n, h in enumerate(heads) if n != at}
    if not found:
        raise UserError(
            f"--marks {path}: none of its {len(body)} rows ({_listed(unmatched)}) is a trial's "
            f"({_listed([trial.folder for trial in sweep.trials])}); a row is found by the name "
            "that `generate` gave the answers, the trial's folder"
        )
    without = tuple(t.folder for t in sweep.finished if t.folder not in found)
    return TrialMarks(path.name, columns, found, tuple(unmatched), without)


def kept_marks(entry: object, sweep: Sweep) -> TrialMarks | None:
    """The marks that a sweep's file has from before; None where there are none.

    Args:
        entry: What is there.
        sweep: The trials, of which some may be gone.
    """
    kept = as_mapping(entry)
    columns = [c for c in kept.get("columns", []) if isinstance(c, str)]
    folders = {trial.folder for trial in sweep.trials}
    trials = {
        folder: {c: own[c] for c in columns if isinstance(own.get(c), float | int | str)}
        for folder, own in as_mapping(kept.get("trials")).items()
        if folder in folders and isinstance(own, dict)
    }
    if not trials:
        return None
    unmatched = kept.get("unmatched")
    return TrialMarks(
        str(kept.get("file", "leaderboard.csv")),
        tuple(columns),
        trials,
        tuple(map(str, unmatched)) if isinstance(unmatched, list) else (),
        tuple(t.folder for t in sweep.finished if t.folder not in trials),
    )


def _rows(path: Path) -> list[Any]:
    """The heads, then each row with its line."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"--marks {path}: too large for a leaderboard; name its CSV file")
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            heads = next(reader, [])
            body = [(reader.line_num, row) for row in reader if row]
    except FileNotFoundError as error:
        raise UserError(f"--marks {path}: no such file; name a leaderboard's CSV file") from error
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"--marks {path}: it cannot be read as CSV: {error}") from error
    for line, row in body:
        if len(row) != len(heads):
            raise UserError(
                f"{path}:{line}: {len(row)} cells under {len(heads)} heads; fix the table"
            )
    return [heads, *body]


def _name_column(heads: Sequence[str], path: Path) -> int:
    lower = [head.strip().lower() for head in heads]
    for name in _NAMES:
        if name in lower:
            return lower.index(name)
    if lower[:1] == [""]:
        return 0
    raise UserError(
        f"--marks {path}: no column names the model of a row; it needs one of {', '.join(_NAMES)}, "
        "or a first one without a name"
    )


def _cell(text: str) -> Cell:
    text = text.strip()
    try:
        value = number(float(text))
    except ValueError:
        return text or None
    return value


def _text(cell: Cell) -> str:
    if isinstance(cell, str):
        return cut(cell, 40)
    return MISSING if cell is None else number_text(cell)


def _sortable(cell: Cell) -> float:
    return float("-inf") if cell is None or isinstance(cell, str) else float(cell)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(cut(name, 60) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
