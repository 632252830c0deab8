"""The reference pass shared out over ranks and runs: the same bytes, and each block once."""

import subprocess
from pathlib import Path

import pytest

from tests.support.reference_caches import values_in
from tests.support.runs import Run
from tests.support.shared_passes import BLOCKS, assert_each_once, environment, noted, shares
from tests.support.warm import start_train

pytestmark = pytest.mark.long

DDP = ("strategy=ddp", "trainer.devices=2")
THREE = ("strategy=ddp", "trainer.devices=3")
FSDP = ("strategy=fsdp", "trainer.devices=2")


def start(folder: Path, cache: Path, *overrides: str, processes: int = 1):
    return start_train(
        *(f"hydra.run.dir={folder}", f"reference.cache_dir={cache}", "logger=none"),
        *("trainer.accelerator=cpu", "evaluation.samples=0", *BLOCKS, *overrides),
        env=environment(cache.parent, processes=processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def end(folder: Path, process) -> Run:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return Run(process.returncode, folder)


def once(folder: Path, *overrides: str, processes: int = 1) -> Run:
    """A run with a cache of its own beside it."""
    folder.mkdir()
    run = folder / "run"
    return end(run, start(run, folder / "cache", *overrides, processes=processes))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "one"
    run = once(folder)
    assert run.result["reference"] == {"rows": 136, "computed": 136, "cached": 0}
    assert len(noted(folder)) >= 8
    return folder


@pytest.mark.parametrize(
    ("words", "count"), [(DDP, 2), (THREE, 3), (FSDP, 2)], ids=["two", "three", "sharded"]
)
def test_any_number_of_ranks_gives_the_same_bytes(alone, tmp_path, words, count):
    """No block begins before all ranks have one."""
    run = once(tmp_path / "run", *words, processes=count)
    folder = tmp_path / "run"
    assert values_in(folder / "cache") == values_in(alone / "cache")
    assert_each_once(folder, folder / "cache")
    assert len(shares(folder)) == count
    assert run.result["reference"] == {"rows": 136, "computed": 136, "cached": 0}
    # Another number of ranks reads what they left.
    again = tmp_path / "again"
    read = end(again, start(again, folder / "cache"))
    assert read.result["reference"] == {"rows": 136, "computed": 0, "cached": 136}
    assert read.values("train/loss") == Run(0, alone / "run").values("train/loss")


def test_two_runs_that_start_together_compute_each_block_once(alone, tmp_path):
    folder, cache = tmp_path, tmp_path / "cache"
    started = [
        (folder / name, start(folder / name, cache, f"beta={beta}", processes=2))
        for name, beta in (("a", 0.1), ("b", 0.5))
    ]
    runs = [end(*one) for one in started]
    assert values_in(cache) == values_in(alone / "cache")
    assert_each_once(folder, cache)
    assert len(shares(folder)) == 2
    counts = [run.result["reference"] for run in runs]
    assert [count["rows"] for count in counts] == [136, 136]
    assert sum(count["computed"] for count in counts) == 136


def test_a_short_run_computes_the_blocks_that_it_needs(alone, tmp_path):
    """One step of one row and the evaluation's four: five blocks at most."""
    few = ("data.batch_size=1", "trainer.max_steps=1", "data.controlled.eval_groups=4")
    run = once(tmp_path / "run", *few)
    reference = run.result["reference"]
    assert reference == {"rows": 5, "computed": 5, "cached": 0}
    names = {name for _, name in noted(tmp_path / "run")}
    # A row's best and worst response are behind one prompt, but may be of two blocks.
    assert 1 <= len(names) <= 10
    whole = tmp_path / "whole"
    rest = end(whole, start(whole, tmp_path / "run/cache", "data.controlled.eval_groups=4"))
    assert 0 < rest.result["reference"]["computed"] < 100
    assert_each_once(tmp_path / "run", tmp_path / "run/cache")
