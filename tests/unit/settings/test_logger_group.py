"""The choice of loggers: one, several, none; what each of them needs."""

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.settings import logger_group
from dpo_lightning.settings.compose import compose_one, ready_hydra
from dpo_lightning.settings.logger_group import (
    are_loggers,
    chosen_loggers,
    logger_names,
    one_form,
)
from dpo_lightning.settings.overrides import needs_multirun, parse_overrides
from dpo_lightning.settings.schema import LoggerConfig


def chosen(*line: str) -> LoggerConfig:
    with ready_hydra():
        return compose_one([*line]).logger


@pytest.fixture(autouse=True)
def everything_installed(monkeypatch):
    monkeypatch.setattr(logger_group, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("typed", "recorded", "names"),
    [
        (["logger=[wandb,tensorboard]"], ["wandb", "tensorboard"], ("wandb", "tensorboard")),
        (["logger=mlflow", "logger.tracking_uri=http://here"], "mlflow", ("mlflow",)),
        (["logger=csv", "logger.name=none"], "none", ()),
        ([], "wandb", ("wandb",)),
    ],
)
def test_what_is_typed(typed, recorded, names):
    """The files of a list enter their names into one mapping; config.yaml has a name or a list."""
    config = chosen(*typed)
    assert config.name == recorded
    assert chosen_loggers(config) == names


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("logger=[]", "logger=[]: must be one of csv, mlflow, none, tensorboard, wandb"),
        ("logger=[csv,none]", "none is without any other; write logger=none or logger=[csv]"),
        ("logger=[csv,wand]", "logger=wand: unknown logger; available: csv, mlflow, none,"),
        ("logger.name=zandb", "did you mean logger.name=wandb?"),
        ("logger.log_model=true logger=csv", "logger=csv holds no models; add wandb or mlflow"),
        ("logger.tracking_uri=x logger=none", "is for mlflow, and logger=none; leave it out"),
        ("report_to=tensorboard", "use logger=tensorboard"),
    ],
)
def test_what_is_refused(typed, said):
    with pytest.raises(UserError) as caught:
        chosen(*typed.split())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_without_brackets_are_told_from_a_sweep():
    [override] = parse_overrides(["logger=wandb,csv"])
    assert needs_multirun(override).endswith("several loggers at once are logger=[wandb,csv]")


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_extra_is_said_with_its_command(monkeypatch, name):
    monkeypatch.setattr(logger_group, "find_spec", lambda package: None)
    with pytest.raises(UserError) as caught:
        chosen(f"logger=[csv,{name}]")
    assert f"logger=[csv,{name}] needs {name}" in str(caught.value)
    assert f'pip install "dpo-lightning[{name}]"' in str(caught.value)


@pytest.mark.parametrize(
    "value", [[], {}, ["csv", "csv"], {"csv": False}, [1], 3, None, "zandb", ["csv", ["none"]]]
)
def test_what_names_no_loggers(value):
    assert not are_loggers(value)


def test_a_name_a_list_and_the_files_come_to_one_form():
    assert [one_form(v) for v in ("csv", ["csv"], {"csv": True})] == ["csv"] * 3
    assert one_form({"csv": True, "wandb": True}) == ["csv", "wandb"]
    assert logger_names(["csv", "wandb"]) == ("csv", "wandb")
