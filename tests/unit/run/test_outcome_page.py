"""The page of what a run writes is made from the code, and has all of it."""

import re
from dataclasses import fields

from dpo_lightning.run.outcome_page import outcome_page
from dpo_lightning.run.record import RunRecord
from dpo_lightning.settings import metric_names
from dpo_lightning.settings.metric_meanings import OF_RESPONSES, OF_STEPS, WHOLE_NAMES
from tests.support.runs import ROOT


def test_the_page_is_that_of_the_code():
    """`make docs` writes it anew."""
    assert (ROOT / "docs" / "outcomes.md").read_text() == outcome_page()


def test_each_metric_has_a_meaning_and_no_other_has():
    assert [*OF_RESPONSES] == [*metric_names._OF_RESPONSES]
    assert {*OF_STEPS} == {*metric_names._OF_STEPS}
    assert [*WHOLE_NAMES] == [*metric_names._WHOLE_NAMES]
    for own in (OF_RESPONSES | OF_STEPS | WHOLE_NAMES).values():
        assert own.says.endswith(".")


def test_entries_and_codes_are_there():
    page = outcome_page()
    entries = re.findall(r"^\| `(\w+)` \| ", page.partition("## result.json")[2], flags=re.M)
    assert entries == [own.name for own in fields(RunRecord)]
    codes = re.findall(r"^\| (\d+) \| ", page, flags=re.M)
    assert codes == ["0", "1", "2", "3", "4", "130", "143"]
    assert "| `eval/fitted_log_loss` | " in page
    row = next(line for line in page.splitlines() if line.startswith("| `loss` "))
    assert "| less |" in row
