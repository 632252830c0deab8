"""A run of rounds that is killed ten times, while it draws, marks, writes, fills and trains."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.recovery import assert_same_end, rows
from tests.support.round_crash import POINTS
from tests.support.runs import ROOT, Run

pytestmark = pytest.mark.faults

TASK = (
    *("data.controlled.train_groups=96", "data.controlled.eval_groups=40", "data.batch_size=16"),
    *("rounds.count=5", "rounds.steps=4", "rounds.offline_fraction=0.25", "optimizer.lr=0.003"),
    *("checkpoint.every_n_steps=3", "checkpoint.keep=2", "data.micro_batch_tokens=64"),
    *("evaluation.samples=2", "evaluation.partition_samples=0", "trainer.log_every_n_steps=2"),
    *("evaluation.judge=sunny", "trainer.callbacks=[die_after_a_step]"),
    *("plugins=[tests.support.round_crash]", "trainer.accelerator=cpu", "trainer.threads=1"),
)
# The latest time of each at which a run is killed: it comes about a round further.
TIMES = {
    "before a batch": 12,
    "after a batch": 12,
    "in a mark": 3,
    "between the files": 2,
    "in the rows": 2,
    "before values": 2,
    "after values": 2,
    "after a step": 3,
}
KILLS = 10


def drive(folder: Path, *words: str, crash: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "train.py", f"hydra.run.dir={folder}", "logger=none"),
            # Each run fills its own, so that a kill meets it.
            *(f"reference.cache_dir={folder.parent / 'cache'}", *TASK, *words),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ROUND_CRASH": crash},
        capture_output=True,
        text=True,
        timeout=300,
    )


def files_of(run: Run) -> dict[str, bytes]:
    """Rows and facts of all rounds; nothing else is left of them but marks and values."""
    folder = run.folder / "rounds"
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".jsonl", ".json")}


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("reference", ["start", "previous"])
def test_ten_kills(tmp_path, reference):
    word = f"rounds.reference={reference}"
    whole = drive(tmp_path / "one" / "run", word)
    assert whole.returncode == 0, whole.stderr
    seed = random.randrange(1000)
    moments = random.Random(seed)
    folder = tmp_path / "two" / "run"
    killed = []
    for _ in range(KILLS):
        point = moments.choice(POINTS)
        crash = f"{point}:{moments.randint(1, TIMES[point])}"
        done = drive(folder, word, "resume=auto", crash=crash)
        print(f"seed {seed}: {crash}: {done.returncode}")
        assert done.returncode in (-9, 0), done.stderr
        killed.append(done.returncode == -9)
        if not done.returncode:  # such a moment did not come any more
            break
    # A run may come to its end before the tenth: a time may not come any more.
    assert sum(killed) >= KILLS // 2
    done = drive(folder, word, "resume=auto")
    assert done.returncode == 0, done.stderr
    one, two = Run(0, tmp_path / "one" / "run"), Run(0, folder)
    assert rows(two) == rows(one)
    assert files_of(two) == files_of(one)
    resumed = two.result["resumed"]
    assert_same_end(two, one, after=resumed["step"] if resumed else 0)


def test_marks_that_were_made_are_not_asked_for_again(tmp_path):
    """Killed in the judge's fourth call: the resumed run asks for what has no mark yet."""
    folder = tmp_path / "two" / "run"
    assert drive(folder, crash="in a mark:4").returncode == -9
    kept = marks_of(folder / "rounds" / ".marks" / "1.jsonl")
    assert kept
    done = drive(folder, "resume=auto")
    assert done.returncode == 0, done.stderr
    made = marks_of(folder / "rounds" / ".marks" / "2.jsonl")
    assert made
    assert len({*kept, *made}) == len(kept) + len(made)


def marks_of(path: Path) -> list[str]:
    """Names of the marks in a file, line by line."""
    return [key for line in path.read_text().splitlines() for key in json.loads(line)["marks"]]
