"""The table of faults names tests that are there."""

import ast
import re

from tests.support.runs import ROOT

PAGE = ROOT / "docs" / "reliability.md"


def known_tests() -> dict[str, bool]:
    """Every test function, and whether it or its module is of the fault suite."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        whole = "pytestmark = pytest.mark.faults" in text
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = {ast.unparse(mark) for mark in node.decorator_list}
                found[node.name] = whole or "pytest.mark.faults" in marks
    return found


def named() -> list[tuple[str, str]]:
    """The sign before each test of the page, and its name."""
    return re.findall(r"(⚑ )?`(test_\w+)`", PAGE.read_text())


def test_every_test_of_the_page_exists_and_is_of_the_suite_it_says():
    tests = known_tests()
    assert len(named()) > 20
    for flag, name in named():
        assert name in tests, name
        assert tests[name] == bool(flag), name


def test_every_row_has_a_fault_a_promise_and_a_test():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    kept = [row for row in rows if not row.startswith(("| Fault ", "|---"))]
    assert len(kept) > 15
    for row in kept:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 3, row
        assert all(cells), row
        assert "`test_" in cells[2], row
