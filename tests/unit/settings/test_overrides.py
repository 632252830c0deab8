"""Words of a command line and of a user's files that Hydra would answer less well."""

from pathlib import Path

import pytest

from dpo_lightning import cli
from dpo_lightning.settings.overrides import with_own_names
from tests.support.commands import own_place

GLOBAL = "# @package _global_\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("overrides")
    (folder / "a,b.jsonl").touch()
    with own_place(folder):
        yield folder


def said(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(line) == 2
    [text] = capsys.readouterr().err.splitlines()
    return str(text)


@pytest.mark.parametrize(
    ("content", "fragment", "mended"),
    [
        (
            "beta: 0.2\n",
            "experiment/mine.yaml: its keys were read as keys of experiment; make "
            "`# @package _global_` its first line",
            f"{GLOBAL}beta: 0.2\n",
        ),
        (
            f"{GLOBAL}defaults:\n  - override loss: ipo\n",
            "experiment/mine.yaml: `loss` in its defaults is looked for in the file's own folder; "
            "write `override /loss: <choice>`, with the slash",
            f"{GLOBAL}defaults:\n  - override /loss: ipo\n",
        ),
        (
            f"{GLOBAL}defaults:\n  - loss: ipo\n",
            "write `override /loss: <choice>`, with the slash",
            f"{GLOBAL}defaults:\n  - override /loss: ipo\n",
        ),
        (
            f"{GLOBAL}defaults:\n  - /loss: ipo\n",
            "write `override /loss: ipo` there",
            f"{GLOBAL}defaults:\n  - override /loss: ipo\n",
        ),
        (
            f"{GLOBAL}defaults:\n  - override /loss: dpo\n",
            "loss=dpo: unknown loss; available: ",
            f"{GLOBAL}defaults:\n  - override /loss: sigmoid\n",
        ),
    ],
    ids=["no global", "no slash", "no override", "neither", "another name"],
)
def test_a_file_of_ones_own(place, content, fragment, mended, capsys):
    line = ["--config-dir=own", "experiment=mine", f"hydra.run.dir={place / 'r'}"]
    path = place / "own" / "experiment" / "mine.yaml"
    path.write_text(content)
    assert fragment in said(line, capsys)
    path.write_text(mended)
    assert cli.main(line) == 0


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("data.train=a,b.jsonl", "separates values; write 'data.train=\"a,b.jsonl\"'"),
        ("data.train=a,c.jsonl", "one text that has commas is 'data.train=\"a,c.jsonl\"'"),
        ("--learning_rate=1e-5", "settings have no dashes; learning_rate: unknown key; use opt"),
        ("--learning_rate 1e-5", "settings have no dashes; learning_rate: unknown key; use opt"),
        ("--beta 0.1", "--beta: settings have no dashes; write beta=<value>"),
        ("--hydra.run.dir=x", "settings have no dashes; write hydra.run.dir=x"),
        (
            "loss_type=dpo lr=1e-5",
            "use loss=sigmoid (docs/objectives.md has their names elsewhere)",
        ),
    ],
)
def test_a_command_line(place, line, fragment, capsys):
    assert fragment in said(line.split(), capsys)


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("loss=dpo", "loss=sigmoid"),
        ("loss=DPO,ipo,SimPO", "loss=sigmoid,ipo,simpo"),
        ("loss=ipo", "loss=ipo"),
        ("loss=cdpo", "loss=cdpo"),
        ("loss.name=dpo", "loss.name=dpo"),
        ("loss=choice(dpo,ipo)", "loss=choice(dpo,ipo)"),
    ],
)
def test_a_loss_by_its_name_elsewhere_is_used_and_said(typed, ours, caplog):
    assert with_own_names(["beta=1", typed]) == ["beta=1", ours]
    said = [record.getMessage() for record in caplog.records]
    assert said == ([] if typed == ours else [f"{typed} is {ours} here: using that"])


def test_the_name_that_was_meant_is_what_runs(place, capsys):
    assert cli.main(["loss=dpo", "--cfg", "job"]) == 0
    assert "name: sigmoid" in capsys.readouterr().out
