"""The Python reference is made from the code, and has all that is public, as it is called."""

import importlib
import inspect
import re
from dataclasses import fields, is_dataclass

import pytest

from dpo_lightning.run.api_page import MODULES, api_page, find_definition
from dpo_lightning.run.docstrings import markdown_of, summary_of
from tests.support.runs import ROOT

PAGE = api_page()


def section(name: str) -> str:
    """Text below the heading of a name, up to the next one."""
    [found] = re.findall(rf"^### `{name}`\n(.*?)(?=^##|\Z)", PAGE, flags=re.S | re.M)
    return found


def test_the_page_is_that_of_the_code():
    """`make docs` writes it anew."""
    assert (ROOT / "docs" / "api.md").read_text() == PAGE


@pytest.mark.parametrize("module", MODULES)
def test_each_public_name_is_there_with_what_it_takes(module: str):
    """Compared with what Python itself says of the imported object."""
    imported = importlib.import_module(f"dpo_lightning.{module}")
    for name in imported.__all__:
        text, found = section(name), getattr(imported, name)
        if inspect.isfunction(found):
            code = text.partition("```python\n")[2].partition("```")[0]
            inside = code.partition("(")[2]
            for own in inspect.signature(found).parameters:
                assert re.search(rf"(^|[ *(]){own}\b", inside, flags=re.M), (name, own)
        elif is_dataclass(found):
            for own in fields(found):
                assert f"\n    {own.name}: " in text, (name, own.name)
        if inspect.isfunction(found) or inspect.isclass(found):
            first = inspect.getdoc(found).split("\n\n")[0]
            assert summary_of(first) in text


def test_a_name_of_two_modules_has_one_section():
    assert PAGE.count("### `register_loss`") == 1
    assert "`register_loss` is [that of `dpo_lightning.plugins`](#register_loss)." in PAGE


def test_a_docstring_becomes_paragraphs_lists_and_code():
    text = markdown_of(
        inspect.cleandoc(
            """Takes ``x`` to *p* times :func:`y`.

            More of
            it.

            Args:
                x: Of shape (B,),
                    in nats.
                **options: Others.

            Raises:
                ValueError: If it is none.

            Example:
                Of two:

                >>> f(2)
                4
            """
        )
    )
    assert text.split("\n\n") == [
        r"Takes `x` to \*p\* times `y`.",
        "More of it.",
        "**Args**",
        "- `x`: Of shape (B,), in nats.\n- `**options`: Others.",
        "**Raises**",
        "- `ValueError`: If it is none.",
        "**Example**",
        "Of two:",
        "```pycon\n>>> f(2)\n4\n```",
    ]


def test_a_name_that_nothing_defines_is_an_error(tmp_path):
    (tmp_path / "api.py").write_text("from dpo_lightning.below import f\n\n__all__ = ['f']\n")
    (tmp_path / "below.py").write_text("def f(a, *, b: int = 2) -> int:\n    '''Adds.'''\n")
    place, found = find_definition(tmp_path, "api", "f")
    assert (place, found.doc) == ("below", "Adds.")
    with pytest.raises(LookupError, match="api: no source defines g"):
        find_definition(tmp_path, "api", "g")
