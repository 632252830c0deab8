"""Examples in the docstrings of the objectives: each public function has one, and it is right."""

import doctest
import importlib
import inspect

import pytest

from dpo_lightning import objectives
from tests.support.runs import ROOT

MODULES = sorted(
    path.stem
    for path in (ROOT / "dpo_lightning" / "objectives").glob("*.py")
    if ">>>" in path.read_text()
)
PUBLIC = [name for name in objectives.__all__ if callable(getattr(objectives, name))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_say_what_comes_out(name):
    result = doctest.testmod(importlib.import_module(f"dpo_lightning.objectives.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_each_public_function_has_an_example(name):
    assert ">>>" in (inspect.getdoc(getattr(objectives, name)) or "")
