"""Any command line is accepted or refused in one line, exit code 2, before anything starts."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from tests.support.commands import check_command, commands, files, own_place
from tests.support.properties import examples

quick = settings(suppress_health_check=list(HealthCheck), max_examples=examples(12))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("commands")
    with own_place(folder):
        yield folder


@quick
@given(commands)
def test_command_lines(place, line):
    check_command(line)


@pytest.mark.slow
@quick
@given(files)
def test_files_of_ones_own(place, content):
    text = yaml.safe_dump(content, allow_unicode=True)
    (place / "own" / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    check_command(["--config-dir=own", "experiment=mine"])


@pytest.mark.slow
# What was once a traceback, or ran nothing and called it finished.
@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("model=glob(*)", "add -m"),
        ("-m model=glob(zz*)", "nothing is left to run"),
        ("-m beta=interval(0,1)", "INTERVAL_SWEEP"),
        ("-m beta=1,2 hydra.sweeper=null", "hydra/sweeper="),
        ("-m hydra.launcher=3", "hydra/launcher="),
        ("hydra.launcher=3", "hydra/launcher="),
        ("hydra.job_logging.handlers=null", "hydra:"),
        ("hydra.verbose=[3]", "hydra:"),
        ("beta=" + "9" * 5000, "beta=9999"),
        ("beta=" + "9" * 4000, "beta: int too large"),
        ("beta=" + "[" * 3000, "cannot be read"),
        ("beta=" + "[" * 3000 + "]" * 3000, "beta=[[["),
    ],
)
def test_what_was_found(place, line, fragment, capsys):
    from dpo_lightning import cli

    assert cli.main(line.split()) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert fragment in said
    assert len(said) < 1000
