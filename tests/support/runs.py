"""Runs of the front door in this process, and their results."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


SHARED = ROOT.parent / "shared"


@dataclass(frozen=True)
class Run:
    """A finished run, as another program sees it."""

    code: int
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    @property
    def rows(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def values(self, name: str) -> list[float]:
        """Values of a metric over the run; at least one row has it."""
        found = [row[name] for row in self.rows if name in row]
        assert found, f"no row has {name}"
        return found


# Lightning leaves them behind, and what runs later would take itself for a rank: it would listen
# on a port that is taken, or end its process after a failure.
_OF_RANKS = (
    *("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "RANK", "GROUP_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE"),
)


def run_train(folder: Path, *overrides: str, logger: str = "none") -> Run:
    """Trains in this process, which saves the imports, through the same front door."""
    from dpo_lightning.cli import main

    arguments = [f"hydra.run.dir={folder}", f"logger={logger}", "trainer.threads=1", *overrides]
    before = {name: os.environ.get(name) for name in _OF_RANKS}
    try:
        return Run(main(arguments), folder)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


# Small and quick, but with every kind of group the task has.
TINY = (
    "data.controlled.train_groups=96",
    "data.controlled.eval_groups=40",
    "data.batch_size=16",
    "evaluation.samples=0",
)
