"""The commands of the installed program: which there are, and how the program says its own name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_lightning
from dpo_lightning import __main__ as program_main
from dpo_lightning.__main__ import COMMANDS, main
from dpo_lightning.settings import program
from dpo_lightning.settings.program import importing, started_as, typed
from dpo_lightning.sweeps.report.text import own_words
from tests.support.runs import ROOT

PACKAGE = ROOT / "dpo_lightning"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_commands_are_listed(capsys, words: list[str]):
    assert main(words) == 0
    out = capsys.readouterr().out
    for name, (what, _) in COMMANDS.items():
        assert f"{name} " in out or f"{name}.py " in out
        assert what in out


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dpo-lightning {dpo_lightning.__version__}\n"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trian", "trian: unknown command; did you mean `train`?"),
        ("Train", "Train: unknown command; did you mean `train`?"),
        ("reports", "reports: unknown command; did you mean `report`?"),
        ("x", f"x: unknown command; available: {', '.join(COMMANDS)}"),
        ("beta=0.1", "beta=…: a command comes first, such as `python train.py`; available: "),
        ("-m", "-m: a command comes first, such as `python train.py`; available: "),
        ("--cfg", "--cfg: a command comes first"),
        ("a\nb", "a b: unknown command"),
        ("key=hf_abcdefghijklmnopqrstuvwxyz0123456789", "key=…: a command comes first"),
        ("hf_abcdefghijklmnopqrstuvwxyz0123456789", "[hidden]: unknown command"),
    ],
)
def test_an_unknown_command_is_answered_in_one_line(capsys, word: str, said: str):
    assert main([word, "more"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {said}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_given_the_words_behind_its_name(monkeypatch, name: str):
    given = []
    known = {name: ("", lambda argv: given.append(argv) or 7)}
    monkeypatch.setattr(program_main, "COMMANDS", known)
    monkeypatch.setattr(sys, "argv", ["dpo-lightning", name, "a", "-m"])
    assert main() == 7
    assert given == [["a", "-m"]]


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        (["train", "beta=none"], 2, "", "error: beta=none: must be a finite number"),
        (["train", "--cfg", "job", "-p", "sweep"], 0, "# @package sweep\n", ""),
        (["train", "--help"], 0, "  python -m dpo_lightning train model=llama beta=0.1\n", ""),
        (["inspect", "--help"], 0, "usage: python -m dpo_lightning inspect [--json]", ""),
        (["inspect", "bta=1"], 2, "", "error: bta: unknown key; did you mean `beta`?\n"),
        (["preflight", "--help"], 0, "usage: python -m dpo_lightning preflight [--gib N]", ""),
        (["preflight", "bta=1"], 2, "", "error: bta: unknown key; did you mean `beta`?\n"),
        (["report", "--help"], 0, "usage: python -m dpo_lightning report", ""),
        (["report", "none"], 2, "", "error: none: "),
        (
            *(["interpolate", "--help"], 0),
            *("usage: python -m dpo_lightning interpolate RUN [--betas B,B,…]", ""),
        ),
        (["interpolate"], 2, "", "error: no folder: name the folder of one run"),
        (["evaluate", "--help"], 0, "usage: python -m dpo_lightning evaluate RUN", ""),
        (["evaluate", "none"], 2, "", "error: run=none: no such folder"),
        (["evaluate", "--slice"], 2, "", "error: --slice: needs a value behind it"),
        (["compare", "--help"], 0, "usage: python -m dpo_lightning compare RUN RUN…", ""),
        (["compare", "none"], 2, "", "error: none: name two policies or more"),
        (["interpolate", "none"], 2, "", "error: run=none: no such folder"),
        (["judge", "--help"], 0, "usage: python -m dpo_lightning judge --answers FILE|RUN", ""),
        (["judge"], 2, "", "error: --answers is missing"),
        (["judge", "--answers", "none", "evaluation.judge=org/m"], 2, "", "error: --answers=none"),
        (["doctor", "--help"], 0, "usage: python -m dpo_lightning doctor [--json]", ""),
        (["doctor", "--jsn"], 2, "", "error: --jsn: `python -m dpo_lightning doctor` takes --json"),
    ],
)
def test_commands_answer_from_any_folder_without_torch(tmp_path, words, code, out, err):
    code_of = (
        "import sys; from dpo_lightning.__main__ import main; "
        f"sys.argv[0] = {str(PACKAGE / '__main__.py')!r}; code = main({words!r}); "
        "assert not {'torch', 'lightning', 'transformers'} & {*sys.modules}; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code_of],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert out in done.stdout
    assert done.stderr.startswith(err)
    assert err or not done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_package_is_a_command():
    command = [sys.executable, "-m", "dpo_lightning", "train", "beta=none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: beta=none: must be a finite number")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("argv0", "way", "train", "report"),
    [
        ("train.py", "clone", "python train.py", "python -m dpo_lightning report"),
        (str(ROOT / "train.py"), "clone", "python train.py", "python -m dpo_lightning report"),
        ("/usr/bin/dpo-lightning", "command", "dpo-lightning train", "dpo-lightning report"),
        (
            *(str(PACKAGE / "__main__.py"), "module"),
            *("python -m dpo_lightning train", "python -m dpo_lightning report"),
        ),
        (
            *(str(PACKAGE / "preflight.py"), "module"),
            *("python -m dpo_lightning train", "python -m dpo_lightning report"),
        ),
        ("", "clone", "python train.py", "python -m dpo_lightning report"),
    ],
)
def test_what_is_shown_for_typing_follows_how_it_was_started(
    monkeypatch, argv0: str, way: str, train: str, report: str
):
    monkeypatch.setattr(sys, "argv", [argv0, "beta=0.1"])
    assert started_as() == way
    assert (" ".join(typed()), " ".join(typed("report"))) == (train, report)
    assert own_words("python train.py beta=0.1 resume=auto") == f"{train} beta=0.1"
    # In a trial of a sweep it is how the sweep was started.
    monkeypatch.setenv(program.STARTED_AS, "command")
    assert " ".join(typed()) == "dpo-lightning train"
    monkeypatch.setenv(program.STARTED_AS, "something else")
    assert " ".join(typed()) == train


def test_without_a_clone_it_is_the_command(monkeypatch):
    monkeypatch.setattr(program, "IN_CLONE", False)
    monkeypatch.setattr(sys, "argv", ["train.py"])  # a user's own
    assert " ".join(typed()) == "dpo-lightning train"


def test_another_interpreter_imports_a_clone_whether_or_not_it_is_installed(monkeypatch, tmp_path):
    assert importing({}) == {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)}
    found = importing({"PYTHONPATH": "a", "X": "y"})
    assert found == {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}a", "X": "y"}
    assert importing(found) == found
    (tmp_path / "yaml.py").write_text("raise SystemExit('a file of the user was imported')")
    (tmp_path / "dpo_lightning").mkdir()
    code = [sys.executable, *program.RUN, "beta=none"]
    environment = importing({name: os.environ[name] for name in ("PATH", "HOME")})
    done = subprocess.run(code, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    monkeypatch.setattr(program, "SOURCE", None)
    assert importing({"PYTHONPATH": "a"}) == {"PYTHONSAFEPATH": "1", "PYTHONPATH": "a"}


def test_the_config_files_are_in_one_place():
    from dpo_lightning.settings.schema import CONF, IN_CLONE

    assert IN_CLONE
    assert (CONF, CONF.parent) == (ROOT / "conf", Path(ROOT))
    assert (CONF / "config.yaml").is_file()
