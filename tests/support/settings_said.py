"""Answers of the settings to a line of them, in a folder with files that it may name."""

import functools
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import yaml
from omegaconf import OmegaConf

from dpo_lightning.errors import UserError
from dpo_lightning.run.inputs import read_sources
from dpo_lightning.settings.combinations import inconsistencies
from dpo_lightning.settings.schema import Config
from dpo_lightning.settings.validation import validate
from tests.support.setting_rows import FILES

_OF_THE_COMMAND = ("-m", "hydra.run.dir=r", "hydra/launcher=devices")


def make_files(folder: Path) -> None:
    """Files that the rows name."""
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def installed(name: str) -> ModuleType:
    """A package that is there, as far as one asks."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    return module


def said(line: str) -> list[str]:
    """The clauses about settings, as a command line has them; ``-m`` is a sweep in this process."""
    config = Config()
    words = line.split()
    for word in words:
        if word in _OF_THE_COMMAND:
            continue
        key, _, text = word.partition("=")
        *sections, leaf = key.split(".")
        section = functools.reduce(getattr, sections, config)
        value = yaml.safe_load(text)
        if isinstance(section, dict):
            section[leaf] = value
        else:
            assert hasattr(section, leaf), key
            setattr(section, leaf, value)
    in_process = "-m" in words and "hydra/launcher=devices" not in words
    return list(
        inconsistencies(config, multirun=in_process, explicit_run_dir="hydra.run.dir=r" in words)
    )


def judged(line: str) -> list[str]:
    """The one line about values that are refused; empty where none is."""
    cfg = OmegaConf.structured(Config)
    for word in line.split():
        key, _, text = word.partition("=")
        OmegaConf.update(cfg, key, yaml.safe_load(text), force_add=True)
    try:
        validate(cfg)
    except UserError as error:
        return [str(error)]
    return []


def read(line: str) -> list[str]:
    """The one line about the rows that the settings name; empty where they are read."""
    cfg = OmegaConf.structured(Config)
    for word in line.split():
        key, _, text = word.partition("=")
        OmegaConf.update(cfg, key, yaml.safe_load(text), force_add=True)
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    try:
        read_sources(config, Path.cwd(), when_begun=lambda write: write())
    except UserError as error:
        return [str(error)]
    return []
