"""Help of the settings: every key has a sentence, and the page and ``--help`` show it."""

import re

import pytest

from dpo_lightning.settings.keys import Setting, settings
from dpo_lightning.settings.page import settings_help, settings_page
from tests.support.runs import ROOT

LEAVES = {key: setting for key, setting in settings().items() if not setting.is_section}


def faults(key: str, setting: Setting) -> list[str]:
    """Faults in what the schema says about a key."""
    found = []
    if not re.match(r"(.*[^.])\.$", setting.help, flags=re.S):
        found.append(f"{key}: its help is no sentence: {setting.help!r}")
    elif len(setting.help) > 220:
        found.append(f"{key}: its help is longer than a sentence should be")
    if re.match(r"(What|Whether|How|Where|Which)\b", setting.help):
        found.append(f"{key}: its help names no thing")
    if setting.kind in (int, float) and setting.unit is None:
        found.append(f"{key}: a number without a unit")
    return found


def test_every_key_has_a_sentence_and_every_number_a_unit():
    assert len(LEAVES) > 100
    assert [fault for key, setting in LEAVES.items() for fault in faults(key, setting)] == []


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        ({}, "no sentence"),
        ({"help": "No full stop"}, "no sentence"),
        ({"help": "Whether it is."}, "names no thing"),
        ({"help": "Steps."}, "without a unit"),
    ],
)
def test_a_key_without_one_is_found(rule, fault):
    [found, *_] = faults("a.key", Setting(int, False, 1, rule))
    assert fault in found


def test_the_page_is_that_of_the_schema():
    """`make docs` writes it anew."""
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page()


def test_the_page_has_each_key_once_with_its_default():
    rows = re.findall(r"^\| `([\w.]+)` \| .*? \| `(.*?)` \|", settings_page(), flags=re.M)
    assert [key for key, _ in rows] == list(LEAVES)
    shown = dict(rows)
    assert (shown["beta"], shown["trainer.max_steps"]) == ("0.1", "null")
    assert shown["optimizer.betas"] == "[0.9,0.999]"
    assert shown["loss.gamma"] == "0.5"


def test_help_lists_each_key_with_its_sentence():
    lines = settings_help().splitlines()
    assert all(len(line) <= 100 for line in lines)
    text = " ".join(line.strip() for line in lines)
    assert [line.partition("=")[0] for line in lines if not line.startswith(" ")] == list(LEAVES)
    for setting in LEAVES.values():
        assert setting.help.replace("$", "$$") in text
