"""A reference pass whose processes are killed: the others take over, and the bytes are the same."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.reference_caches import values_in
from tests.support.runs import ROOT, Run
from tests.support.shared_passes import BLOCKS, environment, noted, shares
from tests.support.waiting import until
from tests.support.warm import start_train

pytestmark = pytest.mark.faults

DDP = ("strategy=ddp", "trainer.devices=2")


def start(folder: Path, cache: Path, *overrides: str, processes: int = 1, seconds: float = 0.2):
    return start_train(
        *(f"hydra.run.dir={folder}", f"reference.cache_dir={cache}", "logger=none"),
        *("trainer.accelerator=cpu", "evaluation.samples=0", *BLOCKS, *overrides),
        env=environment(cache.parent, processes=processes, seconds=seconds),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("alone")
    process = start(folder / "run", folder / "cache", seconds=0.0)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return values_in(folder / "cache")


@pytest.mark.parametrize("words", [(), DDP], ids=["a run", "two ranks"])
def test_a_killed_rank_or_run_leaves_its_blocks_to_the_others(alone, tmp_path, words):
    """All of a run is killed in a block; one that goes on beside it computes what is left."""
    cache = tmp_path / "cache"
    ranks = 2 if words else 1
    killed = start(tmp_path / "killed", cache, *words, processes=ranks + 1)
    other = start(tmp_path / "other", cache, processes=ranks + 1)
    until(lambda: len(noted(tmp_path)) >= 3 + ranks)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    said, _ = other.communicate(timeout=300)
    assert other.returncode == 0, said
    assert values_in(cache) == alone
    # Twice begun are those alone that a killed process had in hand.
    names = [name for _, name in noted(tmp_path)]
    assert len(names) - len({*names}) <= ranks
    reference = Run(0, tmp_path / "other").result["reference"]
    assert reference["rows"] == 136
    assert 0 < reference["computed"] < 136
    assert [*cache.rglob(".*.claim")] == []


def test_a_rank_that_dies_in_the_pass_ends_the_run_in_one_line(tmp_path):
    cache = tmp_path / "cache"
    process = start(tmp_path / "run", cache, *DDP, processes=2, seconds=1.0)
    until(lambda: len(shares(tmp_path)) == 2)
    [child] = {*shares(tmp_path)} - {process.pid}
    os.kill(child, signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    lines = [line for line in said.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "rank 1 was ended by SIGKILL" in lines[0]


def test_a_killed_trial_of_a_sweep_leaves_its_blocks_to_the_others(alone, tmp_path):
    """Three trials, two at a time: one is killed in a block, and its run is done by the next sweep.

    Nothing is computed twice but the block that the killed one had in hand.
    """
    cache = tmp_path / "cache"
    command = [
        *(sys.executable, str(ROOT / "train.py"), "-m", "beta=0.1,0.5,1", "hydra.sweep.dir=sweep"),
        *("logger=none", "trainer.accelerator=cpu", "hydra.launcher.devices=2"),
        *("evaluation.samples=0", f"reference.cache_dir={cache}", *BLOCKS),
    ]
    numbers = environment(tmp_path, processes=2, seconds=0.2)
    own = os.environ | {name: value for name, value in numbers.items() if value is not None}
    own |= {"PYTHONPATH": str(ROOT)}  # where the plugin is
    process = subprocess.Popen(
        command, cwd=tmp_path, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        until(lambda: len(noted(tmp_path)) >= 4)
        killed = noted(tmp_path)[-1][0]
        os.kill(killed, signal.SIGKILL)
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 1, said
    # The third trial reads what the second one computed, with the killed one's.
    assert values_in(cache) == alone
    names = [name for _, name in noted(tmp_path)]
    assert len(names) - len({*names}) <= 1
    assert [*cache.rglob(".*.claim")] == []
    trials = [path.parent for path in sorted(tmp_path.glob("sweep/*/trial.json"))]
    statuses = [json.loads((trial / "trial.json").read_text())["status"] for trial in trials]
    assert sorted(statuses) == ["failed", "finished", "finished"]

    again = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    counts = [Run(0, trial).result["reference"] for trial in trials]
    assert [count["rows"] for count in counts] == [136] * 3
    assert counts[statuses.index("failed")]["computed"] == 0
    assert [name for _, name in noted(tmp_path)] == names
