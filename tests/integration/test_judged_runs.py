"""Runs whose answers a language model judges, from the settings to the files."""

import json
import re
from pathlib import Path

import pytest

from dpo_lightning.run.judge.command import main as judge
from tests.support.judge_server import Act, JudgeServer, judge_server, prefers_longer
from tests.support.runs import TINY, Run, run_train
from tests.support.selecting import names_written, unknown

pytestmark = pytest.mark.slow  # trains three small policies

KEY = "word-of-no-known-form"


def train(folder: Path, server: JudgeServer, *more: str) -> Run:
    return run_train(
        folder, *TINY, "trainer.max_steps=2", "evaluation.samples=12",
        "evaluation.partition_samples=0", "evaluation.judge=endpoint",
        f"evaluation.judge_url={server.url}", "evaluation.judge_model=m",
        "evaluation.judge_key_variable=MY_JUDGE", *more,
    )  # fmt: skip


def files_with(folder: Path, text: str) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and text.encode() in p.read_bytes()]


def test_a_run_is_judged_and_its_rerun_costs_nothing(tmp_path, monkeypatch, capfd):
    """The server repeats the key in every reply; it is in no file and no line."""
    monkeypatch.setenv("MY_JUDGE", KEY)
    monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(tmp_path / "cache"))

    def telling(number, question):
        act = prefers_longer(number, question)
        return Act(f"{KEY} {act.text}")

    with judge_server(telling) as server:
        first = train(tmp_path / "first", server, "evaluation.judge_price=[1,2]")
        asked = len(server.seen)
        second = train(tmp_path / "second", server)
    assert (first.code, second.code) == (0, 0)
    assert asked > 0
    assert len(server.seen) == asked
    assert {header["Authorization"] for header in server.headers} == {f"Bearer {KEY}"}
    assert files_with(tmp_path, KEY) == []
    printed = capfd.readouterr()
    assert KEY not in printed.out + printed.err
    # The bound and the bill are in the run's log or on the terminal.
    told = printed.out + printed.err
    told += "".join(p.read_text() for p in (tmp_path / "first").glob("*.log"))
    assert "after the training 24 questions, at most" in told
    assert re.search(r"judge: \d+ requests, [\d,]+ tokens in and", told)
    metrics = first.result["metrics"]
    evaluation = json.loads((tmp_path / "first" / "evaluation.json").read_text())
    rows = evaluation["samples"]
    both = [(len(row["policy"]), len(row["reference"])) for row in rows]
    wins = [1.0 if own > other else 0.5 if own == other else 0.0 for own, other in both]
    assert [row["win"] for row in rows] == wins
    assert metrics["samples/win_rate"] == pytest.approx(sum(wins) / 12)
    assert second.result["metrics"]["samples/win_rate"] == metrics["samples/win_rate"]
    assert metrics["samples/judge_missing"] == 0
    assert unknown(names_written(first)) == set()
    assert {"samples/length", "samples/reference_length", "samples/cut_off",
            "samples/reference_cut_off", "samples/win_rate_low"} <= metrics.keys()  # fmt: skip
    assert evaluation["judge"].startswith(f"m at {server.url}, pairs, ")
    assert first.result["basis"]["judge"] == evaluation["judge"]


def test_a_judge_that_fails_costs_no_run_and_judges_later(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MY_JUDGE", KEY)
    monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(tmp_path / "cache"))
    down = True

    def act(number, question):
        return Act(f"wrong key {KEY}", status=401) if down else prefers_longer(number, question)

    with judge_server(act) as server:
        run = train(tmp_path / "run", server)
        assert run.code == 0
        assert run.result["status"] == "finished"
        assert (run.folder / "model" / "model.safetensors").is_file()
        assert "samples/kl" in run.result["metrics"]
        assert "samples/win_rate" not in run.result["metrics"]
        evaluation = json.loads((run.folder / "evaluation.json").read_text())
        assert "answers 401 (wrong key [hidden])" in evaluation["judge_failed"]
        told = "".join(capfd.readouterr())
        told += "".join(p.read_text() for p in run.folder.glob("*.log"))
        assert f"judge --answers {run.folder}` judges them later" in told
        down = False
        capfd.readouterr()
        assert judge(["--answers", str(run.folder), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["kept_in"] == str(run.folder)
    assert run.result["metrics"]["samples/win_rate"] == found["win_rate"]
    assert files_with(tmp_path, KEY) == []
