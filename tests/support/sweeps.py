"""Sweeps of real trials, each a process of its own, as a user starts them."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.runs import ROOT, TINY, Run

# A user's module that makes trials fail at their third step for as long as the file "broken" is
# there. It knows which trial it is in by its command line.
FAULTS = """
import os, signal, sys
from pathlib import Path
import torch
from dpo_lightning.training.module import DPOModule

def boom(module):
    raise RuntimeError("boom")

def kill(module):
    os.kill(os.getpid(), signal.SIGKILL)

def leave(module):
    sys.exit(7)

def diverge(module):
    with torch.no_grad():
        next(module.policy.parameters()).fill_(float("nan"))

FAULTS = {"beta=0.2": boom, "beta=0.3": kill, "beta=0.4": leave, "beta=0.5": diverge}
step = DPOModule.training_step

def training_step(self, batch, index):
    if self.global_step == 3 and Path("broken").exists() and self.trainer.is_global_zero:
        for key, fault in FAULTS.items():
            if key in sys.argv:
                fault(self)
    return step(self, batch, index)

DPOModule.training_step = training_step
"""

SMALL = (*TINY, "trainer.accelerator=cpu", "hydra.launcher.devices=2")


@dataclass(frozen=True)
class Sweep:
    """A finished sweep, as other programs see it."""

    code: int
    folder: Path
    stdout: str
    stderr: str

    def trial(self, name: str) -> Run:
        return Run(0, self.folder / name)

    @property
    def only_trial(self) -> Run:
        [name] = self.trials
        return self.trial(name)

    @property
    def trials(self) -> list[str]:
        return sorted(path.parent.name for path in self.folder.glob("*/trial.json"))

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "sweep.json").read_text())


def sweep(place: Path, *overrides: str, logger: str = "none", **environment: str) -> Sweep:
    """Runs a sweep from a folder of one's own, with a cache of its own."""
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra.sweep.dir=sweep"]
    done = subprocess.run(
        [*command, f"logger={logger}", *overrides],
        cwd=place,
        env=os.environ | {"DPO_LIGHTNING_CACHE": str(place / "cache")} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return Sweep(done.returncode, place / "sweep", done.stdout, done.stderr)


def alive(folder: Path) -> list[str]:
    """Command lines of the processes that use a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                where = (entry / "cwd").resolve()
            except OSError:
                continue
            if state != "Z" and (str(folder) in line or where == folder):
                found.append(line)
    return found
