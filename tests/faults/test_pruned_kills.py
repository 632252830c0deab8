"""A pruned sweep, killed at ten random moments: the same decisions, and the same end."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dpo_lightning.sweeps.course import Course
from dpo_lightning.sweeps.trials import Trial
from tests.support.pruned import decisions, make_course, plans
from tests.support.recovery import checkpoint, differences, load, rows
from tests.support.runs import ROOT, TINY, Run
from tests.support.sweeps import alive
from tests.support.trials import run
from tests.support.waiting import until

pytestmark = pytest.mark.faults

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


# Takes steps whose outcome depends on each one before, and saves every one of them.
ACT = """
from dpo_lightning.tracking.rungs import RungReport, read_goal, write_reports
beta, goal = float(folder.name.removeprefix("beta-")), read_goal(folder)
end = 16 if goal is None else round(16 * goal.at[goal.rung])
saved = folder / "checkpoints" / "step-000000.ckpt"
saved.parent.mkdir(exist_ok=True)
step, value = json.loads(saved.read_text()) if saved.exists() else (0, 7)
while step < end:
    step += 1
    value = (31 * value + step + int(100 * beta)) % 1000003
    saved.with_suffix(".new").write_text(json.dumps([step, value]))
    saved.with_suffix(".new").replace(saved)
    time.sleep(0.01)
if goal is None:
    finish()
else:
    score = (value % 7 - beta, value % 11 - beta)
    write_reports(folder, [RungReport(goal.rung, step, 16, goal.metric, sum(score) / 2, score)])
    finish("paused")
"""


def stand_ins(folder: Path) -> None:
    """A pruned sweep of quick stand-ins for trials."""
    folder.mkdir(exist_ok=True)

    def course(sweep: Path, trials: list[Trial]) -> Course:
        made = make_course(sweep, trials)
        made.begin()
        return made

    run(folder, plans([{"beta": beta} for beta in (0.1, 0.2, 0.5, 1, 2)], ACT), course=course)


def left(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"decisions": decisions(folder)}
    for trial in sorted(folder.glob("beta-*")):
        status = json.loads((trial / "result.json").read_text())["status"]
        found[trial.name] = status, (trial / "checkpoints" / "step-000000.ckpt").read_text()
    return found


def test_ten_kills_of_stand_ins(tmp_path):
    """As below, with trials that take no time, so that the kills fall between them as well."""
    began = time.monotonic()
    stand_ins(tmp_path / "whole")
    seconds = time.monotonic() - began
    seed = random.randrange(1000)
    print(f"seed {seed}")
    moments = random.Random(seed)
    for _ in range(KILLS):
        process = multiprocessing.get_context("fork").Process(
            target=stand_ins, args=(tmp_path / "killed",)
        )
        process.start()
        process.join(moments.uniform(0, seconds / 2))
        process.kill()
        process.join()
    stand_ins(tmp_path / "killed")
    assert left(tmp_path / "killed") == left(tmp_path / "whole")
    ends = [end for name, (end, *_) in left(tmp_path / "whole").items() if name != "decisions"]
    assert sorted(Counter(ends).items()) == [("finished", 1), ("pruned", 4)]


@pytest.mark.timeout(7200)
def test_ten_kills_of_a_pruned_sweep(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(timeout=3000) == 0, (whole / "log").read_text()
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
    assert start(killed).wait(timeout=3000) == 0, (killed / "log").read_text()
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
