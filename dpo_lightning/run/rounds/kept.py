"""Files of rounds in the folders of a run, and of the run that it goes on from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from dpo_lightning.files import ROUNDS_FOLDER
from dpo_lightning.run.folder import RunFolder
from dpo_lightning.run.rounds.files import facts_path, rows_path
from dpo_lightning.run.rounds.filling import OWN
from dpo_lightning.training.checkpoints.files import run_of


@dataclass(slots=True)
class Saving:
    """Places of what a round leaves.

    Attributes:
        folder: The run's folder.
        checkpoints: Its checkpoints' folder.
        keep: Number of checkpoints that stay.
        resumed: The checkpoint that the run goes on from.
        is_clean: True once rows of a course that the run left are removed.
    """

    folder: RunFolder
    checkpoints: Path
    keep: int
    resumed: Path | None
    is_clean: bool = False

    @property
    def writes(self) -> bool:
        """True if parts of a round may be kept by now: no other run's files are in the way."""
        return self.folder.begun or self.resumed is not None

    @property
    def folders(self) -> list[Path]:
        """Folders of runs that may have a round: that of the one that is resumed, then its own."""
        own = self.folder.path
        other = None if self.resumed is None else run_of(self.resumed)
        if other is None or other.absolute() == own.absolute():
            return [own]
        return [other, own]

    def take_over(self, folder: Path, round: int) -> None:
        """Has the rounds so far in the run's own folder too, once it may write there.

        Args:
            folder: The run's that has them.
            round: The last of them.
        """
        self.folder.when_begun(lambda: self._take_over(folder, round))

    def _take_over(self, folder: Path, round: int) -> None:
        self.remove_later(round)
        own = self.folder.path
        if folder.absolute() == own.absolute():
            return
        (own / ROUNDS_FOLDER).mkdir(exist_ok=True)
        for number in range(1, round + 1):
            for path in (rows_path(folder, number), facts_path(folder, number)):
                if path.is_file():
                    shutil.copyfile(path, own / ROUNDS_FOLDER / path.name)
        values = folder / ROUNDS_FOLDER / OWN
        if values.is_dir():
            shutil.copytree(values, own / ROUNDS_FOLDER / OWN, dirs_exist_ok=True)

    def remove_later(self, round: int) -> None:
        """Removes rows of later rounds, once: they are of a course that the run left.

        Args:
            round: The round that it goes on with.
        """
        if self.is_clean:
            return
        self.is_clean = True
        folder = self.folder.path
        for path in (folder / ROUNDS_FOLDER).glob("*.jsonl"):
            if path.stem.isdecimal() and int(path.stem) > round:
                facts_path(folder, int(path.stem)).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
