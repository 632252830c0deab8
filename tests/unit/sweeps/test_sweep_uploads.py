"""The last lines of a sweep: its report in wandb, and the command that uploads its runs."""

from pathlib import Path
from typing import Any

import pytest

from dpo_lightning.settings.schema import LoggerConfig
from dpo_lightning.sweeps import finish
from dpo_lightning.sweeps.trials import SweepFacts

REPORT: dict[str, Any] = {"trials": [], "pick": None}


def lines(folder: Path, logger: Any, where: str | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    asked = []

    def report_sweep(*arguments: Any, **named: Any) -> str | None:
        asked.append(named)
        return where

    monkeypatch.setattr(finish, "report_sweep", report_sweep)
    facts = SweepFacts(folder, True, None, LoggerConfig(name=logger))
    found = finish._to_wandb(facts, REPORT)
    assert len(asked) == ("wandb" in logger)
    return found


def test_one_line_uploads_all_trials_and_the_report(tmp_path, monkeypatch):
    for trial in ("beta-0.1", "beta-0.2"):
        (tmp_path / trial / "wandb" / "offline-run-1-a").mkdir(parents=True)
    (tmp_path / "wandb" / "offline-run-1-b").mkdir(parents=True)
    everything = f"wandb sync {tmp_path}/wandb/offline-run-* {tmp_path}/*/wandb/offline-run-*"
    own = f"wandb sync {tmp_path}/wandb/offline-run-1-b"
    assert lines(tmp_path, ["csv", "wandb"], own, monkeypatch) == [everything]
    # A report that is online has an address, and the trials that are not their command.
    url = "https://wandb/me/p/runs/b"
    assert lines(tmp_path, "wandb", url, monkeypatch) == [url, everything]
    assert lines(tmp_path, {"wandb": True}, None, monkeypatch) == [everything]


def test_without_recordings_there_is_the_address_alone(tmp_path, monkeypatch):
    assert lines(tmp_path, "wandb", "https://wandb/x", monkeypatch) == ["https://wandb/x"]
    assert lines(tmp_path, "wandb", None, monkeypatch) == []
    assert lines(tmp_path, ["csv"], "https://wandb/x", monkeypatch) == []
