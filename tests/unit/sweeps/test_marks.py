"""A leaderboard's CSV, read back into the report of the sweep whose answers it marks."""

import json
from pathlib import Path

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.sweeps.report.marks import kept_marks, read_marks
from dpo_lightning.sweeps.report.read import Sweep, read_sweep
from dpo_lightning.sweeps.report.write import main
from tests.support.sweep_folders import write_trial


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for beta in ("0.1", "0.5", "1"):
        write_trial(tmp_path / "s", f"beta-{beta}", f"beta={beta}")
    write_trial(tmp_path / "s", "beta-2", "beta=2", status="failed")
    return tmp_path / "s"


def board(folder: Path, *lines: str) -> Path:
    path = folder.parent / "leaderboard.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def sweep(folder: Path) -> Sweep:
    return read_sweep(folder)


def test_rows_are_matched_by_the_trials_name_as_alpaca_eval_writes_them(folder):
    """Its first column has no name; a text column is kept, an empty cell is no number."""
    path = board(
        folder,
        ",win_rate,mode,avg_length",
        "gpt,50,minimal,2049",
        "beta-0.5,12.5,,800.0",
        "beta-0.1,31,own,",
    )
    found = read_marks(path, sweep(folder))
    assert found.columns == ("win_rate", "mode", "avg_length")
    assert found.trials == {
        "beta-0.5": {"win_rate": 12.5, "mode": None, "avg_length": 800.0},
        "beta-0.1": {"win_rate": 31.0, "mode": "own", "avg_length": None},
    }
    assert (found.unmatched, found.without) == (("gpt",), ("beta-1",))
    table = found.table(sweep(folder))
    assert [row[0] for row in table.rows] == ["beta-0.1", "beta-0.5"]  # the best first
    assert "gpt" in table.text
    assert "beta-1" in table.text


@pytest.mark.parametrize("head", ["name", "Model", "generator"])
def test_a_named_column_says_whose_a_row_is(folder, head):
    found = read_marks(board(folder, f"win_rate,{head}", "3,beta-1"), sweep(folder))
    assert found.trials == {"beta-1": {"win_rate": 3.0}}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["name,a", "gpt,1"], "none of its 1 rows (gpt) is a trial's"),
        (["name,a", "beta-1,1", "beta-1,2"], "leaderboard.csv:3: beta-1 is there twice"),
        (["name,a", "beta-1,1,2"], "leaderboard.csv:2: 3 cells under 2 heads"),
        (["score,a", "1,2"], "no column names the model of a row"),
        (["name,a", '"beta-1'], "cannot be read as CSV"),
    ],
)
def test_a_wrong_table_is_named(folder, lines, said):
    with pytest.raises(UserError) as caught:
        read_marks(board(folder, *lines), sweep(folder))
    assert said in str(caught.value)


def test_marks_stay_in_the_report_until_there_are_others(folder):
    entry = read_marks(board(folder, "name,a", "beta-1,1"), sweep(folder)).entry()
    kept = kept_marks(json.loads(json.dumps(entry)), sweep(folder))
    assert kept is not None
    assert (kept.trials, kept.without) == ({"beta-1": {"a": 1.0}}, ("beta-0.1", "beta-0.5"))
    for damaged in (None, [], {"trials": 3}, {"trials": {"beta-1": 3}}, {"trials": {"x": {}}}):
        assert kept_marks(damaged, sweep(folder)) is None


@pytest.mark.slow  # writes reports with their pictures
def test_the_report_shows_them_and_keeps_them(folder, capsys):
    path = board(folder, "name,win_rate", "beta-1,17.25", "other,3")
    assert main([str(folder), "--marks", str(path)]) == 0
    out = capsys.readouterr().out
    assert "marks     1 trials, win_rate" in out
    assert "rows of no trial: other" in out
    assert "trials without a row: beta-0.1, beta-0.5" in out
    for again in (False, True):
        if again:
            assert main([str(folder)]) == 0
        said = json.loads((folder / "sweep.json").read_text())["marks"]
        assert said["trials"] == {"beta-1": {"win_rate": 17.25}}
        assert "Marks of leaderboard.csv" in (folder / "report.html").read_text()
        assert "17.2" in (folder / "report.md").read_text()
    assert main([str(folder), "--marks", str(folder / "none.csv")]) == 2
    assert "no such file" in capsys.readouterr().err
