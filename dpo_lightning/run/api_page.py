"""Page of the public functions and classes, ``docs/api.md``, from their signatures and docstrings.

``python -m dpo_lightning.run.api_page`` prints it. Sources are parsed and nothing of them is
imported: the page is the same on every machine, and is made without torch.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from dpo_lightning.run.docstrings import markdown_of, summary_of
from dpo_lightning.settings.schema import PACKAGE

MODULES = ("api", "plugins", "objectives", "errors")
"""Modules of the package that are public, in the order of the page."""

_INTRODUCTION = """\
# Python reference

Made from signatures and docstrings by `make docs`. These names stay; all others of the package may
move. [From Python](python.md) shows them at work.
"""

Node: TypeAlias = ast.FunctionDef | ast.ClassDef | ast.AnnAssign | ast.Assign
_NAMED = (ast.FunctionDef, ast.ClassDef, ast.AnnAssign, ast.Assign)
_WIDTH = 88


@dataclass(frozen=True, slots=True)
class Definition:
    """A public name, where it stands in the source.

    Attributes:
        name: The name.
        node: Its definition.
        doc: Its docstring; of a value the string behind it.
    """

    name: str
    node: Node
    doc: str


def api_page(package: Path = PACKAGE) -> str:
    """The page as Markdown.

    Args:
        package: Folder of the package's sources.
    """
    homes: dict[tuple[str, str], str] = {}
    contents, parts = [], []
    for module in MODULES:
        source = _source(package, module)
        own: list[tuple[Definition, str]] = []
        elsewhere: list[tuple[Definition, str]] = []
        for name in _exported(source):
            place, found = find_definition(package, module, name)
            home = homes.setdefault((place, name), module)
            (own if home == module else elsewhere).append((found, home))
        title = f"dpo_lightning.{module}"
        links = ", ".join(f"[`{found.name}`](#{found.name.lower()})" for found, _ in own)
        contents.append(f"- [`{title}`](#{title.replace('.', '')}): {links}")
        parts += [f"## `{title}`\n", markdown_of(ast.get_docstring(source) or ""), ""]
        parts += [
            f"`{found.name}` is [that of `dpo_lightning.{home}`](#{found.name.lower()}).\n"
            for found, home in elsewhere
        ]
        for found, _ in own:
            parts += _entry(found)
    text = "\n".join([_INTRODUCTION, *contents, "", *parts])
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def find_definition(package: Path, module: str, name: str) -> tuple[str, Definition]:
    """The place of a name's definition, and the definition; imports are followed.

    Args:
        package: Folder of the package's sources.
        module: Dotted name below the package, such as ``objectives``.
        name: The name, as that module exports it.

    Raises:
        LookupError: If no source defines it.
    """
    body = _flat(_source(package, module).body)
    for place, node in enumerate(body):
        if isinstance(node, _NAMED) and _name_of(node) == name:
            return module, Definition(name, node, _doc_of(node, body[place + 1 : place + 2]))
    for node in body:
        if isinstance(node, ast.ImportFrom) and any(own.name == name for own in node.names):
            below = (node.module or "").removeprefix("dpo_lightning.")
            return find_definition(package, below, name)
    raise LookupError(f"{module}: no source defines {name}")


def _source(package: Path, module: str) -> ast.Module:
    path = package.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _exported(source: ast.Module) -> list[str]:
    """The names of ``__all__``."""
    for node in source.body:
        if isinstance(node, ast.Assign) and _python(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    raise LookupError("no __all__ there")


def _flat(body: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Statements of a module, with those of ``if TYPE_CHECKING:``."""
    found: list[ast.stmt] = []
    for node in body:
        found += _flat(node.body) if isinstance(node, ast.If) else [node]
    return found


def _name_of(node: Node) -> str:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    return _python(node.target if isinstance(node, ast.AnnAssign) else node.targets[0])


def _doc_of(node: Node, behind: Sequence[ast.stmt]) -> str:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return ast.get_docstring(node) or ""
    for after in behind:
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return inspect.cleandoc(str(after.value.value))
    return ""


def _entry(found: Definition) -> Iterator[str]:
    yield f"### `{found.name}`\n"
    yield f"```python\n{_signature(found.node)}\n```\n"
    if text := markdown_of(found.doc):
        yield f"{text}\n"
    if isinstance(found.node, ast.ClassDef):
        for node in found.node.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                says = summary_of(ast.get_docstring(node) or "")
                yield f"- `{_call(node, ' ', skip=1)}`: {says}"
        yield ""


def _signature(node: Node) -> str:
    """The definition as Python, without its body."""
    if isinstance(node, ast.FunctionDef):
        line = f"def {_call(node, ' ')}"
        return line if len(line) <= _WIDTH else f"def {_call(node, chr(10))}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(_python(base) for base in node.bases)
        head = f"class {node.name}({bases})" if bases else f"class {node.name}"
        rows = [_python(own) for own in node.body if isinstance(own, ast.AnnAssign | ast.Assign)]
        makers = [
            f"def {_call(own, ' ')}"
            for own in node.body
            if isinstance(own, ast.FunctionDef) and own.name == "__init__"
        ]
        return "\n    ".join([head + (":" if rows or makers else ""), *rows, *makers])
    # Of a table that is filled elsewhere its value says nothing.
    if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
        return f"{_python(node.target)}: {_python(node.annotation)}"
    return _python(node)


def _call(node: ast.FunctionDef, between: str, *, skip: int = 0) -> str:
    """Name, parameters and what is returned; a parameter a line where they are many.

    Args:
        node: The function.
        between: A space or a new line, which stands between parameters.
        skip: Positional parameters that are left out, such as ``self``.
    """
    words = _parameters(node.args)[skip:]
    inside = ", ".join(words)
    if between == "\n":
        inside = "".join(f"\n    {word}," for word in words) + "\n"
    back = f" -> {_python(node.returns)}" if node.returns is not None else ""
    return f"{node.name}({inside}){back}"


def _python(node: ast.AST) -> str:
    """A node as Python, with the quotes that this project has."""
    text = ast.unparse(node)
    return text if '"' in text else text.replace("'", '"')


def _parameters(arguments: ast.arguments) -> list[str]:
    places = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(places) - len(arguments.defaults)) + [*arguments.defaults]
    words = [_parameter(own, value) for own, value in zip(places, defaults, strict=True)]
    if arguments.vararg is not None:
        words.append(f"*{_parameter(arguments.vararg, None)}")
    elif arguments.kwonlyargs:
        words.append("*")
    named = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    words += [_parameter(own, value) for own, value in named]
    if arguments.kwarg is not None:
        words.append(f"**{_parameter(arguments.kwarg, None)}")
    return words


def _parameter(own: ast.arg, value: ast.expr | None) -> str:
    kind = "" if own.annotation is None else f": {_python(own.annotation)}"
    if value is None:
        return f"{own.arg}{kind}"
    return f"{own.arg}{kind}{' = ' if kind else '='}{_python(value)}"


if __name__ == "__main__":
    print(api_page(), end="")
