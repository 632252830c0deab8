"""Event files, recordings of wandb and tables of csv, each read back by its own library.

A run of four steps goes on from its second one: rows 3 and 4 come a second time, with the same
values, as a resume is exact. Each value has to be in each logger once, and as in ``metrics.jsonl``.
"""

import csv
import math
from collections.abc import Iterable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.runs import TINY, Run, run_train
from tests.support.wandb_files import history

pytestmark = pytest.mark.slow

Values = dict[tuple[str, int], list[float]]

SETTINGS = (
    *(*TINY[:3], "evaluation.samples=2", "evaluation.every_n_steps=2"),
    *("checkpoint.every_n_steps=2", "checkpoint.keep=9", "trainer.max_steps=4"),
)
LOGGERS = "[wandb,tensorboard,csv]"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("trackers") / "run"
    first = run_train(folder, *SETTINGS, logger=LOGGERS)
    assert first.code == 0
    checkpoint = folder / "checkpoints" / "step-000002.ckpt"
    again = run_train(folder, f"resume={checkpoint}", "overwrite=true", logger=LOGGERS)
    assert again.code == 0
    return again


def collected(values: Iterable[tuple[str, int, float]]) -> Values:
    found: Values = {}
    for name, step, value in values:
        found.setdefault((name, step), []).append(value)
    return found


def expected(run: Run) -> Values:
    """The values of ``metrics.jsonl``, null as NaN."""
    return collected(
        (name, row["step"], math.nan if value is None else value)
        for row in run.rows
        for name, value in row.items()
        if "/" in name
    )


def test_event_files(run: Run):
    """TensorBoard holds float32."""
    events = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    own = expected(run)
    names = {name for name, _ in own}
    found = collected(
        (name, event.step, event.value) for name in names for event in events.Scalars(name)
    )
    assert found.keys() == own.keys()
    for key, values in own.items():
        assert found[key] == pytest.approx(values, rel=1e-6, nan_ok=True), key
    # What is measured once, at the end, is there too, and the answers.
    tags = events.Tags()
    assert set(tags["scalars"]) - names >= {"controlled/log_z"}
    assert "samples/text_summary" in tags["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_a_recording_of_wandb(run: Run):
    """Both sessions are of one run, whose id is in both names."""
    paths = sorted((run.folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(paths) == 2
    assert len({path.name for path in paths}) == 1
    found = collected(
        (name, row["trainer/global_step"], math.nan if value == "NaN" else value)
        for path in paths
        for row in history(path)
        if "trainer/global_step" in row
        for name, value in row.items()
        if "/" in name and name != "trainer/global_step" and not isinstance(value, dict)
    )
    assert found == expected(run)


def test_a_table_of_csv(run: Run):
    with (run.folder / "csv" / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    found = collected(
        (name, int(row["step"]), float(value))
        for row in table
        for name, value in row.items()
        if "/" in name and value
    )
    assert found == expected(run)


def test_the_command_that_uploads_has_both_sessions(run: Run):
    log = (run.folder / "train.log").read_text()
    [identity] = {path.stem for path in Path(run.folder, "wandb").glob("offline-run-*/run-*.wandb")}
    folder = run.folder / "wandb"
    assert f"wandb sync {folder}/*run-*-{identity.removeprefix('run-')}" in log
