"""The README: its length, its badges, and the links of it and of the pages that it leads to."""

import re
import tomllib

import pytest

from tests.support.runs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))),
]


def test_the_readme_fits_on_three_screens_and_its_badges_are_true():
    text = README
    assert text.count("\n") <= 150
    versions = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if ":: 3." in c]
    badges = re.findall(r"\[!\[([^]]*)\]\(https://img\.shields\.io/badge/(\S+)\)\]", text)
    assert [words for words, _ in badges] == [
        f"Python {', '.join(versions)}",
        f"License {PROJECT['license']}",
    ]
    assert [shown.replace("%20%7C%20", ", ").replace("--", "_") for _, shown in badges] == [
        f"python-{', '.join(versions)}-blue",
        f"license-{PROJECT['license'].replace('-', '_')}-blue",
    ]


TERMS = {
    "DPO": r"\[Direct Preference Optimization\]\(https://\S+\) \(DPO\)",
    "policy": r"the \*policy\*",
    "β": r"strength \*\*β\*\* of the tie to",
    "reference": r"the \*reference\*, which is",
    "embedded task": r"\[embedded task\]\(",
    "KL": r"\*\*KL\*\* divergence from",
    "nats": r"\*nats\* per answer \(",
    "frontier": r"points of all β are the \*\*frontier\*\*",
    "partition function": r"\*\*partition function\*\* Z\(x\) sums over",
    "pick": r"The \*\*pick\*\* is the β that",
    "held-out": r"\*held-out\* rows, which no",
    "undecided": r"cannot tell, it says \*undecided\*",
    "group": r"A row is a \*\*group\*\*: a",
}
"""Terms of the first screens, and the words that define or link each."""


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_defined_or_linked_where_it_is_used_first(term: str):
    """Text alone counts: neither commands nor the words that stand for a picture."""
    text = re.sub(r"^```.*?^```|`[^`]*`|!\[[^]]*\]\([^)]*\)", "", README, flags=re.S | re.M)
    text = " ".join(text.split())
    first = re.search(rf"(?<!\w){term}", text)
    defined = re.search(TERMS[term], text)
    assert first is not None
    assert defined is not None
    assert defined.start() <= first.start() < defined.end()


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_are_there(page: str):
    """Files, and headings in them, as they are named on the page."""
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", (ROOT / page).read_text()):
        name, _, heading = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.M)
            assert heading in {anchor(title) for title in titles}, target


def anchor(title: str) -> str:
    """The name of a heading in a link."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
