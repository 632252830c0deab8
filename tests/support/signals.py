"""Runs that are sent signals."""

import json
import os
import signal
import subprocess
import sys

import torch
from safetensors.torch import load_file

from tests.support.runs import ROOT, TINY, Run
from tests.support.waiting import until

DISTURBED = ("plugins=[tests.support.disturbances]", "trainer.callbacks=[disturb]")


SMALL = (*TINY, "evaluation.partition_samples=0", "trainer.accelerator=cpu")


TWO = ("strategy=ddp", "trainer.devices=2")


# Long enough that a signal comes in the middle.
LONG = ("trainer.max_steps=400", "checkpoint.every_n_steps=null")


def start(folder, *overrides: str, disturb: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "train.py", f"hydra.run.dir={folder}", "logger=none"]
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*command, "trainer.threads=1", *overrides],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DISTURB": disturb, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for_step(folder, process, step: int) -> None:
    def is_there() -> bool:
        with_rows = folder / "metrics.jsonl"
        lines = with_rows.read_text().splitlines() if with_rows.exists() else []
        return len(lines) > 1 and json.loads(lines[-2])["step"] >= step

    log = folder.with_suffix(".log")
    until(lambda: is_there() or process.poll() is not None, log.read_text)
    assert is_there(), log.read_text()


def ended(folder, process) -> Run:
    """The run, when all of its processes are gone."""
    try:
        until(lambda: process.poll() is not None, folder.with_suffix(".log").read_text)
    except AssertionError:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    until(lambda: not ranks_of(folder), lambda: ranks_of(folder))
    return Run(process.returncode, folder)


def ranks_of(folder) -> list[int]:
    """Process ids of a run, the first rank first."""
    found = []
    for path in ROOT.__class__("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"hydra.run.dir={folder}" in words and state != "Z":
            rank = b"LOCAL_RANK=1" in (path / "environ").read_bytes()
            found.append((rank, int(path.name)))
    return [pid for _, pid in sorted(found)]


def assert_same_weights(one: Run, other: Run, *, exact: bool) -> None:
    mine, theirs = (load_file(run.folder / "model" / "model.safetensors") for run in (one, other))
    for name, tensor in mine.items():
        if exact:
            assert torch.equal(tensor, theirs[name]), name
        else:
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)
