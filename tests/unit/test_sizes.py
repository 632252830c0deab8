"""Lengths of functions and widths of constructors, over the whole package."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.runs import ROOT

PACKAGE = ROOT / "dpo_lightning"

MOST_LINES = 60
MOST_LINES_OF_95_PERCENT = 35
MOST_PARAMETERS = 12

LONG_FUNCTIONS = {
    "objectives/closed_form.py:fit_tabular_policy": "public: 41 lines come before its code",
    "objectives/pairwise.py:pairwise_loss": "public: 62 lines come before its code",
}

WIDE_CONSTRUCTORS = {
    "api.py:Result": "the entries of result.json, for who reads it",
    "settings/schema.py:Config": "the settings as one tree; each field is a group or a key",
    "settings/material.py:DataConfig": "a group of settings, a key each",
    "settings/conduct.py:EvaluationConfig": "a group of settings, a key each",
    "settings/conduct.py:TrainerConfig": "a group of settings, a key each",
    "data/packing.py:GroupBatch": "tensors of one layout, made in one place and read by name",
    "memory/footprint.py:Training": "facts that one formula takes, replaced one at a time",
    "run/typed_answers.py:FrontierPoint": "the entries of a point in JSON, for who reads it",
    "run/record.py:RunRecord": "the entries of result.json, in its order",
    "run/page/content.py:RunContent": "the texts of a run's page, for one template",
    "sweeps/report/content.py:ReportContent": "the texts of a report, for one template",
}
"""Data records alone; what does something takes small typed values."""


def files_of(package: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package).as_posix(), ast.parse(path.read_text())


def lengths(package: Path = PACKAGE) -> list[tuple[str, int]]:
    """Lines of each function from its name to its end, docstring included."""
    return [
        (f"{file}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1)
        for file, tree in files_of(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def parameters(node: ast.ClassDef) -> int:
    """Parameters of a class: those of its own ``__init__``, or the fields of a dataclass."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            own = item.args
            return len([*own.posonlyargs, *own.args, *own.kwonlyargs]) - 1
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return sum(isinstance(item, ast.AnnAssign) for item in node.body)
    return 0


def widths(package: Path = PACKAGE) -> dict[str, int]:
    return {
        f"{file}:{node.name}": parameters(node)
        for file, tree in files_of(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def percentile(values: list[int]) -> int:
    """The length that 95 of 100 functions do not exceed."""
    return sorted(values)[int(0.95 * len(values))]


def test_a_function_fits_on_a_screen():
    found = {name: lines for name, lines in lengths() if lines > MOST_LINES}
    assert found.keys() == LONG_FUNCTIONS.keys(), found


def test_most_functions_are_short():
    all_lines = [lines for _, lines in lengths()]
    print(f"{len(all_lines)} functions, 95 of 100 have at most {percentile(all_lines)} lines")
    assert percentile(all_lines) <= MOST_LINES_OF_95_PERCENT


def test_a_constructor_takes_few_values():
    found = {name: count for name, count in widths().items() if count > MOST_PARAMETERS}
    assert found.keys() == WIDE_CONSTRUCTORS.keys(), found


# The tests see what they are about ----------------------------------------------------------------


def test_lines_and_parameters_are_counted(tmp_path):
    """A docstring counts, ``self`` and class variables without a type do not."""
    (tmp_path / "a.py").write_text(
        "@dataclass(frozen=True)\nclass A:\n    x: int\n    y: int = 1\n    z = 2\n\n"
        "class B:\n    def __init__(self, a, *, b):\n        'Text.'\n        self.a = a\n\n"
        "class C:\n    x: int\n"
    )
    assert lengths(tmp_path) == [("a.py:__init__", 3)]
    assert widths(tmp_path) == {"a.py:A": 2, "a.py:B": 2, "a.py:C": 0}


def test_the_percentile_is_passed_by_one_in_twenty():
    assert percentile([1] * 95 + [9] * 5) == 9
    assert percentile([1] * 96 + [9] * 4) == 1
