"""The page on the architecture names files and functions that are there."""

import re

import pytest

from tests.support.runs import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
PATH = r"\b((?:\w+/)+\w+\.(?:py|md)|\w+/(?:\w+/)?)(?=`|\s)"
NAMED = sorted(set(re.findall(PATH, PAGE)))


@pytest.mark.parametrize("path", NAMED)
def test_what_is_named_is_there(path: str):
    parents = (ROOT, ROOT / "dpo_lightning", ROOT / "dpo_lightning" / "sweeps")
    training = ROOT / "dpo_lightning" / "training"
    assert any((parent / path).exists() for parent in (*parents, training)), path


def test_functions_that_are_named_are_there():
    code = "".join(path.read_text() for path in (ROOT / "dpo_lightning").rglob("*.py"))
    for name in ("RowReader", "plan_step", "GroupBatch", "compare_responses", "Destination"):
        assert name in PAGE
        assert re.search(rf"(class|def) {name}\b", code), name
