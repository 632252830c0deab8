"""The first line of each docstring names the thing: a noun phrase, a verb, or "True if ..."."""

import ast
import re
from pathlib import Path

import pytest

from tests.support.runs import ROOT

FOLDERS = ("dpo_lightning", "hydra_plugins", "benchmarks", "tests")

_WORDS = "what|whether|how|where|which|who|whom|whose"
CLAUSE = re.compile(rf"((by|on|in|of|to|for|from|with) )?({_WORDS})\b", re.I)
"""Opening of a clause that stands for a name, such as "What the head takes"."""

QUOTED_CLAUSE = re.compile(rf'["\']\s*{CLAUSE.pattern}', re.I)

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def first_lines(code: str) -> list[tuple[int, str]]:
    """Line number and first line of each docstring of a module."""
    found = []
    for node in ast.walk(ast.parse(code)):
        said = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if said:
            found.append((node.body[0].lineno, said.partition("\n")[0]))
    return sorted(found)


def clauses(root: Path = ROOT) -> list[str]:
    """Docstrings that open with a clause, as ``file:line: first line``."""
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    found = []
    for path in [root / "train.py", *files]:
        name = path.relative_to(root).as_posix()
        code = path.read_text(encoding="utf-8")
        # Parsing all files would take seconds.
        if QUOTED_CLAUSE.search(code):
            found += [f"{name}:{n}: {line}" for n, line in first_lines(code) if CLAUSE.match(line)]
    return found


def test_no_docstring_opens_with_a_clause():
    found = clauses()
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("What a trial asks for.", True),
        ("Whether the order still counts.", True),
        ("By what a trial knows its parent.", True),
        ("On what terms jobs are submitted.", True),
        ("Whose prompts are answered.", True),
        ("Devices that a trial asks for.", False),
        ("True if the order still counts.", False),
        ("Whole tensors on rank 0.", False),
        ("Of the settings, those that count.", False),
    ],
)
def test_a_clause_is_told_from_a_name(text, wrong):
    assert bool(CLAUSE.match(text)) == wrong


def test_each_docstring_that_opens_with_a_clause_is_listed_with_its_place(tmp_path):
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    (tmp_path / "train.py").write_text('"""How to train."""\n')
    (tmp_path / "tests" / "test_it.py").write_text(
        '"""Tests."""\n\n\nclass It:\n    """\n    Where it is.\n    """\n\n'
        '    async def right(self):\n        """True if it is right."""\n\n'
        '        def inner():\n            """Which one,\n            in full."""\n'
    )
    assert clauses(tmp_path) == [
        "train.py:1: How to train.",
        "tests/test_it.py:5: Where it is.",
        "tests/test_it.py:13: Which one,",
    ]
