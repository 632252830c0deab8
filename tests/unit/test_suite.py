"""The rules that the tests themselves keep."""

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings

from tests.support.plugin import pytest_terminal_summary
from tests.support.runs import ROOT

OF_EACH_KIND = """
import threading
import pytest

def limit(request): return getattr(request.node.get_closest_marker("timeout"), "args", None)

def test_one(): pytest.skip("no CUDA")
def test_two(): pytest.skip("no Chromium")
@pytest.mark.skipif(True, reason="no CUDA")
def test_three(): assert False
def test_usual(request): assert limit(request) is None
@pytest.mark.slow
def test_slow(request): assert limit(request) == (1200,)
@pytest.mark.slow
@pytest.mark.timeout(7)
def test_own(request): assert limit(request) == (7,)
@pytest.mark.timeout(0.5)
def test_hangs(): threading.Event().wait(60)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> list[str]:
    """The lines that pytest prints of a file, with the settings and the plugin of this suite."""
    folder: Path = tmp_path_factory.mktemp("suite")
    (folder / "test_it.py").write_text(OF_EACH_KIND)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "tests.support.plugin"]
    options = ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={folder}", "--noconftest"]
    selected = ["-m", "not faults", str(folder)]
    done = subprocess.run([*command, *options, *selected], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_skips_are_counted_by_reason_in_one_line(run):
    assert "skipped: 2 no CUDA; 1 no Chromium" in run


def test_that_nothing_was_skipped_is_said():
    said: list[str] = []
    pytest_terminal_summary(SimpleNamespace(stats={"passed": []}, write_line=said.append))
    assert said == ["skipped: none"]


@pytest.mark.slow
def test_a_test_that_hangs_ends_with_its_stack(run, pytestconfig):
    assert float(pytestconfig.getini("timeout")) == 300
    assert [line for line in run if "Failed: Timeout (>0.5s)" in line]
    assert ">   def test_hangs(): threading.Event().wait(60)" in run


@pytest.mark.slow
def test_slow_tests_have_a_longer_limit_unless_they_name_their_own(run):
    assert run[-1].startswith("1 failed, 3 passed, 3 skipped")


def test_property_tests_draw_the_same_examples_each_time(pytestconfig):
    if pytestconfig.getoption("--hypothesis-profile") is None:
        assert settings().derandomize
        assert settings().database is None
    assert settings().deadline is None


# What no test does -------------------------------------------------------------------------------

CLOCKS = {"time", "monotonic", "perf_counter", "process_time"}
MAY_BE_MISSING = {"bitsandbytes"}
BY_PROFILE = {"deadline", "derandomize", "database"}


def called(node: ast.AST) -> str:
    """Last word of the name that is called: ``b`` of ``a.b()``."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", ""))


def reads_clock(node: ast.AST) -> bool:
    return any(called(part) in CLOCKS for part in ast.walk(node))


def never_fails(test: ast.expr) -> bool:
    """True if an asserted expression is true whatever the code does."""
    if isinstance(test, ast.Constant):
        return bool(test.value)
    if isinstance(test, ast.Tuple | ast.List | ast.Set | ast.Dict):
        return bool(getattr(test, "elts", getattr(test, "keys", ())))
    if isinstance(test, ast.JoinedStr | ast.Lambda | ast.GeneratorExp):
        return True
    return called(test) in {"dumps", "repr", "str", "format", "join"}


def imported(node: ast.AST) -> list[str]:
    """Full names that an import names; none of any other node."""
    if isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        return [f"{module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def skips_without_a_package(node: ast.AST) -> bool:
    """True if a test is skipped where a package is missing that every developer has."""
    inside = [called(part) for part in ast.walk(node)]
    if called(node) == "importorskip":
        name = node.args[0]
        return not (isinstance(name, ast.Constant) and name.value in MAY_BE_MISSING)
    if called(node) == "skipif":
        return "find_spec" in inside
    return isinstance(node, ast.ExceptHandler) and "skip" in inside


def faults(code: str, name: str = "test_it.py") -> list[str]:
    """Lists the rules that a file of tests breaks."""
    found = []
    in_faults = "faults/" in name
    for node in ast.walk(ast.parse(code)):
        if any(re.match(r"\.|tests\.(?!support\b)", full) for full in imported(node)):
            found.append("imports from another test")
        if skips_without_a_package(node):
            found.append("skips where a dependency is missing")
        if isinstance(node, ast.Assert):
            if never_fails(node.test):
                found.append("asserts what cannot be false")
            for part in ast.walk(node.test):
                if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Sub):
                    found += ["asserts a wall time"] if reads_clock(part) else []
        if called(node) == "settings" and not in_faults:
            pinned = {keyword.arg for keyword in node.keywords}
            found += ["pins what a profile says"] if pinned & BY_PROFILE else []
            counts = [k.value for k in node.keywords if k.arg == "max_examples"]
            if any(called(count) != "examples" for count in counts):
                found.append("pins its number of examples")
    return found


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("from tests.unit.test_a import helper", "imports from another test"),
        ("import tests.integration.test_b", "imports from another test"),
        ("from tests import unit", "imports from another test"),
        ("from .test_a import helper", "imports from another test"),
        ("from tests.support.runs import ROOT\nimport pytest", None),
        ('pytest.importorskip("torchao")', "skips where a dependency is missing"),
        ('pytest.importorskip("bitsandbytes", reason="why")', None),
        ('pytest.mark.skipif(find_spec("trl") is None)', "skips where a dependency is missing"),
        (
            "try:\n    import trl\nexcept ImportError:\n    pytest.skip()",
            "skips where a dependency is missing",
        ),
        ('pytest.mark.skipif(which("chromium") is None, reason="no Chromium")', None),
        ("assert time.monotonic() - begin < 30", "asserts a wall time"),
        ("assert 0 < perf_counter() - begin", "asserts a wall time"),
        ("while True:\n    assert time.monotonic() < deadline", None),
        ("assert json.dumps(config)", "asserts what cannot be false"),
        ('assert (1 == 2, "why")', "asserts what cannot be false"),
        ('assert f"{x}"', "asserts what cannot be false"),
        ("assert [x for x in y]", None),
        ("@settings(max_examples=30)\ndef test(): ...", "pins its number of examples"),
        ("@settings(max_examples=examples(30))\ndef test(): ...", None),
        ("quick = settings(deadline=None)", "pins what a profile says"),
    ],
)
def test_each_rule_sees_what_it_is_about(code: str, fault: str | None):
    assert faults(code) == ([] if fault is None else [fault])


def test_no_test_does_what_none_does():
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert len(files) > 80
    found = {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}
    assert {name: faults(code, name) for name, code in found.items() if faults(code, name)} == {}


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_a_deprecation_that_our_calls_cause_is_an_error(kind: type[Warning]):
    """Or one of a library that we call most; what others do to each other is only shown."""

    def warn(module: str, message: str = "it will be gone") -> None:
        warnings.warn_explicit(message, kind, "file.py", 1, module=module)

    for module in ("dpo_lightning.cli", "hydra_plugins.x", "tests.unit.test_a", "torch.nn.modules"):
        with pytest.raises(kind):
            warn(module)
    for module in ("torch", "lightning.pytorch.trainer", "transformers.modeling_utils", "peft.x"):
        with pytest.raises(kind):
            warn(module)
    with pytest.warns(kind):
        warn("torchmetrics.metric")


def test_nothing_is_skipped_for_an_empty_list(pytestconfig):
    assert pytestconfig.getini("empty_parameter_set_mark") == "fail_at_collect"
