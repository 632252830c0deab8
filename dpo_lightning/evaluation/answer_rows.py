"""Answers at evaluations of a training, as rows of ``samples.jsonl``. No torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from dpo_lightning.files import SAMPLES_FILE, json_object

log = logging.getLogger(__name__)

ANSWER_COLUMNS = ("step", "prompt", "answer", "judge")
"""Entries of a row: the step, texts, and the judge's mark, which is null where there is none."""


class Keeper(Protocol):
    """A run's folder, as far as files are kept in it once the run has begun."""

    def put(self, name: str, content: Callable[[], bytes]) -> None:
        """Writes a file, now or when the run begins; whole or not at all."""

    def when_begun(self, hook: Callable[[], None]) -> None:
        """Calls a function that writes, now or when the run begins."""


class AnswerRows:
    """Keeps the answers of evaluations; a run that goes on from a checkpoint keeps those before it.

    Args:
        folder: The run's folder.
        keeper: Says when files may be written there.
    """

    def __init__(self, folder: Path, keeper: Keeper) -> None:
        self._path = folder / SAMPLES_FILE
        self._keeper = keeper
        self._kept: list[bytes] = []
        self._begun = False
        self._failed = False

    def start(self, step: int, last: int | None) -> None:
        """Keeps the rows that a checkpoint knew of, and none where there is no checkpoint.

        Args:
            step: Optimizer steps completed.
            last: Step of the last evaluation that the checkpoint knew of; None without one.
        """
        if step and last is not None and self._path.is_file():
            lines = self._path.read_bytes().split(b"\n")
            self._kept = [line for line in lines if _step(line) <= min(step, last)]
        self._keeper.put(SAMPLES_FILE, lambda: b"".join(line + b"\n" for line in self._kept))
        self._keeper.when_begun(self._go_on)

    def add(self, rows: Sequence[Sequence[Any]]) -> None:
        """Adds rows of ``ANSWER_COLUMNS``; a disk that is full is said once and costs them alone.

        Args:
            rows: Those of one evaluation.
        """
        lines = [
            json.dumps(dict(zip(ANSWER_COLUMNS, row, strict=True)), ensure_ascii=False).encode(
                "utf-8", "replace"
            )
            for row in rows
        ]
        self._kept += lines
        if not self._begun:
            return
        try:
            with self._path.open("ab") as file:
                file.write(b"".join(line + b"\n" for line in lines))
        except OSError as error:
            if not self._failed:
                log.warning("%s: %s: answers are missing there", self._path, error.strerror)
            self._failed = True

    def table(self) -> list[list[Any]]:
        """All rows so far, of ``ANSWER_COLUMNS``."""
        found = [json_object(line) or {} for line in self._kept]
        return [[row.get(name) for name in ANSWER_COLUMNS] for row in found]

    def _go_on(self) -> None:
        self._begun = True


def _step(line: bytes) -> float:
    """The step of a row; beyond all steps for a line that is none."""
    row = json_object(line)
    step = None if row is None else row.get("step")
    return step if type(step) is int else float("inf")
