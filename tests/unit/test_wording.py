"""Messages in the words that were agreed on: short main clauses, and none of the old phrases."""

import re

import pytest

from dpo_lightning.settings.page import settings_help
from tests.support.messages import messages
from tests.support.runs import ROOT

pytestmark = pytest.mark.slow  # parses every file of the package

AGREED = {
    "of 32 groups": ("prompts, learning rate", "run/header.py"),
    "groups ({}), {} warm-up": ("{} x {} prompts ({}), learning rate", "run/inspect/content.py"),
    "of warm-up": ("warm-up {}", "run/header.py"),
    "the policy's start, frozen, cached": ("initial policy", "run/header.py"),
    "are computed once and kept": (
        "computing reference log-probs (cached for later runs)",
        "reference/fill.py",
    ),
    "tokens at once": ("micro-batches of up to {} tokens", "run/header.py"),
    "merge with a response and are scored with it": (
        "rows the tokenizer merged prompt and response; those tokens count as response",
        "data/tokens.py",
    ),
    "dropped: 6 identical_responses": ("chosen equals rejected", "data/tokens.py"),
    "the trained policy / quantity": ("final evaluation", "tracking/display.py"),
    "quantity": ("metric", "tracking/display.py"),
    "rounded by chance": ("Stochastic rounding", "settings/conduct.py"),
    "so that no step is lost": ("of their last digit survive", "settings/conduct.py"),
    "no such choice": ("; available: ", "settings/messages.py"),
    "needs a finite number, above 0": ("a finite number", "settings/messages.py"),
    "goes on from": ("resuming from", "training/checkpoints/files.py"),
    "does what is missing": ("runs only the missing trials", "settings/conduct.py"),
}
"""Samples that are messages of the program: the old words, the agreed ones and their file."""

OF_PAGES = [
    *("is a sweep away", "What one changes", "What a run leaves", "What survives what"),
    *("with what composes over them", "less is to be won", "is for a scorer to say"),
    *("find a start in", "constraints.txt` anew", "constraints.txt anew"),
]
"""Samples that stand in pages, or stood there."""

KINDS_OF_PAGES = ["to the bit", "undisturbed", "rounded by chance", "composes over", "made anew"]
"""Other old words, which a page may have only in the name of something."""

AGREED_OF_PAGES = [
    "One sweep shows what β does",
    "the gain is smaller",
    "## Key settings",
    "## Run outputs",
    "with stochastic rounding, so that small updates survive",
    "with modifiers that combine with them",
    "# Fault tolerance",
    "finishes bit-identical to an uninterrupted run",
    "To use W&B agents, start from",
    "regenerate constraints.txt",
]
"""Samples that stand in pages, in the words that were agreed on."""

PAGES = [
    *("README.md", "CONTRIBUTING.md", "Makefile"),
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))),
]

OF_THEIR_KIND = [
    *(
        "is to be won",
        "to the bit",
        "composes over",
        "going on from",
        "there is none of",
        "have it opened to you",
        "mend it",
        "mend that",
        "does not suffice",
    ),
    *("is known of the", "begins anew", "written anew", "write it anew", "by now: using"),
    *("nobody was asked", "names nobody", "are there already", "shows all there are"),
    *("its like", "if you know better", "what helps, each alone", "passed over in a run"),
    *(
        "is of a hub id",
        "is of a server",
        "is of an endpoint",
        "is of mlflow",
        "says what it is of",
        "is at work there",
        "judged no more",
        "were nonsense",
        "question of ours",
        "lets them go on",
        "knows nothing of",
        "are common to both",
        "not here;",
    ),
]


def where(words: str) -> list[str]:
    """Files of which a message has these words, in capital letters or small ones."""
    pattern = re.compile(rf"(?<!\w){re.escape(words)}", re.I)
    return [file for file, text in messages().items() if pattern.search(text)]


def test_the_old_words_are_in_no_message():
    found = {old: where(old) for old in (*AGREED, *OF_PAGES, *OF_THEIR_KIND)}
    assert {old: files for old, files in found.items() if files} == {}


def test_the_agreed_words_are_in_their_place():
    missing = [(new, file) for new, file in AGREED.values() if new not in messages()[file]]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_the_old_words_are_in_no_page(page: str):
    """Names of tests and of files may have them."""
    text = re.sub(r"`[^`]*`", "", (ROOT / page).read_text())
    text = " ".join(text.split()).lower()
    old = [words for words in (*OF_PAGES, *KINDS_OF_PAGES) if words.lower() in text]
    assert old == []


def test_the_agreed_words_are_in_some_page():
    text = " ".join(" ".join((ROOT / page).read_text().split()) for page in PAGES)
    assert [words for words in AGREED_OF_PAGES if words not in text] == []


def test_a_phrase_that_is_there_is_found():
    """Over the pieces of an f-string, and over lines of source; a docstring is no message."""
    assert where("those tokens count as response") == ["data/tokens.py"]
    assert where("unknown key; `{}") == ["settings/messages.py"]
    assert where("Boundary between a command and its user") == []


def test_help_of_settings_begins_with_no_superlative_for_a_bound():
    """A bound is a maximum, and not the most of something."""
    entries = [line.strip() for line in settings_help().splitlines()]
    assert [line for line in entries if re.match(r"Most (?!of)", line)] == []
