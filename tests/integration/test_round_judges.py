"""Runs of rounds whose judge fails: it is waited for, or the run stops and goes on later."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from dpo_lightning.run.rounds import marking
from dpo_lightning.run.rounds.asking import Patience
from tests.support.judge_server import Act, JudgeServer, judge_server, marks_length
from tests.support.runs import Run, run_train


@pytest.fixture(autouse=True)
def impatient(monkeypatch, tmp_path):
    """Waits between attempts are short, and nothing is known from before."""
    monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(marking, "Patience", functools.partial(Patience, first_wait=0.01))


def train(folder: Path, server: JudgeServer, model: Path, rows: Path, *more: str) -> Run:
    return run_train(
        folder, f"model.pretrained={model}", f"data.train={rows}", "data.batch_size=4",
        "rounds.count=2", "rounds.steps=2", "rounds.prompts=8", "rounds.num_generations=4",
        "rounds.max_new_tokens=4", "checkpoint.every_n_steps=2", "evaluation.samples=0",
        "evaluation.judge=endpoint", f"evaluation.judge_url={server.url}",
        "evaluation.judge_model=m", "evaluation.judge_form=marks", "evaluation.judge_retries=0",
        "evaluation.judge_concurrency=2", "evaluation.judge_timeout=0.5", *more,
    )  # fmt: skip


def round_rows(run: Run) -> list[dict[str, Any]]:
    """The rows of both rounds, but for the address of the judge, which is another in each test."""
    found = []
    for number in (1, 2):
        lines = (run.folder / "rounds" / f"{number}.jsonl").read_text().splitlines()
        found += map(json.loads, lines)
    for row in found:
        assert "127.0.0.1" in row["provenance"].pop("judge")
    return found


@pytest.mark.slow  # trains a small policy twice
def test_a_judge_that_fails_stalls_and_talks_nonsense_ends_the_run_no_differently(
    tmp_path, tiny_model, pairs_file, capfd
):
    bad = {3: Act("down", status=503), 5: Act(stall=20), 8: Act('{"mark": NaN}'), 11: Act("Fine!"),
           14: Act(reset=True)}  # fmt: skip

    def act(number, question):
        return bad.get(number) or marks_length(number, question)

    with judge_server(marks_length) as server:
        whole = train(tmp_path / "whole", server, tiny_model, pairs_file)
        asked = {*server.questions}
    (tmp_path / "cache").rename(tmp_path / "before")
    with judge_server(act) as server:
        run = train(tmp_path / "run", server, tiny_model, pairs_file)
        assert {*server.questions} == asked
        assert len(server.seen) == len(asked) + len(bad)
    assert run.code == whole.code == 0
    assert round_rows(run) == round_rows(whole)
    assert run.values("train/loss") == whole.values("train/loss")
    printed = capfd.readouterr()
    assert "round 1: evaluation.judge=endpoint fails (" in printed.out + printed.err


@pytest.mark.long  # trains a small policy three times
@pytest.mark.parametrize("round", [1, 2])
def test_a_judge_that_stays_away_stops_the_run_which_goes_on_later(
    tmp_path, tiny_model, pairs_file, capfd, round
):
    """Answers that were marked before are not asked for again."""
    with judge_server(marks_length) as server:
        whole = train(tmp_path / "whole", server, tiny_model, pairs_file)
        asked = len({*server.questions})
    (tmp_path / "cache").rename(tmp_path / "before")
    capfd.readouterr()
    down = {1: 5, 2: asked - 5}[round]

    def act(number, question):
        return marks_length(number, question) if number < down else Act("down", status=503)

    with judge_server(act) as server:
        run = train(tmp_path / "run", server, tiny_model, pairs_file)
        assert run.code == 2
        said = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
        assert len(said) == 1
        assert f"round {round}: evaluation.judge=endpoint: {server.url}: it answers 503" in said[0]
        assert "resume=" in said[0]
        url, down = server.url, 10**9
        before = len(server.seen)
        again = train(tmp_path / "run", server, tiny_model, pairs_file, "resume=auto")
        assert len(server.seen) - before == asked - {1: 5, 2: asked - 5}[round]
        assert server.url == url
    assert again.code == 0
    assert round_rows(again) == round_rows(whole)
    assert again.result["metrics"]["train/loss"] == whole.result["metrics"]["train/loss"]
