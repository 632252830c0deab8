"""The form of the project: pins, import directions, what starts without torch, the README."""

import ast
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import dpo_lightning
from dpo_lightning.preflight import GRAMMAR
from dpo_lightning.run.inspect.command import read_asked
from dpo_lightning.run.words import read_words
from tests.support.pages import check_command_of_page
from tests.support.runs import ROOT

PACKAGE = ROOT / "dpo_lightning"


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_are_exact_unhashed_and_for_every_machine():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line), line
    names = {canonical(name) for name in pins()}
    assert not [name for name in names if re.match(r"(nvidia|cuda|triton)", name)]
    assert "dpo-lightning" not in names
    assert pins()["torch"] == "2.13.0"


def test_every_direct_dependency_is_pinned():
    extras = project()["optional-dependencies"].values()
    wanted = [*project()["dependencies"], *itertools.chain(*extras)]
    names = {canonical(re.match(r"[A-Za-z0-9._-]+", line).group()) for line in wanted}
    assert names <= {canonical(name) for name in pins()}


# Below these, or in these, others were harmed: code from outside ran, or the package was an attack.
FLOORS = {
    "lightning": "2.6.6",  # CVE-2026-58659; 2.6.2 and 2.6.3 stole credentials when imported
    "pytorch-lightning": "2.6.6",
    "transformers": "5.3",  # CVE-2026-4372
    "torch": "2.10",  # GHSA-63cw-57p8-fm3p; the range begins above it
    "hydra-core": "1.3.8",  # CVE-2026-106439
}


@pytest.mark.parametrize("name", FLOORS)
def test_pins_and_ranges_are_above_what_is_known_to_be_unsafe(name: str):
    floor = Version(FLOORS[name])
    assert Version(pins()[name]) >= floor
    ranges = {r.name: r.specifier for r in map(Requirement, project()["dependencies"])}
    if name in ranges:
        below = [f"{floor.major}.{floor.minor}.{n}" for n in range(floor.micro)]
        below += [f"{floor.major}.{n}" for n in range(floor.minor)] + ["0.1"]
        assert [version for version in below if version in ranges[name]] == []
        assert str(floor) in ranges[name] or name in ("transformers", "torch")


def test_torch_is_new_enough_for_the_kernel_that_attention_calls():
    """The ``varlen_attn`` of before has no ``enable_gqa``."""
    [torch] = [r for r in map(Requirement, project()["dependencies"]) if r.name == "torch"]
    assert not [version for version in ("2.10.0", "2.12.0", "2.12.9") if version in torch.specifier]
    assert pins()["torch"] in torch.specifier


def imports(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def modules(pattern: str):
    found = sorted(PACKAGE.glob(pattern))
    assert found, pattern
    return found


def test_objectives_import_torch_alone():
    standard = set(sys.stdlib_module_names)
    for path in modules("objectives/*.py"):
        assert top(imports(path)) - standard <= {"torch", "dpo_lightning"}, path


@pytest.mark.parametrize(
    ("package", "places"),
    [
        ("lightning", {"data/datamodule.py", "tracking/*", "training/*", "evaluation/*", "run/*"}),
        ("hydra", {"settings/*", "sweeps/launch.py", "sweeps/launcher.py", "cli.py"}),
        ("omegaconf", {"settings/*", "sweeps/launch.py", "sweeps/launcher.py", "cli.py"}),
        ("wandb", {"tracking/wandb_runs.py"}),
        ("mlflow", {"tracking/mlflow_runs.py"}),
        ("submitit", {"sweeps/places/slurm_jobs.py"}),
    ],
)
def test_libraries_stay_in_their_places(package: str, places: set[str]):
    users = [
        path.relative_to(PACKAGE).as_posix()
        for path in modules("**/*.py")
        if package in top(imports(path))
    ]
    assert users
    assert [user for user in users if not any(fnmatch(user, place) for place in places)] == []


def test_only_loading_calls_from_pretrained():
    callers = {
        str(path.relative_to(PACKAGE))
        for path in modules("**/*.py")
        if any(
            isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained"
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert callers <= {"models/loading.py", "assets/make_tiny_llama.py"}


def test_the_package_imports_nothing_heavy():
    code = (
        "import sys, dpo_lightning.cli, dpo_lightning.run.supervise, dpo_lightning.sweeps.launch;"
        "import dpo_lightning.sweeps.finish, dpo_lightning.sweeps.report.write;"
        "import hydra_plugins.dpo_lightning_slurm, hydra_plugins.dpo_lightning_ray;"
        "print([m for m in ('torch', 'lightning', 'transformers', 'wandb', 'datasets', 'submitit',"
        " 'ray') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_extra_that_is_named_is_there():
    """In messages, pages and settings; ``require_extra`` puts its own into a message."""
    extras = set(project()["optional-dependencies"])
    files = [*PACKAGE.rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    files += [ROOT / "Makefile", *ROOT.glob("conf/**/*.yaml"), *ROOT.glob("benchmarks/*.*")]
    named = set()
    for path in files:
        text = path.read_bytes().decode(errors="replace")
        for found in re.findall(r"dpo-lightning\[([^\]{}]+)\]", text):
            named |= {canonical(extra.strip()) for extra in found.split(",")}
        for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require_extra":
                named.add(node.args[1].value)
    assert {"qlora", "ray", "slurm", "optuna", "sweeps"} <= named
    assert named <= extras


def test_the_extra_of_sweeps_has_what_the_others_have():
    extras = project()["optional-dependencies"]
    assert sorted(extras["sweeps"]) == sorted(extras["optuna"] + extras["ray"] + extras["slurm"])


def test_the_version_has_one_place():
    assert project()["dynamic"] == ["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dpo_lightning.__version__
    assert citation["license"] == project()["license"]


def test_hooks_before_a_commit_take_the_tools_of_the_environment():
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in hooks.values()} == {"system"}
    assert {hook["entry"].split()[0] for hook in hooks.values()} == {"ruff"}


STARTS = ("python train.py", "make train", "dpo-lightning ", "python -m dpo_lightning")
"""How a line of a page begins that starts our program."""

OTHERS = (
    *("report", "doctor", "interpolate", "evaluate", "compare", "judge", "generate", "chat"),
    *("export", "push", "--help"),
)
"""Commands that take no settings of a run; their own tests run them."""

PAGES = (
    *("docs/scaling.md", "docs/memory.md", "docs/data.md", "docs/frontier.md"),
    *("docs/evaluate.md", "docs/judges.md", "docs/loggers.md", "docs/sharing.md"),
    *("docs/running.md", "docs/embedded_task.md", "docs/tutorial.md"),
    *("docs/gpus.md", "docs/slurm_and_ray.md"),
    *(f"docs/coming_from/{name}.md" for name in ("trl", "original")),
    *(f"docs/coming_from/{name}.md" for name in ("llama_factory", "alignment_handbook")),
    *("docs/selection.md", "docs/answers.md", "docs/python.md", "docs/troubleshooting.md"),
)


def readme_commands(page: str = "README.md") -> list[str]:
    """The lines of the shell blocks of a page that start our program."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith(STARTS)]


@pytest.mark.docs
@pytest.mark.parametrize(
    "command",
    [line for page in ("README.md", *PAGES) for line in readme_commands(page)],
)
def test_every_command_of_the_readme_composes_and_validates(command: str, tmp_path, monkeypatch):
    command = command.partition("#")[0]
    words = shlex.split(command.replace("python -m dpo_lightning ", "dpo-lightning "))
    if words[0] == "make":
        [arguments] = [w.removeprefix("ARGS=") for w in words if w.startswith("ARGS=")] or [""]
        words = shlex.split(arguments)
    elif words[0] == "dpo-lightning" and words[1] in OTHERS:
        return  # other tests run them
    else:
        assert words[0] == "python" or words[1] in ("train", "preflight", "inspect")
        command, words = words[1], words[2:]
        if command == "inspect":
            words = [*read_asked(words).settings]
        elif command == "preflight":
            words = [*read_words(words, GRAMMAR).settings]
    check_command_of_page(words, tmp_path, monkeypatch)


@pytest.mark.docs
@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "experiment").glob("*.yaml")))
def test_every_experiment_composes_and_validates(path, tmp_path, monkeypatch):
    # The first one is a template for rows that the user names.
    rows = ["data.train=pairs.jsonl"] if path.stem == "preferences" else []
    check_command_of_page([f"experiment={path.stem}", *rows], tmp_path, monkeypatch)


def test_the_sweep_for_agents_names_settings_and_passes_them_without_dashes(tmp_path, monkeypatch):
    sweep = yaml.safe_load((ROOT / "examples" / "wandb_beta.yaml").read_text())
    # The installed package, so that an agent needs no clone.
    assert sweep["program"] == dpo_lightning.__name__
    assert sweep["command"][1:] == [
        "${interpreter}",
        "-m",
        "${program}",
        "train",
        "${args_no_hyphens}",
    ]
    assert "margins" not in sweep["metric"]["name"]
    words = [f"{key}={spec['values'][0]}" for key, spec in sweep["parameters"].items()]
    check_command_of_page(words, tmp_path, monkeypatch)


def test_the_readme_names_commands():
    assert len(readme_commands()) >= 8
    assert len(readme_commands("docs/scaling.md")) >= 8
    assert len(readme_commands("docs/memory.md")) == 4
    assert len(readme_commands("docs/data.md")) == 14
    assert len(readme_commands("docs/frontier.md")) == 4
    assert len(readme_commands("docs/judges.md")) == 6
    assert len(readme_commands("docs/answers.md")) >= 8
    assert len(readme_commands("docs/python.md")) == 1
    assert len(readme_commands("docs/troubleshooting.md")) == 3
