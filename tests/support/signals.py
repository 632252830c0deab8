"""Runs that are sent signals."""

import json
import os
import signal
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.runs import TINY, Run
from tests.support.waiting import until
from tests.support.warm import WarmRun, start_train

DISTURBED = ("plugins=[tests.support.disturbances]", "trainer.callbacks=[disturb]")


# A run brings its own settings when it is resumed.
UNDISTURBED = ("plugins=[]", "trainer.callbacks=[]")


SMALL = (*TINY, "evaluation.partition_samples=0", "trainer.accelerator=cpu")


TWO = ("strategy=ddp", "trainer.devices=2")


# As short as a run may be that is paused at a step.
SHORT = ("trainer.max_steps=24", "checkpoint.every_n_steps=null")


# Long enough that a signal comes in the middle.
LONG = ("trainer.max_steps=400", "checkpoint.every_n_steps=null")


def start(folder: Path, *overrides: str, disturb: str = "") -> WarmRun | subprocess.Popen[str]:
    """Starts a run in a session of its own; its output is in a log beside its folder."""
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".log").open("ab") as log:
        return start_train(
            *(f"hydra.run.dir={folder}", "logger=none", "trainer.threads=1", *overrides),
            env={"DISTURB": disturb, "DISTURB_GO": str(folder.with_suffix(".go"))},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for_step(folder: Path, process: WarmRun | subprocess.Popen[str], step: int) -> None:
    """Waits until the run has logged a step."""

    def is_there() -> bool:
        with_rows = folder / "metrics.jsonl"
        lines = with_rows.read_text().splitlines() if with_rows.exists() else []
        return len(lines) > 1 and json.loads(lines[-2])["step"] >= step

    log = folder.with_suffix(".log")
    until(lambda: is_there() or process.poll() is not None, log.read_text)
    assert is_there(), log.read_text()


def wait_for_word(folder: Path, process: WarmRun | subprocess.Popen[str], word: str) -> None:
    """Waits until the run has said something."""
    log = folder.with_suffix(".log")
    until(lambda: word in log.read_text() or process.poll() is not None, log.read_text)
    assert word in log.read_text(), log.read_text()


def ended(folder: Path, process: WarmRun | subprocess.Popen[str]) -> Run:
    """The run, when all of its processes are gone."""
    try:
        until(lambda: process.poll() is not None, folder.with_suffix(".log").read_text)
    except AssertionError:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    until(lambda: not ranks_of(process), lambda: ranks_of(process))
    assert process.returncode is not None
    return Run(process.returncode, folder)


def ranks_of(process: WarmRun | subprocess.Popen[str]) -> list[int]:
    """Process ids of what is left of a run, the first rank first: they share its session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            # "pid (name) state ppid pgrp session …"; the name may hold spaces and brackets.
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            environment = (path / "environ").read_bytes()
        except OSError:
            continue
        if int(fields[3]) == process.pid and fields[0] != "Z":
            found.append((b"LOCAL_RANK=1" in environment, int(path.name)))
    return [pid for _, pid in sorted(found)]


def assert_same_weights(one: Run, other: Run, *, exact: bool) -> None:
    mine, theirs = (load_file(run.folder / "model" / "model.safetensors") for run in (one, other))
    for name, tensor in mine.items():
        if exact:
            assert torch.equal(tensor, theirs[name]), name
        else:
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)
