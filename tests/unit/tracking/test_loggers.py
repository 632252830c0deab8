"""metrics.jsonl: the rows that a resumed run keeps, and odd values."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dpo_lightning.tracking.loggers import JsonlLogger


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged(folder: Path, *steps: int) -> JsonlLogger:
    """A file with a row for each of the steps, numbered in ``n``."""
    logger = JsonlLogger(folder)
    logger.start(0)
    for number, step in enumerate(steps):
        logger.log_metrics({"epoch": 0.5, "n": number}, step=step)
    return logger


def test_a_row_has_its_step_and_what_is_not_finite_is_null(tmp_path):
    logger = JsonlLogger(tmp_path)
    logger.start(0)
    logger.log_metrics({"epoch": 0.5, "x": math.nan, "y": 2.0}, step=3)
    [row] = rows(tmp_path)
    assert row.pop("time") > 0
    assert row == {"step": 3, "epoch": 0.5, "x": None, "y": 2.0}
    assert math.isnan(logger.last["x"])
    assert logger.last["y"] == 2.0


@pytest.mark.parametrize(
    ("step", "known", "kept"),
    [
        # Three rows of step 2, of which the checkpoint knew two: the third comes again.
        (2, 2, [0, 1, 2]),
        (2, 3, [0, 1, 2, 3]),
        (2, 0, [0]),
        (1, 1, [0]),
        (4, 1, [0, 1, 2, 3, 4]),
        # From the beginning there is nothing to keep.
        (0, 0, []),
    ],
)
def test_a_run_that_goes_on_keeps_the_rows_that_its_checkpoint_knew(tmp_path, step, known, kept):
    logged(tmp_path, 1, 2, 2, 2, 4)
    JsonlLogger(tmp_path).start(step, rows=known)
    assert [row["n"] for row in rows(tmp_path)] == kept


def test_the_rows_of_the_newest_step_are_counted_on(tmp_path):
    logger = logged(tmp_path, 1, 2, 2)
    assert (logger.rows_of(2), logger.rows_of(1)) == (2, 0)
    again = JsonlLogger(tmp_path)
    again.start(2, rows=1, last={"n": 7.0})
    again.log_metrics({"m": 1.0}, step=2)
    assert again.rows_of(2) == 2
    assert again.last == {"n": 7.0, "m": 1.0}


def test_a_torn_line_goes_and_the_others_stay(tmp_path):
    logged(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": "1"}\n{"step": 2, "n"')
    JsonlLogger(tmp_path).start(2, rows=1)
    assert [row["n"] for row in rows(tmp_path)] == [0, 1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_rows_wait_until_they_can_be_written(tmp_path, caplog):
    logger = logged(tmp_path, 1)
    path = logger.path
    logger.path = Path("/dev/full")
    logger.log_metrics({"n": 1}, step=2)
    logger.log_metrics({"n": 2}, step=3)
    [said] = caplog.records
    assert "rows wait in memory until it can be" in said.getMessage()
    logger.path = path
    logger.log_metrics({"n": 3}, step=4)
    assert [row["n"] for row in rows(tmp_path)] == [0, 1, 2, 3]
