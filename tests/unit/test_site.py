"""The site has each page of docs/ once, and nothing of it is fetched from elsewhere."""

import re
import tomllib
from collections.abc import Iterator
from typing import Any

from tests.support.runs import ROOT


def pages_of(nav: list[dict[str, Any]]) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from pages_of(value)


def test_each_page_is_in_the_navigation_once():
    project = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
    found = sorted(pages_of(project["nav"]))
    docs = ROOT / "docs"
    assert found == sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    assert project["theme"]["font"] is False


def test_a_long_page_begins_with_its_contents():
    """More than 1,000 words are too many to scroll through; tables made from code have sections."""
    without = [
        path.name
        for path in (ROOT / "docs").rglob("*.md")
        if len(path.read_text().split()) > 1000 and "](#" not in path.read_text()[:3000]
    ]
    assert without == []


def test_links_to_pages_stay_inside_the_site():
    """The site's builder stops at a page that it does not have."""
    docs = ROOT / "docs"
    outside = [
        f"{path.name}: {target}"
        for path in sorted(docs.rglob("*.md"))
        for target in re.findall(r"\]\((?!https?://)([^)#]+\.md)", path.read_text())
        if docs not in (path.parent / target).resolve().parents
    ]
    assert outside == []
