"""The rules that the tests themselves keep."""

import subprocess
import sys
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


def test_skips_are_counted_by_reason_in_one_line(run):
    assert "skipped: 2 no CUDA; 1 no Chromium" in run


def test_that_nothing_was_skipped_is_said():
    said: list[str] = []
    pytest_terminal_summary(SimpleNamespace(stats={"passed": []}, write_line=said.append))
    assert said == ["skipped: none"]


def test_a_test_that_hangs_ends_with_its_stack(run, pytestconfig):
    assert float(pytestconfig.getini("timeout")) == 300
    assert [line for line in run if "Failed: Timeout (>0.5s)" in line]
    assert ">   def test_hangs(): threading.Event().wait(60)" in run


def test_slow_tests_have_a_longer_limit_unless_they_name_their_own(run):
    assert run[-1].startswith("1 failed, 3 passed, 3 skipped")


def test_property_tests_draw_the_same_examples_each_time(pytestconfig):
    if pytestconfig.getoption("--hypothesis-profile") is None:
        assert settings().derandomize
        assert settings().database is None
    assert settings().deadline is None
