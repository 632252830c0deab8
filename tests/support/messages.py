"""Texts of the program's messages, as they stand in its source."""

import ast
import functools

from tests.support.runs import ROOT


@functools.cache
def messages() -> dict[str, str]:
    """Texts of each file but its docstrings, a line each; values in f-strings are braces."""
    found: dict[str, str] = {}
    package = ROOT / "dpo_lightning"
    for path in sorted(package.rglob("*.py")):
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        lines = []
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
                lines.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append("" if id(node) in docstrings else node.value)
        texts = (" ".join(line.split()) for line in lines)
        found[path.relative_to(package).as_posix()] = "\n".join(texts)
    return found
