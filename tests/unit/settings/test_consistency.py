"""Settings that may not stand together: for each clause a line that it refuses, and one it lets be.

The accepted line of a row is the nearest that is right, so that no clause is wider than it should
be. Every clause of ``combinations.py`` is found in its source and must be that of some row.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT
from tests.support.setting_rows import ROWS, Row
from tests.support.settings_said import installed, make_files, said


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with what the rows name; bitsandbytes is there."""
    make_files(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", installed("bitsandbytes"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.refused)
def test_a_clause_refuses_its_line_and_not_the_nearest_right_one(
    row: Row, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(row.accepted) == []
    if row.without:
        monkeypatch.setitem(sys.modules, row.without, None)
    [clause] = said(row.refused)
    assert row.message in clause
    assert "\n" not in clause


# Every clause has a row -------------------------------------------------------------------------


def clauses() -> dict[str, re.Pattern[str]]:
    """Patterns of the clauses' words, by the place where each clause stands."""
    folder = ROOT / "dpo_lightning" / "settings"
    checks = ast.parse((folder / "combinations.py").read_text())
    names = ("pruning.py", "judging.py", "selection.py", "moving_reference.py", "rounds.py")
    others = [node for name in names for node in ast.walk(ast.parse((folder / name).read_text()))]
    found = {}
    for node in (*ast.walk(checks), *others):
        if isinstance(node, ast.Yield):
            message = node.value
        elif isinstance(node, ast.YieldFrom) and isinstance(node.value, ast.GeneratorExp):
            message = node.value.elt
        else:
            # What is wrong with all trials together is raised, not with one of them.
            raised = isinstance(node, ast.Raise) and node in ast.walk(checks)
            assert not raised, f"line {node.lineno}: a clause is yielded"
            continue
        assert isinstance(message, ast.Constant | ast.JoinedStr), f"line {node.lineno}: no text"
        parts = message.values if isinstance(message, ast.JoinedStr) else [message]
        pattern = "".join(
            re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in parts
        )
        found[f"line {node.lineno}: {ast.unparse(message)}"] = re.compile(pattern)
    return found


def test_every_clause_is_that_of_some_row(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message is by the clause with the most words, of those whose words it has."""
    known = clauses()
    assert len(known) > 50
    spoken = set()
    for row in ROWS:
        with monkeypatch.context() as patch:
            if row.without:
                patch.setitem(sys.modules, row.without, None)
            [clause] = said(row.refused)
        fitting = [where for where, pattern in known.items() if pattern.fullmatch(clause)]
        if not fitting:
            # The search for files has words of its own, which its tests know.
            assert clause.startswith(("data.train=", "data.eval=", "data.eval: ", "data.eval.")), (
                clause
            )
            continue
        spoken.add(max(fitting, key=lambda where: len(known[where].pattern)))
    assert sorted(known.keys() - spoken) == []
