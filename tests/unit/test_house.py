"""The rooms of the package and their order, from which follows what each file may import."""

import ast
import functools
import graphlib
import re
from pathlib import Path

from tests.support.runs import ROOT

PACKAGE = ROOT / "dpo_lightning"

STAIR = (
    *("__init__", "errors", "files"),
    *(
        "objectives",
        "plugins",
        "processes",
        "data",
        "assets",
        "settings",
        "models",
        "tracking",
        "run/page",
    ),
    *("reference", "memory", "training/checkpoints", "training", "evaluation", "run"),
    *("sweeps/trials", "sweeps/places", "sweeps/report", "sweeps", "sweeps/compare"),
    "sweeps/generate",
    *("preflight", "cli", "api", "__main__"),
)
"""From the bottom to the top: a step imports from those before it. A file stands on the longest of
them that its path begins with: a room, a room inside a room, or a file alone."""

ROOMS = 12
MOST_LOOSE_FILES = 8
MOST_FLOORS = 10


def step_of(file: str) -> str:
    """The step that a file stands on, such as ``training`` for ``training/module.py``.

    Raises:
        ValueError: If it stands on none.
    """
    path = file.removesuffix(".py")
    own = [step for step in STAIR if path == step or path.startswith(f"{step}/")]
    if not own:
        raise ValueError(f"{file} stands on no step of the house")
    return max(own, key=len)


def files_of(package: Path) -> list[str]:
    return sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py"))


def imported(node: ast.AST) -> list[str]:
    """Dotted names that a node imports, or calls ``import_module`` with; each may be a module's."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = getattr(node.func, "attr", getattr(node.func, "id", ""))
        return [str(node.args[0].value)] if function in {"import_module", "__import__"} else []
    return []


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def outside_functions(tree: ast.AST) -> list[ast.AST]:
    """The nodes that run when a file is imported, as far as classes and conditions go."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    own = [node for node in ast.iter_child_nodes(tree) if not isinstance(node, functions)]
    return own + [inner for node in own for inner in outside_functions(node)]


def imports_of(package: Path, file: str, *, at_start: bool = False) -> list[tuple[int, str]]:
    """Line and file of all that a file imports of the package, inside its functions too.

    With ``at_start`` it is what the file imports when it is itself imported.
    """
    found = []
    tree = parsed(package / file)
    for node in outside_functions(tree) if at_start else ast.walk(tree):
        for name in imported(node):
            first, *parts = name.split(".")
            if first != "dpo_lightning":
                continue
            # The last part, or two, may be what is defined in a module.
            for end in range(len(parts), -1, -1):
                path = "/".join(parts[:end])
                names = [f"{path}.py", f"{path}/__init__.py"] if path else ["__init__.py"]
                real = [own for own in names if (package / own).is_file()]
                if real:
                    found.append((node.lineno, real[0]))
                    break
    return found


@functools.cache
def graph(package: Path = PACKAGE) -> dict[str, list[tuple[int, str]]]:
    return {file: imports_of(package, file) for file in files_of(package)}


def paying_for(target: str, package: Path = PACKAGE) -> set[str]:
    """Files that import the target when they are imported themselves, by way of others too."""
    arrows = {
        file: {other for _, other in imports_of(package, file, at_start=True)}
        for file in files_of(package)
    }
    found = {target}
    while more := {file for file, own in arrows.items() if own & found} - found:
        found |= more
    return found - {target}


def upward(package: Path = PACKAGE) -> list[str]:
    """Each import of what stands higher, as ``file:line imports X, which is above``."""
    return [
        f"dpo_lightning/{file}:{line} imports dpo_lightning/{other}, which is above"
        for file, found in graph(package).items()
        for line, other in found
        if STAIR.index(step_of(other)) > STAIR.index(step_of(file))
    ]


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A circle, if there is one."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def file_arrows(package: Path = PACKAGE) -> dict[str, set[str]]:
    return {
        file: {other for _, other in found if other != file}
        for file, found in graph(package).items()
    }


def step_arrows(package: Path = PACKAGE) -> dict[str, set[str]]:
    arrows: dict[str, set[str]] = {step: set() for step in STAIR}
    for file, others in file_arrows(package).items():
        arrows[step_of(file)] |= {step_of(other) for other in others} - {step_of(file)}
    return arrows


def longest_chain(arrows: dict[str, set[str]]) -> list[str]:
    """From the top to the bottom."""

    @functools.cache
    def below(step: str) -> tuple[str, ...]:
        return (step, *max((below(other) for other in arrows[step]), key=len, default=()))

    return list(max(map(below, arrows), key=len))


def classes_of(package: Path = PACKAGE) -> dict[str, list[str]]:
    """Places where the classes of each name are defined."""
    found: dict[str, list[str]] = {}
    for file in files_of(package):
        for node in ast.walk(parsed(package / file)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(f"{file}:{node.lineno}")
    return found


def rooms(package: Path = PACKAGE) -> set[str]:
    """Folders of code; that of ``assets`` holds data, and the program that made it."""
    return {path.parent.name for path in package.glob("*/__init__.py")} - {"assets"}


def make_package(folder: Path, files: dict[str, str]) -> Path:
    for name, code in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    return folder


def test_every_file_stands_on_a_step_and_every_step_is_there():
    files = files_of(PACKAGE)
    assert len(files) > 100
    assert {step_of(file) for file in files} == set(STAIR)


def test_there_are_twelve_rooms_and_few_loose_files():
    loose = sorted(path.name for path in PACKAGE.glob("*.py"))
    print(f"{len(rooms())} rooms, {len(loose)} loose files")
    assert len(rooms()) == ROOMS
    assert rooms() <= set(STAIR)
    assert len(loose) <= MOST_LOOSE_FILES, loose


def test_imports_go_down():
    found = upward()
    assert not found, "\n" + "\n".join(found)


def test_no_files_import_each_other_in_a_circle():
    found = circle(file_arrows())
    assert not found, " -> ".join(found)


def test_a_run_without_a_server_does_not_pay_for_an_http_client():
    """The one file that imports httpx is imported by its users, and by these inside functions."""
    users = [f for f in files_of(PACKAGE) if "import httpx" in (PACKAGE / f).read_text()]
    assert users == ["evaluation/posting.py"]
    own = {"completions", "endpoint", "endpoint_judge"}
    assert paying_for(users[0]) == {f"evaluation/{name}.py" for name in own}


def test_the_house_is_not_high():
    arrows = step_arrows()
    assert circle(arrows) == []
    chain = longest_chain(arrows)
    print(f"{len(chain)} floors: {' -> '.join(chain)}")
    assert len(chain) <= MOST_FLOORS, " -> ".join(chain)


def test_no_two_classes_have_one_name():
    assert {name: where for name, where in classes_of().items() if len(where) > 1} == {}


def test_each_room_says_what_comes_in_and_what_goes_out():
    for path in sorted(PACKAGE.glob("**/__init__.py")):
        if path.parent.name in {*rooms(), "places", "report", "checkpoints"}:
            said = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert "\nIn: " in said, path
            assert " Out: " in said, path


def test_the_folders_of_unit_tests_are_rooms():
    folders = {path.parent.name for path in (ROOT / "tests" / "unit").glob("*/test_*.py")}
    assert len(folders) > 5
    assert folders <= rooms()


def test_the_stair_of_the_page_is_this_one():
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = re.search(r"## The stair.*?```\n(.*?)```", page, flags=re.S).group(1)
    named = re.findall(r"^(\w+)/ ", drawn, flags=re.M)
    assert set(named) == rooms()
    assert sorted(named, key=STAIR.index, reverse=True) == named


# The tests see what they are about ----------------------------------------------------------------


def test_an_import_of_what_is_above_is_named_with_its_place(tmp_path):
    package = make_package(
        tmp_path,
        {
            "errors": "import os\n\nfrom dpo_lightning.cli import main\n",
            "cli": "main = None\n",
            "settings/__init__": "",
            "settings/schema": "def f():\n    import dpo_lightning.training.module\n",
            "training/__init__": "",
            "training/module": "from importlib import import_module\n\n"
            'import_module("dpo_lightning.run")\n',
            "training/checkpoints/files": "from dpo_lightning.training import module\n",
            "run/__init__": "",
        },
    )
    assert upward(package) == [
        "dpo_lightning/errors.py:3 imports dpo_lightning/cli.py, which is above",
        "dpo_lightning/settings/schema.py:2 imports dpo_lightning/training/module.py, "
        "which is above",
        "dpo_lightning/training/checkpoints/files.py:1 imports dpo_lightning/training/module.py, "
        "which is above",
        "dpo_lightning/training/module.py:3 imports dpo_lightning/run/__init__.py, which is above",
    ]


def test_a_circle_inside_a_room_is_found(tmp_path):
    package = make_package(
        tmp_path,
        {
            "data/rows": "from dpo_lightning.data import texts\n",
            "data/texts": "def f():\n    from dpo_lightning.data.tokens import g\n",
            "data/tokens": "from dpo_lightning.data.rows import x\n",
        },
    )
    assert upward(package) == []
    assert set(circle(file_arrows(package))) == {
        f"data/{n}.py" for n in ("rows", "texts", "tokens")
    }


def test_what_is_imported_inside_a_function_is_not_paid_for(tmp_path):
    package = make_package(
        tmp_path,
        {
            "dear": "",
            "user": "if True:\n    from dpo_lightning import dear\n",
            "late": "class A:\n    def f(self):\n        from dpo_lightning import dear\n",
            "above": "from dpo_lightning.user import x\n\n\nasync def f():\n    import dear\n",
        },
    )
    assert paying_for("dear.py", package) == {"user.py", "above.py"}


def test_the_longest_chain_is_counted_from_the_top():
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]


def test_two_classes_of_one_name_are_named_with_their_places(tmp_path):
    package = make_package(tmp_path, {"errors": "class A: ...\n", "files": "\nclass A: ...\n"})
    assert classes_of(package) == {"A": ["errors.py:1", "files.py:2"]}
