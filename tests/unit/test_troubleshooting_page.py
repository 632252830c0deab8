"""The page of symptoms quotes messages that the program has, and names settings that there are."""

import re

import pytest

from dpo_lightning.settings.keys import settings
from tests.support.messages import messages
from tests.support.runs import ROOT

pytestmark = pytest.mark.docs  # parses every file of the package

PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = r"(?:\{\}|%\S*?[sdfg]|.)*?"


def quoted(page: str) -> list[str]:
    """First cells of the tables of messages."""
    tables = re.findall(r"\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", page)
    rows = [row for table in tables for row in table.splitlines()]
    cells = [re.match(r"\| `([^`]+)` \|", row) for row in rows]
    assert all(cells), [row for row, cell in zip(rows, cells, strict=True) if not cell]
    return [cell[1] for cell in cells if cell]


def is_said(words: str) -> bool:
    """True if one message has these words in their order; an ellipsis stands for what varies."""
    pattern = re.compile(GAP.join(map(re.escape, words.split("…"))))
    return any(pattern.search(line) for text in messages().values() for line in text.split("\n"))


def test_each_quoted_message_is_in_the_code():
    found = quoted(PAGE.read_text())
    assert len(found) == len({*found}) > 60
    assert [words for words in found if not is_said(words)] == []
    # A few letters would be found anywhere.
    assert [words for words in found if len(words) < 14] == []


def test_a_message_that_is_not_there_is_found_out():
    """Pieces have to stand in one message, and in their order."""
    assert is_said("data.max_dropped=…: … of … rows were dropped")
    assert not is_said("rows were dropped … data.max_dropped=")
    assert not is_said("data.max_dropped=…: … of … rows were thrown out")
    assert not is_said("the policy hardly moved … answers do not end")


def test_each_setting_of_the_page_is_one():
    page = PAGE.read_text()
    sections = "|".join(sorted({key.partition(".")[0] for key in settings() if "." in key}))
    named = {key for key in re.findall(rf"(?<![\w./])(?:{sections})\.[a-z_]+[\w.]*[a-z_]", page)}
    files = (".jsonl", ".ckpt", ".py", ".json", ".md")
    unknown = {key for key in named if not key.endswith(files)} - {*settings()}
    assert unknown == set()
    assert {"optimizer.lr", "data.max_length", "reference.cache_dir"} <= named
