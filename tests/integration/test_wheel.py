"""The wheel in an environment that knows nothing of the clone: its commands, from any folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

import dpo_lightning
from tests.support.runs import ROOT, TINY, Run

# It builds, installs and starts half a dozen processes, each with its imports.
pytestmark = pytest.mark.slow

SHORT = (*TINY, "trainer.max_steps=2", "trainer.accelerator=cpu", "logger=none")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of somebody who has no clone, nor anything else of this process in mind."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def pip(*words: str | Path, cwd: Path) -> None:
    done = run(sys.executable, "-m", "pip", "--disable-pip-version-check", *words, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of a wheel, apart from the clone, into which building would write."""
    folder = tmp_path_factory.mktemp("sources")
    names = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"]
    names += ["CITATION.cff", "constraints.txt", "train.py"]
    for name in names:
        shutil.copy(ROOT / name, folder)
    for name in ("conf", "dpo_lightning", "hydra_plugins"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def builds_here() -> bool:
    """True if the setuptools of this environment knows all that pyproject.toml says."""
    return Version(version("setuptools")) >= Version("77")


@pytest.fixture(scope="module")
def wheel(sources: Path) -> Path:
    """Built by the setuptools of this environment; by pip's own where that is too old."""
    isolation = ["--no-build-isolation"] if builds_here() else []
    pip("wheel", "--no-deps", *isolation, "--wheel-dir", sources / "dist", sources, cwd=sources)
    [path] = (sources / "dist").glob("*.whl")
    return path


def fresh(folder: Path) -> list[str | Path]:
    """Arguments for pip to install into a new environment that has the libraries of the tests.

    Only the folders are added: a .pth file in them, such as that of the clone, is not read.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "libraries.pth").write_text("".join(f"{path}\n" for path in libraries))
    return ["--python", folder / "bin" / "python", "install", "--no-cache-dir"]


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel; what it depends on is found in that of the tests."""
    folder = tmp_path_factory.mktemp("fresh")
    into = [*fresh(folder), "--no-index"]
    pip(*into, "--no-deps", "--ignore-installed", wheel, cwd=folder)
    # Now with what it and two of its extras depend on, which is there as it is pinned.
    pinned = ["-c", ROOT / "constraints.txt"]
    pip(*into, *pinned, f"dpo-lightning[optuna,slurm] @ {wheel.as_uri()}", cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which there is nothing."""
    return tmp_path_factory.mktemp("place")


def test_the_wheel_has_all_that_is_not_code(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"dpo_lightning/{path.relative_to(ROOT).as_posix()}" in names
    for pattern in ("py.typed", "assets/tiny_llama/*", "**/templates/*", "**/*.py"):
        for path in (ROOT / "dpo_lightning").glob(pattern):
            assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "hydra_plugins").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    tops = {name.partition("/")[0] for name in names}
    assert {name for name in tops if "dist-info" not in name} == {"dpo_lightning", "hydra_plugins"}
    assert f"\nVersion: {dpo_lightning.__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert "\nProvides-Extra: sweeps\n" in text


def test_the_source_distribution_makes_the_same_wheel(sources, wheel, tmp_path):
    code = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    if not builds_here():
        pytest.skip("setuptools of this environment is too old to build with")
    done = run(sys.executable, "-c", code, tmp_path, cwd=sources)
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = [folder for folder in tmp_path.iterdir() if folder.is_dir()]
    assert (unpacked / "conf" / "config.yaml").is_file()
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, unpacked, cwd=tmp_path)
    [again] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())


def test_it_is_imported_from_the_wheel(bin_folder, place):
    code = (
        "import json, sys, dpo_lightning, hydra_plugins.dpo_lightning_ray as plugin;"
        "from dpo_lightning.settings.schema import CONF, IN_CLONE;"
        "files = [dpo_lightning.__file__, plugin.__file__, str(CONF)];"
        "print(json.dumps([sys.path, files, IN_CLONE]))"
    )
    done = run(bin_folder / "python", "-c", code, cwd=place)
    assert done.returncode == 0, done.stderr
    folders, files, in_clone = json.loads(done.stdout)
    assert [file for file in files if not file.startswith(str(bin_folder.parent))] == []
    assert not in_clone
    assert ROOT not in {(place / path).resolve() for path in folders}


def test_a_clone_is_installed_as_it_stands(sources, tmp_path, place):
    """Its config files stay where they are, and Hydra finds the launchers."""
    isolation = ["--no-build-isolation"] if builds_here() else []
    words = ["--no-deps", "--ignore-installed", *isolation, "--editable", sources]
    pip(*fresh(tmp_path / "env"), *words, cwd=tmp_path)
    command = tmp_path / "env" / "bin" / "dpo-lightning"
    (sources / "conf" / "experiment" / "new.yaml").write_text("# @package _global_\nbeta: 0.7\n")
    try:
        shown = run(command, "train", "--cfg", "job", "experiment=new", cwd=place)
    finally:
        (sources / "conf" / "experiment" / "new.yaml").unlink()
    assert shown.stdout.startswith("beta: 0.7\n"), shown.stderr
    program = [tmp_path / "env" / "bin" / "python", sources / "train.py"]
    launcher = ["--cfg", "hydra", "-p", "hydra.launcher", "hydra/launcher=slurm"]
    for start in ([command, "train"], program):
        found = run(*start, *launcher, cwd=place)
        assert "_target_: hydra_plugins.dpo_lightning_slurm.SlurmLauncher" in found.stdout


def test_settings_are_answered_without_torch(bin_folder, place):
    code = (
        "import sys; from dpo_lightning.__main__ import main; code = main(sys.argv[1:]);"
        "print({'torch', 'lightning', 'transformers'} & {*sys.modules}, file=sys.stderr)"
    )
    done = run(bin_folder / "python", "-c", code, "train", "--cfg", "job", cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "set()"
    assert done.stdout.startswith("beta: 0.1\n")
    command = bin_folder / "dpo-lightning"
    assert run(command, "--version", cwd=place).stdout.endswith(f"{dpo_lightning.__version__}\n")
    listed = run(command, cwd=place)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "dpo-lightning preflight" in listed.stdout
    assert "  dpo-lightning train -m beta=" in run(command, "train", "--help", cwd=place).stdout
    wrong = run(command, "trian", cwd=place)
    assert wrong.returncode == 2
    assert wrong.stderr == "error: trian: unknown command; did you mean `train`?\n"
    assert list(place.iterdir()) == []


@pytest.mark.long
def test_a_run_and_its_memory(bin_folder, tmp_path):
    """Files of one's own are found by --config-dir, and outputs/ is where one stands."""
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    mine = "# @package _global_\nbeta: 0.25\nname: mine\n"
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(mine)
    words = ["--config-dir", "own", "experiment=mine", *SHORT]
    done = run(bin_folder / "dpo-lightning", "train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    [folder] = (tmp_path / "outputs" / "runs").iterdir()
    assert folder.name.endswith("_mine")
    assert (Run(0, folder).result["status"], Run(0, folder).result["beta"]) == ("finished", 0.25)
    assert (folder / "model" / "model.safetensors").is_file()
    estimate = run(bin_folder / "dpo-lightning", "preflight", *words, cwd=tmp_path)
    assert estimate.returncode == 0, estimate.stderr
    assert "74,624 parameters" in estimate.stdout


@pytest.mark.long
def test_two_processes_of_one_run(bin_folder, tmp_path):
    words = ["strategy=ddp", "trainer.devices=2", "hydra.run.dir=run", *SHORT]
    done = run(bin_folder / "dpo-lightning", "train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Run(0, tmp_path / "run").result["status"] == "finished"


@pytest.mark.long
def test_a_sweep_and_its_report(bin_folder, tmp_path):
    # By this name Python would find it ahead of the library.
    (tmp_path / "datasets.py").write_text("raise SystemExit('a file of the user was imported')")
    words = ["-m", "beta=0.1,0.5", "hydra.sweep.dir=sweep", "hydra.launcher.devices=2", *SHORT]
    done = run(bin_folder / "dpo-lightning", "train", *words, cwd=tmp_path)
    logs = [path.read_text() for path in tmp_path.glob("sweep/*/trial.log")]
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *logs])
    trials = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"]
    assert [(trial["beta"], trial["status"]) for trial in trials] == [
        (0.1, "finished"),
        (0.5, "finished"),
    ]
    assert trials[0]["command"].startswith("dpo-lightning train beta=0.1 ")
    page = (tmp_path / "sweep" / "report.md").read_text()
    assert "dpo-lightning report " in page
    assert "train.py" not in page + (tmp_path / "sweep" / "report.html").read_text()
    (tmp_path / "sweep" / "report.html").unlink()
    again = run(bin_folder / "dpo-lightning", "report", "sweep", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert re.search(r"^report +sweep/report\.html$", again.stdout, flags=re.M)


@pytest.mark.long
def test_from_python(bin_folder, tmp_path):
    code = (
        "from dpo_lightning.api import load, train\n"
        f"result = train([*{SHORT!r}, 'hydra.run.dir=run'])\n"
        "policy, tokenizer = load(result.folder)\n"
        "print(result.status, sum(p.numel() for p in policy.parameters()))\n"
    )
    done = run(bin_folder / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "finished 74624"
