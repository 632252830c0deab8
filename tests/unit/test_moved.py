"""Names that modules had before they moved: files of users may still say them."""

import importlib
import importlib.util
import subprocess
import sys

import pytest
import yaml
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from dpo_lightning import MOVED, name_now
from dpo_lightning.settings.hydra_node import hydra_problems
from tests.support.runs import ROOT, TINY, run_train

PACKAGE = ROOT / "dpo_lightning"


def path_of(name: str):
    return PACKAGE / f"{name.replace('.', '/')}.py"


@pytest.mark.parametrize("old", MOVED)
def test_a_module_has_its_old_name_beside_its_own(old: str):
    assert not path_of(old).exists()
    assert path_of(MOVED[old]).is_file()
    assert not (PACKAGE / old.replace(".", "/")).is_dir()
    name = f"dpo_lightning.{old}"
    assert importlib.util.find_spec(name) is not None
    module = importlib.import_module(name)
    assert module is importlib.import_module(f"dpo_lightning.{MOVED[old]}")
    # It goes on being what it is, and can be imported again.
    assert module.__name__ == module.__spec__.name == f"dpo_lightning.{MOVED[old]}"
    assert importlib.import_module(name) is module


def test_other_names_are_not_found():
    assert importlib.util.find_spec("dpo_lightning.nonesuch") is None
    for name in ("dpo_lightning.nonesuch", "dpo_lightning.terminal.nonesuch", "terminal"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


@pytest.mark.parametrize(
    ("name", "now"),
    [
        ("dpo_lightning.terminal", "dpo_lightning.tracking.terminal"),
        ("dpo_lightning.terminal.LogFile", "dpo_lightning.tracking.terminal.LogFile"),
        ("dpo_lightning.sweeps.results.Sweep", "dpo_lightning.sweeps.report.read.Sweep"),
        ("dpo_lightning.tracking.terminal.LogFile", None),
        ("dpo_lightning.errors", None),
        ("os.terminal", None),
        ("terminal", None),
    ],
)
def test_the_name_of_today(name: str, now: str | None):
    assert name_now(name) == now


def test_an_old_name_costs_nothing_before_it_is_asked_for():
    code = (
        "import sys, dpo_lightning;"
        "import dpo_lightning.terminal, dpo_lightning.config;"
        "from dpo_lightning import lifeline;"
        "print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules],"
        "lifeline.__name__, sys.modules['dpo_lightning.config'].__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    words = "[] dpo_lightning.processes.lifeline dpo_lightning.settings.schema"
    assert done.stdout.strip() == words, done.stderr


def job_logging(old: bool) -> dict:
    text = (ROOT / "conf" / "hydra" / "job_logging" / "terminal.yaml").read_text()
    assert "dpo_lightning.tracking.terminal" in text
    named = "dpo_lightning.terminal" if old else "dpo_lightning.tracking.terminal"
    return yaml.safe_load(text.replace("dpo_lightning.tracking.terminal", named))


@pytest.mark.parametrize("old", [True, False])
def test_a_logging_section_may_name_either(old: bool):
    Plugins.instance()  # Hydra knows its launchers once these are loaded
    node = OmegaConf.create({"launcher": {}, "sweeper": {}, "job_logging": job_logging(old)})
    assert list(hydra_problems(node)) == []
    node.job_logging.handlers.terminal["class"] = "dpo_lightning.terminal.os.system"
    [problem] = hydra_problems(node)
    assert "dpo_lightning.tracking.terminal.TerminalHandler" in problem
    assert "dpo_lightning.terminal.TerminalHandler" not in problem


def test_a_run_with_a_logging_file_of_before(tmp_path, capsys):
    folder = tmp_path / "own" / "hydra" / "job_logging"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(yaml.safe_dump(job_logging(old=True)))
    more = [f"--config-dir={tmp_path / 'own'}", "hydra/job_logging=mine", "trainer.max_steps=1"]
    run = run_train(tmp_path / "run", *TINY, *more)
    assert run.code == 0
    assert (run.folder / "train.log").read_text()
