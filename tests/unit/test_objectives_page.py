"""The page on objectives agrees with the registry, and its commands and examples work."""

import re
import shlex
import sys
from collections import Counter

import pytest
import yaml
from hydra.core.config_store import ConfigStore

from dpo_lightning import plugins
from dpo_lightning.objectives import registry
from dpo_lightning.objectives.listwise import LISTWISE_LOSSES
from dpo_lightning.objectives.objective import ObjectiveSettings, known_losses
from tests.support.pages import check_command_of_page
from tests.support.runs import ROOT

PAGE = (ROOT / "docs" / "objectives.md").read_text()
HEADER = ["loss", "of a pair", "options", "reference", "elsewhere"]

# Without what plugins of other tests may have registered in this process.
known_losses()
PAIRWISE = {
    name: entry
    for name, entry in registry.PAIRWISE_LOSSES.items()
    if entry.fn.__module__ == "dpo_lightning.objectives.losses"
}
LOSSES = (*PAIRWISE, *registry.LISTWISE_LOSSES, *registry.UNPAIRED_LOSSES)
WITH_OPTIONS = {**PAIRWISE, **registry.UNPAIRED_ENTRIES}
FILES = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf/loss").glob("*")}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def table(header: list[str]) -> list[list[str]]:
    """The rows of the one table of the page with these columns."""
    lines = PAGE.splitlines()
    [start] = [i for i, line in enumerate(lines) if line.startswith("|") and cells(line) == header]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(cells(line))
    return rows


def rows_of(name: str) -> list[list[str]]:
    return [row for row in table(HEADER) if f"`{name}`" in row[0]]


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S)
    return [line for block in blocks for line in block.splitlines()]


def test_every_loss_has_one_row_and_every_row_is_a_loss():
    named = Counter(re.match(r"\[?`(\w+)`", row[0]).group(1) for row in table(HEADER))
    assert set(named.values()) == {1}
    assert set(named) == {*LOSSES, *FILES}
    assert all(len(row) == len(HEADER) and all(row) for row in table(HEADER))


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_has_the_paper(name: str):
    [row] = rows_of(name)
    paper = (WITH_OPTIONS.get(name) or LISTWISE_LOSSES[name]).paper
    link = re.match(r"https://[^\s,]+", paper)
    assert row[0].startswith(f"[`{name}`]({link.group()})" if link else f"`{name}` (")


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_has_the_options_with_their_defaults_and_bounds(name: str):
    [row] = rows_of(name)
    schema = WITH_OPTIONS[name].schema if name in WITH_OPTIONS else {}
    assert set(re.findall(r"`(\w+)=", row[2])) == set(schema)
    # What loss=<name> gives: the file of the loss wins.
    for option, entry in schema.items():
        value = FILES.get(name, {}).get(option, entry.default)
        bounds = entry.expected().partition(", ")[2]
        assert f"`{option}={value:g}` {bounds}" in row[2]


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_says_whether_a_reference_is_needed(name: str):
    [row] = rows_of(name)
    objective = ObjectiveSettings(terms={name: 1.0})
    needed = "needed" if objective.needs_reference else "optional"
    assert row[3] == (needed if objective.uses_reference else "unused")


@pytest.mark.parametrize("name", sorted(name for name, file in FILES.items() if "terms" in file))
def test_a_sum_shows_its_weights(name: str):
    [row] = rows_of(name)
    assert re.findall(r"`(\w+): ([\d.]+)`", row[1]) == [
        (term, f"{weight:g}") for term, weight in FILES[name]["terms"].items()
    ]
    objective = ObjectiveSettings(terms=FILES[name]["terms"])
    assert row[3] == ("needed" if objective.needs_reference else "optional")


def test_every_divergence_has_a_row_and_the_losses_that_take_it_are_named():
    rows = table(["`f_divergence`", "score instead of s = log t"])
    assert tuple(row[0].strip("`") for row in rows) == registry.DIVERGENCES
    paragraph = re.search(r"For the losses on the margin: (.*?), alone", PAGE, flags=re.S).group(1)
    named = re.findall(r"`(\w+)`", paragraph)
    assert named == [name for name, entry in PAIRWISE.items() if entry.on_margin]


def test_the_losses_that_need_a_whole_step_are_named():
    [sentence] = re.findall(r"need a whole step at once\.\*\* In (.*?) the loss", PAGE, flags=re.S)
    named = set(re.findall(r"`(\w+)`", sentence))
    assert named == {name for name, entry in PAIRWISE.items() if entry.couples}


REGISTRIES = (registry.PAIRWISE_LOSSES, plugins.SCORERS, plugins.CALLBACKS, plugins.OPTIMIZERS)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the page's modules; what they register and import is forgotten."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = [dict(entries) for entries in REGISTRIES]
    modules = dict(re.findall(r"```python\n# (\w+)\.py(.*?)```", PAGE, flags=re.S))
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(f"#{text}")
    yield tmp_path
    for name in modules:
        sys.modules.pop(name, None)
    for group, number in (("loss", 0), ("optimizer", 3)):
        choices = ConfigStore.instance().repo.get(group, {})
        for name in REGISTRIES[number].keys() - before[number].keys():
            choices.pop(f"{name}.yaml", None)
    for entries, old in zip(REGISTRIES, before, strict=True):
        entries.clear()
        entries.update(old)


@pytest.mark.docs
@pytest.mark.parametrize("command", commands())
def test_every_command_composes_and_validates(command: str, place, monkeypatch):
    words = shlex.split(command)
    assert words[:2] == ["python", "train.py"]
    check_command_of_page(words[2:], place, monkeypatch)
