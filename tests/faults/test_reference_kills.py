"""A reference pass whose processes are killed: the others take over, and the bytes are the same."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.reference_caches import values_in
from tests.support.runs import Run
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
