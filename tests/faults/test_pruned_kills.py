"""A pruned sweep, killed at ten random moments: the same decisions, and the same end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support.pruned import decisions
from tests.support.recovery import checkpoint, differences, load, rows
from tests.support.runs import ROOT, TINY, Run
from tests.support.sweeps import alive
from tests.support.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

KILLS, STEPS = 10, 12
GRID = (
    *("beta=0.1,0.3,1,3", *TINY, f"trainer.max_steps={STEPS}", "optimizer.warmup=0.05"),
    *("trainer.accelerator=cpu", "trainer.threads=1", "checkpoint.every_n_steps=2"),
    *("evaluation.partition_samples=0", "hydra.launcher.devices=2"),
    *("sweep.prune=halving", "sweep.prune_at=[0.25,0.5]", "sweep.prune_within=[]"),
    *("sweep.prune_metric=controlled/expected_reward", "optimizer.lr=3e-3"),
    *("plugins=[tests.support.block_log]", "data.micro_batch_tokens=64"),
)


def start(place: Path) -> subprocess.Popen[bytes]:
    place.mkdir(exist_ok=True)
    own = {"DPO_LIGHTNING_CACHE": str(place / "cache"), "BLOCK_LOG": str(place / "blocks")}
    (place / "blocks").touch()
    with (place / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "-m", "hydra.sweep.dir=sweep", "logger=none",
             *GRID],
            cwd=place, stdout=log, stderr=log,
            env=os.environ | own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def progress(place: Path) -> int:
    """Lines of metrics and rungs of all trials."""
    files = [*place.glob("sweep/*/metrics.jsonl"), *place.glob("sweep/*/rungs.jsonl")]
    return sum(len(path.read_bytes().splitlines()) for path in files)


def blocks(place: Path) -> Counter[str]:
    return Counter(line.split()[1] for line in (place / "blocks").read_text().splitlines())


def test_ten_kills(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(timeout=1800) == 0, (whole / "log").read_text()
    seed = random.randrange(1000)
    moments = random.Random(seed)
    last = progress(whole)
    for target in sorted(moments.choices(range(last), k=KILLS)):
        delay = moments.uniform(0, 1.0)
        process = start(killed)
        print(f"seed {seed}: to be killed {delay:.2f} s after line {target} of {last}")
        while progress(killed) < target and process.poll() is None:
            time.sleep(0.05)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: alive(killed) == [])
    assert start(killed).wait(timeout=1800) == 0, (killed / "log").read_text()
    assert decisions(killed / "sweep") == decisions(whole / "sweep")
    assert len(decisions(whole / "sweep")) == 2
    ends = {}
    for trial in sorted(path.name for path in (whole / "sweep").glob("beta-*")):
        runs = [Run(0, place / "sweep" / trial) for place in (whole, killed)]
        said = [run.result for run in runs]
        assert said[0]["status"] == said[1]["status"]
        assert said[0]["error"] == said[1]["error"]
        ends[trial] = said[0]["status"]
        step = STEPS if ends[trial] == "finished" else said[0]["step"]
        saved = [load(checkpoint(run, step)) for run in runs]
        assert differences(*saved) == []
        if ends[trial] == "finished":
            assert said[0]["metrics"] == said[1]["metrics"]
            # An evaluation that was due where the trial stopped has its rows later.
            found = [sorted(json.dumps(row, sort_keys=True) for row in rows(run)) for run in runs]
            assert found[0] == found[1]
    assert sorted(Counter(ends.values()).items()) == [("finished", 1), ("pruned", 3)]
    # Each block once; a killed process had one in hand, which somebody else took over.
    assert set(blocks(whole).values()) == {1}
    assert blocks(killed).keys() == blocks(whole).keys()
    assert sum(blocks(killed).values()) - len(blocks(whole)) <= 2 * KILLS
