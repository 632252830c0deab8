"""Continuous integration: its targets, its audit, and the environments that it leaves alone."""

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.runs import ROOT


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(**vulnerabilities: list[str] | None) -> str:
    """Output of pip-audit; None stands for a package that the service does not know."""
    return json.dumps(
        {
            "dependencies": [
                {"name": name, "skip_reason": "not found"}
                if ids is None
                else {
                    "name": name,
                    "version": "1.0",
                    "vulns": [{"id": i, "fix_versions": ["1.1"]} for i in ids],
                }
                for name, ids in vulnerabilities.items()
            ]
        }
    )


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (report(a=[], b=[]), 0, "audit: 2 of 2 pins audited, none"),
        (report(a=[], b=None), 0, "audit: not audited: b\naudit: 1 of 2 pins audited, none"),
        (report(a=["CVE-1"], b=None), 1, "a==1.0: CVE-1, fixed in 1.1\naudit: 1 of 2 pins"),
        (report(a=["CVE-1", "CVE-2"]), 1, "a==1.0: CVE-2, fixed in 1.1"),
        (report(a=None, b=None), 3, "NOT AUDITED: the advisory service knows none of 2 pins"),
        ("", 3, "NOT AUDITED: the advisory service was not reached"),
        ("Traceback", 3, "NOT AUDITED: the advisory service was not reached"),
        ("[]", 3, "NOT AUDITED: the advisory service was not reached"),
    ],
)
def test_the_audit_tells_a_finding_from_no_audit(audit, text: str, code: int, words: str):
    lines, found = audit.judge(text)
    assert found == code
    assert words in "\n".join(lines)
    assert (code == 3) == lines[-1].startswith("NOT AUDITED")


def test_the_audit_says_why_it_got_no_report(audit):
    lines, code = audit.judge("", "WARNING:a\nERROR:no route to host\n\n")
    assert code == 3
    assert lines == ["NOT AUDITED: the advisory service was not reached (ERROR:no route to host)"]


def test_the_audit_ends_by_itself(audit, monkeypatch, capsys):
    monkeypatch.setattr(audit, "SECONDS", 0.01)
    assert audit.main([]) == 3
    assert "NOT AUDITED: the advisory service was not reached" in capsys.readouterr().out


def test_the_audit_needs_its_program(audit, monkeypatch, capsys):
    monkeypatch.setattr(audit, "find_spec", lambda name: None)
    assert audit.main([]) == 1
    assert "pip-audit is not installed" in capsys.readouterr().err


# The script --------------------------------------------------------------------------------------

# Answers each target as the environment says: TARGET=code:words.
MAKE = """#!/bin/sh
name=$(echo "$1" | tr - _)
eval "answer=\\${$name-0:$1 passed}"
echo "$1" >> "$CALLS"
echo "${answer#*:}"
exit "${answer%%:*}"
"""


def run_ci(folder: Path, **answers: str) -> tuple[int, list[str], list[str]]:
    """The exit code, the lines and the targets of .ci/run with a stand-in for make."""
    (folder / "make").write_text(MAKE)
    (folder / "make").chmod(0o755)
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci")
    environment = os.environ | answers
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}
    done = subprocess.run(
        ["bash", ".ci/run"], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines(), (folder / "calls").read_text().split()


TARGETS = ["test", "test-slow", "check", "audit"]
SILENT = "2:some lines\nNOT AUDITED: the advisory service was not reached"


def test_all_is_well(tmp_path):
    code, lines, targets = run_ci(tmp_path, test="0:7 passed in 1s", audit="0:audit: 9 of 9 pins")
    assert (code, targets) == (0, TARGETS)
    assert lines == ["7 passed in 1s", "test-slow passed", "check passed", "audit: 9 of 9 pins"]


def test_no_audit_is_the_last_line_and_no_failure(tmp_path):
    """make itself ends with 2 whatever a command of it ended with."""
    code, lines, _ = run_ci(tmp_path, audit=SILENT)
    assert code == 0
    assert lines[-2:] == ["some lines", "NOT AUDITED: the advisory service was not reached"]


@pytest.mark.parametrize("answer", ["2:audit: a==1: CVE-1\naudit: 1 of 1 pins", "1:", "2:no rule"])
def test_a_finding_or_an_audit_that_does_not_start_is_a_failure(tmp_path, answer: str):
    code, lines, _ = run_ci(tmp_path, audit=answer)
    assert code == 1
    assert lines[-1] == "failed: make audit"


@pytest.mark.parametrize("target", ["test", "test_slow", "check"])
def test_what_fails_is_named_after_the_rest_has_run(tmp_path, target: str):
    code, lines, targets = run_ci(tmp_path, **{target: "2:1 failed in 1s"})
    assert (code, targets) == (1, TARGETS)
    assert "1 failed in 1s" in lines
    assert lines[-1] == f"failed: make {target.replace('_', '-')}"


def test_a_failure_without_an_audit_says_both(tmp_path):
    code, lines, _ = run_ci(tmp_path, test="2:1 failed in 1s", check="2:", audit=SILENT)
    assert code == 1
    assert lines[-2:] == [
        "failed: make test, make check",
        "NOT AUDITED: the advisory service was not reached",
    ]


# The Makefile ------------------------------------------------------------------------------------


def commands(*targets: str) -> list[str]:
    """Commands that make would run on a fresh machine."""
    # What this run's own make was told is not for that one.
    told = ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in told}
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", *targets],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("target", "folder"),
    [
        ("bench", ".venv-bench"),
        ("bench-gpu", ".venv-bench"),
        ("test-launchers", ".venv-launchers"),
    ],
)
def test_what_needs_more_has_an_environment_of_its_own(target: str, folder: str):
    lines = commands(target)
    assert [line for line in lines if ".venv/" in line or line.endswith(".venv")] == []
    assert any(line.startswith(f"{folder}/bin/python -m pip install") for line in lines)
    assert lines[-1].startswith(f"{folder}/bin/python ")
    [removed] = [line for line in commands("clean") if line.startswith("rm -rf")]
    assert folder in removed.split()
    assert ".venv-*/" in (ROOT / ".gitignore").read_text().split()


def test_the_environment_of_the_tests_has_the_pinned_trl_alone():
    installs = [line for line in commands("test") if "pip install" in line]
    assert all("-c constraints.txt" in line for line in installs)
    assert installs[1].endswith("--no-deps trl")


@pytest.mark.parametrize(
    ("target", "marks"),
    [
        ("test-slow", "(slow or docs) and not long and not launchers and not faults"),
        ("test-docs", "docs"),
        ("test-all", "not long and not launchers and not faults"),
        ("fuzz", "hypothesis and not long and not launchers and not faults"),
        ("coverage", "not long and not launchers and not faults"),
        ("test-faults", "faults"),
        ("test-long", "long and not docs"),
        ("test-launchers", "launchers"),
    ],
)
def test_each_command_runs_its_tests(target: str, marks: str):
    [line] = [line for line in commands(target) if "-m pytest" in line]
    assert f'-m "{marks}"' in line or line.rstrip().endswith(f"-m {marks}")


def test_the_quick_suite_is_what_pytest_selects_by_itself(pytestconfig):
    [line] = [line for line in commands("test") if "-m pytest" in line]
    assert line.count(" -m ") == 1
    assert (
        "not slow and not docs and not long and not launchers and not faults"
        in pytestconfig.getini("addopts")
    )
