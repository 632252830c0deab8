"""Memory that a process takes beside its tensors, and the measured estimates."""

import json
import os

import pytest

from dpo_lightning import cli
from dpo_lightning.memory.peaks import bound_product_caches
from tests.support.runs import ROOT

NAMES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
MEASURED = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())


def test_caches_of_products_are_bounded():
    environment = {"HOME": "x"}
    bound_product_caches(environment)
    assert environment == {"HOME": "x"} | dict.fromkeys(NAMES, "256")


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_has_set_stays(name: str):
    environment = {name: "7"}
    bound_product_caches(environment)
    assert environment == dict.fromkeys(NAMES, "256") | {name: "7"}


def test_a_run_on_a_cpu_bounds_them(tmp_path, monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    small = ("trainer.max_steps=1", "evaluation.samples=0", "data.controlled.train_groups=64")
    kind = ("trainer.accelerator=cpu", "logger=none")
    assert cli.main([f"hydra.run.dir={tmp_path / 'run'}", *small, *kind]) == 0
    assert [os.environ[name] for name in NAMES] == ["256", "256"]


@pytest.mark.parametrize("way", MEASURED)
def test_a_measured_process_is_within_15_percent_of_the_estimate(way: str):
    """``benchmarks/memory.py`` measures them; docs/memory.md shows them."""
    row = MEASURED[way]
    off = row["estimated"] / row["measured"] - 1
    assert abs(off) < 0.15
    mib = [f"{row[name] / 2**20:,.0f}" for name in ("estimated", "measured", "resident")]
    page = (ROOT / "docs" / "memory.md").read_text()
    assert f"| {way} | {' | '.join(mib)} | {off:+.0%} |" in page
    assert row["estimated"] == sum(row["parts"].values())
