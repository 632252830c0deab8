"""Rows reach each logger once, in their order and whatever fails; a logger ends no run."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_lightning.tracking.destinations import make_loggers
from dpo_lightning.tracking.lasting import Destination, LastingLogger
from dpo_lightning.tracking.local_files import CsvTable, EventFiles
from dpo_lightning.tracking.logger_settings import LoggerSettings
from dpo_lightning.tracking.loggers import JsonlLogger
from dpo_lightning.tracking.rows import known_values
from dpo_lightning.tracking.tracked import TrackedRun, flat, summary_of
from tests.support.properties import examples


class Place(Destination):
    """A destination that refuses the calls whose numbers it is given, counted from 0."""

    kind = "place"

    def __init__(self, *, refuses=(), known=None, remade=False):
        self.refuses, self.known, self.remade = {*refuses}, known or {}, remade
        self.calls = 0
        self.rows: list[dict[str, Any]] = []

    def _call(self) -> None:
        self.calls += 1
        if self.calls - 1 in self.refuses:
            raise OSError("no room for token=hf_abcdefghijklmnopqrstuvwxyz0123456789")

    def open(self):
        self._call()
        self.is_open = True
        if self.remade:
            self.rows = []
        return self.known

    def write(self, rows: Sequence[Any]) -> None:
        self._call()
        self.rows += [{"step": row["step"], "n": row["n"]} for row in rows]

    def keep_model(self, folder):
        raise RuntimeError("gone")

    def close(self, summary, exit_code):
        return f"closed with {exit_code}"


def both(folder: Path, place: Destination, **options: Any) -> tuple[JsonlLogger, LastingLogger]:
    folder.mkdir(exist_ok=True)
    metrics = JsonlLogger(folder)
    metrics.start(0)
    return metrics, LastingLogger(place, metrics.rows, **options)


def log_rows(loggers: Sequence[Any], *steps: int) -> None:
    for step in steps:
        for logger in loggers:
            logger.log_metrics({"n": float(step), "epoch": 0.5}, step=step)


def test_rows_of_before_the_beginning_come_first(tmp_path):
    place = Place()
    metrics, logger = both(tmp_path, place)
    log_rows((metrics, logger), 1, 2)
    assert place.calls == 0
    logger.begin()
    log_rows((metrics, logger), 3)
    assert [row["step"] for row in place.rows] == [1, 2, 3]


@settings(max_examples=examples(40))
@given(
    refuses=st.sets(st.integers(0, 12), max_size=8),
    remade=st.booleans(),
    begins=st.integers(0, 6),
    pause=st.sampled_from([0.0, 1e9]),
)
def test_each_row_arrives_once_and_in_order(tmp_path_factory, refuses, remade, begins, pause):
    """With no pause it is tried at every row; with a long one only once more, at the end.

    The last try comes after at most 7 + 7 calls of before; call 13 and on are taken, so that all
    rows are there.
    """
    place = Place(refuses=refuses, remade=remade)
    metrics, logger = both(tmp_path_factory.mktemp("run"), place, retry_seconds=pause)
    for step in range(1, 7):
        if step == begins:
            logger.begin()
        log_rows((metrics, logger), step)
    if begins == 0:
        logger.begin()
    steps = [row["step"] for row in place.rows]
    assert steps == list(range(1, len(steps) + 1))
    place.refuses = set()
    assert logger.finish({}, exit_code=0) == "closed with 0"
    assert [row["step"] for row in place.rows] == [1, 2, 3, 4, 5, 6]


def test_a_failure_is_said_once_and_without_secrets(tmp_path, caplog):
    place = Place(refuses=range(1, 99))
    metrics, logger = both(tmp_path, place, retry_seconds=0.0)
    logger.begin()
    log_rows((metrics, logger), 1, 2, 3)
    logger.keep_model(tmp_path)
    assert logger.finish({}, exit_code=3) == "closed with 3"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert said[0].startswith(
        "place takes no metrics (no room for token=[hidden]): the run goes on"
    )
    assert said[1] == "place does not hold the model (gone)"
    assert said[2] == "place lacks rows of metrics; metrics.jsonl has all of them"


def test_a_server_that_is_gone_is_not_asked_at_every_step(tmp_path):
    place = Place(refuses=range(99))
    metrics, logger = both(tmp_path, place)
    logger.begin()
    log_rows((metrics, logger), *range(1, 20))
    assert place.calls == 1


def test_what_it_has_already_does_not_come_again_but_other_values_do(tmp_path):
    """Of steps 1 to 3 it has n = 1, 7 and nothing: step 1 is left out, 2 and 3 are written."""
    known = known_values([{"step": 1, "epoch": 0.1, "time": 0, "n": 1.0}, {"step": 2, "n": 7.0}])
    place = Place(known=known)
    metrics, logger = both(tmp_path, place)
    logger.begin()
    log_rows((metrics, logger), 1, 2, 3)
    assert place.rows == [{"step": 2, "n": 2.0}, {"step": 3, "n": 3.0}]


# The loggers themselves ---------------------------------------------------------------------------

CONFIG = {"beta": 0.2, "loss": {"name": "sigmoid", "terms": {}}, "plugins": ["a"], "name": None}
FACTS = {"model": "tiny", "loss": "sigmoid", "beta": 0.2, "lr": 1e-3, "seed": 4}


def scalars(folder: Path) -> dict[tuple[str, int], list[float]]:
    """Every scalar that TensorBoard's own reader finds, by name and step."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found: dict[tuple[str, int], list[float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault((name, event.step), []).append(event.value)
    return found


def test_event_files_have_each_value_once_also_after_a_second_beginning(tmp_path):
    """As after a resume: rows 2 and 3 were there, and come again, 3 with another value."""
    run = TrackedRun("run", tmp_path, CONFIG, FACTS)
    for last in (0.25, 0.75):
        rows = [{"step": n, "epoch": n / 2, "time": 100.0 + n, "x/n": float(n)} for n in (1, 2)]
        rows.append({"step": 3, "epoch": None, "time": 103.0, "x/n": last, "x/none": None})
        logger = LastingLogger(EventFiles(run), lambda rows=rows: rows)
        logger.begin()
        logger.write_table("samples", ("prompt", "after"), [("a|b", "c\nd")])
        where = logger.finish({"x/n": 9.0, "samples/kl": 0.5, "beta": 0.2}, exit_code=0)
        assert where == f"tensorboard --logdir {tmp_path / 'tensorboard'}"
    found = scalars(tmp_path / "tensorboard")
    assert math.isnan(found.pop(("x/none", 3))[0])
    assert found == {
        **{("x/n", 1): [1.0], ("x/n", 2): [2.0], ("x/n", 3): [0.75]},
        **{("epoch", 1): [0.5], ("epoch", 2): [1.0]},
        # Measured once, at the end.
        ("samples/kl", 3): [0.5],
    }
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("x/n")[0].wall_time == 101.0
    [text] = events.Tensors("samples/text_summary")
    assert b"| a\\|b | c d |" in text.tensor_proto.string_val[0]
    session = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert all(word in session for word in (b"loss.name", b"sigmoid", b"seed"))


def test_a_table_of_csv_has_the_rows_of_an_earlier_session_once(tmp_path):
    run = TrackedRun("run", tmp_path, CONFIG, FACTS)
    for _ in range(2):
        rows = [{"step": n, "epoch": 0.5, "time": 0.0, "n": float(n)} for n in (1, 2)]
        logger = LastingLogger(CsvTable(run), lambda rows=rows: rows)
        logger.begin()
        logger.log_metrics({"n": 3.0}, step=3)
        logger.finish({}, exit_code=0)
    lines = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert lines == ["epoch,n,step", "0.5,1.0,1", "0.5,2.0,2", ",3.0,3"]
    assert "loss.name: sigmoid" in (tmp_path / "csv" / "hparams.yaml").read_text()


def test_ranks_that_write_nothing_have_no_loggers(tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    everything = LoggerSettings(("csv", "tensorboard"), None, None, "auto", (), None)
    run = TrackedRun("run", tmp_path, CONFIG, FACTS)

    def made() -> list[str]:
        loggers = make_loggers(everything, run, rows=list, when_begun=lambda hook: hook())
        return [logger.name for logger in loggers.all]

    assert made() == ["csv", "tensorboard"]
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert made() == []


def test_a_run_as_a_row_of_a_table():
    """Columns of a plot over runs: facts, and short names of what is free of beta."""
    metrics = {"eval/rewards/accuracies": 0.75, "samples/kl": 0.5, "train/loss": 0.6}
    assert summary_of(FACTS, metrics) == {**metrics, **FACTS, "accuracy": 0.75, "kl": 0.5}
    exact = {"controlled/kl_policy_reference": 0.4, "eval/logratios/margins": 2.0}
    assert summary_of({}, metrics | exact)["kl"] == 0.4
    assert summary_of({}, metrics | exact)["margin"] == 2.0


def test_settings_are_named_as_they_are_typed():
    assert dict(flat(CONFIG)) == {
        **{"beta": 0.2, "loss.name": "sigmoid", "loss.terms": {}},
        **{"plugins": ["a"], "name": None},
    }
    assert json.dumps(dict(flat({}))) == "{}"
