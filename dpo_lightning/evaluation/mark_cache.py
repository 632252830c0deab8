"""Replies and marks of a judge, kept on disk, so that nothing is asked and paid for twice.

Imports no torch. An endpoint's replies are kept for all runs. The marks of functions and reward
models are kept for one run: their code and weights may change under the same name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.files import json_object, write_whole

log = logging.getLogger(__name__)

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply.

    Attributes:
        text: The reply itself.
        tokens_in: Tokens of the question, as the server counted them; None where it did not.
        tokens_out: Those of the reply.
    """

    text: str
    tokens_in: int | None
    tokens_out: int | None


def key_of(judge: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """The name of a reply: a hash of all that it depends on.

    Args:
        judge: Address, model, question and options.
        content: Prompt and answers.
    """
    text = json.dumps([_FORMAT, dict(judge), dict(content)], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class MarkCache:
    """A file for each reply, written whole; what is damaged counts as missing.

    Args:
        folder: Where they are; it is made with the first one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_open = True

    def get(self, key: str) -> Reply | None:
        """The reply of that name, if it is there and whole."""
        try:
            found = json_object(self._path(key).read_bytes()) or {}
        except OSError:
            return None
        text = found.get("text")
        if found.get("key") != key or not isinstance(text, str):
            return None
        counts = (found.get(name) for name in ("tokens_in", "tokens_out"))
        first, second = (count if isinstance(count, int) else None for count in counts)
        return Reply(text, first, second)

    def put(self, key: str, reply: Reply) -> None:
        """Keeps a reply; a disk that takes none is said once, and costs no mark."""
        content = {"key": key} | asdict(reply)
        if not self._is_open:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, f"{json.dumps(content)}\n".encode(), lasting=False)
        except OSError as error:
            self._is_open = False
            log.warning("marks are not kept: %s: %s", error.filename or path, error.strerror)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


class KeptMarks:
    """Marks that a judge gave in the rounds of one run: a file of lines for each process of it.

    No process touches another one's file. What is added at once is one line, which is there as a
    whole or not at all: one that was cut off by a kill counts as missing.

    Args:
        folder: Where the files are; it is made with the first mark, in a folder that is there.
        judge: All that the marks depend on, as plain values.
        earlier: The same folder of a run that this one goes on from, which is read alone.
    """

    def __init__(
        self, folder: Path, judge: Mapping[str, Any], *, earlier: Path | None = None
    ) -> None:
        self._folder = folder
        self._earlier = earlier
        self._judge = dict(judge)
        self._path: Path | None = None
        self._is_open = True
        self._rounds: dict[int, dict[str, float | None]] | None = None

    def key(self, content: Mapping[str, Any]) -> str:
        """The name of a mark.

        Args:
            content: Prompt and answer, or answers.
        """
        return key_of(self._judge, content)

    def before(self, round: int) -> dict[str, float]:
        """Marks that were made in earlier rounds, by name.

        Args:
            round: The number of the round that is marked, from 1.
        """
        rounds = self._read()
        return {
            key: mark
            for number in sorted(rounds)
            if number < round
            for key, mark in rounds[number].items()
            if mark is not None
        }

    def of(self, round: int) -> dict[str, float | None]:
        """Marks of a round, by name; None where the run went on without one.

        Args:
            round: Its number, from 1.
        """
        return self._read().get(round, {})

    def add(self, round: int, marks: Mapping[str, float | None]) -> None:
        """Keeps marks; a disk that takes none is said once, and costs no mark.

        Args:
            round: The number of the round, from 1.
            marks: By name; None where the run goes on without one.
        """
        self._read().setdefault(round, {}).update(marks)
        if not self._is_open or not marks:
            return
        line = json.dumps({"round": round, "marks": dict(marks)})
        try:
            with self._own_file().open("ab") as file:
                file.write(f"{line}\n".encode())
        except OSError as error:
            self._is_open = False
            where = error.filename or self._folder
            log.warning("marks are not kept: %s: %s", where, error.strerror)

    def _own_file(self) -> Path:
        # Each time: what an earlier run left may be cleared away as this one takes its first step.
        for folder in (self._folder.parent, self._folder):
            folder.mkdir(exist_ok=True)
        if self._path is None:
            numbers = [int(path.stem) for path in _files(self._folder)]
            self._path = self._folder / f"{1 + max(numbers, default=0)}.jsonl"
        return self._path

    def _read(self) -> dict[int, dict[str, float | None]]:
        if self._rounds is None:
            self._rounds = {}
            before = [] if self._earlier is None else _files(self._earlier)
            for path in [*before, *_files(self._folder)]:
                with contextlib.suppress(OSError):
                    for line in path.read_bytes().split(b"\n"):
                        _take(json_object(line) or {}, self._rounds)
        return self._rounds


def _files(folder: Path) -> list[Path]:
    """The files of marks in a folder, in the order in which they were begun."""
    found = [path for path in folder.glob("*.jsonl") if path.stem.isdecimal()]
    return sorted(found, key=lambda path: int(path.stem))


def _take(found: Mapping[str, Any], rounds: dict[int, dict[str, float | None]]) -> None:
    """Takes the marks of a line, if it is whole."""
    round, marks = found.get("round"), found.get("marks")
    if type(round) is int and isinstance(marks, dict) and all(map(_is_mark, marks.values())):
        rounds.setdefault(round, {}).update(marks)


def _is_mark(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isfinite(value))
